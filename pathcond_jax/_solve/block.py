"""Exact minimization over whole groups at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._solve import flat_objective, stacks
from pathcond_jax._solve.flat_objective import Problem, Run, Sums
from pathcond_jax._solve.one_neuron import Neurons, log_masses, log_x, neurons_at
from pathcond_jax._solve.stacks import Table
from pathcond_jax._spec.spec import ArchSpec


class Color(NamedTuple):
    """Sets of groups that :func:`block_sweep` moves together, one after the other.

    Attributes:
      mask: (colors, H) booleans, their neurons.
      joined: (colors,) booleans, whether an entry may meet two neurons of the set.
    """

    mask: np.ndarray
    joined: np.ndarray


def block(
    problem: Problem, spec: ArchSpec, z: jax.Array, max_steps: jax.Array, tol: jax.Array
) -> Run:
    """Sweeps over sets of groups, each moved to its exact joint minimum.

    Groups without a common entry share only S, so even and odd layers of a chain move in turn.
    Stops when Σ|Δ(2z)| over a sweep is below ``tol``.
    """

    def unfinished(state: tuple) -> jax.Array:
        return (state[2] < max_steps) & (state[1] >= tol)

    def body(state: tuple) -> tuple:
        z, _, step = state
        moved = block_sweep(problem, spec, z)
        return moved, 2 * jnp.abs(moved - z).sum(), step + 1

    start = (z, jnp.full((), jnp.inf, z.dtype), jnp.zeros((), jnp.int32))
    z, moved, step = lax.while_loop(unfinished, body, start)
    products = step * len(colors(spec).mask) + 1
    return Run(
        z, step, products, moved < tol, *flat_objective.measured(problem, stacks.table(spec), z)
    )


def block_sweep(problem: Problem, spec: ArchSpec, z: jax.Array) -> jax.Array:
    """One exact minimization over each color in turn; never increases F."""
    table, sets = stacks.table(spec), colors(spec)

    def step(z: jax.Array, color: Color) -> tuple[jax.Array, None]:
        return block_step(
            problem, table, color, z, flat_objective.log_sums(problem, table, 0, z)
        ), None

    z, _ = lax.scan(step, z, sets)
    return z


@functools.lru_cache(maxsize=64)
def colors(spec: ArchSpec) -> Color:
    """Sets of groups without common entries; two sets where the graph of groups allows it."""
    table, count = stacks.table(spec), len(spec.groups)
    # Groups are neighbors if an entry may meet neurons of both: then they cannot move at once.
    near: list[set[int]] = [set() for _ in range(count)]
    for piece in table.pieces:
        sides = [
            set(stacks.groups_of(slot, table))
            for slots in (piece.rows, piece.cols)
            for slot in slots
        ]
        for i, one in enumerate(sides):
            for other in sides[i + 1 :]:
                for group in one:
                    near[group] |= other
                for group in other:
                    near[group] |= one
    # A group that is its own neighbor moves by the bound, which others need not pay for.
    looped = [k in near[k] for k in range(count)]
    chosen: dict[int, int] = {}
    while len(chosen) < count:
        # DSATUR, which is exact on bipartite graphs: next comes the group that sees most colors.
        taken = {
            k: {chosen[n] for n in near[k] & set(chosen)} for k in range(count) if k not in chosen
        }
        group = max(taken, key=lambda k: (len(taken[k]), len(near[k]), -k))
        chosen[group] = min(set(range(count)) - taken[group])
    palette = sorted({(looped[k], chosen[k]) for k in range(count)})
    mask = np.zeros((len(palette), table.size), bool)
    for k in range(count):
        mask[palette.index((looped[k], chosen[k])), table.starts[k] : table.starts[k + 1]] = True
    return Color(mask, np.array([joined for joined, _ in palette]))


def block_step(problem: Problem, table: Table, color: Color, z: jax.Array, sums: Sums) -> jax.Array:
    """The exact minimum over one color; of an upper bound of F if its neurons meet on edges.

    Neurons that never meet share only S, which makes their joint minimum a scalar equation
    (:func:`_together`). Neurons that do meet, on a recurrent kernel, have masses e^{s(a − b)}
    between them and no such equation. Then S is bounded from above by a sum that separates again,
    and the bound is minimized in place of S: a step that cannot increase F.

    The bound, for entries between two moving neurons, is e^{a − b} ≤ (e^{2a} + e^{−2b})/2, and
    e^a ≤ (e^{2a} + 1)/2 for the others: with Δ = δ/2, S(z + Δ) ≤ (D' + Σ_h B_h e^{sδ_h} +
    C_h e^{−sδ_h})/2, D' = 2S − Σ_h (B_h + C_h), is separable and exact at δ = 0. So the same
    equation serves with D' for D, half the tilt and twice the box, and δ is twice the step: this is
    the ``factor`` below.

    Where F has no linear part the minimum over a neuron does not depend on S, so that there is no
    equation to solve: a fraction of the program.
    """
    moving, factor = problem.box.alive & color.mask, jnp.where(color.joined, 2, 1).astype(z.dtype)
    neurons = neurons_at(problem, sums.met, z, powers=table.powers)
    neurons = neurons._replace(
        tilt=neurons.tilt / factor,
        alive=moving,
        low=factor * neurons.low,
        high=factor * neurons.high,
    )
    if problem.linear is None:
        moved = log_x(neurons, jnp.zeros((), z.dtype), table.powers)
        return problem.box.clip(z + moved / (factor * problem.exponents[0]))
    mass = jnp.where(moving, functools.reduce(jnp.add, map(jnp.exp, sums.met)), 0).sum()
    rest = _untouched(table, moving, jnp.exp(sums.positions))
    rest = jnp.where(color.joined, jnp.maximum(2 - mass, 0), rest)
    moved = _together(neurons, rest, table.powers)
    return problem.box.clip(z + moved / (factor * problem.exponents[0]))


def _untouched(table: Table, moving: jax.Array, masses: jax.Array) -> jax.Array:
    """The mass of the entries that meet no moving neuron, when none meets two."""
    met = stacks.spread_any(table, moving)
    parts = jnp.stack(
        [jnp.where(met, 0, masses), jnp.where(met, masses, 0), met.astype(masses.dtype)]
    )
    rest = jnp.zeros((), masses.dtype)
    for rows, cols in stacks.side_sums(table, parts):
        (row_still, _, rows_met), (col_still, col_moving, cols_met) = rows, cols
        # Where only one side moves, its still slices are the rest: a sum, without cancellation.
        both = jnp.maximum(row_still - col_moving, 0)
        left = jnp.where(rows_met > 0, both, col_still)
        rest = rest + jnp.where(cols_met > 0, left, row_still).sum()
    return rest


def _together(neurons: Neurons, rest: jax.Array, powers: tuple[float, ...]) -> jax.Array:
    """log x of neurons that share only S and move at once.

    S solves ``S = D + Σ_h B_h x_h(S) + C_h / x_h(S)``. The right side grows more slowly than S,
    so there is one root; Newton's steps on its logarithm are kept inside a bracket. (With powers p,
    the masses at x are B x^p and C / x^p. By Cauchy and Schwarz all of this remains.)
    """
    log_rest = jnp.log(rest)
    gain = jnp.log(jnp.abs(neurons.tilt))

    def grown(total: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = log_x(neurons, total, powers)
        mass, curvature = log_masses(neurons, at, powers)
        mass = jnp.where(neurons.alive, mass, -jnp.inf)
        value = stacks.logsumexp(jnp.append(mass, log_rest))
        # d mass / d log S = (tilt S)² / curvature where x is not held by the box.
        free = (mass > -jnp.inf) & (at > neurons.low) & (at < neurons.high)
        slope = jnp.where(free, jnp.exp(2 * (gain + total) - curvature - value), 0).sum()
        return value - total, jnp.clip(slope, 0, 1)

    def body(state: tuple) -> tuple:
        total, low, high, _, step = state
        gap, slope = grown(total)
        low, high = jnp.where(gap > 0, total, low), jnp.where(gap > 0, high, total)
        tiny = jnp.finfo(total.dtype).eps
        following = total + gap / jnp.maximum(1 - slope, tiny)
        outside = (following <= low) | (following >= high)
        following = jnp.where(outside & (gap != 0), 0.5 * (low + high), following)
        moved = jnp.abs(following - total) / (1 + jnp.abs(total))
        return following, low, high, moved, step + 1

    def unfinished(state: tuple) -> jax.Array:
        return (state[3] > 2 * jnp.finfo(rest.dtype).eps) & (state[4] < 60)

    # From log S = 0, the sum before the move, relative to which all masses are given.
    infinity = jnp.full_like(rest, jnp.inf)
    start = (jnp.zeros_like(rest), -infinity, infinity, infinity, jnp.zeros((), jnp.int32))
    total = lax.while_loop(unfinished, body, start)[0]
    return log_x(neurons, total, powers)
