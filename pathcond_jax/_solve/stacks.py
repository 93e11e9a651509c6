"""Block arithmetic: sums over the reduced entries of a criterion, in linear and in log form.

A criterion is reduced to (batch, rows, cols) arrays of masses whose entries feel the log-scales
of their row plus those of their column. Here such arrays are stacked by shape, all their rows and
columns are numbered as *positions*, and B z, Bᵀ w and the sums of ``mass · exp(s (Bz))`` over
rows and columns become a gather, a segment sum and matrix-vector products. Masses are kept
equilibrated, in [0, 1] beside the logarithms of a factor per row and per column, so that networks
of any depth stay inside float32.

To be read in three parts: how masses come to lie in stacks (:func:`stacked`), how vectors of
neurons become vectors of positions and back, :func:`spread` (B z) and :func:`collect` (Bᵀ w), and
the products.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._solve.arrangement import Piece, Table, groups_of, table
from pathcond_jax._solve.objective import LogSum
from pathcond_jax._spec.arrays import SMALL, each, is_traced, part_of, side_by_side
from pathcond_jax._spec.sharding import segment_max, segment_sum

__all__ = ["Table", "groups_of", "table"]


class Masses(NamedTuple):
    """The masses of one term: ``values · exp(logs of the row + logs of the column)``.

    Attributes:
      values: one (batch, rows, cols) array per stack, in [0, 1].
      logs: (positions,), −inf where a row or column has no mass.
    """

    values: tuple[jax.Array, ...]
    logs: jax.Array


class Weights(NamedTuple):
    """One term's masses at some exponents over their sum S, in factors: nothing the size of masses.

    An entry is its value times the ``inner`` factor of one of its positions and the ``outer``
    factor of the other, whichever of the two is which.

    Attributes:
      total: log S.
      inner: (positions,), at most 1.
      outer: (positions,).
      marginals: (positions,), the sums over rows and columns.
      logs: (positions,), their logarithms.
    """

    total: jax.Array
    inner: jax.Array
    outer: jax.Array
    marginals: jax.Array
    logs: jax.Array


def stacked(term: LogSum, table: Table, dtype: jnp.dtype) -> LogSum:
    """The term with its masses as they are, one array per stack in place of one per block.

    Beside the stacks are, for each batch entry of one after the other, the logarithms of its scale.
    """
    # One program per stack outside of `jit`, whatever the number of its blocks.
    arrays = [(term.masses[piece.block],) for piece in table.pieces]
    fitted = iter(each(_fitted, arrays, [(*_fit(piece), dtype) for piece in table.pieces]))
    masses = [_joined([next(fitted) for _ in stack]) for stack in table.stacks]
    scales = jnp.stack([scale.astype(dtype) for scale in term.log_scales])
    owners = np.repeat([p.block for p in table.pieces], [p.shape[0] for p in table.pieces])
    logs = scales.at[owners.astype(np.int32)].get(mode="promise_in_bounds")
    return term._replace(masses=tuple(masses), log_scales=(logs,))


def are_masses(term: LogSum) -> jax.Array:
    """Whether all that :func:`stacked` gives are finite and none is negative."""
    # Both ends are NaN where an entry is.
    lowest = jnp.concatenate([values.min(2).reshape(-1) for values in term.masses])
    highest = jnp.concatenate([values.max(2).reshape(-1) for values in term.masses])
    (logs,) = term.log_scales
    return (lowest.min() >= 0) & (highest.max() < jnp.inf) & (jnp.abs(logs).max() < jnp.inf)


def equilibrate(term: LogSum, valid: jax.Array) -> Masses:
    """Masses over the roots of the largest of their row and of their column; 0 unless ``valid``."""
    (scales,) = term.log_scales
    ends = np.cumsum([len(values) for values in term.masses])[:-1]
    stacks = zip(term.masses, jnp.split(scales, ends), strict=True)
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
    parts = iter(jnp.split(values, _ends(table)))
    return [
        (next(parts).reshape(batch, rows), next(parts).reshape(batch, cols))
        for batch, rows, cols in table.shapes
    ]


def side_sums(table: Table, values: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """The sums of (n, positions) arrays over each side of each batch entry, (n, batch) each."""
    parts = iter(jnp.split(values, _ends(table), 1))
    return [
        (
            next(parts).reshape(-1, batch, rows).sum(2),
            next(parts).reshape(-1, batch, cols).sum(2),
        )
        for batch, rows, cols in table.shapes
    ]


def _ends(table: Table) -> np.ndarray:
    """Where each side of each stack ends among the positions, without the last."""
    return np.cumsum([batch * n for batch, *sides in table.shapes for n in sides])[:-1]


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


def levels(table: Table, exponents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exponents in two parts that stay in range, for products over the other position.

    Args:
      table: the arrangement.
      exponents: (positions,).

    Returns:
      ``exp(exponents − top)``, top the largest of the side, and ``exponents + other top``.
    """
    tops = [
        tuple(_finite(jnp.max(side, axis=1, keepdims=True)) for side in sides)
        for sides in split_sides(table, exponents)
    ]
    own, other = (
        join_sides(
            [
                (jnp.broadcast_to(pair[k], (b, r)), jnp.broadcast_to(pair[1 - k], (b, c)))
                for pair, (b, r, c) in zip(tops, table.shapes, strict=True)
            ]
        )
        for k in (0, 1)
    )
    return jnp.exp(exponents - own), exponents + other


