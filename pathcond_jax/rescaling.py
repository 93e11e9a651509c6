"""The group action on parameters, and conditioning: lift, solve, rescale."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._solve.solution import Solution, Status
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.extended_range import power_of_two
from pathcond_jax._spec.sharding import automatic
from pathcond_jax._spec.spec import ArchSpec, no_neuron
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import Incidence, PyTree, SpecError
from pathcond_jax.criteria._base import Criterion
from pathcond_jax.criteria._catalogue import as_criterion

LogScales = tuple[jax.Array, ...]


def rescale(params: PyTree, spec: ArchSpec, log_scales: LogScales, *, power: int = 1) -> PyTree:
    """The group action: incoming entries × e^z, outgoing entries ÷ e^z.

    The network's function does not change. In floating point it does by rounding; with scales
    that are powers of two (``round_to_powers_of_two``) not at all.

    Args:
      params: the parameters the spec was built for, or anything of their shapes.
      spec: the architecture.
      log_scales: one array ``(group.size,)`` per group of the spec.
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
    values = match_leaves(spec, params)
    checked = _checked(log_scales, spec)
    met = {i.path for group in spec.groups for i in (*group.incoming, *group.outgoing)}
    positions = [k for k, leaf in enumerate(spec.leaves) if leaf.path in met]
    rescaled = _rescaled([values[k] for k in positions], checked, spec=spec.symmetry, power=power)
    for k, value in zip(positions, rescaled, strict=True):
        values[k] = value
    return jax.tree.unflatten(spec.treedef, values)


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
    by_power = {power: _factors(checked, power) for power in {power for _, _, power in buffers}}
    rescaled = []
    for value, position, power in buffers:
        path, (incoming, outgoing) = spec.leaves[position].path, by_power[power]
        factors = [
            _along_leaf(incidence, factor, spec)
            for group, *sides in zip(spec.groups, incoming, outgoing, strict=True)
            for factor, incidences in zip(sides, (group.incoming, group.outgoing), strict=True)
            for incidence in incidences
            if incidence.path == path
        ]
        rescaled.append(_multiplied(value, factors) if factors else value)
    return rescaled


def condition(
    params: PyTree, spec: ArchSpec, criterion: Criterion | str = "path", **options: Any
) -> tuple[PyTree, Solution]:
    """Moves parameters to the best representative of the same function.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.
      criterion: what to balance: ``"path"``, the conditioning of the path-lifting Gram matrix,
        ``"enorm"``, ``"equalize"``, or any criterion of :mod:`pathcond_jax.criteria`.
      **options: of ``solve``: ``method``, ``max_steps``, ``tol``, ``max_log_scale``, ``initial``;
        of the criterion: ``norm_weight`` adds ``norm_weight · p · log Σ θ² e^{−2Bz}`` to the
        path criterion, which bounds the scales; ``rounding="power_of_two"`` rounds the log-scales
        as ``round_to_powers_of_two`` does.

    Returns:
      The rescaled parameters, dtypes kept, and the solution. Where a parameter is NaN or infinite
      the parameters come back unchanged, with log-scales 0 and a status that says so.

    Raises:
      SpecError: ``params`` does not fit the spec, or the spec has no neuron to rescale.
      NotPathLiftableError: the path criterion needs a network that is a sum over paths.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> conditioned, solution = pathcond.condition(params, spec)
      >>> jnp.round(conditioned["a"]["w"], 3).tolist()
      [[4.0, 4.0]]

    References:
      Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026, arXiv 2602.19799.
    """
    match_leaves(spec, params)
    if not spec.groups:
        raise SpecError(no_neuron(spec))
    norm_weight, rounding = options.pop("norm_weight", 0.0), options.pop("rounding", None)
    if rounding not in (None, "power_of_two"):
        raise SpecError(f"rounding is {rounding!r}; there are None and 'power_of_two'")

    def conditioned(params: PyTree) -> tuple[PyTree, Solution]:
        chosen = as_criterion(criterion, norm_weight=norm_weight)
        solution = chosen.solve(params, spec, **options)
        if rounding is not None:
            solution = solution._replace(log_scales=round_to_powers_of_two(solution.log_scales))
        # Multiplying by 1 may flush subnormal numbers and rewrite NaNs.
        keep = solution.status == Status.NON_FINITE
        return _unless(keep, params, rescale(params, spec, solution.log_scales)), solution

    return automatic(conditioned, params)


