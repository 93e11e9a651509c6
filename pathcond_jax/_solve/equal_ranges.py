"""Equal ranges: a fixed point at which incoming and outgoing maxima of every neuron agree.

Maxima of all neurons agree at many points of an orbit as soon as one entry is the largest of both
its neurons, in depthwise and residual networks almost always. Which of them sweeps reach depends on
where they start, and on nothing else: a whole step sets

    z_h ← ½ max_k (log |θ_hk| + z_k) + ½ min_j (z_j − log |θ_jh|),

which is monotone in z and moves by at most c where c is added to all z, so that it moves no two
points further apart in the maximum norm, and half steps, the box and sweeps do not either. Sweeps
thus start at the minimum of a strictly convex function (:func:`start`), which is one point of each
orbit: all representatives get the parameters of one fixed point, and what rounding leaves of a
difference at the start does not grow.

With ranges that are given and α > 0 a step sets ``z_h ← (1 − α) max_k (log |θ_hk| + z_k) − α a_h``,
a contraction by 1 − α: there is one fixed point, whatever the start.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._solve import flat_objective, stacks
from pathcond_jax._solve.block import colors
from pathcond_jax._solve.flat_objective import Box, Problem, Run
from pathcond_jax._solve.newton import newton
from pathcond_jax._solve.objective import LogSum, Ranges
from pathcond_jax._solve.stacks import Masses, Table
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.log_scales import concatenated
from pathcond_jax._spec.spec import ArchSpec

# The norm whose minimum is the start. A larger one is nearer to equal ranges, which saves sweeps,
# and sees less of the neurons of small weights.
_NORM = 4
_NEWTON_STEPS = 50

# Powers of the scales and, for each, the logarithms of the ranges that take it.
_Side = tuple[tuple[float | jax.Array, jax.Array], ...]


class RangeProblem(NamedTuple):
    """``(1 − α) log out = α log in`` over a box, for the flat vector of all neurons.

    Attributes:
      term: the largest absolute weights, stacked.
      given: as in :class:`Balance`.
      alpha: α.
      box: where z may be.
    """

    term: LogSum
    given: jax.Array | None
    alpha: jax.Array
    box: Box

    def balance(self, start: jax.Array) -> "Balance":
        """The problem with equilibrated masses, of which there are none until ``start`` is known.

        What finds the start holds masses of its own: three arrays of their size are one too many.
        """
        masses = stacks.equilibrate(self.term, self.box.finite & jnp.isfinite(start).all())
        return Balance(masses, self.given, self.alpha, self.box)


class Balance(NamedTuple):
    """The ranges at any log-scales.

    Attributes:
      masses: the equilibrated largest absolute weights.
      given: (H,), the logarithms of the incoming ranges at z = 0; None: those of the masses. They
        are of what the outgoing weights read, and take their power of the scale.
      alpha: α.
      box: where z may be.
    """

    masses: Masses
    given: jax.Array | None
    alpha: jax.Array
    box: Box

    def gaps(self, table: Table, z: jax.Array) -> jax.Array:
        """``(1 − α) log out − α log in``, 0 for neurons that lack either."""
        sides = self._ranges(table, z)
        out, into = (functools.reduce(jnp.maximum, [logs for _, logs in side]) for side in sides)
        return self._known((1 - self.alpha) * out - self.alpha * into)

    def steps(self, table: Table, z: jax.Array) -> jax.Array:
        """By how much each log-scale has to change for its gap to close, were the others to stay.

        With powers p of what leaves and q of what enters, this is the δ for which
        ``(1 − α) max_p (log out_p − p δ) = α max_q (log in_q + q δ)``. Of one p and one q it is a
        quotient. The left side falls, so that of several p the largest δ counts; the right side
        grows, so that of several q the least does.
        """
        if table.powers == (1.0,):
            return self.gaps(table, z)
        outs, intos = self._ranges(table, z)
        least = jnp.full_like(z, jnp.inf)
        for q, into in intos:
            largest = jnp.full_like(z, -jnp.inf)
            for p, out in outs:
                gap = (1 - self.alpha) * out - self.alpha * into
                step = gap / ((1 - self.alpha) * p + self.alpha * q)
                largest = jnp.maximum(largest, jnp.where(out > -jnp.inf, step, -jnp.inf))
            least = jnp.minimum(least, jnp.where(into > -jnp.inf, largest, jnp.inf))
        return self._known(least)

    def _ranges(self, table: Table, z: jax.Array) -> tuple[_Side, _Side]:
        met = _log_ranges(self.masses, table, z)
        outs, intos = (
            tuple(zip(table.powers, side, strict=True)) for side in (met[::2], met[1::2])
        )
        if self.given is None:
            return outs, intos
        if table.powers == (1.0,):
            return outs, ((1.0, self.given + z),)
        read = [jnp.where(out > -jnp.inf, jnp.full_like(z, p), 0) for p, out in outs]
        power = functools.reduce(jnp.maximum, read)
        return outs, ((power, self.given + power * z),)

    def _known(self, values: jax.Array) -> jax.Array:
        return jnp.where(self.box.finite & jnp.isfinite(values), values, 0)


def make(ranges: Ranges, spec: ArchSpec, limit: jax.Array) -> RangeProblem:
    """Checks and equilibrates ranges whose masses are stacked."""
    table, term = stacks.table(spec), ranges.term
    dtype = compute_dtype(*(mass.dtype for mass in term.masses))
    finite, given = stacks.are_masses(term), None
    if ranges.given is not None:
        given = concatenated(ranges.given, dtype)
        finite &= (given < jnp.inf).all()
    alive = jnp.broadcast_to(finite, (table.size,))
    box = Box(alive, jnp.asarray(limit).astype(dtype), finite)
    alpha = jnp.asarray(ranges.alpha, dtype)
    return RangeProblem(term, given, alpha, box)


def start(problem: RangeProblem, spec: ArchSpec, z: jax.Array) -> jax.Array:
    """The log-scales of the least 4-norm of the ranges; z where incoming ranges are given."""
    if problem.given is not None:
        return z
    table, box = stacks.table(spec), problem.box
    one = jnp.ones((1,), z.dtype)
    furthest = 0.45 * float(np.log(jnp.finfo(z.dtype).max))
    ranges = stacks.equilibrate(problem.term, box.finite)
    masses = Masses(tuple(values**_NORM for values in ranges.values), _NORM * ranges.logs)
    norm = Problem(
        weights=one,
        exponents=-_NORM * one,
        linear=None,
        smooth=(),
        scale=one.sum(),
        masses=(masses,),
        box=box._replace(limit=jnp.minimum(box.limit, furthest)),
    )
    norm = flat_objective.tilted(norm, table, None)
    # As exactly as rounding allows: what is left of a difference here stays.
    steps, tol = jnp.asarray(_NEWTON_STEPS, jnp.int32), jnp.zeros((), z.dtype)
    run = newton(norm, spec, z, steps, tol)
    return run.z


def largest_gap(problem: RangeProblem, table: Table, z: jax.Array) -> jax.Array:
    """How far the ranges of any neuron are from agreeing."""
    return jnp.abs(problem.balance(z).gaps(table, z)).max()


def fixed_point(
    problem: RangeProblem, spec: ArchSpec, z: jax.Array, max_steps: jax.Array, tol: jax.Array
) -> Run:
    """Sweeps over sets of groups until no log-scale moves by more than ``tol``.

    A step makes the ranges of a neuron agree, were its neighbors to stay. The value of the run is
    the largest gap that is left and its gradient norm the Euclidean norm of the gaps; nothing
    bounds the suboptimality, since nothing is minimized.
    """
    table, sets, balance = stacks.table(spec), colors(spec), problem.balance(z)
    before = jnp.abs(balance.gaps(table, jnp.zeros_like(z))).max()

    def sweep(state: tuple) -> tuple:
        last, _, step = state
        z = last
        for mask, joined in zip(*sets, strict=True):
            # Where neurons of a color meet on an edge, whole steps could go back and forth.
            length = 0.5 if joined else 1.0
            z = problem.box.clip(jnp.where(mask, z + length * balance.steps(table, z), z))
        return z, jnp.abs(z - last).max(), step + 1

    infinity = jnp.full((), jnp.inf, z.dtype)
    z, moved, steps = lax.while_loop(
        lambda state: (state[1] > tol) & (state[2] < max_steps),
        sweep,
        (z, infinity, jnp.zeros((), jnp.int32)),
    )
    left = balance.gaps(table, z)
    products = 1 + len(sets.mask) * steps
    largest, norm = jnp.abs(left).max(), jnp.linalg.norm(left)
    return Run(z, steps, products, moved <= tol, infinity, largest, norm, before)


def _log_ranges(masses: Masses, table: Table, z: jax.Array) -> tuple[jax.Array, ...]:
    """The logarithms of the largest outgoing and of the largest incoming weight: (H,) each."""
    inner, rest = stacks.levels(table, masses.logs - stacks.spread(table, z))
    sides = zip(masses.values, stacks.split_sides(table, inner), strict=True)
    maxima = [((v * y[:, None, :]).max(2), (v * x[:, :, None]).max(1)) for v, (x, y) in sides]
    logs = rest + jnp.log(stacks.join_sides(maxima))
    return stacks.over_neurons(table, logs, -jnp.inf, lambda met: met.max(1))
