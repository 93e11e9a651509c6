"""The paper's algorithm: neuron after neuron, in forward order, each to its exact minimum.

The neurons of a group are visited together where no entry meets two of them: then B and C of all
of them are two matrix-vector products, and only the total S goes from one to the next. Groups
that meet arrays of the same shapes share one compiled visit, so that the program does not grow
with the depth of a network of equal layers.

To be read in two halves. What is known before any number is: :func:`plan` finds where each group
meets the pieces of the arrangement (:class:`Encounter`), and puts groups of one shape into a
:class:`Family`. What is computed: :func:`coordinate` sweeps, :func:`_visit` moves one group, by
:func:`_in_turn` or, where its neurons meet on edges, :func:`_one_by_one`; :func:`_total` is the
paper's Lemma 4.1 for one neuron.
"""

import functools
import itertools
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


class Site(NamedTuple):
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
      apart: where an entry meets at most one of its neurons, so that they share only the total S.
      joined: where an entry may meet two of them.
    """

    start: Integers
    apart: tuple[Encounter, ...]
    joined: tuple[Encounter, ...]


class Family(NamedTuple):
    """Groups that meet arrays of the same shapes.

    Attributes:
      size: the size of each group.
      apart: the static side of ``visits.apart``.
      joined: the static side of ``visits.joined``.
      visits: their visits, stacked along a new first axis.
    """

    size: int
    apart: tuple[Site, ...]
    joined: tuple[Site, ...]
    visits: Visit


class Plan(NamedTuple):
    """A sweep: for each group in forward order its family, and which member of it the group is."""

    families: tuple[Family, ...]
    family: np.ndarray
    member: np.ndarray


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
    problem: Problem, spec: ArchSpec, z: jax.Array, max_steps: jax.Array, tol: jax.Array
) -> Run:
    """The paper's sweeps: every neuron in turn, in forward order, to its exact minimum.

    Stops when Σ|Δ(2z)| over a sweep is below ``tol``, as the authors do.
    """
    table, sweep = stacks.table(spec), plan(spec)
    masses = _by_stack(problem.masses[0], table)
    sums = flat_objective.log_sums(problem, table, 0, z)
    # Every entry is in one row: the sum of a piece is that of its rows.
    rows = sums.positions[np.flatnonzero(table.is_row)] + sums.total
    owners = [np.full(p.shape[0] * p.shape[1], k) for k, p in enumerate(table.pieces)]
    totals = stacks.segment_logsumexp(rows, np.concatenate(owners), len(owners))
    branches = [functools.partial(_visit, problem, masses, family) for family in sweep.families]

    # One switch inside a scan: a program as long as there are families, not groups.
    def visit(carry: tuple, which: tuple) -> tuple:
        family, member = which
        return lax.switch(family, branches, member, *carry), None

    def body(state: tuple) -> tuple:
        before, totals, _, step = state
        (z, totals), _ = lax.scan(visit, (before, totals), (sweep.family, sweep.member))
        return z, totals, 2 * jnp.abs(z - before).sum(), step + 1

    def unfinished(state: tuple) -> jax.Array:
        return (state[3] < max_steps) & (state[2] >= tol)

    start = (z, totals, jnp.full((), jnp.inf, z.dtype), jnp.zeros((), jnp.int32))
    z, _, moved, step = lax.while_loop(unfinished, body, start)
    return Run(z, step, step + 2, moved < tol, *flat_objective.measured(problem, table, z))


@functools.lru_cache(maxsize=64)
def plan(spec: ArchSpec) -> Plan:
    """Where each group meets the pieces, groups of one family together."""
    table = stacks.table(spec)
    met = _encounters(table)
    sites = [(tuple(p for p, _ in apart), tuple(p for p, _ in joined)) for apart, joined in met]
    visits = [
        Visit(np.asarray(start, np.uint32), *(tuple(e for _, e in found) for found in pair))
        for start, pair in zip(table.starts, met, strict=False)
    ]
    members: dict[object, list[int]] = {}
    for k, group in enumerate(spec.groups):
        shapes = [np.shape(array) for array in jax.tree.leaves(visits[k])]
        members.setdefault((group.size, sites[k], *shapes), []).append(k)
    families, (family, member) = [], np.zeros((2, len(visits)), np.uint32)
    for number, ks in enumerate(members.values()):
        family[ks], member[ks] = number, np.arange(len(ks))
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *(visits[k] for k in ks))
        families.append(Family(spec.groups[ks[0]].size, *sites[ks[0]], stacked))
    return Plan(tuple(families), family, member)


Found = list[tuple[Site, Encounter]]


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
                        site = Site(stack, piece.shape[0], side)
                        by_group.setdefault(int(group), []).append((site, encounter))
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


class Meeting(NamedTuple):
    """An encounter with the numbers that are met.

    Attributes:
      site: its static side.
      encounter: where neurons meet the piece.
      values: the equilibrated masses of the piece, (batch, rows, cols).
      logs: the logarithms of the factors of its rows and of its columns, (batch, n) each.
    """

    site: Site
    encounter: Encounter
    values: jax.Array
    logs: tuple[jax.Array, jax.Array]


StackMasses = tuple[tuple[jax.Array, tuple[jax.Array, jax.Array]], ...]


def _by_stack(masses: Masses, table: Table) -> StackMasses:
    return tuple(zip(masses.values, stacks.split_sides(table, masses.logs), strict=True))


def _meeting(masses: StackMasses, site: Site, encounter: Encounter) -> Meeting:
    def taken(array: jax.Array) -> jax.Array:
        # Without a choice, no copy.
        if array.shape[0] == site.batch:
            return array
        return lax.dynamic_slice_in_dim(array, encounter.first, site.batch)

    values, (rows, cols) = masses[site.stack]
    return Meeting(site, encounter, taken(values), (taken(rows), taken(cols)))


def _visit(
    problem: Problem,
    masses: StackMasses,
    family: Family,
    member: jax.Array,
    z: jax.Array,
    totals: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Moves the neurons of one group; ``totals`` holds the logarithm of each piece's sum.

    A neuron's minimum depends on B, C and D, and D is all that is neither B nor C. To sum all of it
    anew for each of H neurons would make a sweep H passes over the masses. Hence the sum of every
    piece is carried along: a visit sums the pieces that the group meets, slice by slice, which
    gives every B and C; D is what the other pieces hold, together with the slices here that belong
    to none of these neurons (the last segment). Sums of positive parts only: a difference S − B − C
    would lose all digits where one neuron dominates.

    Afterwards a slice has changed by the factor of its neuron alone, so the new sums of the pieces
    follow from the same slices, shifted. This fails where an entry meets two neurons of the group,
    a recurrent kernel: B and C then change with every move within the visit. Such pieces are
    ``joined``; they are visited one neuron after the other, and summed again at the end.
    """
    s, size = problem.exponents[0], family.size
    visit: Visit = jax.tree.map(
        lambda a: lax.dynamic_index_in_dim(a, member, keepdims=False), family.visits
    )
    apart, joined = (
        tuple(itertools.starmap(functools.partial(_meeting, masses), zip(*found, strict=True)))
        for found in ((family.apart, visit.apart), (family.joined, visit.joined))
    )
    total = stacks.logsumexp(totals)
    logs = _all_slice_logs(apart, s, z) - total
    segments = jnp.concatenate([jnp.zeros((0,), jnp.int32), *(met.segments for met in visit.apart)])
    sums = stacks.segment_logsumexp(logs, segments, 2 * size + 1)
    neurons = neurons_at(problem, (sums[:size], sums[size:-1]), z, visit.start)
    touched = jnp.asarray([met.piece for met in visit.apart], jnp.int32)
    if joined:
        moved = _one_by_one(problem, joined, neurons, total, visit.start, z)
    else:
        others = jnp.ones(totals.shape, bool).at[touched].set(False)
        rest = jnp.exp(sums[-1]) + jnp.where(others, jnp.exp(totals - total), 0).sum()
        here = lax.dynamic_slice_in_dim(z, visit.start, size)
        here = problem.box.clip(here + _in_turn(neurons, rest) / s)
        moved = lax.dynamic_update_slice_in_dim(z, here, visit.start, 0)
    step = lax.dynamic_slice_in_dim(moved - z, visit.start, size)
    shift = s * stacks.signed(step)
    lengths = [met.segments.size for met in visit.apart]
    owners = np.repeat(np.arange(len(lengths)), lengths)
    after = stacks.segment_logsumexp(logs + shift[segments], owners, len(lengths)) + total
    totals = totals.at[touched].set(after)
    for met in joined:
        sum_of_rows = _all_slice_logs((_seen_from_rows(met),), s, moved)
        totals = totals.at[met.encounter.piece].set(stacks.logsumexp(sum_of_rows))
    return moved, totals


