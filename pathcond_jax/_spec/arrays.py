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

    Outside of ``jit``, parts of one size share what is compiled. So they do within: XLA compiles
    equal kernels once, and a start that it knows would make each part, and what reads it, a kernel
    of its own. Hence positions in an array, which stays outside of the kernels, and a product with
    1, which is neither an array of one number nor joined with what reads it.
    """
    if not is_traced(array):
        return lax.dynamic_slice_in_dim(array, np.int32(start), size)
    here = np.arange(start, start + size, dtype=np.int32)
    return _products(array, np.stack([here, np.full_like(here, array.shape[0])], 1))


def entries_of(array: jax.Array) -> list[jax.Array]:
    """The entries of a vector, as scalars.

    Outside of ``jit`` they share what is compiled, whatever their number.
    """
    if is_traced(array):
        return list(array)
    return [lax.dynamic_index_in_dim(array, np.int32(k), keepdims=False) for k in range(array.size)]


@jax.jit
def _products(array: jax.Array, positions: jax.Array) -> jax.Array:
    """For each row of positions the product of what is there; 1 is behind the end."""
    extended = jnp.append(array, jnp.ones((1,), array.dtype))
    return extended.at[positions].get(mode="promise_in_bounds").prod(1)
