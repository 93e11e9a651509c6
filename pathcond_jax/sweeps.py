"""Exact minimization over some of the neurons: one after the other, or whole groups at once.

Both methods treat a single term. With x = exp(s Δz_h), B the outgoing mass of neuron h, C its
incoming mass and D the rest, ``F = w log S − b Δz_h`` where ``S = B x + C/x + D``. It is
stationary where ``B x² + tilt S x − C = 0``, tilt = −b/(w s), which is (#in − #out)/p for the
path criterion: the paper's Lemma 4.1. Masses are handled as logarithms relative to S.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax import blocks, problem
from pathcond_jax.blocks import Masses, Piece, Table
from pathcond_jax.problem import Problem, Run
from pathcond_jax.spec import ArchSpec


class Part(NamedTuple):
    """One side of a piece that carries neurons of a group.

    Attributes:
      piece: position among ``table.pieces``.
      side: 0 for its rows, 1 for its columns.
      segments: for each slice its neuron if the slice leaves it, size + neuron if it enters it,
        2 · size if neither.
    """

    piece: int
    side: int
    segments: np.ndarray


class Visit(NamedTuple):
    """Where the neurons of one group meet the pieces.

    Attributes:
      start: where the group begins in the vector of neurons.
      size: its number of neurons.
      parts: where an entry meets at most one of them, so that they share only the total S.
      joined: where an entry may meet two of them.
    """

    start: int
    size: int
    parts: tuple[Part, ...]
    joined: tuple[Part, ...]


class View(NamedTuple):
    """The equilibrated masses of one piece."""

    values: jax.Array
    logs: tuple[jax.Array, jax.Array]


class Neurons(NamedTuple):
    """What the exact minimum over one neuron, or each of several, depends on but the rest D.

    Attributes:
      out: log B.
      into: log C.
      tilt: −b/(w s).
      alive: whether it may move.
      low: lower bound of log x.
      high: upper bound of log x.
    """

    out: jax.Array
    into: jax.Array
    tilt: jax.Array
    alive: jax.Array
    low: jax.Array
    high: jax.Array


class Minimum(NamedTuple):
    """What S at the minimum over one neuron depends on, in linear form.

    Attributes:
      tilt: −b/(w s).
      product: B C.
      ends: the outgoing and the incoming mass at the lowest x, then at the highest.
    """

    tilt: jax.Array
    product: jax.Array
    ends: tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def coordinate(
    task: Problem, spec: ArchSpec, z: jax.Array, max_steps: jax.Array, tol: jax.Array
) -> Run:
    """The paper's sweeps: every neuron in turn, in forward order, to its exact minimum.

    Stops when Σ|Δ(2z)| over a sweep is below ``tol``, as the authors do.
    """
    table, plan = blocks.table(spec), visits(spec)
    views = _views(task.masses[0], table)
    sums = problem.log_sums(task, table, 0, z)
    rows = sums.positions[np.flatnonzero(table.is_row)] + sums.total
    owners = [np.full(p.shape[0] * p.shape[1], k) for k, p in enumerate(table.pieces)]
    totals = blocks.segment_logsumexp(rows, np.concatenate(owners), len(owners))

    def sweep(state: tuple) -> tuple:
        before, totals, _, step = state
        z = before
        for visit in plan:
            z, totals = _visit(task, table, views, visit, z, totals)
        return z, totals, 2 * jnp.abs(z - before).sum(), step + 1

    def unfinished(state: tuple) -> jax.Array:
        return (state[3] < max_steps) & (state[2] >= tol)

    start = (z, totals, jnp.full((), jnp.inf, z.dtype), jnp.zeros((), jnp.int32))
    z, _, moved, step = lax.while_loop(unfinished, sweep, start)
    return Run(z, step, step + 2, moved < tol, *problem.measured(task, table, z))


@functools.lru_cache(maxsize=64)
def visits(spec: ArchSpec) -> tuple[Visit, ...]:
    """Where each group meets the pieces."""
    table = blocks.table(spec)
    parts: list[list[Part]] = [[] for _ in spec.groups]
    joined: list[list[Part]] = [[] for _ in spec.groups]
    for number, piece in enumerate(table.pieces):
        met: dict[int, list[Part]] = {}
        for side, slots in enumerate((piece.rows, piece.cols)):
            for slot in slots.reshape(slots.shape[0], -1):
                for group in blocks.groups_of(slot, table):
                    segments = _segments(
                        slot, table.starts[group], table.starts[group + 1], table.size
                    )
                    met.setdefault(group, []).append(Part(number, side, segments))
        for group, found in met.items():
            (parts if len(found) == 1 else joined)[group].extend(found)
    ends = zip(table.starts[:-1], table.starts[1:], strict=True)
    return tuple(
        Visit(start, stop - start, tuple(parts[k]), tuple(joined[k]))
        for k, (start, stop) in enumerate(ends)
    )


class Color(NamedTuple):
    """Sets of groups that :func:`block` moves together, one after the other.

    Attributes:
      mask: (colors, H) booleans, their neurons.
      joined: (colors,) booleans, whether an entry may meet two neurons of the set.
    """

    mask: np.ndarray
    joined: np.ndarray


def block(task: Problem, spec: ArchSpec, z: jax.Array, max_steps: jax.Array, tol: jax.Array) -> Run:
    """Sweeps over sets of groups, each moved to its exact joint minimum.

    Groups without a common entry share only S, so even and odd layers of a chain move in turn.
    Stops when Σ|Δ(2z)| over a sweep is below ``tol``.
    """

    def unfinished(state: tuple) -> jax.Array:
        return (state[2] < max_steps) & (state[1] >= tol)

    def body(state: tuple) -> tuple:
        z, _, step = state
        moved = block_sweep(task, spec, z)
        return moved, 2 * jnp.abs(moved - z).sum(), step + 1

    start = (z, jnp.full((), jnp.inf, z.dtype), jnp.zeros((), jnp.int32))
    z, moved, step = lax.while_loop(unfinished, body, start)
    products = step * len(colors(spec).mask) + 1
    return Run(z, step, products, moved < tol, *problem.measured(task, blocks.table(spec), z))


def block_sweep(task: Problem, spec: ArchSpec, z: jax.Array) -> jax.Array:
    """One exact minimization over each color in turn; never increases F."""
    table, plan = blocks.table(spec), colors(spec)
    z, _ = lax.scan(lambda z, color: (_block_step(task, table, color, z), None), z, plan)
    return z


@functools.lru_cache(maxsize=64)
def colors(spec: ArchSpec) -> Color:
    """Sets of groups without common entries; two sets where the graph of groups allows it."""
    table, count = blocks.table(spec), len(spec.groups)
    near: list[set[int]] = [set() for _ in range(count)]
    for piece in table.pieces:
        sides = [
            set(blocks.groups_of(slot, table))
            for slots in (piece.rows, piece.cols)
            for slot in slots
        ]
        for i, one in enumerate(sides):
            for other in sides[i + 1 :]:
                for group in one:
                    near[group] |= other
                for group in other:
                    near[group] |= one
    looped = [k in near[k] for k in range(count)]
    chosen: dict[int, int] = {}
    while len(chosen) < count:
        # DSATUR, which is exact on bipartite graphs: next comes the group that sees most colors.
        taken = {
            k: {chosen[n] for n in near[k] & set(chosen)} for k in range(count) if k not in chosen
        }
        group = max(taken, key=lambda k: (len(taken[k]), len(near[k]), -k))
        chosen[group] = min(set(range(count)) - taken[group])
    kinds = sorted({(looped[k], chosen[k]) for k in range(count)})
    mask = np.zeros((len(kinds), table.size), bool)
    for k in range(count):
        mask[kinds.index((looped[k], chosen[k])), table.starts[k] : table.starts[k + 1]] = True
    return Color(mask, np.array([joined for joined, _ in kinds]))


def _block_step(task: Problem, table: Table, color: Color, z: jax.Array) -> jax.Array:
    """The exact minimum over one color; of an upper bound of F if its neurons meet on edges.

    The bound, for entries between two moving neurons, is e^{a − b} ≤ (e^{2a} + e^{−2b})/2, and
    e^a ≤ (e^{2a} + 1)/2 for the others: with Δ = δ/2, S(z + Δ) ≤ (D' + Σ_h B_h e^{sδ_h} +
    C_h e^{−sδ_h})/2, D' = 2S − Σ_h (B_h + C_h), is separable and exact at δ = 0.
    """
    sums = problem.log_sums(task, table, 0, z)
    moving, factor = task.alive & color.mask, jnp.where(color.joined, 2, 1).astype(z.dtype)
    neurons = _neurons(task, sums.out, sums.into, slice(None), z)
    neurons = neurons._replace(
        tilt=neurons.tilt / factor,
        alive=moving,
        low=factor * neurons.low,
        high=factor * neurons.high,
    )
    mass = jnp.where(moving, jnp.exp(sums.out) + jnp.exp(sums.into), 0).sum()
    rest = _untouched(table, moving, jnp.exp(sums.positions))
    rest = jnp.where(color.joined, jnp.maximum(2 - mass, 0), rest)
    return task.clip(z + _together(neurons, rest) / (factor * task.exponents[0]))


def _untouched(table: Table, moving: jax.Array, masses: jax.Array) -> jax.Array:
    """The mass of the entries that meet no moving neuron, when none meets two."""
    met = blocks.spread_any(table, moving)
    touched = blocks.split(table, jnp.where(met, masses, 0))
    still = blocks.split(table, jnp.where(met, 0, masses))
    flags = blocks.split(table, met)
    rest = jnp.zeros((), masses.dtype)
    for (row_still, col_still), (_, col_met), (row_flags, col_flags) in zip(
        still, touched, flags, strict=True
    ):
        # Where only one side moves, its still slices are the rest: a sum, without cancellation.
        both = jnp.maximum(row_still.sum(1) - col_met.sum(1), 0)
        left = jnp.where(row_flags.any(1), both, col_still.sum(1))
        rest = rest + jnp.where(col_flags.any(1), left, row_still.sum(1)).sum()
    return rest


def _together(neurons: Neurons, rest: jax.Array) -> jax.Array:
    """Log x of neurons that share only S and move at once.

    S solves ``S = D + Σ_h B_h x_h(S) + C_h / x_h(S)``. The right side grows more slowly than S,
    so there is one root; Newton's steps on its logarithm are kept inside a bracket.
    """
    log_rest = jnp.log(rest)
    gain = jnp.log(jnp.abs(neurons.tilt))

    def grown(total: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_x = _log_x(neurons, total)
        mass = jnp.where(
            neurons.alive, jnp.logaddexp(neurons.out + log_x, neurons.into - log_x), -jnp.inf
        )
        value = blocks.logsumexp(jnp.append(mass, log_rest))
        # d mass / d log S = (tilt S)² / mass where x is not held by the box.
        free = (mass > -jnp.inf) & (log_x > neurons.low) & (log_x < neurons.high)
        slope = jnp.where(free, jnp.exp(2 * (gain + total) - mass - value), 0).sum()
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

    infinity = jnp.full_like(rest, jnp.inf)
    start = (jnp.zeros_like(rest), -infinity, infinity, infinity, jnp.zeros((), jnp.int32))
    total = lax.while_loop(unfinished, body, start)[0]
    return _log_x(neurons, total)


def balance(out: jax.Array, into: jax.Array, tilt: jax.Array, total: jax.Array) -> jax.Array:
    """Log x for the positive root of ``B x² + tilt S x − C = 0`` given log B, log C, log S.

    With x = sqrt(C/B) v it reads v² + 2κ v − 1 = 0, so log v = −asinh κ: nothing cancels or
    overflows, whatever the depth of the network.
    """
    size = jnp.log(jnp.abs(tilt)) + total - 0.5 * (out + into) - float(np.log(2))
    large = size + jnp.log1p(jnp.sqrt(1 + jnp.exp(-2 * jnp.maximum(size, 0))))
    root = jnp.where(size > 0, large, jnp.arcsinh(jnp.exp(jnp.minimum(size, 0))))
    return 0.5 * (into - out) - jnp.sign(tilt) * root


def _visit(
    task: Problem,
    table: Table,
    views: tuple[View, ...],
    visit: Visit,
    z: jax.Array,
    totals: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Moves the neurons of one group; ``totals`` holds the logarithm of each piece's sum."""
    s, here = task.exponents[0], slice(visit.start, visit.start + visit.size)
    total = blocks.logsumexp(totals)
    logs = _part_logs(visit.parts, table, views, s, z) - total
    segments = np.concatenate([np.zeros(0, int), *(part.segments for part in visit.parts)])
    sums = blocks.segment_logsumexp(logs, segments, 2 * visit.size + 1)
    neurons = _neurons(task, sums[: visit.size], sums[visit.size : -1], here, z)
    touched = [part.piece for part in visit.parts]
    if visit.joined:
        moved = _one_by_one(task, table, views, visit, neurons, total, z)
    else:
        others = ~np.isin(np.arange(len(views)), touched)
        rest = jnp.exp(sums[-1]) + jnp.where(others, jnp.exp(totals - total), 0).sum()
        moved = z.at[here].set(task.clip(z[here] + _in_turn(neurons, rest) / s))
    step = (moved - z)[here]
    shift = s * blocks.signed(step)
    owners = np.repeat(np.arange(len(touched)), [part.segments.size for part in visit.parts])
    after = blocks.segment_logsumexp(logs + shift[segments], owners, len(touched)) + total
    totals = totals.at[np.array(touched, int)].set(after)
    for number in sorted({part.piece for part in visit.joined}):
        part = Part(number, 0, np.zeros(0))
        rows = _part_logs((part,), table, views, s, moved)
        totals = totals.at[number].set(blocks.logsumexp(rows))
    return moved, totals