def _seen_from_rows(met: Meeting) -> Meeting:
    """The same meeting, its slices the rows of the piece."""
    if met.site.side == 0:
        return met
    encounter = met.encounter._replace(own=met.encounter.other, other=met.encounter.own)
    return met._replace(site=met.site._replace(side=0), encounter=encounter)


def _in_turn(neurons: Neurons, rest: jax.Array) -> jax.Array:
    """log x of neurons that share only S and move one after the other.

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
    # |tilt| < 1, since no neuron has all p entries: S is the larger root, and positive.
    free = 1 - tilt * tilt
    total = (others + jnp.sqrt((tilt * others) ** 2 + 4 * product * free)) / free
    rises_low = (1 + tilt) * out_low - (1 - tilt) * into_low + tilt * others > 0
    falls_high = (1 + tilt) * out_high - (1 - tilt) * into_high + tilt * others < 0
    total = jnp.where(rises_low, others + out_low + into_low, total)
    return jnp.where(falls_high, others + out_high + into_high, total)


def _one_by_one(
    problem: Problem,
    joined: tuple[Meeting, ...],
    neurons: Neurons,
    total: jax.Array,
    start: Integers,
    z: jax.Array,
) -> jax.Array:
    """Moves neurons that meet on edges, whose B and C change with every move before."""
    s = problem.exponents[0]

    def move(k: jax.Array, state: tuple) -> tuple:
        z, current = state
        signed, place = stacks.signed(z), start + k.astype(jnp.uint32)
        neuron = jax.tree.map(lambda a: a[k], neurons)
        both = [jnp.stack([neuron.out, neuron.into])]
        for met in joined:
            both += list(_slice_logs(met, s, signed, met.encounter.slices[:, k]).T - total)
        out, into = stacks.logsumexp(jnp.stack(both), axis=0)
        neuron = neuron._replace(out=out, into=into)
        # A difference, unlike in `_in_turn`: the others' parts change with every move.
        others = jnp.maximum(current - jnp.exp(out) - jnp.exp(into), 0)
        after = _total(_minimum(neuron), others)
        z = z.at[place].set(problem.box.clip(z[place] + log_x(neuron, jnp.log(after)) / s))
        return z, jnp.where(neuron.alive, after, current)

    size = neurons.alive.size
    return lax.fori_loop(0, size, move, (z, jnp.ones_like(total)))[0]


def _slice_logs(met: Meeting, s: jax.Array, signed: jax.Array, slices: Integers) -> jax.Array:
    """The logarithms of the sums of some rows or columns of a piece, −inf for slice −1."""
    side, encounter = met.site.side, met.encounter
    batch, index = jnp.divmod(jnp.maximum(slices, 0), met.values.shape[1 + side])
    values = met.values[batch, index] if side == 0 else met.values[batch, :, index]
    own, other = (
        log + s * signed[slots].sum(0).reshape(log.shape)
        for log, slots in (
            (met.logs[side], encounter.own),
            (met.logs[1 - side], encounter.other),
        )
    )
    # Zeros of the piece are −inf here.
    logs = stacks.logsumexp(jnp.log(values) + other[batch], axis=-1)
    return jnp.where(slices >= 0, logs + own[batch, index], -jnp.inf)


def _all_slice_logs(meetings: tuple[Meeting, ...], s: jax.Array, z: jax.Array) -> jax.Array:
    """The logarithms of the sums of all slices that are met, one meeting after the other."""
    if not meetings:
        return jnp.zeros((0,), z.dtype)
    slots = [slots for _, encounter, *_ in meetings for slots in (encounter.own, encounter.other)]
    shifts = s * stacks.signed(z)[jnp.concatenate(slots, 1)].sum(0)
    chunks = iter(jnp.split(shifts, np.cumsum([slot.shape[1] for slot in slots])[:-1]))
    own, sums = [], []
    for met in meetings:
        side = met.site.side
        own.append(met.logs[side].reshape(-1) + next(chunks))
        other = met.logs[1 - side]
        logs = other + next(chunks).reshape(other.shape)
        sums.append(stacks.log_matvec(met.values, logs, side).reshape(-1))
    return jnp.concatenate(own) + jnp.concatenate(sums)
