"""Whether parameters are where the last due update announced: a few entries of each, compared.

An element of a chain sees what it emits and not what becomes of it. Conditioning is right only if
the update arrives as it is: scaled or clipped, it changes the network's function. The next call
sees where the parameters are, and a few remembered entries tell.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pathcond_jax._spec.sharding import automatic
from pathcond_jax._spec.types import Leaf

# How far parameters may be from the announced ones by rounding, relative to their size.
_ROUNDING = 2.0**-12
_PER_AXIS = 2


def num_remembered(leaves: Sequence[Leaf]) -> int:
    """How many entries of these leaves are remembered."""
    return sum(math.prod(min(n, _PER_AXIS) for n in leaf.shape) for leaf in leaves)


def corners(values: Sequence[Any]) -> list[jax.Array]:
    """The first two entries of each array along each axis, flat."""

    def cut(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        return leaves, [leaf[(slice(0, _PER_AXIS),) * leaf.ndim].ravel() for leaf in leaves]

    return automatic(cut, [jnp.asarray(value) for value in values])[1]


def joined(parts: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """What is remembered, ``(num_remembered,)``."""
    return jnp.concatenate([part.astype(dtype) for part in parts])


def differ(announced: jax.Array, here: jax.Array) -> jax.Array:
    """Whether any entry is another one than announced, by more than rounding."""
    size = jnp.maximum(abs(here), abs(announced))
    near = abs(here - announced) <= _ROUNDING * size
    # An update that is not finite is passed on as it is; it announces nothing.
    return (~near & jnp.isfinite(announced)).any()


ALTERED_BY = {
    "recondition": "recondition must be the last element of the chain, as in optax.chain("
    "optax.sgd(...), pathcond.recondition(...)), and nothing else may change what it emits",
    "reconditioned": "wrap the whole chain, as in pathcond.reconditioned(optax.chain(...), ...), "
    "and let nothing else change what it emits",
}
