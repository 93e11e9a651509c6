"""Solvers: from a Gram diagonal, or any criterion, to the log-scales that minimize it.

A goal is reduced to arrays of masses, prepared by the one that its method names, handed to the
method, and what the method finds becomes a :class:`Solution`. A further method is one entry of
``METHODS``: options, the box, the initial point and bad numbers are not its business.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._solve import (
    block,
    coordinate,
    difference,
    equal_ranges,
    flat_objective,
    newton,
    stacks,
)
from pathcond_jax._solve.equal_ranges import RangeProblem
from pathcond_jax._solve.flat_objective import Minimize, Problem
from pathcond_jax._solve.layout import layout
from pathcond_jax._solve.objective import Goal, LogSum, Objective, Ranges
from pathcond_jax._solve.path import path_objective
from pathcond_jax._solve.solution import Solution, Status, log_scales_of, solution_of
from pathcond_jax._solve.stacks import Table
from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.extended_range import ScaledDiagonal
from pathcond_jax._spec.log_scales import LogScales, concatenated
from pathcond_jax._spec.spec import ArchSpec, no_neuron
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError


def default_limit(spec: ArchSpec) -> float:
    """The box without ``max_log_scale``: two neurons of one entry keep it in its dtype's range."""
    largest = min(float(jnp.finfo(leaf.dtype).max) for leaf in spec.leaves if leaf.trainable)
    return 0.45 * float(np.log(largest)) / max(spec.powers)


class Method(NamedTuple):
    """An algorithm and its defaults.

    Attributes:
      goal: the type of what it reaches.
      prepare: from a goal, the spec and the limit of the box to the problem that ``run`` gets.
      value: from a problem, the table of stacks and z to what the solution's objective is there.
      run: ``run(problem, spec, z, max_steps, tol) -> Run``, z inside the box.
      max_steps: steps or sweeps.
      tol: the tolerance for each bit width of the dtype.
      start: from a problem, the spec and log-scales 0 to those where ``run`` begins unless the
        caller says where.
      limit: the limit of the box where neither the caller nor the goal has one.
      one_term: whether it treats nothing but a single logarithm.
      power_one: whether its closed form needs entries that take no other power of their scale.
    """

    goal: type
    prepare: Callable[[Any, ArchSpec, jax.Array], Problem | RangeProblem]
    value: Callable[[Any, Table, jax.Array], jax.Array]
    run: Minimize
    max_steps: int
    tol: dict[int, float]
    start: Callable[[Any, ArchSpec, jax.Array], jax.Array] = flat_objective.at_zero
    limit: Callable[[ArchSpec], float] = default_limit
    one_term: bool = False
    power_one: bool = False


_minimizer = functools.partial(Method, Objective, flat_objective.make, flat_objective.value)

# The first method of a goal is its default.
METHODS = {
    "newton": _minimizer(newton.newton, 50, {32: 1e-5, 64: 1e-8}),
    "block": _minimizer(block.block, 100, {32: 1e-2, 64: 1e-6}, one_term=True),
    "coordinate": _minimizer(
        coordinate.coordinate, 10, {32: 1e-2, 64: 1e-2}, one_term=True, power_one=True
    ),
    "fixed_point": Method(
        Ranges,
        equal_ranges.make,
        equal_ranges.largest_gap,
        equal_ranges.fixed_point,
        1000,
        {32: 1e-5, 64: 1e-10},
        start=equal_ranges.start,
        # Ranges that agree lie between those that are there, which the parameters hold.
        limit=lambda spec: np.inf,
    ),
}


