"""The group action on parameters, and on anything of their shapes."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._solve.solution import Solution, log_scales_of
from pathcond_jax._spec.arrays import SMALL, compute_dtype, looked_up, part_of, widened
from pathcond_jax._spec.extended_range import computed_once, times_power_of_two
from pathcond_jax._spec.log_scales import LogScales as LogScales
from pathcond_jax._spec.log_scales import concatenated
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError


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
    return _with_rescaled(params, spec, log_scales, power, None)


def rescale_unless(
    keep: jax.Array, params: PyTree, spec: ArchSpec, log_scales: LogScales
) -> PyTree:
    """What :func:`rescale` returns, or ``params`` bit for bit where ``keep``."""
    # Multiplying by 1 may flush subnormal numbers and rewrite NaNs.
    return _with_rescaled(params, spec, log_scales, 1, keep)


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
    plans = {power: _plan(spec.symmetry, power) for power in {power for _, _, power in buffers}}
    factors = {power: _factors(checked, plan.powers) for power, plan in plans.items()}
    rescaled = []
    for value, position, power in buffers:
        meetings = plans[power].by_path.get(spec.leaves[position].path)
        rescaled.append(_rescaled(value, factors[power], meetings) if meetings else value)
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


class _Meeting(NamedTuple):
    """An incidence as a static argument, and which factor it takes.

    Attributes:
      start: where the group begins in the vector of neurons.
      taken: the position of the power in the tuple of factors.
      size: the number of neurons of the group.
      axes: of the leaf.
      shape: of the index.
      neurons: the bytes of the index; None: it counts the neurons in order.
    """

    start: int
    taken: int
    size: int
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    neurons: bytes | None


class _Plan(NamedTuple):
    """How a spec's leaves are rescaled.

    Attributes:
      powers: of the scales, of which there are factors.
      by_path: the meetings of each leaf that neurons meet.
    """

    powers: tuple[float, ...]
    by_path: dict[str, tuple[_Meeting, ...]]


@functools.lru_cache(maxsize=64)
def _plan(spec: ArchSpec, power: int) -> _Plan:
    starts = np.cumsum([0, *(group.size for group in spec.groups)])
    met = [
        (int(start), group.size, sign * power * incidence.power, incidence)
        for start, group in zip(starts, spec.groups, strict=False)
        for sign, incidences in ((1, group.incoming), (-1, group.outgoing))
        for incidence in incidences
    ]
    powers = tuple(dict.fromkeys(taken for _, _, taken, _ in met))
    by_path: dict[str, tuple[_Meeting, ...]] = {}
    for start, size, taken, incidence in met:
        index = np.asarray(incidence.index, np.int32)
        in_order = list(incidence.axes) == sorted(incidence.axes)
        whole = in_order and np.array_equal(index.ravel(), np.arange(size))
        meeting = _Meeting(
            start,
            powers.index(taken),
            size,
            tuple(incidence.axes),
            index.shape,
            None if whole else index.tobytes(),
        )
        by_path[incidence.path] = (*by_path.get(incidence.path, ()), meeting)
    return _Plan(powers, by_path)


def _with_rescaled(
    params: PyTree,
    spec: ArchSpec,
    log_scales: LogScales | Solution,
    power: int,
    keep: jax.Array | None,
) -> PyTree:
    """The parameters with those leaves replaced that neurons meet; the others are passed on."""
    values, checked = match_leaves(spec, params), _checked(log_scales, spec)
    plan = _plan(spec.symmetry, power)
    factors = _factors(checked, plan.powers)
    for k, leaf in enumerate(spec.leaves):
        if leaf.path in plan.by_path:
            values[k] = _rescaled(values[k], factors, plan.by_path[leaf.path], keep)
    return jax.tree.unflatten(spec.treedef, values)


def _rescaled(
    value: jax.Array,
    factors: tuple[_Factor, ...],
    meetings: tuple[_Meeting, ...],
    keep: jax.Array | None = None,
) -> jax.Array:
    """A leaf times its factors; as it is where ``keep``."""
    part = looked_up if value.size <= SMALL else part_of
    halves = [
        [part(half, meeting.start, meeting.size) for half in factors[meeting.taken]]
        for meeting in meetings
    ]
    # Where they begin is known: outside of `jit`, equal blocks share what is compiled.
    same = tuple(meeting._replace(start=0, taken=0) for meeting in meetings)
    return _multiplied(value, halves, keep, same)


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


@functools.partial(jax.jit, static_argnums=1)
def _factors(log_scales: list[jax.Array], powers: tuple[float, ...]) -> tuple[_Factor, ...]:
    """The scales of all neurons to each of some powers, (H,) each."""
    if not log_scales:
        return ()
    # All groups at once, which XLA compiles much faster than one after the other.
    dtype = compute_dtype(*(z.dtype for z in log_scales))
    mantissa, exponent = _exponential(concatenated(log_scales, dtype))
    raised = [_to_power(mantissa, exponent, power) for power in powers]
    return tuple(_Factor(*map(computed_once, factor)) for factor in raised)


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


def _along_leaf(meeting: _Meeting, values: jax.Array, ndim: int) -> jax.Array:
    """Numbers of the neurons of a group laid out to broadcast against a leaf."""
    shape = [1] * ndim
    for axis, size in zip(meeting.axes, meeting.shape, strict=True):
        shape[axis] = size
    if meeting.neurons is None:
        return values.reshape(shape)
    index = np.frombuffer(meeting.neurons, np.int32).reshape(meeting.shape)
    taken = jnp.where(index >= 0, values[np.maximum(index, 0)], 1)
    return taken.transpose(np.argsort(meeting.axes)).reshape(shape)


@functools.partial(jax.jit, static_argnums=3)
def _multiplied(
    value: jax.Array,
    factors: list[list[jax.Array]],
    keep: jax.Array | None,
    meetings: tuple[_Meeting, ...],
) -> jax.Array:
    """A leaf times the two halves of the factors that it meets; as it is where ``keep``."""
    dtype = compute_dtype(value.dtype, *(half.dtype for halves in factors for half in halves))
    product = value.astype(dtype)
    # Two products of a few numbers for each slice, and two with each entry.
    for halves in zip(*factors, strict=True):
        along = [
            _along_leaf(meeting, half.astype(dtype), value.ndim)
            for half, meeting in zip(halves, meetings, strict=True)
        ]
        product = product * functools.reduce(operator.mul, along)
    product = product.astype(value.dtype)
    return product if keep is None else jnp.where(keep, value, product)
