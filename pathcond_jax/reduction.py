"""Objectives over the log-scales, reduced from all entries to neuron × neuron matrices.

An objective is a sum ``Σ_k w_k log Σ_i a_i^(k) exp(s_k (Bz)_i) − ⟨b, z⟩`` over the trainable
entries i. Entries that share their row of B are summed once, before any solver runs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.extended_range import ScaledDiagonal
from pathcond_jax._spec.sharding import segment_max, segment_sum
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import Incidence, Leaf, PyTree


class Link(NamedTuple):
    """The neurons of one group along one axis of a block.

    Attributes:
      group: position in ``spec.groups``.
      sign: −1 where the axis enters the neurons, +1 where it leaves them (the entry of B).
      neurons: integer array (batch, size), the neuron of each slice or -1; None: slice k is
        neuron k.
    """

    group: int
    sign: int
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
      surplus: per group, outgoing minus incoming entries of each neuron: the column sums of B.
    """

    sizes: tuple[int, ...]
    blocks: tuple[Block, ...]
    surplus: tuple[np.ndarray, ...]


class LogSum(NamedTuple):
    """``weight · log Σ_i a_i exp(exponent · (Bz)_i)``.

    Attributes:
      weight: w.
      exponent: s.
      masses: the reduced a, one array per block of the layout.
      log_scales: one scalar per block; the true masses are ``masses · exp(log_scales)``.
    """

    weight: float | jax.Array
    exponent: float
    masses: tuple[jax.Array, ...]
    log_scales: tuple[jax.Array, ...]


class Smooth(NamedTuple):
    """``weight · function(log_scales)``, any smooth convex function.

    Attributes:
      weight: w.
      function: from one array per group to a scalar; a pytree, so that it can be an argument of
        a compiled function.
    """

    weight: float | jax.Array
    function: jax.tree_util.Partial


class Objective(NamedTuple):
    """What a solver minimizes, ``Σ terms + Σ smooth − Σ concave − Σ_g ⟨linear_g, z_g⟩``.

    Attributes:
      terms: logarithms of sums, convex.
      linear: b, one array per group.
      smooth: other convex functions.
      concave: logarithms of sums that are to grow.
      limit: the box |z| ≤ limit outside of which the objective means nothing; None: no box.
    """

    terms: tuple[LogSum, ...]
    linear: tuple[np.ndarray | jax.Array, ...]
    smooth: tuple[Smooth, ...] = ()
    concave: tuple[LogSum, ...] = ()
    limit: float | None = None


def path_objective(spec: ArchSpec, gram: PyTree | ScaledDiagonal) -> Objective:
    """The log-det Bregman criterion ``p log Σ g e^{2Bz} − Σ 2(Bz)``.

    Args:
      spec: the architecture.
      gram: the Gram diagonal g, like the parameters; or its scaled form.

    Returns:
      The objective, reduced.

    References:
      Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026, arXiv 2602.19799.
    """
    masses, log_scales = reduce_masses(spec, gram)
    term = LogSum(float(spec.num_parameters), 2.0, masses, log_scales)
    return Objective((term,), tuple(2.0 * s for s in layout(spec).surplus))


class Reduction(NamedTuple):
    """How entries that share their row of B become one: over axes, over segments, pairwise."""

    axes: Callable[..., jax.Array]
    segments: Callable[..., jax.Array]
    pair: Callable[[jax.Array, jax.Array], jax.Array]


SUM = Reduction(jnp.sum, segment_sum, jnp.add)
MAX = Reduction(jnp.max, segment_max, jnp.maximum)


