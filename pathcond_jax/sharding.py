"""Meshes with explicit axes, in which the types of arrays say how they are sharded."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pathcond_jax.spec import PyTree


def automatic(
    function: Callable[[PyTree], tuple[PyTree, Any]], params: PyTree
) -> tuple[PyTree, Any]:
    """``function(params)``, its inside left to the compiler to shard.

    Args:
      function: maps parameters to arrays of their shapes, and to arrays of any other shapes.
      params: the parameters.

    Returns:
      What ``function`` returns. If the mesh of the parameters has explicit axes, the first output
      is sharded as they are, and the second is on every device.
    """
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, params)
    meshes = [s.mesh for s in jax.tree.leaves(shardings) if AxisType.Explicit in s.mesh.axis_types]
    if not meshes:
        return function(params)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    everywhere = NamedSharding(meshes[0], PartitionSpec())
    _, rest = jax.eval_shape(function, structs)
    out = (
        jax.tree.map(lambda s: s if s.mesh == meshes[0] else everywhere, shardings),
        jax.tree.map(lambda _: everywhere, rest),
    )
    return jax.sharding.auto_axes(function, out_sharding=out)(params)
