"""The static side of a criterion: which entries are summed before any solver runs."""

import functools
from typing import NamedTuple

import numpy as np

from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import Incidence, Leaf


class Link(NamedTuple):
    """The neurons of one group along one axis of a block.

    Attributes:
      group: position in ``spec.groups``.
      entry: the entry of B: minus the power of their scale that the slices take where the axis
        enters the neurons, plus that power where it leaves them.
      neurons: integer array (batch, size), the neuron of each slice or -1; None: slice k is
        neuron k.
    """

    group: int
    entry: float
    neurons: np.ndarray | None


class Axis(NamedTuple):
    """One side of a block: ``size`` slices per batch entry and the neurons they belong to."""

    size: int
    links: tuple[Link, ...]


class Source(NamedTuple):
    """How one leaf is summed into a block: its axes by role, then repeated slices."""

    leaf: int
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    row_segments: np.ndarray | None
    col_segments: np.ndarray | None


class Block(NamedTuple):
    """A (batch, rows, cols) array of masses; (Bz) of an entry is its row's plus its column's."""

    batch: int
    rows: Axis
    cols: Axis
    sources: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the block's array."""
        return (self.batch, self.rows.size, self.cols.size)


class Layout(NamedTuple):
    """The static shape of every criterion over one spec.

    Attributes:
      sizes: the size of each group.
      blocks: the reduced arrays.
      surplus: per group, outgoing minus incoming entries of each neuron, each counted as often as
        its power says: the column sums of B.
    """

    sizes: tuple[int, ...]
    blocks: tuple[Block, ...]
    surplus: tuple[np.ndarray, ...]


@functools.lru_cache(maxsize=64)
def layout(spec: ArchSpec) -> Layout:
    """The blocks that every criterion over ``spec`` reduces to.

    One pass over the leaves. The axes of a leaf along which it meets neurons become the rows and
    columns of a matrix, and axes that both sides share (the groups of a grouped convolution) its
    batch; all others are summed away. Leaves whose matrices have the same slices and neurons add up
    to one block: a kernel and nothing else, but also all biases and scales of one group.
    """
    surplus = [np.zeros(group.size) for group in spec.groups]
    blocks: dict[object, Block] = {}
    by_path: dict[str, list[tuple[int, float, Incidence]]] = {}
    for number, group in enumerate(spec.groups):
        for sign, incidences in ((-1, group.incoming), (1, group.outgoing)):
            for incidence in incidences:
                met = (number, sign * incidence.power, incidence)
                by_path.setdefault(incidence.path, []).append(met)
    for number, leaf in enumerate(spec.leaves):
        if not leaf.trainable or leaf.size == 0:
            continue
        here = by_path.get(leaf.path, [])
        for group_number, entry, incidence in here:
            per_slice = leaf.size // max(incidence.index.size, 1)
            present = incidence.index[incidence.index >= 0]
            np.add.at(surplus[group_number], present, entry * per_slice)
        key, block = _leaf_block(number, leaf, here, spec)
        if key in blocks:
            block = blocks[key]._replace(sources=blocks[key].sources + block.sources)
        blocks[key] = block
    return Layout(tuple(g.size for g in spec.groups), tuple(blocks.values()), tuple(surplus))


def _leaf_block(
    number: int, leaf: Leaf, met: list[tuple[int, float, Incidence]], spec: ArchSpec
) -> tuple[object, Block]:
    batch, rows, cols = _roles([i.axes for _, _, i in met])
    on_rows = [set(incidence.axes) <= {*batch, *rows} for _, _, incidence in met]
    (row_axis, row_segments), (col_axis, col_segments) = (
        _compress(
            [
                _link(*entry, batch, side, leaf)
                for entry, here in zip(met, on_rows, strict=True)
                if here == wanted
            ],
            spec,
        )
        for side, wanted in ((rows, True), (cols, False))
    )
    size = int(np.prod([leaf.shape[a] for a in batch], dtype=np.int64))
    source = Source(number, batch, rows, cols, row_segments, col_segments)
    key = (size, _key(row_axis), _key(col_axis))
    return key, Block(size, row_axis, col_axis, (source,))


def _roles(axes: list[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Splits the axes that carry neurons into shared (batch), row and column axes."""
    sets = sorted({tuple(sorted(a)) for a in axes}, key=lambda s: (len(s), s))
    # A block has two sides; leaves with neurons along more axes than two get sides of several.
    while len(sets) > 2:
        first, second, *rest = sets
        sets = sorted({tuple(sorted({*first, *second})), *rest}, key=lambda s: (len(s), s))
    if not sets:
        return (), (), ()
    if len(sets) == 1:
        return (), sets[0], ()
    smaller, larger = map(set, sets)
    if smaller <= larger:
        return (), sets[1], ()
    shared = smaller & larger
    one, two = sorted((tuple(sorted(smaller - shared)), tuple(sorted(larger - shared))))
    return tuple(sorted(shared)), one, two


def _link(
    group: int,
    entry: float,
    incidence: Incidence,
    batch: tuple[int, ...],
    side: tuple[int, ...],
    leaf: Leaf,
) -> tuple[int, float, np.ndarray]:
    """The neuron of each (batch, slice) pair of one side."""
    axes = batch + side
    order = sorted(range(len(incidence.axes)), key=lambda k: axes.index(incidence.axes[k]))
    index = incidence.index.transpose(order)
    shape = [leaf.shape[a] if a in incidence.axes else 1 for a in axes]
    full = np.broadcast_to(index.reshape(shape), [leaf.shape[a] for a in axes])
    return (
        group,
        entry,
        full.reshape(int(np.prod([leaf.shape[a] for a in batch], dtype=np.int64)), -1),
    )


def _compress(
    links: list[tuple[int, float, np.ndarray]], spec: ArchSpec
) -> tuple[Axis, np.ndarray | None]:
    """Merges the slices of a side that belong to the same neurons.

    Entries that share their row of B add up before any solver runs, and a dense layer behind a
    flattened image has as many rows as pixels for each channel. Slices are equal if all links give
    them the same neurons, so they are compared as the rows of a table (slice × link), whose
    distinct rows become the slices of the axis; ``segments`` says which one each slice joins.
    Where batch entries differ (grouped convolutions), so may their slices, and nothing is merged.
    """
    if not links:
        return Axis(1, ()), None
    links = sorted(links, key=lambda link: link[:2])
    segments = None
    if links[0][2].shape[0] == 1:
        table = np.stack([index[0] for _, _, index in links], axis=1)
        unique, inverse = np.unique(table, axis=0, return_inverse=True)
        if len(unique) < len(table):
            segments = inverse.reshape(-1).astype(np.int32)
            links = [(g, b, unique[None, :, k]) for k, (g, b, _) in enumerate(links)]
    made = []
    for group, entry, index in links:
        identity = np.arange(spec.groups[group].size)[None]
        made.append(Link(group, entry, None if np.array_equal(index, identity) else index))
    return Axis(links[0][2].shape[1], tuple(made)), segments


def _key(axis: Axis) -> object:
    return axis.size, tuple(
        (k.group, k.entry, None if k.neurons is None else (k.neurons.shape, k.neurons.tobytes()))
        for k in axis.links
    )
