"""Kernels and activations as arrays of few shapes, for sums of products of sums.

To be read from :func:`products_of` on: entries of the same neurons are added up, what has one row
or one column becomes columns of one row, and parts of similar shapes are stacked.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._solve.products import Factor, Products

# The power of the norm that stands for the largest entry, differentiable twice.
POWER = 24.0
# Squared derivatives grow with twice the log-scale that leaves an entry.
EXPONENT = 2.0
# Stacks are merged while they need no more entries of nothing than this part of all entries.
PADDING = 0.125


class Part(NamedTuple):
    """The units of one kernel, or of the activations that it reads.

    Attributes:
      rows: the neurons along rows, each integer (batch, rows).
      cols: the neurons along columns, (batch, cols).
      row_entries: of B, one number per array of ``rows``.
      col_entries: the same for ``cols``.
      ranges: largest absolute values, as p-norms where there are several, (batch, rows, cols).
      noises: squared derivatives, of the same shape.
      units: integer (batch, cols), counted from 0.
      offset: the logarithm of the variance of rounding for a range of 1.
    """

    rows: list[np.ndarray]
    cols: list[np.ndarray]
    row_entries: list[float]
    col_entries: list[float]
    ranges: jax.Array
    noises: jax.Array
    units: np.ndarray
    offset: float


def log_masses(values: jax.Array) -> jax.Array:
    """Logarithms of masses; −inf of 0, NaN of what is negative."""
    return jnp.where(
        values > 0,
        jnp.log(jnp.where(values > 0, values, 1)),
        jnp.where(values == 0, -jnp.inf, jnp.nan),
    )


def p_norm(values: jax.Array) -> jax.Array:
    """(Σ |v|^p)^{1/p} over the last axis, for the p that stands for the largest."""
    if values.shape[-1] == 1:
        return jnp.abs(values[..., 0])
    return jnp.exp(jax.nn.logsumexp(POWER * log_masses(jnp.abs(values)), axis=-1) / POWER)


def _merged(part: Part) -> Part:
    """Rows that belong to the same neurons as one; and columns, if their unit is the same, too."""
    if part.ranges.shape[0] > 1:
        return part
    rows, owners = _distinct(part.rows, part.ranges.shape[1])
    cols, others = _distinct([*part.cols, part.units], part.ranges.shape[2])
    ranges, noises = (
        _segments(_segments(values, owners, 1, power), others, 2, power)
        for values, power in ((part.ranges, POWER), (part.noises, 1.0))
    )
    return part._replace(rows=rows, cols=cols[:-1], ranges=ranges, noises=noises, units=cols[-1])


def _distinct(along: list[np.ndarray], size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct positions of a side, and which of them each position is."""
    table = np.stack([*(x.reshape(-1) for x in along), np.zeros(size, int)])
    found, owners = np.unique(table, axis=1, return_inverse=True)
    return [row[None] for row in found[:-1]], owners.reshape(-1)


def _segments(values: jax.Array, owners: np.ndarray, axis: int, power: float) -> jax.Array:
    """(Σ v^p)^{1/p} over the positions of an axis that have one owner, in the order of these."""
    count = int(owners.max()) + 1
    if np.array_equal(owners, np.arange(owners.size)):
        return values
    if count == owners.size:
        return jnp.take(values, np.argsort(owners), axis=axis)
    moved = jnp.moveaxis(power * log_masses(values), axis, 0)
    tops = jax.ops.segment_max(moved, owners, count)
    tops = jnp.where(tops > -jnp.inf, tops, 0)
    sums = jax.ops.segment_sum(jnp.exp(moved - tops[owners]), owners, count)
    return jnp.moveaxis(jnp.exp((log_masses(sums) + tops) / power), 0, axis)


def _flat(part: Part) -> Part:
    """A part of one row, or of one column, as columns of one row."""
    batch, rows, cols = shape = part.ranges.shape
    if rows > 1 and cols > 1:
        return part
    sides = [
        *(x.reshape(batch, rows, 1) for x in part.rows),
        *(x.reshape(batch, 1, cols) for x in part.cols),
        part.units.reshape(batch, 1, cols),
    ]
    *neurons, units = (np.broadcast_to(x, shape).reshape(1, -1) for x in sides)
    ranges, noises = (values.reshape(1, 1, -1) for values in (part.ranges, part.noises))
    entries = [*part.row_entries, *part.col_entries]
    return Part([], neurons, [], entries, ranges, noises, units, part.offset)


def _turned(part: Part) -> Part:
    """A part with no more rows than columns, where all columns of a batch entry share a unit."""
    batch, rows, cols = part.ranges.shape
    if rows <= cols or (part.units != part.units[:, :1]).any():
        return part
    return Part(
        part.cols,
        part.rows,
        part.col_entries,
        part.row_entries,
        jnp.swapaxes(part.ranges, 1, 2),
        jnp.swapaxes(part.noises, 1, 2),
        np.broadcast_to(part.units[:, :1], (batch, rows)),
        part.offset,
    )