def _in_turn(neurons: Neurons, rest: jax.Array) -> jax.Array:
    """Log x of neurons that share only S and move one after the other.

    ``rest`` is the mass that none of them has. What a neuron sees of the others is made of
    positive parts: the rest, what the earlier ones have left and what the later ones still have.
    """
    mass = jnp.exp(neurons.out) + jnp.exp(neurons.into)
    later = lax.scan(lambda sum, m: (sum + m, sum), jnp.zeros_like(rest), mass, reverse=True)[1]
    minimum = _minimum(neurons)

    def move(done: jax.Array, inputs: tuple) -> tuple:
        minimum, alive, mass, later = inputs
        others = rest + later + done
        total = _total(minimum, others)
        return done + jnp.where(alive, total - others, mass), total

    inputs = (minimum, neurons.alive, mass, later)
    totals: jax.Array = lax.scan(move, jnp.zeros_like(rest), inputs)[1]
    return _log_x(neurons, jnp.log(totals))


def _minimum(neurons: Neurons) -> Minimum:
    out, into, tilt, _, low, high = neurons
    ends = jnp.exp(out + low), jnp.exp(into - low), jnp.exp(out + high), jnp.exp(into - high)
    return Minimum(tilt, jnp.exp(out + into), ends)


def _total(minimum: Minimum, others: jax.Array) -> jax.Array:
    """S at the minimum over one neuron within its bounds, given the rest D.

    It is the root of ``(S − D)² = (tilt S)² + 4 B C`` unless dF/dlog x, which has the sign of
    ``B x − C/x + tilt S``, is positive already at the lowest x or still negative at the highest.
    """
    tilt, product, (out_low, into_low, out_high, into_high) = minimum
    free = 1 - tilt * tilt
    total = (others + jnp.sqrt((tilt * others) ** 2 + 4 * product * free)) / free
    rises_low = (1 + tilt) * out_low - (1 - tilt) * into_low + tilt * others > 0
    falls_high = (1 + tilt) * out_high - (1 - tilt) * into_high + tilt * others < 0
    total = jnp.where(rises_low, others + out_low + into_low, total)
    return jnp.where(falls_high, others + out_high + into_high, total)


