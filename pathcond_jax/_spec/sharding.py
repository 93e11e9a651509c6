"""What arrays that are divided among devices need: explicit axes, uneven parts of segments."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pathcond_jax._spec.types import PyTree


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


def segment_sum(values: jax.Array, segments: np.ndarray | jax.Array, count: int) -> jax.Array:
    """``jax.ops.segment_sum``, right also where devices hold unequal numbers of values.

    Args:
      values: ``(n, ...)``.
      segments: integer ``(n,)``, each below ``count``.
      count: the number of segments.

    Returns:
      ``(count, ...)``.
    """
    return _of_one_more(jax.ops.segment_sum, values, segments, count)


def segment_max(values: jax.Array, segments: np.ndarray | jax.Array, count: int) -> jax.Array:
    """``jax.ops.segment_max`` under the conditions of :func:`segment_sum`."""
    return _of_one_more(jax.ops.segment_max, values, segments, count)


def _of_one_more(
    operation: Callable[..., jax.Array],
    values: jax.Array,
    segments: np.ndarray | jax.Array,
    count: int,
) -> jax.Array:
    # XLA makes the parts equal by appending anything to the values and 0 to their segments, so
    # segment 0 must be nobody's.
    return operation(values, segments + 1, count + 1)[1:]
