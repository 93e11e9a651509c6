"""The group action on parameters, and on anything of their shapes."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._solve.solution import Solution, log_scales_of
from pathcond_jax._spec.arrays import compute_dtype, widened
from pathcond_jax._spec.extended_range import computed_once, times_power_of_two
from pathcond_jax._spec.log_scales import LogScales as LogScales
from pathcond_jax._spec.log_scales import by_group, concatenated
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import Incidence, PyTree, SpecError


def rescale(
    params: PyTree, spec: ArchSpec, log_scales: LogScales | Solution, *, power: int = 1
) -> PyTree:
    """The group action: incoming entries × e^z, outgoing entries ÷ e^z.

    Entries that take a power q of their neuron's scale (``Incidence.power``) are multiplied or
    divided by e^{qz}. The network's function does not change. In floating point it does by
    rounding; with scales that are powers of two (``round_to_powers_of_two``) not at all, as far as
    the powers are integers.

    Args:
      params: the parameters the spec was built for, or anything of their shapes.
      spec: the architecture.
      log_scales: one array ``(group.size,)`` per group of the spec; or a solution, for its.
      power: 1 for parameters and tangents (updates, averages), -1 for gradients and their first
        moments, -2 for second moments: each entry is multiplied by its factor to this power.

    Returns:
      A pytree like ``params``, dtypes kept; leaves that no neuron meets are passed through.

    Raises:
      SpecError: ``params`` or ``log_scales`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.ones((1, 2))}, "b": {"w": jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> scaled = pathcond.rescale(params, spec, (jnp.log(jnp.array([2.0, 4.0])),))
      >>> scaled["a"]["w"].tolist(), scaled["b"]["w"].tolist()
      ([[2.0, 4.0]], [[0.5], [0.25]])
    """
    rescaled = functools.partial(_rescaled, spec=spec.symmetry, power=power)
    return _with_rescaled(params, spec, log_scales, rescaled)


def rescale_unless(
    keep: jax.Array, params: PyTree, spec: ArchSpec, log_scales: LogScales
) -> PyTree:
    """What :func:`rescale` returns, or ``params`` bit for bit where ``keep``."""
    # Multiplying by 1 may flush subnormal numbers and rewrite NaNs.
    rescaled = functools.partial(_rescaled_unless, keep, spec=spec.symmetry)
    return _with_rescaled(params, spec, log_scales, rescaled)


def rescale_buffers(
    buffers: Sequence[tuple[jax.Array, int, int]], spec: ArchSpec, log_scales: LogScales
) -> list[jax.Array]:
    """Arrays of the shapes of some leaves, each times its leaf's factor to a power.

    Args:
      buffers: ``(array, position in spec.leaves, power)``.
      spec: the architecture.
      log_scales: one array ``(group.size,)`` per group of the spec.

    Returns:
      The arrays, dtypes kept.
    """
    checked = _checked(log_scales, spec)
    factors_of = {power: _by_path(checked, spec, power) for power in {p for _, _, p in buffers}}
    rescaled = []
    for value, position, power in buffers:
        factors = factors_of[power].get(spec.leaves[position].path)
        rescaled.append(_multiplied(value, factors) if factors else value)
    return rescaled


def round_to_powers_of_two(log_scales: LogScales) -> LogScales:
    """The nearest log-scales whose λ are powers of two, for which rescaling is exact.

    (As long as entries take integer powers of their scales, which they do where they can.)

    Args:
      log_scales: one array per group.

    Returns:
      The same, each entry a multiple of log 2.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> (z,) = pathcond.round_to_powers_of_two((jnp.array([0.0, 0.6, -1.5]),))
      >>> jnp.round(z / jnp.log(2.0)).tolist()
      [0.0, 1.0, -2.0]
    """
    return tuple(_nearest_power(z)[1] for z in map(_as_log_scales, log_scales))


class _Factor(NamedTuple):
    """``first · second``, nearly equal: opposite factors meet before either can overflow."""

    first: jax.Array
    second: jax.Array


def _with_rescaled(
    params: PyTree,
    spec: ArchSpec,
    log_scales: LogScales | Solution,
    rescaled: Callable[[list[jax.Array], list[jax.Array]], list[jax.Array]],
) -> PyTree:
    """The parameters with those leaves replaced that neurons meet; the others are passed on."""
    values = match_leaves(spec, params)
    checked = _checked(log_scales, spec)
    positions = [k for k, leaf in enumerate(spec.leaves) if leaf.path in spec.rescaled_paths]
    replaced = rescaled([values[k] for k in positions], checked)
    for k, value in zip(positions, replaced, strict=True):
        values[k] = value
    return jax.tree.unflatten(spec.treedef, values)


@functools.partial(jax.jit, static_argnames="spec")
def _rescaled_unless(
    keep: jax.Array, values: list[jax.Array], log_scales: list[jax.Array], *, spec: ArchSpec
) -> list[jax.Array]:
    replaced = _rescaled(values, log_scales, spec=spec, power=1)
    return [jnp.where(keep, old, new) for old, new in zip(values, replaced, strict=True)]


@functools.partial(jax.jit, static_argnames=("spec", "power"))
def _rescaled(
    values: list[jax.Array], log_scales: list[jax.Array], *, spec: ArchSpec, power: int
) -> list[jax.Array]:
    """The leaves that neurons meet, in the order of the spec, each times its factors."""
    by_path = _by_path(log_scales, spec, power)
    paths = [leaf.path for leaf in spec.leaves if leaf.path in by_path]
    return [_multiplied(value, by_path[path]) for path, value in zip(paths, values, strict=True)]


def _as_log_scales(z: Any, what: str = "log-scales") -> jax.Array:
    z = jnp.asarray(z)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise SpecError(f"{what} have dtype {z.dtype}; floats are needed")
    return widened(z)


def _checked(log_scales: LogScales | Solution, spec: ArchSpec) -> list[jax.Array]:
    log_scales = log_scales_of(log_scales)
    if not isinstance(log_scales, (tuple, list)):
        raise SpecError(
            "log_scales must be a tuple with one array per group, not of type "
            f"{type(log_scales).__name__}"
        )
    if len(log_scales) != len(spec.groups):
        raise SpecError(f"{len(log_scales)} arrays of log-scales for {len(spec.groups)} groups")
    checked = []
    for group, z in zip(spec.groups, log_scales, strict=True):
        what = f"log-scales of group {group.name!r}"
        z = _as_log_scales(z, what)
        if z.shape != (group.size,):
            raise SpecError(f"{what} have shape {z.shape}, not {(group.size,)}")
        checked.append(z)
    return checked


def _nearest_power(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The k for which 2^k is nearest to e^z, and k · log 2."""
    log_two = np.log(2.0).astype(z.dtype)
    k = lax.stop_gradient(jnp.round(z / log_two))
    return k, k * log_two


def _by_path(log_scales: list[jax.Array], spec: ArchSpec, power: int) -> dict[str, list[_Factor]]:
    """The factors to a power of each leaf that neurons meet, laid out to broadcast against it."""
    met = [
        (number, sign * power * incidence.power, incidence)
        for number, group in enumerate(spec.groups)
        for sign, incidences in ((1, group.incoming), (-1, group.outgoing))
        for incidence in incidences
    ]
    factors = _factors(log_scales, list(dict.fromkeys(taken for _, taken, _ in met)))
    by_path: dict[str, list[_Factor]] = {}
    for number, taken, incidence in met:
        along = _along_leaf(incidence, factors[taken][number], spec)
        by_path.setdefault(incidence.path, []).append(along)
    return by_path


def _factors(log_scales: list[jax.Array], powers: list[float]) -> dict[float, list[_Factor]]:
    """The scales of each group, to each of some powers."""
    if not log_scales:
        return {}
    # All groups at once, which XLA compiles much faster than one after the other.
    dtype = compute_dtype(*(z.dtype for z in log_scales))
    mantissa, exponent = _exponential(concatenated(log_scales, dtype))
    sizes = [z.size for z in log_scales]
    return {
        power: [_Factor(*parts) for parts in zip(*halves, strict=True)]
        for power in powers
        for halves in [
            [by_group(computed_once(half), sizes) for half in _to_power(mantissa, exponent, power)]
        ]
    }


def _exponential(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mantissa and exponent of e^z; exactly a power of two where z is its rounded logarithm."""
    k, nearest = _nearest_power(z)
    # log 2 in two parts, of which the first times k is exact.
    rest = (z - k * (355 / 512)) + k * 2.1219444005469057e-4
    rest = jnp.where(z == nearest, z - lax.stop_gradient(z), rest)
    return jnp.exp(rest), k.astype(jnp.int32)


def _to_power(mantissa: jax.Array, exponent: jax.Array, power: float) -> _Factor:
    if float(power).is_integer():
        # An integer power leaves a scale that is a power of two one.
        whole = mantissa ** abs(int(power))
        return _halves(whole if power > 0 else 1 / whole, int(power) * exponent)
    raised = power * exponent.astype(mantissa.dtype)
    rounded = jnp.round(raised)
    return _halves(mantissa**power * jnp.exp2(raised - rounded), rounded.astype(jnp.int32))


def _halves(mantissa: jax.Array, exponent: jax.Array) -> _Factor:
    half = lax.shift_right_arithmetic(exponent, np.int32(1))
    second = times_power_of_two(jnp.ones_like(mantissa), exponent - half)
    return _Factor(times_power_of_two(mantissa, half), second)


def _along_leaf(incidence: Incidence, factor: _Factor, spec: ArchSpec) -> _Factor:
    """A neuron factor laid out to broadcast against a leaf."""
    shape = [1] * len(spec.leaf(incidence.path).shape)
    for axis, size in zip(incidence.axes, incidence.index.shape, strict=True):
        shape[axis] = size
    order = np.argsort(incidence.axes)

    def lay_out(values: jax.Array) -> jax.Array:
        if np.array_equal(incidence.index, np.arange(values.size)):
            return values.reshape(shape)
        taken = values[np.maximum(incidence.index, 0)]
        taken = jnp.where(incidence.index >= 0, taken, 1)
        return taken.transpose(order).reshape(shape)

    return _Factor(*map(lay_out, factor))


def _multiplied(value: jax.Array, factors: Sequence[_Factor]) -> jax.Array:
    value = jnp.asarray(value)
    dtype = compute_dtype(value.dtype, *(part.dtype for factor in factors for part in factor))
    product = value.astype(dtype)
    # Two products of a few numbers for each slice, and two with each entry.
    for halves in zip(*factors, strict=True):
        product = product * functools.reduce(operator.mul, [half.astype(dtype) for half in halves])
    return product.astype(value.dtype)
