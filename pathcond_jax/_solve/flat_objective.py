"""A criterion on the flat vector of all neurons, as the solvers see it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pathcond_jax._solve import stacks
from pathcond_jax._solve.objective import LogSum, Objective, Smooth
from pathcond_jax._solve.stacks import Masses, Table, Weights
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.log_scales import by_group
from pathcond_jax._spec.spec import ArchSpec


class Box(NamedTuple):
    """Which neurons may move, and how far.

    Attributes:
      alive: (H,) booleans; the other neurons keep their log-scale 0.
      limit: the box ``|z| ≤ limit``, a scalar, possibly inf.
      finite: scalar, whether all input was finite and no mass negative.
    """

    alive: jax.Array
    limit: jax.Array
    finite: jax.Array

    def clip(self, z: jax.Array) -> jax.Array:
        """The nearest log-scales in the box."""
        return jnp.clip(z, -self.limit, self.limit)

    def start(self, z: jax.Array) -> jax.Array:
        """Log-scales to begin with: in the box, 0 where they mean nothing."""
        return jnp.where(self.alive & jnp.isfinite(z), self.clip(z), 0)

    def bound(self, z: jax.Array) -> jax.Array:
        """Which neurons are at the faces of the box."""
        return self.alive & (jnp.abs(z) >= self.limit)

    def projected(self, z: jax.Array, gradient: jax.Array) -> jax.Array:
        """The gradient without what the box, or a neuron that keeps 0, absorbs."""
        outward = self.bound(z) & (jnp.sign(gradient) * z <= 0)
        return jnp.where(self.alive & ~outward, gradient, 0)

    def reach(self, z: jax.Array, slope: jax.Array) -> jax.Array:
        """The largest ⟨slope, z − y⟩ over y in the box."""
        furthest = slope * z + self.limit * jnp.abs(slope)
        return jnp.where(self.alive & (slope != 0), furthest, 0).sum()


class Problem(NamedTuple):
    """``F(z) = Σ_k w_k log Σ_i a_i^(k) exp(s_k (Bz)_i) + Σ_j v_j f_j(z) − ⟨b, z⟩`` over a box.

    Attributes:
      weights: w, (terms,).
      exponents: s, (terms,).
      linear: b, (H,); None: there is none.
      smooth: v and f.
      scale: Σ w + Σ v, to which tolerances are relative.
      masses: the equilibrated a of each term.
      box: where z may be.
      concave: a problem whose F is subtracted from this one's; None: nothing is, F is convex.
    """

    weights: jax.Array
    exponents: jax.Array
    linear: jax.Array | None
    smooth: tuple[Smooth, ...]
    scale: jax.Array
    masses: tuple[Masses, ...]
    box: Box
    concave: "Problem | None" = None

    def slopes(self) -> jax.Array:
        """b, zeros where there is none."""
        nothing = jnp.zeros(self.box.alive.shape, self.box.limit.dtype)
        return nothing if self.linear is None else self.linear


class Run(NamedTuple):
    """Where a method stopped.

    Attributes:
      z: (H,) log-scales.
      num_steps: steps or sweeps.
      num_products: passes over the masses.
      converged: whether the method's own test was met.
      suboptimality: an upper bound of F(z) − min F.
      value: F(z).
      gradient_norm: the norm of its gradient, projected on the box.
      before: F at log-scales 0, if that is where it was to start; None: it does not know.
    """

    z: jax.Array
    num_steps: jax.Array
    num_products: jax.Array
    converged: jax.Array
    suboptimality: jax.Array
    value: jax.Array
    gradient_norm: jax.Array
    before: jax.Array | None = None


Minimize = Callable[[Any, ArchSpec, jax.Array, jax.Array, jax.Array], Run]
"""A method: ``(problem, spec, z, max_steps, tol)`` to where it stopped."""


class Sums(NamedTuple):
    """The sums of one term at a point, relative to their total.

    Attributes:
      total: log S.
      met: (H,) logarithms of the outgoing mass of each neuron over S, then of the incoming mass;
        the same again for each further power of ``table.powers``.
      positions: logarithms of the sums over rows and columns over S.
    """

    total: jax.Array
    met: tuple[jax.Array, ...]
    positions: jax.Array


def make(objective: Objective, spec: ArchSpec, limit: jax.Array) -> Problem:
    """Checks and equilibrates an objective whose masses are stacked."""
    return _problem(objective, spec, limit, mass_dtype(*objective.terms, *objective.concave))


def _problem(objective: Objective, spec: ArchSpec, limit: jax.Array, dtype: Any) -> Problem:
    table, terms = stacks.table(spec), objective.terms
    linear = None if objective.linear is None else jnp.asarray(objective.linear).astype(dtype)
    finite, origin = jnp.asarray(objective.finite), jnp.zeros((table.size,), dtype)
    for term in terms:
        finite &= stacks.are_masses(term)
    for function in objective.smooth:
        finite &= jnp.isfinite(smooth_value(function, table, origin))
    concave = None
    if objective.concave:
        concave = _problem(Objective(objective.concave), spec, limit, dtype)
        finite &= concave.box.finite
    weights, exponents, extra = (
        jnp.asarray([jnp.asarray(number).astype(dtype) for number in numbers], dtype)
        for numbers in (
            [term.weight for term in terms],
            [term.exponent for term in terms],
            [part.weight for part in objective.smooth],
        )
    )
    problem = Problem(
        weights=weights,
        exponents=exponents,
        linear=linear,
        smooth=objective.smooth,
        scale=weights.sum() + extra.sum(),
        masses=tuple(stacks.equilibrate(term, finite) for term in terms),
        box=Box(jnp.ones(origin.shape, bool), jnp.asarray(limit).astype(dtype), finite),
        concave=concave,
    )
    return tilted(problem, table, linear)


def at_zero(problem: Problem, spec: ArchSpec, z: jax.Array) -> jax.Array:
    """Where a method begins whose minimum does not depend on it."""
    del problem, spec
    return z


def tilted(problem: Problem, table: Table, linear: jax.Array | None) -> Problem:
    """The same problem with another linear part, which decides anew who may move."""
    finite = problem.box.finite
    if linear is not None:
        finite &= jnp.isfinite(linear).all()
        linear = jnp.where(finite, linear, 0)
    problem = problem._replace(linear=linear)
    # What a function of one's own, or a concave one, demands of a neuron without masses is not
    # known.
    alive = jnp.ones_like(problem.box.alive)
    if not problem.smooth and problem.concave is None:
        alive = _alive(table, problem.weights * problem.exponents, problem.slopes(), problem.masses)
    return problem._replace(box=problem.box._replace(alive=finite & alive, finite=finite))


def mass_dtype(*terms: LogSum) -> Any:
    """The dtype to solve in: the widest of all masses."""
    dtypes = [mass.dtype for term in terms for mass in term.masses]
    return compute_dtype(*dtypes) if terms else jnp.zeros(()).dtype


def smooth_value(part: Smooth, table: Table, z: jax.Array) -> jax.Array:
    """One smooth function at z, v f(z)."""
    value = part.function(by_group(z, table.sizes))
    return jnp.asarray(part.weight).astype(z.dtype) * jnp.asarray(value).astype(z.dtype)


def smooth_part(problem: Problem, table: Table, z: jax.Array) -> jax.Array:
    """All smooth functions at z, Σ v f(z)."""
    zero = jnp.zeros((), z.dtype)
    return sum((smooth_value(part, table, z) for part in problem.smooth), zero)


def weights(problem: Problem, table: Table, term: int, z: jax.Array) -> Weights:
    """One term at z, its masses divided by their sum: probabilities of the entries."""
    masses = problem.masses[term]
    exponents = masses.logs + problem.exponents[term] * stacks.spread(table, z)
    return stacks.weights(masses, table, exponents)


def log_sums(problem: Problem, table: Table, term: int, z: jax.Array) -> Sums:
    """The sums of one term at z, from matrix-vector products with the equilibrated masses."""
    return sums_of(table, weights(problem, table, term, z))


def sums_of(table: Table, weights: Weights) -> Sums:
    """The sums of one term whose masses are known at a point."""
    return Sums(weights.total, stacks.collect_log(table, weights.logs), weights.logs)


def value(problem: Problem, table: Table, z: jax.Array) -> jax.Array:
    """F alone, which takes half the products."""
    found = smooth_part(problem, table, z) - jnp.dot(problem.slopes(), z)
    shifts = stacks.spread(table, z)
    for w, s, masses in zip(problem.weights, problem.exponents, problem.masses, strict=True):
        found = found + w * stacks.log_total(masses, table, masses.logs + s * shifts)
    return found if problem.concave is None else found - value(problem.concave, table, z)


def value_and_gradient(problem: Problem, table: Table, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """F and its gradient."""
    value, gradient = jax.value_and_grad(lambda z: smooth_part(problem, table, z))(z)
    slopes = problem.slopes()
    value, gradient = value - jnp.dot(slopes, z), gradient - slopes
    for k, (w, s) in enumerate(zip(problem.weights, problem.exponents, strict=True)):
        sums = log_sums(problem, table, k, z)
        value = value + w * sums.total
        # A term without any mass is −inf wherever z is; it has no share of mass to speak of.
        shares = stacks.differences(table, tuple(map(jnp.exp, sums.met)))
        gradient = gradient + w * s * jnp.where(sums.total > -jnp.inf, shares, 0)
    return value, gradient


def measured(problem: Problem, table: Table, z: jax.Array) -> tuple[jax.Array, ...]:
    """The bound of the suboptimality from the slope alone, F and the projected gradient's norm."""
    value, gradient = value_and_gradient(problem, table, z)
    norm = jnp.linalg.norm(problem.box.projected(z, gradient))
    return problem.box.reach(z, gradient), value, norm


def _alive(
    table: Table, slopes: jax.Array, linear: jax.Array, masses: tuple[Masses, ...]
) -> jax.Array:
    """The neurons for which F grows in both directions: those with both kinds of mass."""
    rising, falling = jnp.zeros_like(linear), jnp.zeros_like(linear)
    for slope, term in zip(slopes, masses, strict=True):
        present = (term.logs > -jnp.inf).astype(linear.dtype)
        met = [jnp.minimum(side, 1) for side in stacks.collect(table, present)]
        out, into = (_furthest(table, side) for side in (met[::2], met[1::2]))
        up, down = jnp.where(slope > 0, out, into), jnp.where(slope > 0, into, out)
        rising, falling = rising + jnp.abs(slope) * up, falling + jnp.abs(slope) * down
    return (rising > jnp.maximum(linear, 0)) & (falling > jnp.maximum(-linear, 0))


def _furthest(table: Table, present: list[jax.Array]) -> jax.Array:
    """The largest of the powers that are present: far out, its masses outgrow the others."""
    pairs = zip(table.powers, present, strict=True)
    return functools.reduce(jnp.maximum, [some if p == 1 else p * some for p, some in pairs])
