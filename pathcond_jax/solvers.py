"""Solvers: from a Gram diagonal, or any criterion, to the log-scales that minimize it.

Every criterion is ``F(z) = Σ_k w_k log Σ_i a_i^(k) exp(s_k (Bz)_i) − ⟨b, z⟩``, convex in the
log-scales z, and every method sees it through the sums of :mod:`pathcond_jax.blocks`.
"""

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp

from pathcond_jax import blocks
from pathcond_jax.blocks import Masses, Sides, Table
from pathcond_jax.criteria import Objective, ScaledDiagonal, compute_dtype, path_objective
from pathcond_jax.spec import ArchSpec, PyTree, SpecError, match_leaves


class Status(enum.IntEnum):
    """How a solve ended: ``Status(int(solution.status)).name``."""

    CONVERGED = 0
    STEP_LIMIT = 1
    NON_FINITE = 2
    UNBOUNDED = 3
    CLIPPED = 4


class Solution(NamedTuple):
    """Log-scales and what is known about them.

    Attributes:
      log_scales: z, one ``(group.size,)`` array per group of the spec.
      objective: F(z); NaN where the input was not finite.
      gradient_norm: Euclidean norm of the gradient of F at z, over the neurons that may move;
        components that push a neuron out of the box ``max_log_scale`` do not count.
      suboptimality: an upper bound of F(z) − min F.
      num_steps: Newton steps, or sweeps.
      num_products: passes over the masses, each two matrix-vector products per block.
      status: a :class:`Status` code, int32.
    """

    log_scales: tuple[jax.Array, ...]
    objective: jax.Array
    gradient_norm: jax.Array
    suboptimality: jax.Array
    num_steps: jax.Array
    num_products: jax.Array
    status: jax.Array


class Problem(NamedTuple):
    """An objective on the flat vector of neurons.

    Attributes:
      weights: w, (terms,).
      exponents: s, (terms,).
      linear: b, (H,).
      masses: the equilibrated masses of each term.
      alive: (H,) booleans; the other neurons keep their log-scale 0.
      limit: scalar, the box |z| ≤ limit; inf if there is none.
      finite: scalar, whether all input was finite and no mass negative.
    """

    weights: jax.Array
    exponents: jax.Array
    linear: jax.Array
    masses: tuple[Masses, ...]
    alive: jax.Array
    limit: jax.Array
    finite: jax.Array


class _Run(NamedTuple):
    """Where a method stopped."""

    z: jax.Array
    num_steps: jax.Array
    num_products: jax.Array
    converged: jax.Array
    frozen: jax.Array
    bound: jax.Array


class _Evaluation(NamedTuple):
    objective: jax.Array
    gradient: jax.Array
    curvature: jax.Array


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
    entry = _METHODS.get(method)
    if entry is None:
        raise SpecError(f"unknown method {method!r}; there are {', '.join(map(repr, _METHODS))}")
    if not spec.num_neurons:
        raise SpecError("no neuron to rescale: the spec has no groups")
    if isinstance(gram, Objective):
        if not gram.terms:
            raise SpecError("the objective has no term")
    else:
        match_leaves(spec, gram.mantissa if isinstance(gram, ScaledDiagonal) else gram, "gram")
    max_steps = entry.max_steps if max_steps is None else max_steps
    if max_steps < 0:
        raise SpecError(f"max_steps is {max_steps}; it cannot be negative")
    if tol is not None and not tol >= 0:
        raise SpecError(f"tol is {tol}; it cannot be negative")
    if max_log_scale is not None and not max_log_scale >= 0:
        raise SpecError(f"max_log_scale is {max_log_scale}; it cannot be negative")
    return _solve(
        gram,
        initial,
        max_steps,
        tol,
        max_log_scale,
        spec=spec,
        method=method,
    )


