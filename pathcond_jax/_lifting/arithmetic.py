"""The arithmetic of lifted values: products, sums, and what pulls derivatives back through them.

Functions of arrays with static options, so that outside of ``jit`` equal ones compile once.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pathcond_jax._lifting.values import Call, Kind, call
from pathcond_jax._spec import extended_range
from pathcond_jax._spec.extended_range import Scaled

powered = jax.jit(extended_range.powered, static_argnums=(1, 2, 3))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def forward(linear: Call, normalize: bool, keep_zero: bool, powers: Any, extra: Any) -> Scaled:
    mantissa = linear(*(power.mantissa for power in powers), *extra)
    exponent = sum((power.exponent for power in powers[1:]), powers[0].exponent)
    if normalize:
        return extended_range.normalized(mantissa, exponent, keep_zero)
    return Scaled(mantissa, exponent)


@functools.partial(jax.jit, static_argnums=0)
def summed(linear: Call, powers: Sequence[Scaled], extra: Any) -> Scaled:
    mantissas, exponent = extended_range.aligned(powers)
    return Scaled(linear(*mantissas, *extra), exponent)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def pulled(
    linear: Call,
    kind: Kind,
    wanted: tuple[bool, ...],
    normalize: tuple[bool, ...],
    keep_zero: bool,
    powers: Sequence[Scaled],
    extra: Any,
    found: Sequence[Scaled],
) -> list[Scaled]:
    """The derivatives by the inputs ``wanted`` of a record, from those by its outputs."""
    sums = kind is Kind.SUM
    mantissas = extended_range.aligned(powers)[0] if sums else [power.mantissa for power in powers]
    chosen = [k for k, flag in enumerate(wanted) if flag]

    def of_wanted(*values: jax.Array) -> Any:
        full = list(mantissas)
        for k, value in zip(chosen, values, strict=True):
            full[k] = value
        return linear(*full, *extra)

    out, pull = jax.vjp(of_wanted, *(mantissas[k] for k in chosen))
    adjoints, exponent = extended_range.aligned(found)
    parts = []
    for k, part in zip(
        chosen, pull(adjoints if isinstance(out, list) else adjoints[0]), strict=True
    ):
        others = [power.exponent for j, power in enumerate(powers) if j != k]
        total = sum(others, exponent) if kind is Kind.PRODUCT else exponent
        made = (
            extended_range.normalized(part, total, keep_zero)
            if normalize[k]
            else Scaled(part, total)
        )
        parts.append(made)
    return parts


# Functions linear in their arrays; calls of them with equal options compile once.


def same_value(x: jax.Array) -> jax.Array:
    """The array itself."""
    return x


def add_all(*parts: jax.Array) -> jax.Array:
    """The sum of arrays of one shape."""
    return functools.reduce(jnp.add, parts)


def sum_all(*parts: jax.Array) -> jax.Array:
    return functools.reduce(jnp.add, [part.sum() for part in parts])


def weighted_sum(*parts: jax.Array) -> jax.Array:
    values, weights = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    return functools.reduce(jnp.add, [x * w for x, w in zip(values, weights, strict=True)])


SAME = call(same_value)
