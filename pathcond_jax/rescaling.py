"""The group action on parameters, and conditioning: lift, solve, rescale."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax.criteria import objective
from pathcond_jax.solvers import Solution, solve
from pathcond_jax.spec import ArchSpec, Incidence, PyTree, SpecError, compute_dtype, match_leaves

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
    factors = _neuron_factors(spec, log_scales, power)
    by_path: dict[str, list[jax.Array]] = {}
    for number, group in enumerate(spec.groups):
        for side, incidences in zip(factors[number], (group.incoming, group.outgoing), strict=True):
            for incidence in incidences:
                by_path.setdefault(incidence.path, []).append(_along_leaf(incidence, side, spec))
    scaled = [
        _multiplied(value, by_path[leaf.path]) if leaf.path in by_path else value
        for leaf, value in zip(spec.leaves, values, strict=True)
    ]
    return jax.tree.unflatten(spec.treedef, scaled)


def condition(
    params: PyTree, spec: ArchSpec, criterion: Any = "path", **options: Any
) -> tuple[PyTree, Solution]:
    """Moves parameters to the best representative of the same function.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.
      criterion: what to balance; ``"path"`` is the conditioning of the path-lifting Gram matrix.
      **options: of ``solve``: ``method``, ``max_steps``, ``tol``, ``max_log_scale``, ``initial``;
        and of the criterion: ``norm_weight`` adds ``norm_weight · p · log Σ θ² e^{−2Bz}`` to the
        path criterion, which bounds the scales.

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
    if not spec.groups:
        raise SpecError(_no_neuron(spec))
    norm_weight = options.pop("norm_weight", 0.0)
    goal = objective(params, spec, criterion, norm_weight=norm_weight)
    solution = solve(goal, spec, **options)
    return rescale(params, spec, solution.log_scales), solution


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
    return tuple(jnp.round(z / np.log(2.0).astype(z.dtype)) * np.log(2.0).astype(z.dtype) for z in log_scales)


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
    if spec.apply_fn is None:
        raise SpecError("this spec has no apply function to check")
    keys = jax.random.split(jax.random.key(seed), trials + 1)
    if not inputs:
        inputs = _random_inputs(keys[0], spec)
    before = jax.tree.leaves(spec.apply_fn(params, *inputs))
    worst = 0.0
    for key in keys[1:]:
        after = jax.tree.leaves(
            spec.apply_fn(rescale(params, spec, random_log_scales(key, spec)), *inputs)
        )
        worst = max([worst, *map(_relative_change, before, after)])
    return worst


def random_log_scales(key: jax.Array, spec: ArchSpec, dtype: Any = None) -> LogScales:
    """Log-scales drawn from N(0, 1), one array per group."""
    keys = jax.random.split(key, max(len(spec.groups), 1))
    return tuple(
        jax.random.normal(k, (group.size,), dtype or jnp.zeros(()).dtype)
        for k, group in zip(keys, spec.groups, strict=False)
    )


def _no_neuron(spec: ArchSpec) -> str:
    reasons = "; ".join(str(pin) for pin in spec.pinned[:4])
    return "the network has no neuron to rescale" + (f": {reasons}" if reasons else "")


def _relative_change(before: jax.Array, after: jax.Array) -> float:
    if not jnp.issubdtype(jnp.result_type(before), jnp.floating) or not jnp.size(before):
        return 0.0
    one, two = np.asarray(before, np.float64), np.asarray(after, np.float64)
    return float(np.max(abs(two - one)) / max(np.max(abs(one)), np.finfo(np.float64).tiny))


def _random_inputs(key: jax.Array, spec: ArchSpec) -> Sequence[PyTree]:
    flat, treedef = jax.tree.flatten(spec.example_inputs)
    keys = jax.random.split(key, max(len(flat), 1))
    drawn = [
        jax.random.normal(k, a.shape, a.dtype)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else jnp.zeros(a.shape, a.dtype)
        for k, a in zip(keys, flat, strict=False)
    ]
    return jax.tree.unflatten(treedef, drawn)


def _neuron_factors(
    spec: ArchSpec, log_scales: LogScales, power: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Per group, the factors of incoming and of outgoing entries."""
    if len(log_scales) != len(spec.groups):
        raise SpecError(f"{len(log_scales)} arrays of log-scales for {len(spec.groups)} groups")
    factors = []
    for group, z in zip(spec.groups, log_scales, strict=True):
        if jnp.shape(z) != (group.size,):
            raise SpecError(
                f"log-scales of group {group.name!r} have shape {jnp.shape(z)}, not {(group.size,)}"
            )
        if not jnp.issubdtype(jnp.result_type(z), jnp.floating):
            raise SpecError(
                f"log-scales of group {group.name!r} have dtype {jnp.result_type(z)}; floats are needed"
            )
        scale = jnp.exp(jnp.asarray(z, compute_dtype(jnp.result_type(z))))
        inverse = 1 / scale
        pair = (scale, inverse) if power > 0 else (inverse, scale)
        factors.append(tuple(side ** abs(power) for side in pair))
    return factors


def _along_leaf(incidence: Incidence, factor: jax.Array, spec: ArchSpec) -> jax.Array:
    """A neuron factor laid out to broadcast against a leaf."""
    rank = len(spec.leaf(incidence.path).shape)
    taken = jnp.where(incidence.index >= 0, factor[np.maximum(incidence.index, 0)], 1)
    order = np.argsort(incidence.axes)
    shape = [1] * rank
    for axis, size in zip(incidence.axes, incidence.index.shape, strict=True):
        shape[axis] = size
    return taken.transpose(order).reshape(shape)


def _multiplied(value: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
    value = jnp.asarray(value)
    dtype = compute_dtype(value.dtype, factors[0].dtype)
    factor = factors[0].astype(dtype)
    for other in factors[1:]:
        factor = factor * other.astype(dtype)
    return (value.astype(dtype) * factor).astype(value.dtype)
