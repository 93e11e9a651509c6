"""Block arithmetic: sums over the reduced entries of a criterion, in linear and in log form.

A criterion is reduced to (batch, rows, cols) arrays of masses whose entries feel the log-scales
of their row plus those of their column. Here such arrays are stacked by shape, all their rows and
columns are numbered as *positions*, and B z, Bᵀ w and the sums of ``mass · exp(s (Bz))`` over
rows and columns become a gather, a segment sum and matrix-vector products. Masses are kept
equilibrated, in [0, 1] beside the logarithms of a factor per row and per column, so that networks
of any depth stay inside float32.

To be read in three parts. Types first: a :class:`Piece` is a block or some of its entries, the
:class:`Table` arranges all pieces of a spec, :class:`Masses` are the numbers of one term. Then what
the solvers call, from :func:`spread` (B z) and :func:`collect` (Bᵀ w) to the products. Last, in
NumPy and once per spec, how the arrangement is found, from :func:`_pieces` on.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._solve.layout import Block, layout
from pathcond_jax._solve.objective import LogSum
from pathcond_jax._spec.sharding import segment_max, segment_sum
from pathcond_jax._spec.spec import ArchSpec

# Stacks are merged while they need no more zeros than this in all. Large ones stay apart: devices
# that divide them could not do so alike.
PADDING = 2**14


class Piece(NamedTuple):
    """A block, or the entries of a block that lose two opposite neurons.

    Attributes:
      block: position in ``layout(spec).blocks``.
      shape: (batch, rows, cols) in its stack, where zeros may follow the rows and the columns.
      rows: integer (slots, batch, rows), positions in :func:`signed` z whose sum is (Bz) of a row.
      cols: the same for columns.
      picked: index arrays of the entries that make up this piece; None: all of the block.
      cleared: index arrays of the entries that other pieces hold.
    """

    block: int
    shape: tuple[int, int, int]
    rows: np.ndarray
    cols: np.ndarray
    picked: tuple[np.ndarray, ...] | None = None
    cleared: tuple[tuple[np.ndarray, ...], ...] = ()


class Table(NamedTuple):
    """The static arrangement of all pieces of one spec.

    Attributes:
      size: H, the number of neurons.
      powers: P different powers of scales that entries take; (1.0,) in a ReLU network.
      starts: where each group begins in the flat vector of neurons; ends with H.
      stacks: pieces brought to one (rows, cols) shape, concatenated along the batch axis.
      shapes: the shape of each stack.
      slots: integer (slots, positions) into :func:`signed` z, whose sum is what a position adds
        to (Bz). Positions are the rows of the first stack, its columns, the rows of the second.
      places: the positions that leave each neuron, and those that enter it, of each power, as rows
        of integer arrays (some of 2PH, most); the number of positions where there are fewer. Rows
        of similar length share an array.
      order: integer (2PH,), where each is among all rows: of each power the outgoing ones of all
        neurons first.
    """

    size: int
    powers: tuple[float, ...]
    starts: tuple[int, ...]
    stacks: tuple[tuple[Piece, ...], ...]
    shapes: tuple[tuple[int, int, int], ...]
    slots: np.ndarray
    places: tuple[np.ndarray, ...]
    order: np.ndarray

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each group."""
        return tuple(stop - start for start, stop in itertools.pairwise(self.starts))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of all stacks in order."""
        return tuple(piece for stack in self.stacks for piece in stack)

    @property
    def is_row(self) -> np.ndarray:
        """(positions,) booleans."""
        sizes = [batch * n for batch, *sides in self.shapes for n in sides]
        return np.repeat(np.arange(len(sizes)) % 2 == 0, sizes)


class Masses(NamedTuple):
    """The masses of one term: ``values · exp(logs of the row + logs of the column)``.

    Attributes:
      values: one (batch, rows, cols) array per stack, in [0, 1].
      logs: (positions,), −inf where a row or column has no mass.
    """

    values: tuple[jax.Array, ...]
    logs: jax.Array


Stacks = tuple[tuple[jax.Array, jax.Array], ...]


@functools.lru_cache(maxsize=64)
def table(spec: ArchSpec) -> Table:
    """The arrangement of the blocks of ``spec``."""
    starts = tuple(int(n) for n in np.cumsum([0, *layout(spec).sizes]))
    count = 2 * len(spec.powers) * starts[-1]
    pieces = [
        piece
        for number, block in enumerate(layout(spec).blocks)
        for piece in _pieces(number, block, spec.powers, starts)
    ]
    depth = max(slots.shape[0] for piece in pieces for slots in (piece.rows, piece.cols))
    stacks = _merged(pieces, depth, count)
    sides = [
        [getattr(piece, side).reshape(depth, -1) for piece in stack]
        for stack in stacks
        for side in ("rows", "cols")
    ]
    slots = np.concatenate([slots for side in sides for slots in side], 1)
    places, order = _places(slots, count)
    # JAX remembers how it converted a wider array, also when the user switches to 64 bits.
    return Table(
        size=starts[-1],
        powers=spec.powers,
        starts=starts,
        stacks=stacks,
        shapes=tuple((sum(p.shape[0] for p in stack), *stack[0].shape[1:]) for stack in stacks),
        slots=slots.astype(np.int32),
        places=tuple(rows.astype(np.int32) for rows in places),
        order=order.astype(np.int32),
    )


def stacked(term: LogSum, table: Table, dtype: jnp.dtype) -> Stacks:
    """A term's masses as they are, and a logarithm per batch entry by which they are scaled."""
    return tuple(_fitted_stack(term, stack, dtype) for stack in table.stacks)


