"""A preconditioner that solves for whole groups of neurons at once, beside the diagonal.

Rounding hardly notices when all neurons of a layer take one scale: along such directions the
Hessian of quantization noise is smaller than its diagonal by orders of magnitude, and conjugate
gradients preconditioned by the diagonal alone take hundreds of steps to find out. Within the span
of these directions the Hessian is a small matrix, which is inverted.

References:
  Nicolaides, *Deflation of conjugate gradients with applications to boundary value problems*, SIAM
  Journal on Numerical Analysis, 1987.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# At most so many directions: neighboring groups share one where there are more.
DIRECTIONS = 64
# Of the diagonal of the small matrix, what is added to it: directions may depend on each other.
RIDGE = 1e-4

Apply = Callable[[jax.Array], jax.Array]


def directions(sizes: tuple[int, ...]) -> np.ndarray:
    """The direction that each neuron belongs to, (H,), from the sizes of the groups."""
    count = min(len(sizes), DIRECTIONS)
    return np.repeat(np.arange(len(sizes)) * count // len(sizes), sizes).astype(np.int32)


def unknown(owners: np.ndarray, dtype: jnp.dtype) -> jax.Array:
    """In place of the inverse of the small matrix: with it, only the diagonal counts."""
    count = int(owners.max()) + 1
    return jnp.zeros((count, count), dtype)


def inverse(apply: Apply, owners: np.ndarray, free: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """That of a matrix within the span of the directions.

    Args:
      apply: products with the matrix.
      owners: (H,), of :func:`directions`.
      free: (H,), the neurons that may move.
      dtype: of the matrix.

    Returns:
      (directions, directions).
    """
    count = int(owners.max()) + 1
    shifts = jnp.asarray(owners[None] == np.arange(count)[:, None]) & free[None]
    images = jax.vmap(apply)(shifts.astype(dtype))
    small = jnp.where(shifts[:, None], images[None], 0).sum(-1)
    size = jnp.diagonal(small)
    scale = jnp.where(size > 0, 1 / jnp.sqrt(jnp.where(size > 0, size, 1)), 0)
    # A direction without a free neuron has nothing but the ridge.
    ridge = jnp.diag(jnp.where(size > 0, RIDGE, 1).astype(small.dtype))
    scaled = scale[:, None] * (small + small.T) / 2 * scale[None]
    return scale[:, None] * jnp.linalg.inv(scaled + ridge) * scale[None]


def preconditioner(
    diagonal: jax.Array, small: jax.Array, owners: np.ndarray, free: jax.Array
) -> Apply:
    """The inverse of the diagonal plus, within the span of the directions, that of the matrix.

    Args:
      diagonal: (H,), of the matrix, nearly.
      small: what :func:`inverse` returned, here or at a point nearby.
      owners: (H,), of :func:`directions`.
      free: (H,), the neurons that may move.
    """

    def precondition(residual: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(jnp.where(free, residual, 0), owners, small.shape[0])
        return residual / diagonal + jnp.where(free, (small @ sums)[owners], 0)

    return precondition
