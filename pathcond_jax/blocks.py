"""Block arithmetic: sums over the reduced entries of a criterion, in linear and in log form.

A criterion is reduced to (batch, rows, cols) arrays of masses whose entries feel the log-scales
of their row plus those of their column. Here such arrays are stacked by shape, and B z, Bᵀ w and
the row and column sums of ``mass · exp(s (Bz))`` become a gather, a segment sum and
matrix-vector products. Masses are kept equilibrated, in [0, 1] beside the logarithms of a factor
per row and per column, so that networks of any depth stay inside float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from pathcond_jax.criteria import Block, LogSum, layout
from pathcond_jax.spec import ArchSpec

Sides = list[tuple[jax.Array, jax.Array]]


class Piece(NamedTuple):
    """A block, or the entries of a block that lose two opposite neurons.

    Attributes:
      block: position in ``layout(spec).blocks``.
      shape: (batch, rows, cols).
      rows: integer (slots, batch, rows), positions in ``[z, −z, 0]`` whose sum is (Bz) of a row.
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
      starts: where each group begins in the flat vector of neurons; ends with H.
      stacks: pieces of one (rows, cols) shape, concatenated along the batch axis.
      shapes: the shape of each stack.
      slots: integer (slots, positions) into ``[z, −z, 0]``; the positions are the rows of the
        first stack, its columns, the rows of the second stack, and so on.
    """

    size: int
    starts: tuple[int, ...]
    stacks: tuple[tuple[Piece, ...], ...]
    shapes: tuple[tuple[int, int, int], ...]
    slots: np.ndarray


class Masses(NamedTuple):
    """The masses of one term: ``values · exp(row_logs + col_logs)``, one array per stack.

    Attributes:
      values: (batch, rows, cols), in [0, 1].
      row_logs: (batch, rows); −inf where a row has no mass.
      col_logs: (batch, cols); −inf where a column has no mass.
    """

    values: tuple[jax.Array, ...]
    row_logs: tuple[jax.Array, ...]
    col_logs: tuple[jax.Array, ...]


@functools.lru_cache(maxsize=64)
def table(spec: ArchSpec, stacked: bool = True) -> Table:
    """The arrangement of the blocks of ``spec``; unstacked, each piece is its own stack."""
    blocks, sizes = layout(spec).blocks, layout(spec).sizes
    starts = tuple(int(n) for n in np.cumsum([0, *sizes]))
    pieces = [p for k, block in enumerate(blocks) for p in _pieces(k, block, starts)]
    grouped: dict[object, list[Piece]] = {}
    for number, piece in enumerate(pieces):
        grouped.setdefault(piece.shape[1:] if stacked else number, []).append(piece)
    stacks = tuple(map(tuple, grouped.values()))
    shapes = tuple(
        (sum(piece.shape[0] for piece in stack), *stack[0].shape[1:]) for stack in stacks
    )
    depth = max(a.shape[0] for piece in pieces for a in (piece.rows, piece.cols))
    sides = [
        np.concatenate([_padded(getattr(piece, side), depth, 2 * starts[-1]) for piece in stack], 1)
        for stack in stacks
        for side in ("rows", "cols")
    ]
    slots = np.concatenate([side.reshape(depth, -1) for side in sides], 1)
    return Table(starts[-1], starts, stacks, shapes, slots)


def equilibrate(term: LogSum, table: Table, dtype: jnp.dtype) -> Masses:
    """Stacks the masses of a term and divides out the largest of each row, then column."""
    stacks = [_equilibrated(_stack(term, stack, dtype)) for stack in table.stacks]
    return Masses(*(tuple(parts) for parts in zip(*stacks, strict=True)))


def spread(table: Table, z: jax.Array) -> Sides:
    """(Bz) contributed by the rows and by the columns of each stack."""
    extended = jnp.concatenate([z, -z, jnp.zeros((1,), z.dtype)])
    return split(table, extended[table.slots].sum(0))


def collect(table: Table, sides: Sides) -> tuple[jax.Array, jax.Array]:
    """Sums over the outgoing and over the incoming positions of each neuron, two (H,) arrays."""
    flat = jnp.tile(join(sides), table.slots.shape[0])
    sums = jax.ops.segment_sum(flat, table.slots.reshape(-1), 2 * table.size + 1)
    return sums[: table.size], sums[table.size : -1]


def collect_log(table: Table, sides: Sides) -> tuple[jax.Array, jax.Array]:
    """The logarithms of :func:`collect`, of sides that hold logarithms."""
    flat = jnp.tile(join(sides), table.slots.shape[0])
    logs = segment_logsumexp(flat, table.slots.reshape(-1), 2 * table.size + 1)
    return logs[: table.size], logs[table.size : -1]


def segment_logsumexp(logs: jax.Array, segments: np.ndarray, count: int) -> jax.Array:
    """log Σ exp over each of ``count`` segments; −inf where there is nothing."""
    top = jax.ops.segment_max(logs, segments, count)
    top = jnp.where(jnp.isfinite(top), top, 0)
    return jnp.log(jax.ops.segment_sum(jnp.exp(logs - top[segments]), segments, count)) + top


def join(sides: Sides) -> jax.Array:
    """One value per position."""
    return jnp.concatenate([side.reshape(-1) for pair in sides for side in pair])


def split(table: Table, flat: jax.Array) -> Sides:
    """The inverse of :func:`join`."""
    sizes = [batch * n for batch, *sides in table.shapes for n in sides]
    parts = iter(jnp.split(flat, np.cumsum(sizes)[:-1]))
    return [
        (next(parts).reshape(batch, rows), next(parts).reshape(batch, cols))
        for batch, rows, cols in table.shapes
    ]


def exponents(masses: Masses, exponent: jax.Array, sides: Sides) -> Sides:
    """Logarithms (x, y) per stack such that the masses at z are ``values · exp(x + y)``."""
    return [
        (row_logs + exponent * a, col_logs + exponent * b)
        for row_logs, col_logs, (a, b) in zip(masses.row_logs, masses.col_logs, sides, strict=True)
    ]


def log_sums(values: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log of the row and column sums of ``values · exp(x + y)``, by matrix-vector products."""
    return x + _log_product("brc,bc->br", values, y), y + _log_product("brc,br->bc", values, x)


