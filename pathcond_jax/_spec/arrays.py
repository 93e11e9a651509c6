"""Questions about arrays that every analysis asks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def is_traced(value: Any) -> bool:
    """Whether a transformation of JAX is tracing the value, so that it is not known yet."""
    return isinstance(value, jax.core.Tracer)


def compute_dtype(*dtypes: Any) -> Any:
    """The dtype to compute on values of these dtypes in: the widest float, at least float32."""
    # jnp.promote_types refuses mixed floats where the user has asked for strict promotion.
    floats = [jnp.dtype(d) for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return max([jnp.dtype(jnp.float32), *floats], key=lambda d: jnp.finfo(d).bits)


def widened(value: Any) -> jax.Array:
    """A floating array in the dtype that is computed in: float32 at least."""
    value = jnp.asarray(value)
    return value.astype(compute_dtype(value.dtype))


def part_of(array: jax.Array, start: int, size: int) -> jax.Array:
    """``array[start : start + size]`` of a vector.

    Outside of ``jit``, parts of one size share what is compiled. Within, devices that divide the
    vector are told where the part begins.
    """
    if is_traced(array):
        return lax.slice_in_dim(array, start, start + size)
    return lax.dynamic_slice_in_dim(array, np.int32(start), size)