def round_to_powers_of_two(log_scales: LogScales) -> LogScales:
    """The nearest log-scales whose λ are powers of two, for which rescaling is exact.

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


def check_spec(
    spec: ArchSpec, params: PyTree, *inputs: PyTree, seed: int = 0, trials: int = 3
) -> float:
    """Proves a spec numerically: rescales at random and compares the network's outputs.

    Args:
      spec: the architecture, built by ``trace_spec`` or ``chain_spec``.
      params: parameters, arrays.
      *inputs: the network's inputs; none: standard normal ones of the traced shapes.
      seed: of the log-scales, drawn from N(0, 1), and of the inputs.
      trials: how many draws.

    Returns:
      The largest change of any output, relative to the largest entry of that output.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.ones((1, 2))}, "b": {"w": jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> pathcond.check_spec(spec, params) < 1e-6
      True
    """
    match_leaves(spec, params)
    if spec.apply_fn is None:
        raise SpecError("this spec has no apply function to check; build it with trace_spec")
    keys = jax.random.split(jax.random.key(seed), trials + 1)
    if not inputs:
        inputs = _random_inputs(keys[0], spec)
    before = jax.tree.leaves(spec.apply_fn(params, *inputs))
    worst = 0.0
    for key in keys[1:]:
        after = jax.tree.leaves(
            spec.apply_fn(rescale(params, spec, random_log_scales(key, spec)), *inputs)
        )
        worst = np.max([worst, *map(_relative_change, before, after)])
    return float(worst)


def random_log_scales(key: jax.Array, spec: ArchSpec, dtype: Any = None) -> LogScales:
    """Log-scales drawn from N(0, 1), one array per group."""
    # All at once: each shape that is drawn would be compiled apart.
    drawn = jax.random.normal(key, (spec.num_neurons,), dtype or jnp.zeros(()).dtype)
    ends = np.cumsum([group.size for group in spec.groups], dtype=int)
    return tuple(jnp.split(drawn, ends)[:-1])


def _relative_change(before: jax.Array, after: jax.Array) -> float:
    """NaN where an output is NaN or infinite."""
    if not jnp.issubdtype(jnp.result_type(before), jnp.inexact) or not jnp.size(before):
        return 0.0
    wide = np.result_type(before.dtype, np.float64)
    one, two = np.asarray(before).astype(wide), np.asarray(after).astype(wide)
    with np.errstate(invalid="ignore"):
        return float(np.max(abs(two - one)) / max(np.max(abs(one)), np.finfo(np.float64).tiny))


def _random_inputs(key: jax.Array, spec: ArchSpec) -> tuple[PyTree, ...]:
    flat, treedef = jax.tree.flatten(spec.example_inputs)
    keys = jax.random.split(key, max(len(flat), 1))
    drawn = [
        jax.random.normal(k, a.shape, a.dtype)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else jnp.zeros(a.shape, a.dtype)
        for k, a in zip(keys, flat, strict=False)
    ]
    return jax.tree.unflatten(treedef, drawn)


class _Factor(NamedTuple):
    """``mantissa · 2^exponent``: opposite factors meet before either can overflow."""

    mantissa: jax.Array
    exponent: jax.Array


@functools.partial(jax.jit, static_argnames=("spec", "power"))
def _rescaled(
    values: list[jax.Array], log_scales: list[jax.Array], *, spec: ArchSpec, power: int
) -> list[jax.Array]:
    """The leaves that neurons meet, in the order of the spec, each times its factors."""
    by_path: dict[str, list[_Factor]] = {}
    incoming, outgoing = _factors(log_scales, power)
    for group, *sides in zip(spec.groups, incoming, outgoing, strict=True):
        for factor, incidences in zip(sides, (group.incoming, group.outgoing), strict=True):
            for incidence in incidences:
                along = _along_leaf(incidence, factor, spec)
                by_path.setdefault(incidence.path, []).append(along)
    paths = [leaf.path for leaf in spec.leaves if leaf.path in by_path]
    return [_multiplied(value, by_path[path]) for path, value in zip(paths, values, strict=True)]


def _unless(keep: jax.Array, old: PyTree, new: PyTree) -> PyTree:
    """``new``, or ``old`` where ``keep``; leaves that are the same object in both stay it."""
    before, treedef = jax.tree.flatten(old)
    after = jax.tree.leaves(new)
    changed = [k for k, (o, n) in enumerate(zip(before, after, strict=True)) if o is not n]
    chosen = _where(keep, [before[k] for k in changed], [after[k] for k in changed])
    for k, value in zip(changed, chosen, strict=True):
        after[k] = value
    return jax.tree.unflatten(treedef, after)


@jax.jit
def _where(keep: jax.Array, old: list[jax.Array], new: list[jax.Array]) -> list[jax.Array]:
    return [jnp.where(keep, o, n) for o, n in zip(old, new, strict=True)]


def _as_log_scales(z: Any, what: str = "log-scales") -> jax.Array:
    z = jnp.asarray(z)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise SpecError(f"{what} have dtype {z.dtype}; floats are needed")
    return z.astype(compute_dtype(z.dtype))


def _checked(log_scales: LogScales, spec: ArchSpec) -> list[jax.Array]:
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


def _factors(log_scales: list[jax.Array], power: int) -> list[list[_Factor]]:
    """What the entries that enter and that leave the neurons of each group are multiplied by."""
    if not log_scales:
        return [[], []]
    # All groups at once, which XLA compiles much faster than one after the other.
    dtype = compute_dtype(*(z.dtype for z in log_scales))
    all_groups = _factor(jnp.concatenate([z.astype(dtype) for z in log_scales]))
    ends = np.cumsum([z.size for z in log_scales])[:-1]
    return [
        [_Factor(*parts) for parts in zip(*(jnp.split(a, ends) for a in factor), strict=True)]
        for factor in (_to_power(all_groups, power), _to_power(all_groups, -power))
    ]


def _factor(z: jax.Array) -> _Factor:
    """e^z; exactly a power of two where z is its rounded logarithm."""
    k, nearest = _nearest_power(z)
    # log 2 in two parts, of which the first times k is exact.
    rest = (z - k * (355 / 512)) + k * 2.1219444005469057e-4
    rest = jnp.where(z == nearest, z - lax.stop_gradient(z), rest)
    return _Factor(jnp.exp(rest), k.astype(jnp.int32))


def _to_power(factor: _Factor, power: int) -> _Factor:
    mantissa = factor.mantissa ** abs(power)
    return _Factor(mantissa if power > 0 else 1 / mantissa, power * factor.exponent)


def _along_leaf(incidence: Incidence, factor: _Factor, spec: ArchSpec) -> _Factor:
    """A neuron factor laid out to broadcast against a leaf."""
    shape = [1] * len(spec.leaf(incidence.path).shape)
    for axis, size in zip(incidence.axes, incidence.index.shape, strict=True):
        shape[axis] = size
    order = np.argsort(incidence.axes)

    def lay_out(values: jax.Array, neutral: int) -> jax.Array:
        if np.array_equal(incidence.index, np.arange(values.size)):
            return values.reshape(shape)
        taken = values[np.maximum(incidence.index, 0)]
        taken = jnp.where(incidence.index >= 0, taken, neutral)
        return taken.transpose(order).reshape(shape)

    return _Factor(lay_out(factor.mantissa, 1), lay_out(factor.exponent, 0))


def _multiplied(value: jax.Array, factors: Sequence[_Factor]) -> jax.Array:
    value = jnp.asarray(value)
    dtype = compute_dtype(value.dtype, *(factor.mantissa.dtype for factor in factors))
    mantissa, exponent = factors[0].mantissa.astype(dtype), factors[0].exponent
    for factor in factors[1:]:
        mantissa = mantissa * factor.mantissa.astype(dtype)
        exponent = exponent + factor.exponent
    # In two steps, for factors outside of the range of the dtype; neither is 0 or infinite.
    info = jnp.finfo(dtype)
    half = lax.shift_right_arithmetic(exponent, np.int32(1))
    product = value.astype(dtype) * mantissa
    for part in (half, exponent - half):
        normal = lax.clamp(np.int32(info.minexp), part, np.int32(info.maxexp - 1))
        product = product * power_of_two(normal, dtype)
    return product.astype(value.dtype)
