"""Conditioning: a criterion's log-scales, applied."""

import jax

from pathcond_jax._action.rescale import rescale_unless, round_to_powers_of_two
from pathcond_jax._solve.solution import Solution, Status
from pathcond_jax._spec.log_scales import LogScales
from pathcond_jax._spec.sharding import automatic
from pathcond_jax._spec.spec import ArchSpec, no_neuron
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.criteria._base import Criterion
from pathcond_jax.criteria._catalogue import as_criterion


def condition(
    params: PyTree,
    spec: ArchSpec,
    criterion: Criterion | str = "path",
    *,
    method: str | None = None,
    max_steps: int | None = None,
    tol: float | None = None,
    max_log_scale: float | None = None,
    initial: LogScales | Solution | None = None,
    norm_weight: float | jax.Array = 0.0,
    rounding: str | None = None,
) -> tuple[PyTree, Solution]:
    """Moves parameters to the best representative of the same function.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.
      criterion: what to balance: ``"path"``, the conditioning of the path-lifting Gram matrix,
        ``"enorm"``, ``"equalize"``, or any criterion of :mod:`pathcond_jax.criteria`.
      method: ``"newton"``, ``"block"``, ``"coordinate"``, as in :func:`pathcond_jax.solve`; None:
        the one that suits the criterion.
      max_steps: at most so many steps or sweeps; None: the default of the method.
      tol: when to stop; None: the default of the method.
      max_log_scale: the box ``|z| ≤ max_log_scale``; None: as far as the dtype allows.
      initial: log-scales to start from, or a solution; None: 0.
      norm_weight: μ ≥ 0, adds ``μ · p · log Σ θ² e^{−2Bz}`` to the criterion, which bounds the
        scales.
      rounding: ``"power_of_two"`` rounds the log-scales as ``round_to_powers_of_two`` does, so that
        rescaling is exact; None: does not.

    Returns:
      The rescaled parameters, dtypes kept, and the solution. Where a parameter is NaN or infinite
      the parameters come back unchanged, with log-scales 0 and a status that says so.

    Raises:
      SpecError: ``params`` does not fit the spec, the spec has no neuron to rescale, or an
        option cannot be used.
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
    if rounding not in (None, "power_of_two"):
        raise SpecError(f"rounding is {rounding!r}; there are None and 'power_of_two'")

    chosen = as_criterion(criterion, norm_weight=norm_weight)

    def conditioned(params: PyTree) -> tuple[PyTree, Solution]:
        solution = chosen.solve(
            params,
            spec,
            method=method,
            max_steps=max_steps,
            tol=tol,
            max_log_scale=max_log_scale,
            initial=initial,
        )
        if rounding is not None:
            solution = solution._replace(log_scales=round_to_powers_of_two(solution.log_scales))
        keep = solution.status == Status.NON_FINITE
        return rescale_unless(keep, params, spec, solution.log_scales), solution

    return automatic(conditioned, params)