def _padded(part: Part, shape: tuple[int, int]) -> Part:
    """A part with rows and columns of nothing up to a shape."""
    more = [(0, wanted - n) for wanted, n in zip(shape, part.ranges.shape[1:], strict=True)]

    def along(side: list[np.ndarray], pad: tuple[int, int]) -> list[np.ndarray]:
        return [np.pad(x, ((0, 0), pad), constant_values=-1) for x in side]

    return part._replace(
        rows=along(part.rows, more[0]),
        cols=along(part.cols, more[1]),
        ranges=jnp.pad(part.ranges, ((0, 0), *more)),
        noises=jnp.pad(part.noises, ((0, 0), *more)),
        units=np.pad(part.units, ((0, 0), more[1]), mode="edge"),
    )


def _common_shapes(shapes: list[tuple[int, int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """From the (rows, cols) of parts to those of the stacks that they go to.

    Each stack makes the compiled program longer; a few entries of nothing do not. Greedily, the
    cheapest pair of stacks first.
    """
    counts: dict[tuple[int, int], int] = {}
    for batch, rows, cols in shapes:
        counts[rows, cols] = counts.get((rows, cols), 0) + batch
    goes = {shape: shape for shape in counts}
    budget = sum(math.prod(shape) for shape in shapes) * PADDING
    while len(counts) > 1:
        growths = {
            pair: sum(counts[one] * (math.prod(_around(*pair)) - math.prod(one)) for one in pair)
            for pair in itertools.combinations(counts, 2)
        }
        pair = min(growths, key=lambda pair: growths[pair])
        budget -= growths[pair]
        if budget < 0:
            break
        around = _around(*pair)
        total = sum(counts.pop(one) for one in pair)
        counts[around] = counts.get(around, 0) + total
        goes = {shape: around if to in pair else to for shape, to in goes.items()}
    return goes


def _around(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), max(one[1], other[1])


def products_of(parts: list[Part], num_neurons: int) -> Products:
    """The sum over all units of parts, parts of similar shapes on top of each other."""
    found = [_turned(_flat(_merged(part))) for part in parts]
    starts = np.cumsum([0, *(int(part.units.max()) + 1 for part in found)])
    offsets = np.repeat([part.offset for part in found], np.diff(starts))
    numbered = [
        part._replace(units=part.units + start) for part, start in zip(found, starts, strict=False)
    ]
    stacks = _in_stacks(numbered)
    depth = max(1, *(len(side) for part in found for side in (part.rows, part.cols)))
    slots = [
        _slots(side, entries, size, depth, num_neurons)
        for stack in stacks
        for side, entries, size in _sides(stack)
    ]
    dtype = stacks[0][0].ranges.dtype
    # Logarithms of whole stacks: of parts they would be as many kernels.
    ranges, noises = (
        [
            power * log_masses(jnp.concatenate([getattr(part, of) for part in stack], _axis(stack)))
            for stack in stacks
        ]
        for of, power in (("ranges", POWER), ("noises", 1.0))
    )
    units = [part.units.reshape(-1) for stack in stacks for part in stack]
    return Products(
        (_factor(2 / POWER, -POWER, ranges, dtype), _factor(1.0, EXPONENT, noises, dtype)),
        jnp.asarray(np.concatenate([neurons for neurons, _ in slots], 1).astype(np.int32)),
        jnp.asarray(np.concatenate([entries for _, entries in slots], 1).astype(dtype)),
        jnp.asarray(np.concatenate(units).astype(np.int32)),
        jnp.asarray(offsets.astype(dtype)),
    )


def _in_stacks(parts: list[Part]) -> list[list[Part]]:
    """Parts that lie next to each other in one array: columns of one row, or equal shapes."""
    flat = [part for part in parts if part.ranges.shape[1] == 1]
    others = [part for part in parts if part.ranges.shape[1] > 1]
    goes = _common_shapes([_shape(part) for part in others])
    stacks: dict[tuple[int, int], list[Part]] = {}
    for part in others:
        shape = goes[_shape(part)[1:]]
        stacks.setdefault(shape, []).append(_padded(part, shape))
    return [stack for stack in (flat, *stacks.values()) if stack]


def _shape(part: Part) -> tuple[int, int, int]:
    batch, rows, cols = part.ranges.shape
    return batch, rows, cols


def _axis(stack: list[Part]) -> int:
    """Columns of one row go side by side, other parts on top of each other."""
    return 2 if stack[0].ranges.shape[1] == 1 else 0


def _sides(stack: list[Part]) -> Iterator[tuple[list[np.ndarray], list[float], int]]:
    """The neurons of the rows of a stack and of its columns, with B and the number of positions."""
    for part in stack if _axis(stack) == 0 else stack[:1]:
        yield part.rows, part.row_entries, math.prod(part.ranges.shape[:2])
    for part in stack:
        yield part.cols, part.col_entries, math.prod(part.ranges.shape[::2])


def _factor(weight: float, exponent: float, logs: list[jax.Array], dtype: Any) -> Factor:
    return Factor(jnp.asarray(weight, dtype), jnp.asarray(exponent, dtype), tuple(logs))


def _slots(
    along: list[np.ndarray],
    entries: list[float],
    size: int,
    depth: int,
    num_neurons: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The neurons of positions, and B, (depth, positions)."""
    neurons, factors = np.full((depth, size), num_neurons), np.zeros((depth, size))
    for k, (met, entry) in enumerate(zip(along, entries, strict=True)):
        flat = met.reshape(-1)
        neurons[k] = np.where(flat < 0, num_neurons, flat)
        factors[k] = np.where(flat < 0, 0, entry)
    return neurons, factors
