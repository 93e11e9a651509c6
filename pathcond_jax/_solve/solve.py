"""Solvers: from a Gram diagonal, or any criterion, to the log-scales that minimize it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._solve import coordinate, flat_objective, newton
from pathcond_jax._solve.block import block
from pathcond_jax._solve.flat_objective import Problem, Run
from pathcond_jax._solve.objective import Objective, path_objective
from pathcond_jax._solve.solution import Solution, Status, solution_of
from pathcond_jax._spec.extended_range import ScaledDiagonal
from pathcond_jax._spec.spec import ArchSpec, no_neuron
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError


class Method(NamedTuple):
    """An algorithm and its defaults.

    Attributes:
      run: ``run(task, spec, z, max_steps, tol) -> Run``.
      max_steps: steps or sweeps.
      tol: the tolerance for each bit width of the dtype.
      one_term: whether it treats nothing but a single logarithm.
    """

    run: Callable[[Problem, ArchSpec, jax.Array, jax.Array, jax.Array], Run]
    max_steps: int
    tol: dict[int, float]
    one_term: bool


METHODS = {
    "newton": Method(newton.newton, 50, {32: 1e-5, 64: 1e-8}, one_term=False),
    "block": Method(block, 100, {32: 1e-2, 64: 1e-6}, one_term=True),
    "coordinate": Method(coordinate.coordinate, 10, {32: 1e-2, 64: 1e-2}, one_term=True),
}


def solve(
    gram: PyTree | ScaledDiagonal | Objective,
    spec: ArchSpec,
    *,
    method: str = "newton",
    max_steps: int | None = None,
    tol: float | None = None,
    max_log_scale: float | None = None,
    initial: tuple[jax.Array, ...] | None = None,
) -> Solution:
    """Minimizes a criterion over the log-scales of the neurons."""
    chosen = METHODS.get(method)
    if chosen is None:
        raise SpecError(f"unknown method {method!r}; there are {', '.join(map(repr, METHODS))}")
    if not spec.num_neurons:
        raise SpecError(no_neuron(spec))
    limit = max_log_scale
    if isinstance(gram, Objective):
        _check_objective(gram, method)
        if gram.limit is not None:
            limit = gram.limit if limit is None else min(limit, gram.limit)
            gram = gram._replace(limit=None)
    else:
        match_leaves(spec, gram.mantissa if isinstance(gram, ScaledDiagonal) else gram, "gram")
    for name, value in (("max_steps", max_steps), ("tol", tol), ("max_log_scale", max_log_scale)):
        if value is not None and not value >= 0:
            raise SpecError(f"{name} is {value}; it cannot be negative")
    if initial is not None:
        wanted = tuple((group.size,) for group in spec.groups)
        shapes = tuple(np.shape(part) for part in initial)
        if shapes != wanted:
            raise SpecError(f"initial has shapes {shapes}, the groups of the spec {wanted}")
    max_steps = chosen.max_steps if max_steps is None else int(max_steps)
    tols = chosen.tol if tol is None else dict.fromkeys(chosen.tol, float(tol))
    own = limit is not None
    limit = default_limit(spec) if limit is None else float(limit)
    return _solve(gram, initial, max_steps, tols, limit, own, spec=spec.symmetry, method=method)


def _check_objective(objective: Objective, method: str) -> None:
    if objective.concave:
        raise SpecError("the objective has concave terms, which ascent.solve_difference treats")
    if not objective.terms and not objective.smooth:
        raise SpecError("the objective has no term")
    if METHODS[method].one_term and (len(objective.terms) > 1 or objective.smooth):
        raise SpecError(
            f"method {method!r} minimizes a single logarithm and the objective is a sum of "
            f"{len(objective.terms) + len(objective.smooth)} functions; use method='newton'"
        )


def default_limit(spec: ArchSpec) -> float:
    """The box without ``max_log_scale``: two neurons of one entry keep it in its dtype's range."""
    largest = min(float(jnp.finfo(leaf.dtype).max) for leaf in spec.leaves if leaf.trainable)
    return 0.45 * float(np.log(largest))


@functools.partial(jax.jit, static_argnames=("spec", "method"))
def _solve(
    gram: PyTree,
    initial: tuple[jax.Array, ...] | None,
    max_steps: int | jax.Array,
    tols: dict[int, float | jax.Array],
    limit: float | jax.Array,
    own_limit: bool | jax.Array,
    *,
    spec: ArchSpec,
    method: str,
) -> Solution:
    objective = gram if isinstance(gram, Objective) else path_objective(spec, gram)
    task = flat_objective.make(objective, spec, limit)
    dtype = task.linear.dtype
    z = jnp.zeros_like(task.linear)
    if initial is not None:
        z = jnp.concatenate([jnp.asarray(part).astype(dtype) for part in initial])
        z = jnp.where(task.alive & jnp.isfinite(z), task.clip(z), 0)
    # Python's numbers under jax.disable_jit.
    tol = jnp.asarray(tols[jnp.finfo(dtype).bits]).astype(dtype)
    run = METHODS[method].run(task, spec, z, jnp.asarray(max_steps, jnp.int32), tol)
    return solution_of(task, spec, run, jnp.where(own_limit, Status.CLIPPED, Status.UNBOUNDED))