@functools.partial(jax.jit, static_argnames=("spec", "method"))
def _solve(gram, initial, max_steps, tol, limit, *, spec, method):
    objective = gram if isinstance(gram, Objective) else path_objective(spec, gram)
    entry = _METHODS[method]
    table = blocks.table(spec, entry.stacked)
    problem = _problem(objective, spec, table, limit)
    dtype = problem.linear.dtype
    z = jnp.zeros((table.size,), dtype)
    if initial is not None:
        z = jnp.concatenate([jnp.asarray(part).astype(dtype) for part in initial])
    z = jnp.where(problem.alive, jnp.clip(z, -problem.limit, problem.limit), 0)
    run = entry.run(problem, table, spec, z, max_steps, entry.tol(dtype) if tol is None else tol)
    return _solution(problem, table, spec, run)


def _problem(objective: Objective, spec: ArchSpec, table: Table, limit: Any) -> Problem:
    terms = objective.terms
    dtype = compute_dtype(*(mass.dtype for term in terms for mass in term.masses))
    finite = jnp.array(True)
    for array in jax.tree.leaves([(term.masses, term.log_scales) for term in terms]):
        finite &= jnp.isfinite(array).all()
    for mass in jax.tree.leaves([term.masses for term in terms]):
        finite &= (mass >= 0).all()
    clean = jax.tree.map(
        lambda a: jnp.where(finite, a, 0), [term._replace(weight=1.0, exponent=1.0) for term in terms]
    )
    masses = tuple(blocks.equilibrate(term, table, dtype) for term in clean)
    weights = jnp.stack([jnp.asarray(term.weight).astype(dtype) for term in terms])
    exponents = jnp.stack([jnp.asarray(term.exponent).astype(dtype) for term in terms])
    linear = jnp.concatenate([jnp.asarray(part).astype(dtype) for part in objective.linear])
    rising, falling = jnp.zeros_like(linear), jnp.zeros_like(linear)
    for w, s, mass in zip(weights, exponents, masses, strict=True):
        present = [
            ((rows > -jnp.inf).astype(dtype), (cols > -jnp.inf).astype(dtype))
            for rows, cols in zip(mass.row_logs, mass.col_logs, strict=True)
        ]
        out, into = (jnp.minimum(side, 1) for side in blocks.collect(table, present))
        slope = jnp.abs(w * s)
        rising = rising + slope * jnp.where(s > 0, out, into)
        falling = falling + slope * jnp.where(s > 0, into, out)
    alive = (rising > jnp.maximum(linear, 0)) & (falling > jnp.maximum(-linear, 0)) & finite
    bound = jnp.asarray(jnp.inf if limit is None else limit).astype(dtype)
    return Problem(weights, exponents, linear, masses, alive, bound, finite)


def _evaluate(problem: Problem, table: Table, z: jax.Array) -> _Evaluation:
    """F, its gradient and the Jacobi bound of its Hessian's diagonal."""
    sides = blocks.spread(table, z)
    value, gradient, curvature = -problem.linear @ z, -problem.linear, jnp.zeros_like(z)
    for w, s, masses in zip(problem.weights, problem.exponents, problem.masses, strict=True):
        logs = blocks.all_log_sums(masses, blocks.exponents(masses, s, sides))
        total = blocks.log_total(logs)
        shares = [(jnp.exp(rows - total), jnp.exp(cols - total)) for rows, cols in logs]
        out, into = blocks.collect(table, shares)
        value = value + w * total
        gradient = gradient + w * s * (out - into)
        curvature = curvature + w * s * s * (out + into)
    return _Evaluation(value, gradient, curvature)