def are_masses(stacks: Stacks) -> jax.Array:
    """Whether all are finite and none is negative."""
    # Asked of the stacks: of every block apart, it multiplies the time that XLA takes to compile.
    valid = [
        jnp.isfinite(logs).all() & (jnp.isfinite(values) & (values >= 0)).all()
        for values, logs in stacks
    ]
    return jnp.stack(valid).all()


def equilibrate(stacks: Stacks, valid: jax.Array) -> Masses:
    """Masses, 0 unless ``valid``, divided by the largest of their rows and of their columns."""
    parts = [_equilibrated(values, logs, valid) for values, logs in stacks]
    logs = [(rows, cols) for _, rows, cols in parts]
    return Masses(tuple(values for values, _, _ in parts), join_sides(logs))


def signed(z: jax.Array, powers: tuple[float, ...] = (1.0,)) -> jax.Array:
    """``[z, −z, 0]``, which slots index; with powers ``[z, −z, 2z, −2z, 0]``."""
    multiples = [z if power == 1 else power * z for power in powers]
    both = [side for multiple in multiples for side in (multiple, -multiple)]
    return jnp.concatenate([*both, jnp.zeros((1,), z.dtype)])


def spread(table: Table, z: jax.Array) -> jax.Array:
    """What each position adds to (Bz)."""
    return signed(z, table.powers)[table.slots].sum(0)


def spread_any(table: Table, chosen: jax.Array) -> jax.Array:
    """Whether each position meets any of the chosen neurons; ``chosen`` is boolean (H,)."""
    both = [chosen] * (2 * len(table.powers))
    extended = jnp.concatenate([*both, jnp.zeros((1,), bool)])
    return extended[table.slots].any(0)


def groups_of(slots: np.ndarray, table: Table) -> np.ndarray:
    """The groups whose neurons are among positions in :func:`signed` z."""
    neurons = slots[slots < 2 * len(table.powers) * table.size] % table.size
    return np.unique(np.searchsorted(table.starts, neurons, side="right") - 1)


def over_neurons(
    table: Table, values: jax.Array, empty: float, reduce: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, ...]:
    """Reduces over the positions that leave and over those that enter each neuron.

    Args:
      table: the arrangement.
      values: (positions,).
      empty: a value that does not change what ``reduce`` gives.
      reduce: from (neurons, positions of each) to (neurons,).

    Returns:
      Two arrays (H,), as many for each further power.
    """
    # Rows of `places` are padded with the number of positions: that entry is the empty one.
    extended = jnp.append(values, jnp.full((1,), empty, values.dtype))
    parts = [reduce(extended[places]) for places in table.places]
    both = parts[0] if len(parts) == 1 else jnp.concatenate(parts)[table.order]
    ends = range(table.size, both.size + 1, table.size)
    return tuple(both[end - table.size : end] for end in ends)


