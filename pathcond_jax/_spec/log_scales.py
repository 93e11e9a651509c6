"""Log-scales, the unknowns of everything here: one array per group, or one flat vector."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._spec.arrays import looked_up

LogScales = tuple[jax.Array, ...]
"""z, one array ``(group.size,)`` per group of a spec, in its order; the scales are λ = e^z."""


def concatenated(log_scales: Sequence[Any], dtype: Any) -> jax.Array:
    """The log-scales of all neurons, (H,)."""
    return jnp.concatenate([jnp.asarray(part).astype(dtype) for part in log_scales])


def by_group(values: jax.Array, sizes: Sequence[int]) -> LogScales:
    """The inverse of :func:`concatenated`.

    Args:
      values: one number per neuron, (H,).
      sizes: the size of each group.

    Returns:
      One array per group.
    """
    starts = np.cumsum([0, *sizes], dtype=int)
    return tuple(looked_up(values, int(k), size) for k, size in zip(starts, sizes, strict=False))