def _log_x(neurons: Neurons, total: jax.Array) -> jax.Array:
    """Log x at the minimum, where S is exp(total); 0 for neurons that may not move."""
    log_x = balance(neurons.out, neurons.into, neurons.tilt, total)
    return jnp.where(neurons.alive, jnp.clip(log_x, neurons.low, neurons.high), 0)


def _one_by_one(
    task: Problem,
    table: Table,
    views: tuple[View, ...],
    visit: Visit,
    neurons: Neurons,
    total: jax.Array,
    z: jax.Array,
) -> jax.Array:
    """Moves neurons that meet on edges, whose B and C change with every move before."""
    s = task.exponents[0]
    tables = [_slices(part.segments, visit.size) for part in visit.joined]

    def move(k: jax.Array, state: tuple) -> tuple:
        z, current = state
        signed = blocks.signed(z)
        neuron = jax.tree.map(lambda a: a[k], neurons)
        both = [jnp.stack([neuron.out, neuron.into])]
        for part, slices in zip(visit.joined, tables, strict=True):
            piece, view = table.pieces[part.piece], views[part.piece]
            logs = _slice_logs(piece, view, part.side, s, signed, jnp.asarray(slices)[:, k])
            both += list(logs.T - total)
        out, into = blocks.logsumexp(jnp.stack(both), axis=0)
        neuron = neuron._replace(out=out, into=into)
        others = jnp.maximum(current - jnp.exp(out) - jnp.exp(into), 0)
        after = _total(_minimum(neuron), others)
        here = visit.start + k
        z = z.at[here].set(task.clip(z[here] + _log_x(neuron, jnp.log(after)) / s))
        return z, jnp.where(neuron.alive, after, current)

    return lax.fori_loop(0, visit.size, move, (z, jnp.ones_like(total)))[0]