def collect(table: Table, values: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over the positions that leave and over those that enter each neuron: two of (H,)."""
    return over_neurons(table, values, 0, lambda met: met.sum(1))


def differences(table: Table, collected: tuple[jax.Array, ...]) -> jax.Array:
    """``Bᵀ values`` (H,) of what :func:`collect` made of values: out − into, times their power."""
    pairs = zip(table.powers, collected[::2], collected[1::2], strict=True)
    parts = [out - into if p == 1 else p * (out - into) for p, out, into in pairs]
    return functools.reduce(jnp.add, parts)


def squares(table: Table, collected: tuple[jax.Array, ...]) -> jax.Array:
    """The same with B squared, entry by entry: out + into, times the square of their power."""
    pairs = zip(table.powers, collected[::2], collected[1::2], strict=True)
    parts = [out + into if p == 1 else p**2 * (out + into) for p, out, into in pairs]
    return functools.reduce(jnp.add, parts)


def collect_log(table: Table, logs: jax.Array) -> tuple[jax.Array, ...]:
    """The logarithms of :func:`collect` of exp(logs)."""
    return over_neurons(table, logs, -jnp.inf, lambda met: logsumexp(met, 1))


def segment_logsumexp(logs: jax.Array, segments: np.ndarray | jax.Array, count: int) -> jax.Array:
    """log Σ exp over each of ``count`` segments; −inf where there is nothing."""
    top = _finite(segment_max(logs, segments, count))
    return jnp.log(segment_sum(jnp.exp(logs - top[segments]), segments, count)) + top


def logsumexp(logs: jax.Array, axis: int | None = None) -> jax.Array:
    """log Σ exp over an axis, by default over all entries; −inf where there is nothing."""
    # That of jax.scipy handles signs and +inf as well, and takes three times as long to compile.
    top = _finite(jnp.max(logs, axis=axis, keepdims=True))
    return jnp.log(jnp.exp(logs - top).sum(axis)) + jnp.squeeze(top, axis)


def join_sides(sides: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """One value per position, from (batch, rows) and (batch, cols) arrays per stack."""
    return jnp.concatenate([side.reshape(-1) for pair in sides for side in pair])


def split_sides(table: Table, values: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """The inverse of :func:`join_sides`."""
    sizes = [batch * n for batch, *sides in table.shapes for n in sides]
    parts = iter(jnp.split(values, np.cumsum(sizes)[:-1]))
    return [
        (next(parts).reshape(batch, rows), next(parts).reshape(batch, cols))
        for batch, rows, cols in table.shapes
    ]


def matvec(values: jax.Array, vectors: jax.Array, side: int) -> jax.Array:
    """``values @ vectors`` for each batch entry, transposed for side 1."""
    return jnp.einsum(("brc,bc->br", "brc,br->bc")[side], values, vectors)


def log_matvec(values: jax.Array, logs: jax.Array, side: int) -> jax.Array:
    """log of :func:`matvec` with exp(logs)."""
    top = _finite(jnp.max(logs, axis=1, keepdims=True))
    return jnp.log(matvec(values, jnp.exp(logs - top), side)) + top


def matvecs(weights: tuple[jax.Array, ...], table: Table, values: jax.Array) -> jax.Array:
    """For each position, the sum of its weights times the value of the other position."""
    sides = zip(weights, split_sides(table, values), strict=True)
    return join_sides([(matvec(w, b, 0), matvec(w, a, 1)) for w, (a, b) in sides])


def quadratic(weights: tuple[jax.Array, ...], table: Table, values: jax.Array) -> jax.Array:
    """The sum over all entries of weight times the values of both positions."""
    sides = zip(weights, split_sides(table, values), strict=True)
    return jnp.stack([(a * matvec(w, b, 0)).sum() for w, (a, b) in sides]).sum()


def log_sums(masses: Masses, table: Table, exponents: jax.Array) -> jax.Array:
    """log of the sum over each position of ``values · exp(exponents of both positions)``."""
    sides = zip(masses.values, split_sides(table, exponents), strict=True)
    return exponents + join_sides(
        [(log_matvec(v, y, 0), log_matvec(v, x, 1)) for v, (x, y) in sides]
    )


def log_total(masses: Masses, table: Table, exponents: jax.Array) -> jax.Array:
    """log of the sum over all entries of ``values · exp(exponents of both positions)``."""
    # Every entry is in one row, so the columns need not be asked.
    sides = zip(masses.values, split_sides(table, exponents), strict=True)
    rows = [x + log_matvec(v, y, 0) for v, (x, y) in sides]
    return logsumexp(jnp.concatenate([row.reshape(-1) for row in rows]))


def normalized(
    masses: Masses, table: Table, exponents: jax.Array, total: jax.Array
) -> tuple[jax.Array, ...]:
    """``values · exp(exponents of both positions − total)``."""
    # A quotient is at most 1; the bound only keeps rounding and lost sums from overflowing.
    limit = 0.9 * float(np.log(jnp.finfo(total.dtype).max))
    return tuple(
        values * jnp.exp(jnp.minimum(x[:, :, None] + (y[:, None, :] - total), limit))
        for values, (x, y) in zip(masses.values, split_sides(table, exponents), strict=True)
    )


def _finite(top: jax.Array) -> jax.Array:
    return jnp.where(top > -jnp.inf, top, 0)


def _fitted_stack(
    term: LogSum, stack: tuple[Piece, ...], dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    parts = []
    for piece in stack:
        values = term.masses[piece.block].astype(dtype)
        for entries in piece.cleared:
            values = values.at[entries].set(0)
        if piece.picked is not None:
            values = values[piece.picked][None, :, None]
        parts.append(_fitted(values, piece.shape))
    logs = jnp.stack([term.log_scales[piece.block].astype(dtype) for piece in stack])
    owners = np.repeat(np.arange(len(stack)), [piece.shape[0] for piece in stack])
    return jnp.concatenate(parts), logs[owners.astype(np.int32)]


def _equilibrated(
    values: jax.Array, logs: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    values, logs = jnp.where(valid, values, 0), jnp.where(valid, logs, 0)
    # Rows, then columns of what is left: every entry is at most 1, and every column that has mass
    # has a 1, so sums over neither can leave the range of the dtype.
    rows = values.max(2, keepdims=True)
    values = values / jnp.where(rows > 0, rows, 1)
    cols = values.max(1, keepdims=True)
    values = values / jnp.where(cols > 0, cols, 1)
    return values, jnp.log(rows[:, :, 0]) + logs[:, None], jnp.log(cols[:, 0, :])


def _pieces(
    number: int, block: Block, powers: tuple[float, ...], starts: tuple[int, ...]
) -> list[Piece]:
    """A block as pieces in each of which (Bz) of an entry is its row's plus its column's.

    In one layer whose neurons both read and write a stream, x + W x or a recurrent kernel, entry
    (h, h) enters and leaves neuron h: −z_h of its row and +z_h of its column cancel, and no scale
    moves it. Sums over rows and columns would count its mass as incoming *and* as outgoing mass of
    h. So such entries are cleared from the block and make a piece of their own, a column of single
    entries that keep what their row and column carry besides the opposite pair. (In a block of
    several links per side each pair of opposite positions is looked for apart.)
    """
    size, empty_slot = starts[-1], 2 * len(powers) * starts[-1]
    rows, cols = (
        _slots(axis.links, (block.batch, axis.size), powers, starts)
        for axis in (block.rows, block.cols)
    )
    picked = []
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            entries = _opposite_entries(row, col, size, empty_slot)
            if entries[0].size:
                batch, r, c = entries
                left = [s[batch, r] for s in np.delete(rows, i, 0)]
                left += [s[batch, c] for s in np.delete(cols, j, 0)]
                left += [np.full(batch.shape, empty_slot)]
                empty = np.full((1, 1, 1), empty_slot)
                shape = (1, batch.size, 1)
                picked.append(Piece(number, shape, np.array(left)[:, None], empty, picked=entries))
    cleared = tuple(piece.picked for piece in picked if piece.picked is not None)
    return [Piece(number, block.shape, rows, cols, cleared=cleared), *picked]


def _slots(
    links: tuple, shape: tuple[int, int], powers: tuple[float, ...], starts: tuple[int, ...]
) -> np.ndarray:
    """Positions in ``signed`` z per slice, opposite pairs removed, in as few slots as possible."""
    size, empty = starts[-1], 2 * len(powers) * starts[-1]
    slots = np.full((max(len(links), 1), *shape), empty)
    for slot, link in zip(slots, links, strict=False):
        index = np.arange(shape[1]) if link.neurons is None else link.neurons
        index = np.broadcast_to(index, shape)
        first = starts[link.group] + size * (2 * powers.index(abs(link.entry)) + (link.entry < 0))
        slot[index >= 0] = (first + index)[index >= 0]
    for i, one in enumerate(slots):
        for other in slots[i + 1 :]:
            cancel = (one < empty) & (_opposite(one, size) == other)
            one[cancel] = other[cancel] = empty
    # Sorted, empty slots come last: rows of nothing but those drop.
    slots = np.sort(slots, axis=0)
    return slots[: max(1, int((slots < empty).sum(0).max()))]


def _opposite(slots: np.ndarray, size: int) -> np.ndarray:
    """The positions of the opposites: of z those of −z, and the other way around."""
    return slots + np.where(slots // size % 2 == 0, size, -size)


def _places(slots: np.ndarray, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The columns of ``slots`` that hold each of ``count`` numbers, and which row is whose."""
    flat, width = slots.reshape(-1), slots.shape[1]
    found = np.argsort(flat, kind="stable")
    ends = np.searchsorted(flat[found], np.arange(count + 1))
    sizes = np.diff(ends)
    # Bins of up to 4, 16, 64, ...: a neuron of a long residual stream pads no others.
    bins = np.ceil(0.5 * np.log2(np.maximum(sizes, 4)))
    places = []
    for bin_ in np.unique(bins):
        chosen = sizes[bins == bin_]
        rows = np.full((chosen.size, max(chosen.max(), 1)), width)
        inside = np.repeat(bins == bin_, sizes)
        rows[np.arange(rows.shape[1]) < chosen[:, None]] = found[: ends[-1]][inside] % width
        places.append(rows)
    return places, np.argsort(np.argsort(bins, kind="stable"))


def _opposite_entries(
    row: np.ndarray, col: np.ndarray, size: int, empty: int
) -> tuple[np.ndarray, ...]:
    """The entries (batch, row, column) whose row and column carry opposite positions."""
    opposite = np.where(row < empty, _opposite(row, size), -1)
    if not np.isin(opposite, col).any():
        return (np.zeros(0, np.int32),) * 3
    # JAX remembers how it converted a wider array, also when the user switches to 64 bits.
    found = np.nonzero(opposite[:, :, None] == col[:, None, :])
    return tuple(places.astype(np.int32) for places in found)


def _merged(pieces: list[Piece], depth: int, empty: int) -> tuple[tuple[Piece, ...], ...]:
    """Pieces of one shape together, and pieces of other shapes with them where that is cheap.

    Each stack makes the compiled program longer; zeros around the smaller pieces do not.
    """
    stacks: dict[tuple[int, ...], list[Piece]] = {}
    for piece in pieces:
        stacks.setdefault(piece.shape[1:], []).append(piece)
    # Greedily, the cheapest pair first; there are as many shapes as kinds of layers, so few.
    budget = PADDING
    while len(stacks) > 1:
        growths = {pair: _growth(stacks, *pair) for pair in itertools.combinations(stacks, 2)}
        pair = min(growths, key=lambda pair: growths[pair])
        budget -= growths[pair]
        if budget < 0:
            break
        one, other = (stacks.pop(shape) for shape in pair)
        stacks.setdefault(_around(*pair), []).extend(one + other)
    return tuple(
        tuple(_framed(piece, shape, depth, empty) for piece in stack)
        for shape, stack in stacks.items()
    )


def _around(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(max, one, other))


def _growth(
    stacks: dict[tuple[int, ...], list[Piece]], one: tuple[int, ...], other: tuple[int, ...]
) -> int:
    """The zeros that two stacks need to become one."""
    around = math.prod(_around(one, other))
    return sum(
        piece.shape[0] * (around - math.prod(shape))
        for shape in (one, other)
        for piece in stacks[shape]
    )


def _framed(piece: Piece, shape: tuple[int, ...], depth: int, empty: int) -> Piece:
    """The piece among zeros."""
    height, width = shape
    rows, cols = (
        np.pad(
            slots,
            ((0, depth - len(slots)), (0, 0), (0, size - slots.shape[2])),
            constant_values=empty,
        )
        for slots, size in ((piece.rows, height), (piece.cols, width))
    )
    return piece._replace(shape=(piece.shape[0], height, width), rows=rows, cols=cols)


def _fitted(values: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """A piece's masses in its place in a stack."""
    return jnp.pad(values, [(0, wanted - n) for wanted, n in zip(shape, values.shape, strict=True)])