def reduce_masses(
    spec: ArchSpec, tree: PyTree | ScaledDiagonal, reduction: Reduction = SUM
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Reduces the trainable entries of a parameter-shaped tree to the blocks of the layout."""
    return _reduce_masses(tree, spec.symmetry, reduction)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _reduce_masses(
    tree: PyTree | ScaledDiagonal, spec: ArchSpec, reduction: Reduction
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    if isinstance(tree, ScaledDiagonal):
        values = match_leaves(spec, tree.mantissa, "gram")
        scales = list(jax.tree.leaves(tree.log_scale))
    else:
        values, scales = match_leaves(spec, tree, "gram"), [None] * len(spec.leaves)
    blocks = layout(spec).blocks
    reduced = [_reduce_block(block, values, scales, reduction) for block in blocks]
    return tuple(mass for mass, _ in reduced), tuple(scale for _, scale in reduced)


@functools.lru_cache(maxsize=64)
def layout(spec: ArchSpec) -> Layout:
    """The blocks that every criterion over ``spec`` reduces to."""
    surplus = [np.zeros(group.size) for group in spec.groups]
    blocks: dict[object, Block] = {}
    by_path: dict[str, list[tuple[int, int, Incidence]]] = {}
    for number, group in enumerate(spec.groups):
        for sign, incidences in ((-1, group.incoming), (1, group.outgoing)):
            for incidence in incidences:
                by_path.setdefault(incidence.path, []).append((number, sign, incidence))
    for number, leaf in enumerate(spec.leaves):
        if not leaf.trainable or leaf.size == 0:
            continue
        met = by_path.get(leaf.path, [])
        for group_number, sign, incidence in met:
            per_slice = leaf.size // max(incidence.index.size, 1)
            present = incidence.index[incidence.index >= 0]
            np.add.at(surplus[group_number], present, sign * per_slice)
        key, block = _leaf_block(number, leaf, met, spec)
        if key in blocks:
            block = blocks[key]._replace(sources=blocks[key].sources + block.sources)
        blocks[key] = block
    return Layout(tuple(g.size for g in spec.groups), tuple(blocks.values()), tuple(surplus))


def _leaf_block(
    number: int, leaf: Leaf, met: list[tuple[int, int, Incidence]], spec: ArchSpec
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
    sign: int,
    incidence: Incidence,
    batch: tuple[int, ...],
    side: tuple[int, ...],
    leaf: Leaf,
) -> tuple[int, int, np.ndarray]:
    """The neuron of each (batch, slice) pair of one side."""
    axes = batch + side
    order = sorted(range(len(incidence.axes)), key=lambda k: axes.index(incidence.axes[k]))
    index = incidence.index.transpose(order)
    shape = [leaf.shape[a] if a in incidence.axes else 1 for a in axes]
    full = np.broadcast_to(index.reshape(shape), [leaf.shape[a] for a in axes])
    return (
        group,
        sign,
        full.reshape(int(np.prod([leaf.shape[a] for a in batch], dtype=np.int64)), -1),
    )


def _compress(
    links: list[tuple[int, int, np.ndarray]], spec: ArchSpec
) -> tuple[Axis, np.ndarray | None]:
    """Merges the slices of a side that belong to the same neurons."""
    if not links:
        return Axis(1, ()), None
    links = sorted(links, key=lambda link: link[:2])
    segments = None
    if links[0][2].shape[0] == 1:
        table = np.stack([index[0] for _, _, index in links], axis=1)
        unique, inverse = np.unique(table, axis=0, return_inverse=True)
        if len(unique) < len(table):
            segments = inverse.reshape(-1).astype(np.int32)
            links = [(g, s, unique[None, :, k]) for k, (g, s, _) in enumerate(links)]
    made = []
    for group, sign, index in links:
        identity = np.arange(spec.groups[group].size)[None]
        made.append(Link(group, sign, None if np.array_equal(index, identity) else index))
    return Axis(links[0][2].shape[1], tuple(made)), segments


def _key(axis: Axis) -> object:
    return axis.size, tuple(
        (k.group, k.sign, None if k.neurons is None else (k.neurons.shape, k.neurons.tobytes()))
        for k in axis.links
    )


def _reduce_block(
    block: Block,
    values: list[jax.Array],
    scales: list[jax.Array | None],
    reduction: Reduction,
) -> tuple[jax.Array, jax.Array]:
    parts = [
        _reduce_leaf(block, source, values[source.leaf], reduction) for source in block.sources
    ]
    dtype = compute_dtype(*(part.dtype for part in parts))
    parts = [part.astype(dtype) for part in parts]
    offsets = [scales[source.leaf] for source in block.sources]
    if all(offset is None for offset in offsets):
        return functools.reduce(reduction.pair, parts), jnp.zeros((), dtype)
    logs = jnp.stack([jnp.asarray(0 if o is None else o).astype(dtype) for o in offsets])
    top = jnp.where(jnp.isfinite(logs.max()), logs.max(), 0)
    factors = jnp.exp(logs - top)
    parts = [part * factor for part, factor in zip(parts, factors, strict=True)]
    return functools.reduce(reduction.pair, parts), top


def _reduce_leaf(block: Block, source: Source, value: jax.Array, reduction: Reduction) -> jax.Array:
    value = jnp.asarray(value)
    value = value.astype(compute_dtype(value.dtype))
    kept = source.batch + source.rows + source.cols
    rest = tuple(a for a in range(value.ndim) if a not in kept)
    value = jnp.transpose(reduction.axes(value, axis=rest, keepdims=True), kept + rest)
    rows = value.shape[len(source.batch) : len(source.batch + source.rows)]
    value = value.reshape(block.batch, int(np.prod(rows, dtype=np.int64)), -1)
    for axis, segments in ((1, source.row_segments), (2, source.col_segments)):
        if segments is not None:
            value = _reduce_segments(value, segments, block.shape[axis], axis, reduction)
    return value


def _reduce_segments(
    value: jax.Array, segments: np.ndarray, count: int, axis: int, reduction: Reduction
) -> jax.Array:
    shape, length = value.shape, segments.size
    repeats = length // count
    if repeats * count == length:
        # Flattened images repeat their channels regularly: a reshape is faster than a scatter.
        for order, split, over in (
            (np.tile(np.arange(count), repeats), (repeats, count), axis),
            (np.repeat(np.arange(count), repeats), (count, repeats), axis + 1),
        ):
            if np.array_equal(segments, order):
                apart = value.reshape(*shape[:axis], *split, *shape[axis + 1 :])
                return reduction.axes(apart, axis=over)
    moved = jnp.moveaxis(value, axis, 0)
    return jnp.moveaxis(reduction.segments(moved, segments, count), 0, axis)