def _solution(problem: Problem, table: Table, spec: ArchSpec, run: _Run) -> Solution:
    z = jnp.where(problem.alive & ~run.frozen, run.z, 0)
    evaluation = _evaluate(problem, table, z)
    gradient = _projected(problem, z, evaluation.gradient)
    status = Status.CONVERGED
    clipped = (jnp.abs(z) >= problem.limit) & problem.alive
    status = jnp.where(clipped.any(), Status.CLIPPED, Status.CONVERGED)
    status = jnp.where(run.converged, status, Status.STEP_LIMIT)
    status = jnp.where(run.frozen.any(), Status.UNBOUNDED, status)
    status = jnp.where(problem.finite, status, Status.NON_FINITE).astype(jnp.int32)
    return Solution(
        log_scales=tuple(jnp.split(z, table.starts[1:-1])),
        objective=jnp.where(problem.finite, evaluation.objective, jnp.nan),
        gradient_norm=jnp.where(problem.finite, jnp.linalg.norm(gradient), jnp.nan),
        suboptimality=jnp.where(problem.finite, run.bound, jnp.nan),
        num_steps=run.num_steps,
        num_products=run.num_products,
        status=status,
    )


def _projected(problem: Problem, z: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient without the components that the box or a fixed neuron absorbs."""
    outward = (jnp.abs(z) >= problem.limit) & (gradient * z <= 0)
    return jnp.where(problem.alive & ~outward, gradient, 0)


def _balance(out: jax.Array, into: jax.Array, tilt: jax.Array, total: jax.Array) -> jax.Array:
    """log x for the positive root of ``B x² + tilt · S x − C = 0``, all but the tilt as logs.

    With x = sqrt(C/B) v it reads v² + 2κ v − 1 = 0, so log v = −asinh κ: nothing cancels.
    """
    size = jnp.log(jnp.abs(tilt)) + total - 0.5 * (out + into) - float(np.log(2))
    large = size + jnp.log1p(jnp.sqrt(1 + jnp.exp(-2 * jnp.maximum(size, 0))))
    root = jnp.where(size > 0, large, jnp.arcsinh(jnp.exp(jnp.minimum(size, 0))))
    return 0.5 * (into - out) - jnp.sign(tilt) * root


class _Part(NamedTuple):
    """One side of a stack that a group meets: segments are outgoing, incoming, neither."""

    stack: int
    side: int
    segments: np.ndarray


class _Visit(NamedTuple):
    start: int
    size: int
    parts: tuple[_Part, ...]
    coupled: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def _visits(spec: ArchSpec) -> tuple[_Visit, ...]:
    """Where each group meets the unstacked blocks."""
    table = blocks.table(spec, False)
    sizes = [batch * n for batch, *sides in table.shapes for n in sides]
    positions = np.split(table.slots, np.cumsum(sizes)[:-1], axis=1)
    visits = []
    for start, stop in zip(table.starts[:-1], table.starts[1:], strict=True):
        parts, coupled, size = [], [], stop - start
        for stack in range(len(table.shapes)):
            found = []
            for side in (0, 1):
                slots = positions[2 * stack + side]
                out, into = slots - start, slots - table.size - start
                segments = np.where((out >= 0) & (out < size), out, 2 * size)
                segments = np.where((into >= 0) & (into < size), into + size, segments)
                found += [_Part(stack, side, row) for row in segments if (row < 2 * size).any()]
            if len(found) > 1:
                coupled.append(stack)
            else:
                parts += found
        visits.append(_Visit(start, size, tuple(parts), tuple(coupled)))
    return tuple(visits)


def _coordinate(problem: Problem, table: Table, spec: ArchSpec, z, max_steps, tol) -> _Run:
    """The paper's sweeps: each neuron in turn to its exact minimum."""
    _one_term(problem, "coordinate")
    logs = blocks.all_log_sums(
        problem.masses[0],
        blocks.exponents(problem.masses[0], problem.exponents[0], blocks.spread(table, z)),
    )
    totals = jnp.stack([logsumexp(rows) for rows, _ in logs])

    def sweep(state):
        z, totals, _, step = state
        moved = jnp.zeros((), z.dtype)
        for visit in _visits(spec):
            z, totals, change = _visit_group(problem, table, visit, z, totals)
            moved = moved + change
        return z, totals, moved, step + 1

    def unfinished(state):
        return (state[3] < max_steps) & (state[2] >= tol)

    start = (z, totals, jnp.asarray(jnp.inf, z.dtype), jnp.zeros((), jnp.int32))
    z, _, moved, step = lax.while_loop(unfinished, sweep, start)
    frozen = jnp.zeros_like(problem.alive)
    return _Run(z, step, step, moved < tol, frozen, jnp.asarray(jnp.inf, z.dtype))


def _visit_group(problem: Problem, table: Table, visit: _Visit, z, totals):
    """Moves the neurons of one group in turn; they meet only in the total S."""
    masses, s = problem.masses[0], problem.exponents[0]
    here = slice(visit.start, visit.start + visit.size)
    extended = jnp.concatenate([z, -z, jnp.zeros((1,), z.dtype)])
    positions = _positions(table)
    logs, fresh = [], []
    for part in visit.parts:
        a, b = (
            extended[positions[2 * part.stack + side]].sum(0).reshape(table.shapes[part.stack][0], -1)
            for side in (0, 1)
        )
        x = masses.row_logs[part.stack] + s * a
        y = masses.col_logs[part.stack] + s * b
        sums = blocks.log_sums(masses.values[part.stack], x, y)[part.side].reshape(-1)
        logs.append(sums)
        fresh.append(logsumexp(sums))
    touched = np.array([part.stack for part in visit.parts])
    totals = totals.at[touched].set(jnp.stack(fresh))
    total = logsumexp(totals)
    segments = np.concatenate([part.segments for part in visit.parts])
    sums = blocks.segment_logsumexp(jnp.concatenate(logs), segments, 2 * visit.size + 1)
    out, into = sums[: visit.size] - total, sums[visit.size : -1] - total
    others = np.setdiff1d(np.arange(len(table.shapes)), touched)
    rest = jnp.exp(sums[-1] - total) + jnp.exp(totals[others] - total).sum()
    tilt = -problem.linear[here] / (problem.weights[0] * s)
    step = _sequence(out, into, tilt, rest, problem.alive[here], s, z[here], problem.limit)
    z = z.at[here].add(step)
    shift = s * jnp.concatenate([step, -step, jnp.zeros((1,), z.dtype)])
    ends = np.cumsum([part.segments.size for part in visit.parts])[:-1]
    after = [
        logsumexp(log + shift[part.segments])
        for log, part in zip(logs, visit.parts, strict=True)
    ]
    del ends
    return z, totals.at[touched].set(jnp.stack(after)), 2 * jnp.abs(step).sum()


def _sequence(out, into, tilt, rest, alive, s, z, limit):
    """The moves of the neurons of a group, one after the other."""
    mass = jnp.exp(out) + jnp.exp(into)
    later = jnp.cumsum(mass[::-1])[::-1] - mass
    product = jnp.exp(out + into)

    def move(done, neuron):
        mass, later, tilt, product, alive = neuron
        others = rest + later + done
        # S = D + sqrt((tilt S)² + 4BC), solved for S.
        free = 1 - tilt * tilt
        total = (others + jnp.sqrt((tilt * others) ** 2 + 4 * product * free)) / free
        return done + jnp.where(alive, total - others, mass), total

    _, total = lax.scan(move, jnp.zeros((), z.dtype), (mass, later, tilt, product, alive))
    step = _balance(out, into, tilt, jnp.log(total)) / s
    return jnp.where(alive, step, 0)


@functools.lru_cache(maxsize=64)
def _positions_cached(sizes, slots_id):
    raise NotImplementedError


def _positions(table: Table) -> list[np.ndarray]:
    sizes = [batch * n for batch, *sides in table.shapes for n in sides]
    return np.split(table.slots, np.cumsum(sizes)[:-1], axis=1)


def _one_term(problem: Problem, method: str) -> None:
    if len(problem.masses) != 1:
        raise SpecError(
            f"method {method!r} minimizes a single logarithm and this objective has "
            f"{len(problem.masses)}; use method='newton'"
        )


class _Method(NamedTuple):
    run: Any
    stacked: bool
    max_steps: int
    tol: Any


_METHODS = {
    "coordinate": _Method(_coordinate, False, 10, lambda dtype: 1e-2),
}