def solve(
    gram: PyTree | ScaledDiagonal | Goal,
    spec: ArchSpec,
    *,
    method: str | None = None,
    max_steps: int | None = None,
    tol: float | None = None,
    max_log_scale: float | None = None,
    initial: LogScales | Solution | None = None,
) -> Solution:
    """The log-scales that minimize the path criterion of a Gram diagonal.

    With p trainable entries i, incidence B and the diagonal g, the convex function
    ``F(z) = p log Σ_i g_i e^{2(Bz)_i} − 2 Σ_i (Bz)_i`` of the log-scales z. Neurons without
    incoming or without outgoing mass keep their log-scale 0.

    Args:
      gram: the Gram diagonal, a tree like the parameters with nonnegative floating arrays; or its
        scaled form, which holds diagonals beyond the range of a dtype. (Criteria pass what they
        want in its place.)
      spec: the architecture.
      method: ``"newton"``, all neurons at once by Newton's method with conjugate gradients;
        ``"block"``, exact minima over whole groups in turn; ``"coordinate"``, the paper's sweeps
        over single neurons, where all entries take their scale to the power 1. The last two
        minimize a single logarithm, and no sums of criteria.
        Equal ranges have ``"fixed_point"``. None: the first of these that fits, ``"newton"`` for
        a Gram diagonal.
      max_steps: at most so many Newton steps (None: 50) or sweeps (None: 100 for ``"block"``, 10,
        the authors' number, for ``"coordinate"``, 1000 for ``"fixed_point"``). With concave terms,
        in each round.
      tol: when to stop. ``"newton"``: norm of the gradient, relative to p (None: 1e-5 in float32,
        1e-8 in float64). ``"block"``, ``"coordinate"``: Σ|Δ(2z)| over a sweep (None: 1e-2, and
        1e-6 for ``"block"`` in float64). ``"fixed_point"``: the largest |Δz| of a sweep (None:
        1e-5, 1e-10).
      max_log_scale: the box ``|z| ≤ max_log_scale``. None: as far as the dtype of the parameters
        allows, about 40 in float32.
      initial: log-scales to start from, one array ``(group.size,)`` per group, or a solution.
        None: 0; for equal ranges, the point of the orbit that their criterion names.

    Returns:
      The solution; ``print`` shows it. Arrays are in the dtype of the diagonal, float32 at least.
      Where the input is not finite, or has a negative mass, all log-scales are 0 and the status
      says so.

    Raises:
      SpecError: the diagonal does not fit the spec, the spec has no neuron to rescale, or an
        option cannot be used.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> solution = pathcond.solve(pathcond.gram_diagonal(params, spec), spec)
      >>> jnp.round(jnp.exp(solution.log_scales[0]), 3).tolist()
      [0.5, 0.5]
      >>> pathcond.Status(int(solution.status)).name
      'CONVERGED'

    References:
      Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026, arXiv 2602.19799: the
      criterion, and Lemma 4.1 for ``"coordinate"``.
    """
    if not isinstance(gram, Goal):
        match_leaves(spec, gram.mantissa if isinstance(gram, ScaledDiagonal) else gram, "gram")
    if not spec.num_neurons:
        raise SpecError(no_neuron(spec))
    name = _method_name(method, type(gram) if isinstance(gram, Goal) else Objective)
    _check_powers(spec, name)
    limits = [_nonnegative("max_log_scale", max_log_scale)]
    if isinstance(gram, Goal):
        _check_goal(gram, name, limits)
        limits.append(gram.limit)
        gram = gram._replace(limit=None)
    goal = gram if isinstance(gram, Goal) else path_objective(spec, gram)
    chosen = METHODS[name]
    limit = min((bound for bound in limits if bound is not None), default=None)
    # Numbers are arguments of the compiled function, so that changing them compiles nothing. The
    # dtype, and with it the default tolerance, is known only inside.
    steps, tol = _nonnegative("max_steps", max_steps), _nonnegative("tol", tol)
    # Accelerators round the operands of products to fewer digits unless they are told not to, and
    # with those no gradient comes below the tolerance.
    with jax.default_matmul_precision("highest"):
        return _solve(
            _stacked(goal, spec),
            _checked_initial(initial, spec),
            chosen.max_steps if steps is None else int(steps),
            chosen.tol if tol is None else dict.fromkeys(chosen.tol, float(tol)),
            chosen.limit(spec) if limit is None else float(limit),
            limit is not None,
            spec=spec.symmetry,
            method=name,
        )


def _stacked(goal: Goal, spec: ArchSpec) -> Goal:
    """The goal, its masses as the table of stacks has them."""
    table = stacks.table(spec.symmetry)
    if isinstance(goal, Ranges):
        dtype = flat_objective.mass_dtype(goal.term)
        return goal._replace(term=stacks.stacked(goal.term, table, dtype))
    dtype = flat_objective.mass_dtype(*goal.terms, *goal.concave)
    terms, concave = (
        tuple(_typed(stacks.stacked(term, table, dtype), dtype) for term in part)
        for part in (goal.terms, goal.concave)
    )
    return goal._replace(terms=terms, concave=concave)