def all_log_sums(masses: Masses, sides: Sides) -> Sides:
    """:func:`log_sums` of every stack."""
    return [log_sums(values, *xy) for values, xy in zip(masses.values, sides, strict=True)]


def log_total(sides: Sides) -> jax.Array:
    """log of the whole sum, from the logarithms of row sums."""
    return logsumexp(jnp.concatenate([rows.reshape(-1) for rows, _ in sides]))


def weights(masses: Masses, sides: Sides, total: jax.Array) -> tuple[jax.Array, ...]:
    """The masses divided by exp(total)."""
    # A quotient is at most 1; the bound only keeps rounding and lost sums from overflowing.
    limit = 0.9 * float(np.log(jnp.finfo(total.dtype).max))
    return tuple(
        values * jnp.exp(jnp.minimum(x[:, :, None] + (y[:, None, :] - total), limit))
        for values, (x, y) in zip(masses.values, sides, strict=True)
    )


def products(weights: tuple[jax.Array, ...], sides: Sides) -> Sides:
    """(W b, Wᵀ a) for each stack."""
    return [
        (jnp.einsum("brc,bc->br", w, b), jnp.einsum("brc,br->bc", w, a))
        for w, (a, b) in zip(weights, sides, strict=True)
    ]


def _log_product(pattern: str, values: jax.Array, logs: jax.Array) -> jax.Array:
    top = jnp.max(logs, axis=1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0)
    return jnp.log(jnp.einsum(pattern, values, jnp.exp(logs - top))) + top


def _stack(term: LogSum, stack: tuple[Piece, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    parts, logs = [], []
    for piece in stack:
        values = term.masses[piece.block].astype(dtype)
        for entries in piece.cleared:
            values = values.at[entries].set(0)
        if piece.picked is not None:
            values = values[piece.picked][None, :, None]
        parts.append(values)
        logs.append(jnp.broadcast_to(term.log_scales[piece.block].astype(dtype), piece.shape[:1]))
    return (jnp.concatenate(parts), jnp.concatenate(logs)) if len(parts) > 1 else (parts[0], logs[0])


def _equilibrated(stack: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    values, logs = stack
    rows = values.max(2, keepdims=True)
    values = values / jnp.where(rows > 0, rows, 1)
    cols = values.max(1, keepdims=True)
    values = values / jnp.where(cols > 0, cols, 1)
    return values, jnp.log(rows[:, :, 0]) + logs[:, None], jnp.log(cols[:, 0, :])


def _pieces(number: int, block: Block, starts: tuple[int, ...]) -> list[Piece]:
    size = starts[-1]
    rows, cols = (
        _slots(axis.links, (block.batch, axis.size), starts) for axis in (block.rows, block.cols)
    )
    picked = []
    for i, row in enumerate(rows):
        for j, col in enumerate(cols):
            entries = _opposite(row, col, size)
            if entries[0].size:
                batch, r, c = entries
                left = [s[batch, r] for s in np.delete(rows, i, 0)]
                left += [s[batch, c] for s in np.delete(cols, j, 0)]
                left += [np.full(batch.shape, 2 * size)]
                empty = np.full((1, 1, 1), 2 * size)
                shape = (1, batch.size, 1)
                picked.append(Piece(number, shape, np.array(left)[:, None], empty, picked=entries))
    cleared = tuple(piece.picked for piece in picked if piece.picked is not None)
    return [Piece(number, block.shape, rows, cols, cleared=cleared), *picked]


def _slots(links: tuple, shape: tuple[int, int], starts: tuple[int, ...]) -> np.ndarray:
    """Positions in [z, −z, 0] per slice, opposite pairs removed, in as few slots as possible."""
    size = starts[-1]
    slots = np.full((max(len(links), 1), *shape), 2 * size)
    for slot, link in zip(slots, links, strict=False):
        index = np.broadcast_to(np.arange(shape[1]) if link.index is None else link.index, shape)
        slot[index >= 0] = (starts[link.group] + index + (size if link.sign < 0 else 0))[index >= 0]
    for i, one in enumerate(slots):
        for other in slots[i + 1 :]:
            cancel = (one < 2 * size) & ((one + size) % (2 * size) == other)
            one[cancel] = other[cancel] = 2 * size
    slots = np.sort(slots, axis=0)
    return slots[: max(1, int((slots < 2 * size).sum(0).max()))]


def _opposite(row: np.ndarray, col: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """The entries (batch, row, column) whose row and column carry opposite positions."""
    opposite = np.where(row < 2 * size, (row + size) % (2 * size), -1)
    if not np.isin(opposite, col).any():
        return (np.zeros(0, int),) * 3
    return np.nonzero(opposite[:, :, None] == col[:, None, :])


def _padded(slots: np.ndarray, depth: int, empty: int) -> np.ndarray:
    return np.pad(slots, ((0, depth - len(slots)), (0, 0), (0, 0)), constant_values=empty)