def weights(masses: Masses, table: Table, exponents: jax.Array) -> Weights:
    """``values · exp(exponents of both positions)`` over their sum: one pass over the values."""
    inner, rest = levels(table, exponents)
    sums = matvecs(masses.values, table, inner)
    logs = rest + jnp.log(sums)
    total = logsumexp(jnp.where(table.is_row, logs, -jnp.inf))
    # A sum is at most S; the bound only keeps rounding and lost sums from overflowing.
    limit = 0.9 * float(np.log(jnp.finfo(total.dtype).max))
    known = _finite(total)
    outer = jnp.exp(jnp.minimum(rest - known, limit))
    return Weights(total, inner, outer, outer * sums, logs - known)


def log_sums(masses: Masses, table: Table, exponents: jax.Array) -> jax.Array:
    """log of the sum over each position of ``values · exp(exponents of both positions)``."""
    found = weights(masses, table, exponents)
    return found.logs + _finite(found.total)


def weighted(masses: Masses, table: Table, weights: Weights, values: jax.Array) -> jax.Array:
    """For each position, the sum of its weights times the value of the other position."""
    return weights.outer * matvecs(masses.values, table, weights.inner * values)


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


def _joined(parts: list[jax.Array]) -> jax.Array:
    """Pieces along the batch axis."""
    if len(parts) == 1:
        return parts[0]
    if not is_traced(parts[0]):
        return lax.concatenate(parts, 0)
    small = max(part.size for part in parts) <= SMALL
    return side_by_side(parts, parts[0].shape[1:]) if small else _written(parts)


@jax.jit
def _written(parts: list[jax.Array]) -> jax.Array:
    first, *others = parts
    # Written where they stay: to concatenate what is computed is to write it twice. Parts of one
    # shape are one kernel as long as XLA does not know where they go.
    *starts, count = np.cumsum([part.shape[0] for part in parts], dtype=np.int32)
    hidden = lax.optimization_barrier(np.array(starts))
    values = jnp.pad(first, [(0, count - first.shape[0])] + [(0, 0)] * (first.ndim - 1))
    for k, part in enumerate(others):
        start = part_of(hidden, k, 1).reshape(())
        values = lax.dynamic_update_slice_in_dim(values, part, start, 0)
    return values


def _equilibrated(
    values: jax.Array, logs: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # An entry is at most the largest of its row and of its column, so at most their geometric mean:
    # what is left is at most 1, and sums over neither can leave the range of the dtype. One array
    # is written; rows first, and columns of what is left then, would be two.
    ends = [jnp.where(valid, values.max(axis, keepdims=True), 0) for axis in (2, 1)]
    row_factors, col_factors = (jnp.where(end > 0, 1 / jnp.sqrt(end), 0) for end in ends)
    values = jnp.where(valid, values, 0) * row_factors * col_factors
    rows, cols = (0.5 * jnp.log(end) for end in ends)
    logs = jnp.where(valid, logs, 0)
    return values, rows[:, :, 0] + logs[:, None], cols[:, 0, :]


class _Places(NamedTuple):
    """Index arrays as a static argument."""

    shape: tuple[int, ...]
    numbers: tuple[bytes, ...]

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays."""
        return tuple(np.frombuffer(part, np.int32).reshape(self.shape) for part in self.numbers)


def _places(arrays: tuple[np.ndarray, ...]) -> _Places:
    return _Places(arrays[0].shape, tuple(np.asarray(a, np.int32).tobytes() for a in arrays))


def _fit(piece: Piece) -> tuple[tuple[int, ...], _Places | None, tuple[_Places, ...], bool]:
    """Where in a stack the masses of a piece lie, and which of its block's they are."""
    picked = None if piece.picked is None else _places(piece.picked)
    return piece.shape, picked, tuple(map(_places, piece.cleared)), piece.turned


def _fitted(
    values: jax.Array,
    shape: tuple[int, ...],
    picked: _Places | None,
    cleared: tuple[_Places, ...],
    turned: bool,
    dtype: jnp.dtype,
) -> jax.Array:
    """The masses of a block where those of a piece lie in a stack."""
    values = values.astype(dtype)
    for places in cleared:
        values = values.at[places.arrays()].set(0)
    if picked is not None:
        values = values[picked.arrays()][None, :, None]
    if turned:
        values = jnp.swapaxes(values, 1, 2)
    if values.shape[2] == 1:
        values = values.reshape(shape[0], -1, 1)
    missing = [(0, wanted - n) for wanted, n in zip(shape, values.shape, strict=True)]
    return jnp.pad(values, missing) if any(n for _, n in missing) else values