def _typed(term: LogSum, dtype: Any) -> LogSum:
    """The weight as an array, so that what is compiled for one criterion serves the others."""
    return term._replace(weight=jnp.asarray(term.weight).astype(dtype))


def _method_name(method: str | None, goal: type) -> str:
    fitting = [name for name, entry in METHODS.items() if entry.goal is goal]
    if method is None:
        return fitting[0]
    if method not in fitting:
        unfit = f"method {method!r} does not fit this criterion"
        what = unfit if method in METHODS else f"unknown method {method!r}"
        raise SpecError(f"{what}; there are {', '.join(map(repr, fitting))}")
    return method


def _check_powers(spec: ArchSpec, method: str) -> None:
    if not METHODS[method].power_one or spec.powers == (1.0,):
        return
    name, incidence = next(
        (group.name, incidence)
        for group in spec.groups
        for incidence in (*group.incoming, *group.outgoing)
        if incidence.power != 1
    )
    raise SpecError(
        f"method {method!r} has a closed form for entries that take their neuron's scale to the "
        f"power 1, and in group {name!r} {incidence.path!r} takes the power {incidence.power:g}; "
        "use method='newton' or method='block'"
    )


def _nonnegative(name: str, value: Any) -> Any:
    if is_traced(value):
        raise SpecError(
            f"{name} is traced; it must be a number: bind it before jax.jit, as in "
            f"jax.jit(functools.partial(condition, {name}=1.0))"
        )
    if value is not None and not value >= 0:
        raise SpecError(f"{name} is {value}; it cannot be negative")
    return value


def _checked_initial(initial: Any, spec: ArchSpec) -> LogScales | None:
    if initial is None:
        return None
    given = tuple(log_scales_of(initial))
    wanted = tuple((group.size,) for group in spec.groups)
    shapes = tuple(np.shape(part) for part in given)
    if shapes != wanted:
        raise SpecError(f"initial has shapes {shapes}, the groups of the spec {wanted}")
    return given


def _check_goal(goal: Goal, method: str, limits: list[float | None]) -> None:
    if isinstance(goal, Ranges):
        return
    if goal.concave and goal.limit is None and limits == [None]:
        raise SpecError("an objective with concave terms needs a box: pass max_log_scale")
    if not goal.terms and not goal.smooth and not goal.concave:
        raise SpecError("the objective has no term")
    count = len(goal.terms) + len(goal.smooth)
    if METHODS[method].one_term and (count > 1 or goal.smooth):
        raise SpecError(
            f"method {method!r} minimizes a single logarithm and the objective is a sum of "
            f"{count} functions; use method='newton'"
        )


@functools.partial(jax.jit, static_argnames=("spec", "method"))
def _solve(
    goal: Goal,
    initial: LogScales | None,
    max_steps: int | jax.Array,
    tols: dict[int, float | jax.Array],
    limit: float | jax.Array,
    own_limit: bool | jax.Array,
    *,
    spec: ArchSpec,
    method: str,
) -> Solution:
    chosen = METHODS[method]
    problem = chosen.prepare(goal, spec, jnp.asarray(limit))
    dtype = problem.box.limit.dtype
    z = jnp.zeros((spec.num_neurons,), dtype)
    if initial is None:
        start = chosen.start(problem, spec, z)
    else:
        start = problem.box.start(concatenated(initial, dtype))
    run = chosen.run
    if isinstance(goal, Objective) and goal.concave:
        run = functools.partial(difference.descend, run)
    # Python's numbers under jax.disable_jit.
    tol = jnp.asarray(tols[jnp.finfo(dtype).bits]).astype(dtype)
    found = run(problem, spec, start, jnp.asarray(max_steps, jnp.int32), tol)
    before = found.before if initial is None else None
    if before is None:
        before = chosen.value(problem, stacks.table(spec), z)
    if_clipped = jnp.where(own_limit, Status.CLIPPED, Status.UNBOUNDED)
    return solution_of(found, problem.box, layout(spec).sizes, if_clipped, before)
