"""The paper's algorithm: neuron after neuron, in forward order, each to its exact minimum.

The neurons of a group are visited together where no entry meets two of them: then B and C of all
of them are two matrix-vector products, and only the total S goes from one to the next. Groups
that meet arrays of the same shapes share one compiled visit, so that the program does not grow
with the depth of a network of equal layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._solve import flat_objective, stacks
from pathcond_jax._solve.flat_objective import Problem, Run
from pathcond_jax._solve.one_neuron import Neurons, log_x, neurons_at
from pathcond_jax._solve.stacks import Masses, Table
from pathcond_jax._spec.spec import ArchSpec

Integers = np.ndarray | jax.Array


class Part(NamedTuple):
    """The static side of an :class:`Encounter`.

    Attributes:
      stack: position of its piece's stack in ``table.stacks``.
      batch: the batch size of the piece.
      side: 0 where its rows carry the neurons, 1 for its columns.
    """

    stack: int
    batch: int
    side: int


class Encounter(NamedTuple):
    """Where neurons of a group meet one side of a piece; integer arrays.

    Scalars are unsigned: JAX then does not ask whether they count from the end.

    Attributes:
      piece: (), position among ``table.pieces``.
      first: (), where the piece begins along the batch axis of its stack.
      own: (slots, slices), positions in ``[z, −z, 0]`` of that side.
      other: the same for the other side.
      segments: (slices,), the neuron that the slice leaves, size + the neuron that it enters, or
        2 · size for neither.
      slices: (2, size, most slices), the slices of each neuron, −1 where there are fewer.
    """

    piece: Integers
    first: Integers
    own: Integers
    other: Integers
    segments: Integers
    slices: Integers


class Visit(NamedTuple):
    """One group: where it begins in the vector of neurons, and what it meets.

    Attributes:
      start: (), integer.
      parts: where an entry meets at most one of its neurons, so that they share only the total S.
      joined: where an entry may meet two of them.
    """

    start: Integers
    parts: tuple[Encounter, ...]
    joined: tuple[Encounter, ...]


class Kind(NamedTuple):
    """Groups that meet arrays of the same shapes.

    Attributes:
      size: the size of each group.
      parts: the static side of ``visits.parts``.
      joined: the static side of ``visits.joined``.
      visits: their visits, stacked along a new first axis.
    """

    size: int
    parts: tuple[Part, ...]
    joined: tuple[Part, ...]
    visits: Visit


class Plan(NamedTuple):
    """A sweep: for each group in forward order its kind, and which of the kind it is."""

    kinds: tuple[Kind, ...]
    order: np.ndarray
    place: np.ndarray


class View(NamedTuple):
    """The equilibrated masses of one piece: (batch, rows, cols), and logarithms of both sides."""

    values: jax.Array
    logs: tuple[jax.Array, jax.Array]


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
    table, sweep = stacks.table(spec), plan(spec)
    views = _stacks(task.masses[0], table)
    sums = flat_objective.log_sums(task, table, 0, z)
    rows = sums.positions[np.flatnonzero(table.is_row)] + sums.total
    owners = [np.full(p.shape[0] * p.shape[1], k) for k, p in enumerate(table.pieces)]
    totals = stacks.segment_logsumexp(rows, np.concatenate(owners), len(owners))
    branches = [functools.partial(_visit, task, views, kind) for kind in sweep.kinds]

    def visit(carry: tuple, which: tuple) -> tuple:
        kind, place = which
        return lax.switch(kind, branches, place, *carry), None

    def body(state: tuple) -> tuple:
        before, totals, _, step = state
        (z, totals), _ = lax.scan(visit, (before, totals), (sweep.order, sweep.place))
        return z, totals, 2 * jnp.abs(z - before).sum(), step + 1

    def unfinished(state: tuple) -> jax.Array:
        return (state[3] < max_steps) & (state[2] >= tol)

    start = (z, totals, jnp.full((), jnp.inf, z.dtype), jnp.zeros((), jnp.int32))
    z, _, moved, step = lax.while_loop(unfinished, body, start)
    return Run(z, step, step + 2, moved < tol, *flat_objective.measured(task, table, z))


@functools.lru_cache(maxsize=64)
def plan(spec: ArchSpec) -> Plan:
    """Where each group meets the pieces, groups of one kind together."""
    table = stacks.table(spec)
    met = _encounters(table)
    parts = [(tuple(p for p, _ in apart), tuple(p for p, _ in joined)) for apart, joined in met]
    visits = [
        Visit(np.asarray(start, np.uint32), *(tuple(e for _, e in found) for found in pair))
        for start, pair in zip(table.starts, met, strict=False)
    ]
    members: dict[object, list[int]] = {}
    for k, group in enumerate(spec.groups):
        shapes = [np.shape(array) for array in jax.tree.leaves(visits[k])]
        members.setdefault((group.size, parts[k], *shapes), []).append(k)
    kinds, (order, place) = [], np.zeros((2, len(visits)), np.uint32)
    for number, ks in enumerate(members.values()):
        order[ks], place[ks] = number, np.arange(len(ks))
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *(visits[k] for k in ks))
        kinds.append(Kind(spec.groups[ks[0]].size, *parts[ks[0]], stacked))
    return Plan(tuple(kinds), order, place)


Found = list[tuple[Part, Encounter]]


def _encounters(table: Table) -> list[tuple[Found, Found]]:
    """For each group what it meets, first where it shares only S, then where it is joined."""
    met: list[tuple[Found, Found]] = [([], []) for _ in table.starts[1:]]
    number = 0
    for stack, pieces in enumerate(table.stacks):
        first = 0
        for piece in pieces:
            by_group: dict[int, Found] = {}
            rows, cols = (slots.reshape(len(slots), -1) for slots in (piece.rows, piece.cols))
            for side, (own, other) in enumerate(((rows, cols), (cols, rows))):
                for slot in own:
                    for group in stacks.groups_of(slot, table):
                        start, stop = table.starts[group : group + 2]
                        segments = _segments(slot, start, stop, table.size)
                        slices = _slices(segments, stop - start)
                        arrays = (own, other, segments, slices)
                        encounter = Encounter(
                            *(np.asarray(place, np.uint32) for place in (number, first)),
                            *(np.asarray(array, np.int32) for array in arrays),
                        )
                        part = Part(stack, piece.shape[0], side)
                        by_group.setdefault(int(group), []).append((part, encounter))
            for group, found in by_group.items():
                met[group][len(found) > 1].extend(found)
            number, first = number + 1, first + piece.shape[0]
    return met


def _segments(slot: np.ndarray, start: int, stop: int, size: int) -> np.ndarray:
    count = stop - start
    segments = np.full(slot.shape, 2 * count)
    for first, offset in ((start, 0), (size + start, count)):
        inside = (slot >= first) & (slot < first + count)
        segments[inside] = slot[inside] - first + offset
    return segments


def _slices(segments: np.ndarray, size: int) -> np.ndarray:
    found = [np.flatnonzero(segments == k) for k in range(2 * size)]
    slices = np.full((2 * size, max(map(len, found))), -1, np.int32)
    for row, places in zip(slices, found, strict=True):
        row[: len(places)] = places
    return slices.reshape(2, size, -1)


def _stacks(masses: Masses, table: Table) -> tuple[View, ...]:
    sides = stacks.split(table, masses.logs)
    return tuple(View(values, logs) for values, logs in zip(masses.values, sides, strict=True))


def _view(views: tuple[View, ...], part: Part, met: Encounter) -> View:
    def taken(array: jax.Array) -> jax.Array:
        # Without a choice, no copy.
        if array.shape[0] == part.batch:
            return array
        return lax.dynamic_slice_in_dim(array, met.first, part.batch)

    values, (rows, cols) = views[part.stack]
    return View(taken(values), (taken(rows), taken(cols)))


def _visit(
    task: Problem,
    views: tuple[View, ...],
    kind: Kind,
    place: jax.Array,
    z: jax.Array,
    totals: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Moves the neurons of one group; ``totals`` holds the logarithm of each piece's sum."""
    s, size = task.exponents[0], kind.size
    visit: Visit = jax.tree.map(
        lambda a: lax.dynamic_index_in_dim(a, place, keepdims=False), kind.visits
    )
    parts, joined = (
        tuple((part, met, _view(views, part, met)) for part, met in zip(static, found, strict=True))
        for static, found in ((kind.parts, visit.parts), (kind.joined, visit.joined))
    )
    total = stacks.logsumexp(totals)
    logs = _part_logs(parts, s, z) - total
    segments = jnp.concatenate([jnp.zeros((0,), jnp.int32), *(met.segments for met in visit.parts)])
    sums = stacks.segment_logsumexp(logs, segments, 2 * size + 1)
    neurons = neurons_at(task, sums[:size], sums[size:-1], z, visit.start)
    touched = jnp.asarray([met.piece for met in visit.parts], jnp.int32)
    if joined:
        moved = _one_by_one(task, joined, neurons, total, visit.start, z)
    else:
        others = jnp.ones(totals.shape, bool).at[touched].set(False)
        rest = jnp.exp(sums[-1]) + jnp.where(others, jnp.exp(totals - total), 0).sum()
        here = lax.dynamic_slice_in_dim(z, visit.start, size)
        here = task.clip(here + _in_turn(neurons, rest) / s)
        moved = lax.dynamic_update_slice_in_dim(z, here, visit.start, 0)
    step = lax.dynamic_slice_in_dim(moved - z, visit.start, size)
    shift = s * stacks.signed(step)
    lengths = [met.segments.size for met in visit.parts]
    owners = np.repeat(np.arange(len(lengths)), lengths)
    after = stacks.segment_logsumexp(logs + shift[segments], owners, len(lengths)) + total
    totals = totals.at[touched].set(after)
    for part, met, view in joined:
        rows = (part._replace(side=0), met, view)
        if part.side:
            rows = (rows[0], met._replace(own=met.other, other=met.own), view)
        totals = totals.at[met.piece].set(stacks.logsumexp(_part_logs((rows,), s, moved)))
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
    return log_x(neurons, jnp.log(totals))


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