def _slice_logs(
    piece: Piece,
    view: View,
    side: int,
    s: jax.Array,
    signed: jax.Array,
    slices: jax.Array,
) -> jax.Array:
    """The logarithms of the sums of some rows or columns of a piece, −inf for slice −1."""
    here, other = ((piece.rows, piece.cols), (piece.cols, piece.rows))[side]
    batch, index = jnp.divmod(jnp.maximum(slices, 0), piece.shape[1 + side])
    values = view.values[batch, index] if side == 0 else view.values[batch, :, index]
    lifted = (view.logs[1 - side] + s * signed[other].sum(0))[batch]
    own = (view.logs[side] + s * signed[here].sum(0))[batch, index]
    # Zeros of the piece are −inf here.
    logs = blocks.logsumexp(jnp.log(values) + lifted, axis=-1)
    return jnp.where(slices >= 0, logs + own, -jnp.inf)


def _part_logs(
    parts: tuple[Part, ...],
    table: Table,
    views: tuple[View, ...],
    s: jax.Array,
    z: jax.Array,
) -> jax.Array:
    """The logarithms of the sums of all slices of the parts, one after the other."""
    if not parts:
        return jnp.zeros((0,), z.dtype)
    slots = []
    for part in parts:
        sides = table.pieces[part.piece].rows, table.pieces[part.piece].cols
        slots += [sides[k].reshape(len(sides[k]), -1) for k in (part.side, 1 - part.side)]
    shifts = s * blocks.signed(z)[np.concatenate(slots, 1)].sum(0)
    chunks = iter(jnp.split(shifts, np.cumsum([slot.shape[1] for slot in slots])[:-1]))
    own, sums = [], []
    for part in parts:
        view = views[part.piece]
        own.append(view.logs[part.side].reshape(-1) + next(chunks))
        other = view.logs[1 - part.side]
        logs = other + next(chunks).reshape(other.shape)
        sums.append(blocks.log_product(view.values, logs, part.side).reshape(-1))
    return jnp.concatenate(own) + jnp.concatenate(sums)


