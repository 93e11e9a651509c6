"""How scales move with entries: operations that rearrange, join, take and put.

How to read this file: an operation that only moves entries runs on the label arrays themselves
(``structural``); axes of size 1 stay so wherever the scale is constant along them, so that no label
array grows to the size of its value without need. Then come operations with several operands, and
those that take or put entries at positions: known positions move labels exactly, unknown ones
demand one scale along the axes that they run over.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.primitives import SCATTER_PARAMETERS, runs_only
from pathcond_jax._symmetry.equations import WILD, Term
from pathcond_jax._symmetry.values import (
    MAX_JOINT,
    RULES,
    Scale,
    ScaleRule,
    Scope,
    Terms,
    expand,
    is_wild,
    mapped,
    pin,
    support,
    varies,
)

rule = RULES.rule


def structural(move: Callable[[Scope, np.ndarray], np.ndarray]) -> ScaleRule:
    """An operation that moves entries: run on the label arrays themselves."""

    @functools.wraps(move)
    def moved(scope: Scope, scale: Scale) -> list[Terms]:
        return [mapped(scale.terms, lambda labels: move(scope, labels))]

    return moved


def reshape_labels(labels: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Reshapes labels that broadcast to ``old``; axes along which they are constant stay 1."""
    if 0 in old:
        return np.zeros((1,) * len(new), np.int64)
    shape_parts: list[tuple[int, ...]] = []
    full: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right, i0, j0 = 1, 1, i, j
        while left != right or (i == i0 and j == j0):
            if left <= right and i < len(old):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        varied = any(n > 1 for n in labels.shape[i0:i])
        full += [old[k] if varied else 1 for k in range(i0, i)]
        shape_parts.append(tuple(new[j0:j]) if varied else (1,) * (j - j0))
    target = tuple(n for part in shape_parts for n in part)
    return np.broadcast_to(labels, full).reshape(target)


