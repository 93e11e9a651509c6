"""How scales move with entries: operations that rearrange, join, take and put."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._symmetry.equations import WILD, Term
from pathcond_jax._symmetry.values import (
    MAX_JOINT,
    Rule,
    Scale,
    Scope,
    Terms,
    expand,
    is_wild,
    mapped,
    support,
    varies,
)


def structural(move: Callable[[Scope, np.ndarray], np.ndarray]) -> Rule:
    """An operation that moves entries: run on the label arrays themselves."""

    def rule(scope: Scope, scale: Scale) -> list[Terms]:
        return [mapped(scale.terms, lambda labels: move(scope, labels))]

    return rule


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


def reshape(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels of a reshaped value."""
    if scope.params.get("dimensions") is not None:
        labels = labels.transpose(scope.params["dimensions"])
    return reshape_labels(labels, scope.shape(0), scope.out_shape())


def broadcast_in_dim(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels of a value with new axes."""
    shape = [1] * len(scope.out_shape())
    for axis, target in enumerate(scope.params["broadcast_dimensions"]):
        shape[target] = labels.shape[axis]
    return labels.reshape(shape)


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


def squeeze(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels without axes of size 1."""
    return labels.squeeze(tuple(scope.params["dimensions"]))


def transpose(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels with permuted axes."""
    return labels.transpose(scope.params["permutation"])


def rev(scope: Scope, labels: np.ndarray) -> np.ndarray:
    """Labels in reverse order."""
    return np.flip(labels, scope.params["dimensions"])


def pad(scope: Scope, scale: Scale, value: Scale) -> list[Terms]:
    """Padding with zeros fits every scale, padding with other constants none."""
    ndim = len(scope.out_shape())
    if not is_wild(value.terms):
        return [scope.equate((scale, value), ndim, "fills in a constant that fixes the scale")]

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


def concatenate(scope: Scope, *scales: Scale) -> list[Terms]:
    """Values side by side."""
    axis, ndim = scope.params["dimension"], len(scope.out_shape())
    sizes = [scope.shape(k)[axis] for k in range(len(scales))]
    return [_joined(scope, [expand(scale, ndim) for scale in scales], sizes, axis)]


def _joined(scope: Scope, operands: Sequence[Terms], sizes: Sequence[int], axis: int) -> Terms:
    """Concatenates scales, each set of axes that vary together on its own."""
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


def dynamic_update_slice(scope: Scope, scale: Scale, update: Scale, *starts: Scale) -> list[Terms]:
    """Part of a value overwritten."""
    full = scope.shape(0)
    cut = [a for a, n in enumerate(scope.shape(1)) if n < full[a]]
    parts = [Scale(scope.along(s.terms, cut), s.signal) for s in (scale, update)]
    return [scope.equate(parts, len(full), "overwrites values of another scale")]


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


def gather(scope: Scope, scale: Scale, indices: Scale) -> list[Terms]:
    """Values taken at given positions."""
    numbers = scope.params["dimension_numbers"]
    sizes, full = scope.params["slice_sizes"], scope.shape(0)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    indexed = [a for a, n in enumerate(sizes) if n < full[a] or a in batching]
    known = scope.constant(1)
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


def stack(scope: Scope, scales: Sequence[Scale], ndim: int) -> Terms:
    """Values stacked on a new first axis."""
    operands = [mapped(expand(scale, ndim - 1), lambda x: x[None]) for scale in scales]
    return _joined(scope, operands, (1,) * len(operands), 0)
