"""How the reduced arrays of a spec are arranged, in NumPy and once per spec.

A :class:`Piece` is a block of the layout or some of its entries; the :class:`Table` puts pieces of
one shape into stacks and numbers all their rows and columns as *positions*. To be read from
:func:`table` on: pieces (:func:`_pieces`), stacks (:func:`_merged`), and which positions meet each
neuron (:func:`_places`).
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from pathcond_jax._solve.layout import Block, layout
from pathcond_jax._spec.spec import ArchSpec

# Stacks are merged while they need no more zeros than this in all, or than this part of the entries
# of pieces that are not large. Large ones stay apart: devices that divide them could not do so
# alike, and writing them anew takes longer than a further stack.
PADDING, PART = 2**14, 1 / 16
LARGE = 2**18


class Piece(NamedTuple):
    """A block, or the entries of a block that lose two opposite neurons.

    Attributes:
      block: position in ``layout(spec).blocks``.
      shape: (batch, rows, cols) in its stack, where zeros may follow the rows and the columns.
      rows: integer (slots, batch, rows), positions in :func:`signed` z whose sum is (Bz) of a row.
      cols: the same for columns.
      picked: index arrays of the entries that make up this piece; None: all of the block.
      cleared: index arrays of the entries that other pieces hold.
      turned: whether the rows of the block are the columns of the piece.
    """

    block: int
    shape: tuple[int, int, int]
    rows: np.ndarray
    cols: np.ndarray
    picked: tuple[np.ndarray, ...] | None = None
    cleared: tuple[tuple[np.ndarray, ...], ...] = ()
    turned: bool = False


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
    pieces = _turned(_cut(pieces))
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


def groups_of(slots: np.ndarray, table: Table) -> np.ndarray:
    """The groups whose neurons are among positions in :func:`signed` z."""
    neurons = slots[slots < 2 * len(table.powers) * table.size] % table.size
    return np.unique(np.searchsorted(table.starts, neurons, side="right") - 1)


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
    budget = max(PADDING, PART * sum(math.prod(p.shape) for p in pieces if not _is_large(p)))
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


def _cut(pieces: list[Piece]) -> list[Piece]:
    """Columns, cut to the height of the lowest where it divides theirs: they make one stack."""
    heights = [piece.shape[1] for piece in pieces if piece.shape[1] > 1 == piece.shape[2]]
    unit = min(heights, default=0)

    def cut(piece: Piece) -> Piece:
        batch, height, width = piece.shape
        if width > 1 or height <= unit or height % unit:
            return piece
        shape = (batch * (height // unit), unit, 1)
        cols = np.repeat(piece.cols, height // unit, 1)
        return piece._replace(
            shape=shape, rows=piece.rows.reshape(-1, *shape[:2]), cols=cols.reshape(-1, *shape[::2])
        )

    return [cut(piece) for piece in pieces] if unit else pieces


def _turned(pieces: list[Piece]) -> list[Piece]:
    """Pieces with no more rows than columns, so that layers to and fro are of one shape."""

    def turned(piece: Piece) -> Piece:
        batch, height, width = piece.shape
        if width == 1 or height <= width or _is_large(piece):
            return piece
        shape = (batch, width, height)
        return piece._replace(shape=shape, rows=piece.cols, cols=piece.rows, turned=True)

    return [turned(piece) for piece in pieces]


def _is_large(piece: Piece) -> bool:
    return math.prod(piece.shape[1:]) >= LARGE


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