@rule("reshape", reads=("new_sizes", "dimensions"))
@structural
def reshape(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels of a reshaped value."""
    shape, order = scope.shape(0), scope.params["dimensions"]
    if order is not None:
        labels, shape = labels.transpose(order), tuple(shape[axis] for axis in order)
    return reshape_labels(labels, shape, scope.out_shape())


@rule("broadcast_in_dim", reads=("shape", "broadcast_dimensions"))
@structural
def broadcast_in_dim(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels of a value with new axes."""
    shape = [1] * len(scope.out_shape())
    for axis, target in enumerate(scope.params["broadcast_dimensions"]):
        shape[target] = labels.shape[axis]
    return labels.reshape(shape)


@rule("slice", reads=("start_indices", "limit_indices", "strides"))
def slice_(scope: Scope, scale: Scale) -> list[Terms]:
    """A slice at static positions."""
    full = scope.shape(0)
    strides = scope.params["strides"] or (1,) * len(full)
    bounds = (scope.params["start_indices"], scope.params["limit_indices"], strides)
    cut = [slice(*bound) for bound in zip(*bounds, strict=True)]
    scope.index(scale, [a for a, n in enumerate(scope.out_shape()) if n == 1 < full[a]])

    def move(labels: np.ndarray) -> np.ndarray:
        each = zip(cut, labels.shape, strict=True)
        return labels[tuple(slice(None) if n == 1 else where for where, n in each)]

    return [mapped(scale.terms, move)]


@rule("squeeze", reads=("dimensions",))
@structural
def squeeze(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels without axes of size 1."""
    return labels.squeeze(tuple(scope.params["dimensions"]))


@rule("transpose", reads=("permutation",))
@structural
def transpose(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels with permuted axes."""
    return labels.transpose(scope.params["permutation"])


@rule("rev", reads=("dimensions",))
@structural
def rev(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels in reverse order."""
    return np.flip(labels, scope.params["dimensions"])


@rule("pad", reads=("padding_config",))
def pad(scope: Scope, scale: Scale, value: Scale) -> list[Terms]:
    """Padding with zeros fits every scale; other fillings have the scale of what is filled in."""
    ndim = len(scope.out_shape())
    if not is_wild(value.terms):
        return [_filled(scope, scale, value)]

    def move(labels: np.ndarray) -> np.ndarray:
        config = scope.params["padding_config"]
        for axis, (low, high, interior) in enumerate(config):
            if labels.shape[axis] > 1:
                size = labels.shape[axis] + (labels.shape[axis] - 1) * interior
                wide = np.full([size if a == axis else n for a, n in enumerate(labels.shape)], WILD)
                wide[(slice(None),) * axis + (slice(None, None, interior + 1),)] = labels
                width = [(max(low, 0), max(high, 0)) if a == axis else (0, 0) for a in range(ndim)]
                wide = np.pad(wide, width, constant_values=WILD)
                keep = slice(max(-low, 0), wide.shape[axis] - max(-high, 0))
                labels = wide[(slice(None),) * axis + (keep,)]
        return labels

    return [mapped(scale.terms, move)]


def _filled(scope: Scope, scale: Scale, value: Scale) -> Terms:
    """Scales with those of a filling between them, along the axes that are padded."""
    config, shape = scope.params["padding_config"], scope.shape(0)
    for terms in (scale.terms, value.terms):
        scope.ask_to_join(terms)
    labels = scope.single(scale, len(shape))
    each = zip(shape, labels.shape, config, strict=True)
    full = [n if any(padding) else m for n, m, padding in each]
    if math.prod(scope.out_shape()) > MAX_JOINT:
        return scope.equate((scale, value), len(shape), "fills in a constant that fixes the scale")
    # Label numbers are positions in one list, below 2^31.
    with jax.ensure_compile_time_eval():
        wide = jnp.asarray(np.broadcast_to(labels, full), np.int32)
        moved = jax.lax.pad(wide, jnp.asarray(scope.single(value, 0), np.int32), config)
    return (Term(1.0, narrowed(np.asarray(moved).astype(np.int64))),)


@rule("concatenate", reads=("dimension",))
def concatenate(scope: Scope, *scales: Scale) -> list[Terms]:
    """Values side by side."""
    axis, ndim = scope.params["dimension"], len(scope.out_shape())
    sizes = [scope.shape(k)[axis] for k in range(len(scales))]
    return [_joined(scope, [expand(scale, ndim) for scale in scales], sizes, axis)]


def _joined(scope: Scope, operands: Sequence[Terms], sizes: Sequence[int], axis: int) -> Terms:
    """Concatenates scales, each set of axes that vary together on its own.

    The operands' log-scales are sums of terms. Terms that share an axis, beside the one along which
    values are joined, must be added up to one label array before they can be laid side by side;
    terms with disjoint axes need not, and joining them apart keeps h + w labels from becoming
    h · w. So the supports of all terms are merged into classes that overlap nowhere, and each class
    is joined on its own: to the common labels where all operands agree, side by side where they
    vary along the axis or differ. Zeros fit whatever stands beside them. Beyond ``MAX_JOINT``
    labels the operands are demanded to agree instead, which is sound.
    """
    classes: list[frozenset[int]] = []
    for varied in {support(term) - {axis} for terms in operands for term in terms}:
        met = [other for other in classes if other & varied or other == varied]
        classes = [other for other in classes if other not in met]
        classes.append(varied.union(*met))
    joined: list[Term] = []
    for varied in sorted(classes, key=sorted):
        parts = [
            Scale(terms if is_wild(terms) else _within(terms, varied, axis)) for terms in operands
        ]
        ndim = max(term.labels.ndim for part in parts for term in part.terms)
        arrays = [
            np.full((1,) * ndim, WILD) if is_wild(part.terms) else scope.single(part, ndim)
            for part in parts
        ]
        shape = np.broadcast_shapes(
            *(tuple(1 if a == axis else n for a, n in enumerate(array.shape)) for array in arrays)
        )
        same = all(array is arrays[0] or np.array_equal(array, arrays[0]) for array in arrays)
        constant = all(array.shape[axis] == 1 for array in arrays)
        if constant and same:
            joined.append(Term(1.0, arrays[0]))
        elif constant and math.prod(shape) * sum(sizes) > MAX_JOINT:
            joined += scope.equate(parts, ndim, "joins too many scales to follow")
        else:
            wide = [
                np.broadcast_to(array, [n if a == axis else m for a, m in enumerate(shape)])
                for array, n in zip(arrays, sizes, strict=True)
            ]
            joined.append(Term(1.0, np.concatenate(wide, axis)))
    return tuple(joined)


def _within(terms: Terms, varied: frozenset[int], axis: int) -> Terms:
    return tuple(
        term
        for term in terms
        if (support(term) - {axis}) & varied or support(term) - {axis} == varied
    )


@rule("split", reads=("axis", "sizes"))
def split(scope: Scope, scale: Scale) -> list[Terms]:
    """A value cut along an axis."""
    axis = scope.params["axis"]
    ends = np.cumsum(scope.params["sizes"])
    starts = ends - np.asarray(scope.params["sizes"])
    scope.index(scale, (axis,) if 1 in scope.params["sizes"] else ())

    def cut(start: int, stop: int) -> Terms:
        where = (slice(None),) * axis + (slice(start, stop),)
        return mapped(scale.terms, lambda x: x if x.shape[axis] == 1 else x[where])

    return [cut(start, stop) for start, stop in zip(starts, ends, strict=True)]


@rule("dynamic_slice", reads=("slice_sizes",))
def dynamic_slice(scope: Scope, scale: Scale, *starts: Scale) -> list[Terms]:
    """A slice at a position that may depend on values."""
    sizes, full = scope.params["slice_sizes"], scope.shape(0)
    cut = [a for a, n in enumerate(sizes) if n < full[a]]
    known = {a: int(x) for a in cut if (x := scope.constant(a + 1)) is not None}
    terms = scope.along(scale.terms, [a for a in cut if a not in known])
    scope.index(Scale(terms, scale.signal), [a for a in known if sizes[a] == 1])

    def move(labels: np.ndarray) -> np.ndarray:
        for a in known:
            if labels.shape[a] > 1:
                begin = min(max(known[a], 0), full[a] - sizes[a])
                labels = labels[(slice(None),) * a + (slice(begin, begin + sizes[a]),)]
        return labels

    return [mapped(terms, move)]


@rule("dynamic_update_slice")
def dynamic_update_slice(scope: Scope, scale: Scale, update: Scale, *starts: Scale) -> list[Terms]:
    """Part of a value overwritten."""
    full, part = scope.shape(0), scope.shape(1)
    cut = [a for a, n in enumerate(part) if n < full[a]]
    known = [scope.constant(k) for k in range(2, 2 + len(full))]
    if cut and all(known[a] is not None for a in cut) and math.prod(full) <= MAX_JOINT:
        begin = [int(x) if x is not None else 0 for x in known]
        begin = [min(max(x, 0), n - m) for x, n, m in zip(begin, full, part, strict=True)]
        where = tuple(slice(x, x + m) for x, m in zip(begin, part, strict=True))
        return [_put(scope, scale, update, np.arange(math.prod(full)).reshape(full)[where])]
    parts = [Scale(scope.along(s.terms, cut), s.signal) for s in (scale, update)]
    return [scope.equate(parts, len(full), "overwrites values of another scale")]


def _put(scope: Scope, scale: Scale, update: Scale, places: np.ndarray) -> Terms:
    """Scales written at known places, those of the update; none where a place is below 0."""
    full = scope.shape(0)
    labels = np.array(np.broadcast_to(scope.single(scale, len(full)), full)).reshape(-1)
    written = places >= 0
    new = np.broadcast_to(scope.single(update, places.ndim), places.shape)
    labels[places[written]] = new[written]
    return (Term(1.0, narrowed(labels.reshape(full))),)


def narrowed(labels: np.ndarray) -> np.ndarray:
    """Labels of size 1 along the axes on which all are equal."""
    for axis in range(labels.ndim):
        head = np.take(labels, [0], axis) if labels.shape[axis] else labels
        if (labels == head).all():
            labels = head
    return labels


def _places(scope: Scope) -> np.ndarray | None:
    """Where a scatter puts each entry of its update, -1 for nowhere; None if that is not known."""
    indices, shape, full = scope.constant(1), scope.shape(2), scope.shape(0)
    if indices is None or math.prod(full) > MAX_JOINT:
        return None
    numbers = scope.params["dimension_numbers"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    hidden = (*numbers.inserted_window_dims, *batching)
    windows = iter(numbers.update_window_dims)
    sizes = tuple(1 if a in hidden else shape[next(windows)] for a in range(len(full)))
    taken = jax.lax.GatherDimensionNumbers(
        offset_dims=numbers.update_window_dims,
        collapsed_slice_dims=numbers.inserted_window_dims,
        start_index_map=numbers.scatter_dims_to_operand_dims,
        operand_batching_dims=batching,
        start_indices_batching_dims=tuple(getattr(numbers, "scatter_indices_batching_dims", ())),
    )
    modes = jax.lax.GatherScatterMode
    clips = scope.params["mode"] == modes.CLIP
    with jax.ensure_compile_time_eval():
        positions = jnp.arange(math.prod(full), dtype=np.int32).reshape(full)
        mode = modes.CLIP if clips else modes.FILL_OR_DROP
        found = jax.lax.gather(
            positions, jnp.asarray(indices), taken, sizes, mode=mode, fill_value=-1
        )
    places = np.asarray(found).astype(np.int64)
    promised = scope.params["mode"] == modes.PROMISE_IN_BOUNDS and (places < 0).any()
    return None if promised else places


def _are_distinct(places: np.ndarray) -> bool:
    met = places[places >= 0]
    return len(np.unique(met)) == met.size


@rule("scatter", reads=(*SCATTER_PARAMETERS, "update_jaxpr"))
def overwrite(scope: Scope, scale: Scale, indices: Scale, update: Scale) -> list[Terms]:
    """Values written at positions, or what a program makes of those that stand there."""
    places = _places(scope)
    if scope.params["update_jaxpr"] is not None:
        return _remade(scope, scale, update, places)
    if places is None or not _are_distinct(places):
        return scatter(scope, scale, indices, update)
    return [_put(scope, scale, update, places)]


def _remade(scope: Scope, scale: Scale, update: Scale, places: np.ndarray | None) -> list[Terms]:
    """Entries at known positions have a fixed scale before and after; the others keep theirs."""
    because = "has an unusual 'update_jaxpr'"
    scope.pin(update, because=because)
    if places is None:
        return pin(scope, scale, because=because)
    full = scope.shape(0)
    labels = np.array(np.broadcast_to(scope.single(scale, len(full)), full)).reshape(-1)
    met = places[places >= 0]
    scope.require([Term(1.0, labels[met])], because)
    labels[met] = 0
    return [(Term(1.0, narrowed(labels.reshape(full))),)]


@rule("scatter-mul", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("mul")})
def multiply_at(scope: Scope, scale: Scale, indices: Scale, update: Scale) -> list[Terms]:
    """Factors at positions: known ones, each met once, or factors of the scale 1."""
    places = _places(scope)
    if places is None or not _are_distinct(places):
        scope.pin(update)
        return [scale.terms]
    return [(*scale.terms, *_put(scope, Scale(), update, places))]


@rule("scatter-add", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("add")})
@rule("scatter-sub", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("sub")})
@rule("scatter-max", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("max")})
@rule("scatter-min", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("min")})
def combine_at(scope: Scope, scale: Scale, indices: Scale, update: Scale) -> list[Terms]:
    """Values added or compared at positions: where they meet, they have one scale."""
    places = _places(scope)
    if places is None:
        return scatter(scope, scale, indices, update)
    full, met = scope.shape(0), places[places >= 0]
    labels = np.array(np.broadcast_to(scope.single(scale, len(full)), full)).reshape(-1)
    new = np.broadcast_to(scope.single(update, places.ndim), places.shape)[places >= 0]
    # Where nothing stood, what comes has its own scale; of several, one that is no zero.
    filled = (labels[met] == WILD) & (new != WILD)
    labels[met[filled]] = new[filled]
    scope.require([Term(1.0, labels[met]), Term(-1.0, new)], "joins values of another scale")
    return [(Term(1.0, narrowed(labels.reshape(full))),)]


def scatter(scope: Scope, scale: Scale, indices: Scale, update: Scale) -> list[Terms]:
    """Values written or added at positions that depend on values."""
    numbers, full = scope.params["dimension_numbers"], scope.shape(0)
    hidden = (*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ()))
    windows = [a for a in range(len(full)) if a not in hidden]
    source = dict(zip(windows, numbers.update_window_dims, strict=True))
    whole = {a: b for a, b in source.items() if scope.shape(2)[b] == full[a]}
    kept = scope.along(scale.terms, set(range(len(full))) - set(whole))
    moved = scope.along(update.terms, set(range(len(scope.shape(2)))) - set(whole.values()))

    def laid_out(labels: np.ndarray) -> np.ndarray:
        order = sorted(whole, key=whole.__getitem__)
        labels = labels.reshape([labels.shape[whole[a]] for a in order])
        shape = [labels.shape[order.index(a)] if a in whole else 1 for a in range(len(full))]
        return labels.transpose(np.argsort(order)).reshape(shape)

    parts = [Scale(kept, scale.signal), Scale(mapped(moved, laid_out), update.signal)]
    return [scope.equate(parts, len(full), "joins values of another scale")]


@rule(
    "gather",
    reads=(
        *("dimension_numbers", "slice_sizes", "indices_are_sorted", "mode", "unique_indices"),
        "fill_value",
    ),
)
def gather(scope: Scope, scale: Scale, indices: Scale) -> list[Terms]:
    """Values taken at given positions."""
    numbers = scope.params["dimension_numbers"]
    sizes, full = scope.params["slice_sizes"], scope.shape(0)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    indexed = [a for a, n in enumerate(sizes) if n < full[a] or a in batching]
    known = scope.constant(1)
    if not _fill_fits(scope.params["fill_value"]) and not _inside(scope, known):
        scope.pin(scale, because="fills in a constant that fixes the scale")
        return [()]
    if known is not None and varies(scale.terms, indexed):
        scope.index(scale, indexed if known[..., 0].size == 1 else ())
        return [mapped(scale.terms, lambda x: _gather_labels(scope, x, known, indexed))]
    terms = scope.along(scale.terms, indexed)
    offsets = [a for a in range(len(full)) if a not in numbers.collapsed_slice_dims + batching]

    def move(labels: np.ndarray) -> np.ndarray:
        shape = [1] * len(scope.out_shape())
        for target, axis in zip(numbers.offset_dims, offsets, strict=True):
            shape[target] = labels.shape[axis]
        return labels.reshape(shape)

    return [mapped(terms, move)]


def _fill_fits(value: Any) -> bool:
    """Whether what stands in for entries out of bounds has every scale; None is NaN."""
    return value is None or bool(np.asarray(value) == 0) or not np.isfinite(value)


def _inside(scope: Scope, indices: np.ndarray | None) -> bool:
    """Whether indices are known, and none of them is out of bounds."""
    if indices is None:
        return False
    numbers, sizes = scope.params["dimension_numbers"], scope.params["slice_sizes"]
    last = [scope.shape(0)[axis] - sizes[axis] for axis in numbers.start_index_map]
    return bool(((indices >= 0) & (indices <= np.asarray(last))).all())


def _gather_labels(
    scope: Scope, labels: np.ndarray, indices: np.ndarray, indexed: Sequence[int]
) -> np.ndarray:
    """Gathers at known indices, the axes that are not indexed left at their size in ``labels``."""
    full = [n if a in indexed else labels.shape[a] for a, n in enumerate(scope.shape(0))]
    sizes = [
        n if a in indexed else labels.shape[a] for a, n in enumerate(scope.params["slice_sizes"])
    ]
    params = {**scope.params, "fill_value": WILD, "slice_sizes": tuple(sizes)}
    # Label numbers are positions in one list, below 2^31.
    wide = np.broadcast_to(labels, full).astype(np.int32)
    with jax.ensure_compile_time_eval():
        moved = scope.node.primitive.bind(jnp.asarray(wide), jnp.asarray(indices), **params)
    return np.asarray(moved).astype(np.int64)


def stacked_terms(scope: Scope, scales: Sequence[Scale], ndim: int, axis: int) -> Terms:
    """Values stacked on a new axis."""
    operands = [
        mapped(expand(scale, ndim - 1), lambda x: np.expand_dims(x, axis)) for scale in scales
    ]
    return _joined(scope, operands, (1,) * len(operands), axis)


@rule("stack", reads=("axis",))
def stack(scope: Scope, *scales: Scale) -> list[Terms]:
    """Values of one shape on a new axis."""
    return [stacked_terms(scope, scales, len(scope.out_shape()), scope.params["axis"])]


@rule("unstack", reads=("axis",))
def unstack(scope: Scope, scale: Scale) -> list[Terms]:
    """The slices of a value along an axis."""
    axis = scope.params["axis"]
    scope.index(scale, (axis,))

    def taken(number: int) -> Terms:
        return mapped(scale.terms, lambda x: x.take(min(number, x.shape[axis] - 1), axis))

    return [taken(number) for number in range(len(scope.node.outputs))]


@rule("tile", reads=("reps",))
@structural
def tile(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels of a repeated value."""
    repeats = scope.params["reps"]
    return np.tile(labels, [r if n > 1 else 1 for r, n in zip(repeats, labels.shape, strict=True)])