Met = tuple[Part, Encounter, View]


def _one_by_one(
    task: Problem,
    joined: tuple[Met, ...],
    neurons: Neurons,
    total: jax.Array,
    start: Integers,
    z: jax.Array,
) -> jax.Array:
    """Moves neurons that meet on edges, whose B and C change with every move before."""
    s = task.exponents[0]

    def move(k: jax.Array, state: tuple) -> tuple:
        z, current = state
        signed, place = stacks.signed(z), start + k.astype(jnp.uint32)
        neuron = jax.tree.map(lambda a: a[k], neurons)
        both = [jnp.stack([neuron.out, neuron.into])]
        for met in joined:
            both += list(_slice_logs(met, s, signed, met[1].slices[:, k]).T - total)
        out, into = stacks.logsumexp(jnp.stack(both), axis=0)
        neuron = neuron._replace(out=out, into=into)
        others = jnp.maximum(current - jnp.exp(out) - jnp.exp(into), 0)
        after = _total(_minimum(neuron), others)
        z = z.at[place].set(task.clip(z[place] + log_x(neuron, jnp.log(after)) / s))
        return z, jnp.where(neuron.alive, after, current)

    size = neurons.alive.size
    return lax.fori_loop(0, size, move, (z, jnp.ones_like(total)))[0]