def _neurons(task: Problem, out: jax.Array, into: jax.Array, here: slice, z: jax.Array) -> Neurons:
    s = task.exponents[0]
    tilt = -task.linear[here] / (task.weights[0] * s)
    ends = s * (-task.limit - z[here]), s * (task.limit - z[here])
    return Neurons(out, into, tilt, task.alive[here], jnp.minimum(*ends), jnp.maximum(*ends))


def _views(masses: Masses, table: Table) -> tuple[View, ...]:
    views, logs = [], blocks.split(table, masses.logs)
    for stack, values, (rows, cols) in zip(table.stacks, masses.values, logs, strict=True):
        ends = np.cumsum([0, *(piece.shape[0] for piece in stack)])
        for start, stop in itertools.pairwise(ends):
            views.append(View(values[start:stop], (rows[start:stop], cols[start:stop])))
    return tuple(views)


def _segments(slot: np.ndarray, start: int, stop: int, size: int) -> np.ndarray:
    count = stop - start
    segments = np.full(slot.shape, 2 * count)
    for first, offset in ((start, 0), (size + start, count)):
        inside = (slot >= first) & (slot < first + count)
        segments[inside] = slot[inside] - first + offset
    return segments


def _slices(segments: np.ndarray, size: int) -> np.ndarray:
    """The slices of each neuron, integer (2, size, most slices), −1 where there are fewer."""
    found = [np.flatnonzero(segments == k) for k in range(2 * size)]
    most = max(map(len, found))
    padded = [np.pad(f, (0, most - len(f)), constant_values=-1) for f in found]
    return np.array(padded).reshape(2, size, most)
