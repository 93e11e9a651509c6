"""JAX's primitives by name."""

import functools
from typing import Any

import jax
import numpy as np
from jax.extend.core import primitives as jex_primitives


def primitive(name: str) -> Any:
    """The JAX primitive called ``name``, or None if this version of JAX has none."""
    return _by_tracing().get(name, getattr(jex_primitives, name + "_p", None))


@functools.cache
def _by_tracing() -> dict[str, Any]:
    """Primitives that ``jax.extend`` does not export, taken from programs that use them."""
    # An array would start the backend at import, before jax.distributed.initialize.
    x = jax.ShapeDtypeStruct((2,), np.float32)
    programs = (
        lambda x: jax.lax.split(x, (1, 1)),
        jax.jit(lambda x: x + 1),
        lambda x: jax.lax.optimization_barrier(x),
        lambda x: jax.lax.clamp(x, x, x),
        lambda x: jax.lax.square(x),
        jax.lax.stop_gradient,
        jax.checkpoint(lambda x: x + 1),
    )
    found = {}
    for program in programs:
        for eqn in jax.make_jaxpr(program)(x).jaxpr.eqns:
            found[eqn.primitive.name] = eqn.primitive
    return found
