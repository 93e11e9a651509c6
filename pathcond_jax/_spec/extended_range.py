"""Nonnegative arrays with one exponent: float32 mantissas for numbers of any magnitude."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._spec.arrays import compute_dtype, each_in_one
from pathcond_jax._spec.types import PyTree

# The exponent of an array of zeros: below all others, and far from the end of int32.
ZERO = -(1 << 20)


class Scaled(NamedTuple):
    """``mantissa · 2^exponent``, with one int32 ``exponent`` for the whole array."""

    mantissa: jax.Array
    exponent: jax.Array


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """2^exponent, 0 below the normal numbers and inf above them."""
    # Neither exp2 nor ldexp promises a result without rounding.
    info, integer = _format(dtype)
    lowest, highest = np.int32(info.minexp - 1), np.int32(info.maxexp)
    clipped = lax.clamp(lowest, exponent, highest).astype(integer)
    bits = lax.shift_left(lax.add(clipped, integer(1 - info.minexp)), integer(info.nmant))
    return lax.bitcast_convert_type(bits, dtype)


def times_power_of_two(value: jax.Array, exponent: jax.Array) -> jax.Array:
    """The product ``value · 2^exponent``, also where the power leaves the range of the dtype."""
    # In two steps, of which neither is 0 or inf: a value of 0 stays 0.
    info = jnp.finfo(value.dtype)
    half = lax.shift_right_arithmetic(exponent, np.int32(1))
    for part in (half, exponent - half):
        normal = lax.clamp(np.int32(info.minexp), part, np.int32(info.maxexp - 1))
        value = value * power_of_two(normal, value.dtype)
    return value


def exponent_of(value: jax.Array) -> jax.Array:
    """floor(log2) of positive numbers, ``ZERO`` for 0; int32."""
    info, integer = _format(value.dtype)
    bits = lax.bitcast_convert_type(lax.stop_gradient(value), integer)
    biased = lax.shift_right_arithmetic(bits, integer(info.nmant))
    exponent = lax.sub(biased, integer(1 - info.minexp))
    return jnp.where(value > 0, exponent.astype(jnp.int32), np.int32(ZERO))


def normalized(mantissa: jax.Array, exponent: jax.Array, keep_zero: bool = False) -> Scaled:
    """The same number with its largest entry in [1, 2).

    Args:
      mantissa: nonnegative array.
      exponent: int32 scalar.
      keep_zero: an array of zeros keeps its exponent, which is that of its derivatives, instead
        of the exponent ``ZERO``.
    """
    if not mantissa.size:
        return Scaled(mantissa, exponent)
    own = exponent_of(mantissa.max())
    top = computed_once(jnp.where(own > ZERO, own + exponent, np.int32(ZERO)))
    if keep_zero:
        top = jnp.where(top > ZERO, top, exponent)
    # 2^(exponent − ZERO) is inf, and 0 · inf is NaN.
    shift = jnp.where(top > ZERO, exponent - top, 0)
    return Scaled(mantissa * power_of_two(shift, mantissa.dtype), top)


def largest(values: Sequence[jax.Array]) -> jax.Array:
    """The largest absolute value of each array, 0 of one without entries; NaN where one is.

    Returns:
      ``(len(values),)`` in the dtype to compute in.
    """
    dtype = compute_dtype(*(value.dtype for value in values))
    return each_in_one(_top_as, [(value,) for value in values], [(dtype,)] * len(values))


def _top_as(value: jax.Array, dtype: Any) -> jax.Array:
    return _top(value).astype(dtype) if value.size else jnp.zeros((), dtype)


@jax.jit
def _top(value: jax.Array) -> jax.Array:
    # An absolute value would be written to memory, of the size of the array.
    return jnp.maximum(value.max(), -value.min())


def aligned(parts: Sequence[Scaled]) -> tuple[list[jax.Array], jax.Array]:
    """Mantissas over one exponent, the largest."""
    if len(parts) == 1:
        return [parts[0].mantissa], parts[0].exponent
    exponents = [part.exponent for part in parts]
    top = exponents[0]
    for exponent in exponents[1:]:
        top = jnp.maximum(top, exponent)
    return [
        part.mantissa * power_of_two(part.exponent - top, part.mantissa.dtype) for part in parts
    ], top


def powered(value: jax.Array, order: int, dtype: Any, keep_zero: bool = False) -> Scaled:
    """|value|^order."""
    size = abs(value.astype(dtype))
    if not size.size:
        return Scaled(size, jnp.zeros((), jnp.int32))
    # As :func:`largest` has it: where both are asked for, XLA computes it once.
    top = exponent_of(_top(value.astype(dtype)))
    known = jnp.where(top > ZERO, top, 0)
    mantissa = times_power_of_two(size, -known) ** order
    return Scaled(mantissa, known * order if keep_zero else jnp.where(top > ZERO, top * order, top))


def computed_once(values: jax.Array) -> jax.Array:
    """The same values, out of XLA's sight.

    XLA repeats what is cheap in every kernel that reads it: chains of scalars, so that compile
    time would be quadratic in depth, and vectors that all leaves read. It does not repeat a
    reduction, and removes a barrier before it looks. NaN stays NaN.
    """
    integer = jnp.issubdtype(values.dtype, jnp.integer)
    lowest = jnp.asarray(ZERO if integer else -jnp.inf, values.dtype)
    return jnp.where(np.array([True, False]), values[..., None], lowest).max(-1)


def _format(dtype: Any) -> tuple[Any, Any]:
    info = jnp.finfo(dtype)
    return info, np.int64 if info.bits == 64 else np.int32


class ScaledDiagonal(NamedTuple):
    """A nonnegative parameter-shaped tree that may exceed the range of its dtype.

    The values are ``mantissa · 2^exponent``.

    Attributes:
      mantissa: pytree like the parameters.
      exponent: the same pytree with one int32 scalar per leaf.
    """

    mantissa: PyTree
    exponent: PyTree

    @property
    def log_scale(self) -> PyTree:
        """The natural logarithms of the factors 2^exponent, in the mantissas' dtypes."""
        return jax.tree.map(lambda m, e: log_of(e, m.dtype), self.mantissa, self.exponent)

    def logs(self, dtype: Any) -> jax.Array:
        """The same of all leaves in one array, (leaves,)."""
        return log_of(jnp.stack(jax.tree.leaves(self.exponent)), dtype)


def log_of(exponent: jax.Array, dtype: Any) -> jax.Array:
    return exponent.astype(dtype) * np.log(2.0).astype(dtype)
