"""How scales move with entries: operations that rearrange and join.

How to read this file: an operation that only moves entries runs on the label arrays themselves
(``structural``); axes of size 1 stay so wherever the scale is constant along them, so that no label
array grows to the size of its value without need. Then come operations with several operands.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._symmetry.equations import WILD, Term
from pathcond_jax._symmetry.terms import Terms, is_wild, mapped, support
from pathcond_jax._symmetry.values import MAX_JOINT, RULES, Scale, ScaleRule, Scope, expand

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


def narrowed(labels: np.ndarray) -> np.ndarray:
    """Labels of size 1 along the axes on which all are equal."""
    for axis in range(labels.ndim):
        head = np.take(labels, [0], axis) if labels.shape[axis] else labels
        if (labels == head).all():
            labels = head
    return labels


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