def _slice_logs(met: Met, s: jax.Array, signed: jax.Array, slices: Integers) -> jax.Array:
    """The logarithms of the sums of some rows or columns of a piece, −inf for slice −1."""
    part, encounter, view = met
    batch, index = jnp.divmod(jnp.maximum(slices, 0), view.values.shape[1 + part.side])
    values = view.values[batch, index] if part.side == 0 else view.values[batch, :, index]
    own, other = (
        log + s * signed[slots].sum(0).reshape(log.shape)
        for log, slots in (
            (view.logs[part.side], encounter.own),
            (view.logs[1 - part.side], encounter.other),
        )
    )
    # Zeros of the piece are −inf here.
    logs = stacks.logsumexp(jnp.log(values) + other[batch], axis=-1)
    return jnp.where(slices >= 0, logs + own[batch, index], -jnp.inf)


def _part_logs(parts: tuple[Met, ...], s: jax.Array, z: jax.Array) -> jax.Array:
    """The logarithms of the sums of all slices of the parts, one after the other."""
    if not parts:
        return jnp.zeros((0,), z.dtype)
    slots = [slots for _, met, _ in parts for slots in (met.own, met.other)]
    shifts = s * stacks.signed(z)[jnp.concatenate(slots, 1)].sum(0)
    chunks = iter(jnp.split(shifts, np.cumsum([slot.shape[1] for slot in slots])[:-1]))
    own, sums = [], []
    for part, _, view in parts:
        own.append(view.logs[part.side].reshape(-1) + next(chunks))
        other = view.logs[1 - part.side]
        logs = other + next(chunks).reshape(other.shape)
        sums.append(stacks.log_product(view.values, logs, part.side).reshape(-1))
    return jnp.concatenate(own) + jnp.concatenate(sums)
