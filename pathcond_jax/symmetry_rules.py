"""How positive scales pass through a program: one rule per primitive.

Every value is given the log-scale by which it moves, a sum of terms ``c · z[labels]`` whose label
arrays broadcast against the value. One rule per primitive says how scales pass through it and
which equations they must satisfy; the equations are solved together at the end. An operation
without a rule fixes the scale of what it reads at 0, which is always sound.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax.equations import WILD, Equations, Term, cancel
from pathcond_jax.graph import Graph, Node, primitive

_MAX_JOINT = 1 << 20


class Scale(NamedTuple):
    """The log-scale of a value.

    Attributes:
      terms: what it is the sum of.
      signal: whether the value depends on the network's input (else on parameters only).
    """

    terms: tuple[Term, ...]
    signal: bool


class Analysis:
    """One pass over a graph: the equations so far and where they come from."""

    def __init__(self, leaf_shapes: dict[int, tuple[int, ...]], factors: dict[int, set]) -> None:
        self.equations = Equations()
        self.nodes: list[Node] = []
        self.leaf_shapes = leaf_shapes
        self.factors = factors
        self.requests: list[tuple[int, tuple[int, ...]]] = []

    def leaf(self, number: int) -> Scale:
        """Unknown log-scales for a parameter, one label array per set of its axes."""
        shape = self.leaf_shapes[number]
        terms = []
        for axes in sorted(self.factors[number]):
            labels = self.equations.new(tuple(shape[a] for a in axes), number, axes)
            full = [shape[a] if a in axes else 1 for a in range(len(shape))]
            terms.append(Term(1.0, labels.reshape(full)))
        return Scale(tuple(terms), False)

    def run(self, graph: Graph, arguments: Sequence[Scale]) -> list[Scale]:
        """The scales of the graph's outputs."""
        env = dict(zip(graph.inputs, arguments, strict=True))
        for number, value in graph.constants.items():
            env.setdefault(number, _constant_scale(value))
        for node in graph.nodes:
            self.nodes.append(node)
            inputs = [env[i] for i in node.inputs]
            signal = any(scale.signal for scale in inputs)
            rule = RULES.get(node.primitive, _pin)
            scope = _Scope(self, graph, node, len(self.nodes) - 1)
            outputs = rule(scope, *inputs)
            for number, terms in zip(node.outputs, outputs, strict=True):
                if not jnp.issubdtype(graph.avals[number].dtype, jnp.inexact):
                    terms = ()
                scale = Scale(tuple(cancel(list(terms))), signal)
                env[number] = scope.settle(scale) if signal else scale
        return [env[i] for i in graph.outputs]


@dataclasses.dataclass
class _Scope:
    """What a rule sees of the operation it is applied to."""

    analysis: Analysis
    graph: Graph
    node: Node
    origin: int

    def shape(self, k: int) -> tuple[int, ...]:
        return self.graph.avals[self.node.inputs[k]].shape

    def out_shape(self, k: int = 0) -> tuple[int, ...]:
        return self.graph.avals[self.node.outputs[k]].shape

    def constant(self, k: int) -> np.ndarray | None:
        value = self.graph.constants.get(self.node.inputs[k])
        return None if value is None else np.asarray(value)

    @property
    def params(self) -> Any:
        return self.node.params

    def require(self, terms: Iterable[Term]) -> None:
        self.analysis.equations.require(list(terms), self.origin)

    def new(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.analysis.equations.new(shape)

    def pin(self, scale: Scale) -> None:
        for group in _connected(scale.terms):
            self.require(group)

    def leaf_blocks(self, term: Term) -> list[tuple[int, tuple[int, ...]]]:
        equations = self.analysis.equations
        blocks = [equations.blocks[k] for k in equations.block_numbers(term.labels)]
        return [(block.leaf, block.axes) for block in blocks if block.leaf is not None]

    def ask_to_join(self, terms: Iterable[Term]) -> None:
        """Separate labels on two axes of a leaf meet: the next pass gives it joint ones."""
        axes: dict[int, list[tuple[int, ...]]] = {}
        for term in terms:
            for leaf, block_axes in self.leaf_blocks(term):
                axes.setdefault(leaf, []).append(block_axes)
        for leaf, sets in axes.items():
            joint = tuple(sorted(set().union(*sets)))
            size = math.prod(self.analysis.leaf_shapes[leaf][a] for a in joint)
            if len(sets) > 1 and not any(set(joint) <= set(s) for s in sets) and size <= _MAX_JOINT:
                self.analysis.requests.append((leaf, joint))

    def fresh(self, group: Sequence[Term]) -> Term:
        """A new label array equal to the sum of ``group``."""
        shape = np.broadcast_shapes(*(term.labels.shape for term in group))
        labels = self.new(shape)
        self.require([*group, Term(-1.0, labels)])
        wild = np.zeros(shape, bool)
        for term in group:
            wild = wild | (term.labels == WILD)
        return Term(1.0, np.where(wild, WILD, labels))

    def settle(self, scale: Scale) -> Scale:
        """Names the scale of a signal that parameters have entered: its own neurons."""
        met = [term for term in scale.terms if self.leaf_blocks(term)]
        if not met:
            return scale
        self.ask_to_join(met)
        terms = []
        for group in _connected(scale.terms):
            entered = any(term is other for term in group for other in met)
            terms += [self.fresh(group)] if entered else group
        return Scale(tuple(terms), True)

    def single(self, scale: Scale, ndim: int) -> np.ndarray:
        """The scale as one label array."""
        if not scale.terms:
            return np.zeros((1,) * ndim, np.int64)
        if len(scale.terms) == 1 and scale.terms[0].coefficient == 1.0:
            return scale.terms[0].labels
        return self.fresh(scale.terms).labels

    def equate(self, scales: Sequence[Scale], ndim: int) -> tuple[Term, ...]:
        """The common scale of values that are added, compared or selected between."""
        first, *rest = (_expand(scale, ndim) for scale in scales)
        for second in rest:
            first = self._equate_two(first, second, ndim)
        return first

    def _equate_two(
        self, one: tuple[Term, ...], two: tuple[Term, ...], ndim: int
    ) -> tuple[Term, ...]:
        if _is_wild(one) or _is_wild(two):
            return two if _is_wild(one) else one
        difference = cancel([*one, *(Term(-t.coefficient, t.labels) for t in two)])
        for group in _connected(difference):
            self.ask_to_join(group)
            self.require(group)
        if not any((term.labels == WILD).any() for term in (*one, *two)):
            # Prefer what operations have named over labels of leaves, then what names more axes.
            return min(one, two, key=lambda terms: (any(map(self.leaf_blocks, terms)), not terms))
        left = self.single(Scale(one, True), ndim)
        right = self.single(Scale(two, True), ndim)
        return (Term(1.0, np.where(left == WILD, right, left)),)

    def along(self, terms: Iterable[Term], axes: Iterable[int]) -> tuple[Term, ...]:
        """Demands one scale along ``axes``; the result has size 1 there."""
        axes, kept = tuple(axes), []
        for group in _connected(terms):
            shape = np.broadcast_shapes(*(term.labels.shape for term in group))
            varying = tuple(a for a in axes if shape[a] > 1)
            if not varying:
                kept += group
            elif len(group) == 1:
                representative = _first_known(group[0].labels, varying)
                self.require([group[0], Term(-group[0].coefficient, representative)])
                kept.append(Term(group[0].coefficient, representative))
            else:
                rest = tuple(1 if a in varying else n for a, n in enumerate(shape))
                common = Term(1.0, self.new(rest))
                self.require([*group, Term(-1.0, common.labels)])
                kept.append(common)
        return tuple(kept)

    def contract(self, terms: Iterable[Term], summed: tuple[int, ...]) -> tuple[Term, ...]:
        """The scale of a sum of products, ``terms`` laid out over all axes, some summed away."""
        terms = cancel(list(terms))
        if any(_is_wild((term,)) for term in terms):
            return (Term(1.0, np.full((1,) * terms[0].labels.ndim, WILD)),)
        groups = _connected(terms)
        outside = [
            (leaf, _support(term))
            for group in groups
            if not _varies(group, summed)
            for term in group
            for leaf, _ in self.leaf_blocks(term)
        ]
        kept: list[Term] = []
        for group in groups:
            if not _varies(group, summed):
                kept += group
                continue
            self.ask_to_join(group)
            shape = np.broadcast_shapes(*(term.labels.shape for term in group))
            rest = tuple(1 if a in summed else n for a, n in enumerate(shape))
            leaves = {leaf for term in group for leaf, _ in self.leaf_blocks(term)}
            varying = {a for a, n in enumerate(rest) if n > 1}
            if any(leaf in leaves and varying <= support for leaf, support in outside):
                # A constant along the summed axes could as well sit on the parameter's other
                # axes: setting it to 0 loses nothing.
                self.require(group)
                continue
            known = np.zeros(shape, bool)
            for term in group:
                known = known | (term.labels == WILD)
            labels = self.new(rest)
            self.require([*group, Term(-1.0, labels)])
            kept.append(Term(1.0, np.where(known.all(axis=summed, keepdims=True), WILD, labels)))
        return tuple(kept)


def _varies(terms: Iterable[Term], axes: Iterable[int]) -> bool:
    return any(term.labels.shape[a] > 1 for term in terms for a in axes)


def _support(term: Term) -> frozenset[int]:
    return frozenset(a for a, n in enumerate(term.labels.shape) if n > 1)


def _connected(terms: Iterable[Term]) -> list[list[Term]]:
    """Terms that share an axis belong together; constant terms join the first group."""
    groups: list[tuple[frozenset[int], list[Term]]] = []
    constant: list[Term] = []
    for term in terms:
        support = _support(term)
        if not support:
            constant.append(term)
            continue
        joined, members = support, [term]
        apart = []
        for other_support, other in groups:
            if other_support & joined:
                joined, members = joined | other_support, other + members
            else:
                apart.append((other_support, other))
        groups = [*apart, (joined, members)]
    found = [members for _, members in groups]
    if constant:
        found = [found[0] + constant, *found[1:]] if found else [constant]
    return found


def _is_wild(terms: Sequence[Term]) -> bool:
    return any((term.labels == WILD).all() for term in terms)


def _first_known(labels: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The first label along ``axes`` that is not wild."""
    moved = np.moveaxis(labels, axes, range(-len(axes), 0))
    flat = moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1)
    chosen = np.take_along_axis(flat, (flat != WILD).argmax(-1)[..., None], -1)[..., 0]
    return np.expand_dims(chosen, axes)


def _expand(scale: Scale, ndim: int) -> tuple[Term, ...]:
    """Scalars take part in elementwise operations of any rank."""
    return tuple(
        term if term.labels.ndim == ndim else Term(term.coefficient, term.labels.reshape((1,) * ndim))
        for term in scale.terms
    )


def _constant_scale(value: Any) -> Scale:
    """Zeros and infinities fit every scale, other constants only the scale 1."""
    ndim = np.ndim(value)
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return Scale((), False)
    array = np.asarray(value)
    free = (array == 0) | np.isinf(array)
    if not free.any():
        return Scale((), False)
    if free.all():
        return Scale((Term(1.0, np.full((1,) * ndim, WILD)),), False)
    for axis in range(ndim):
        head = np.take(free, [0], axis)
        if (free == head).all():
            free = head
    return Scale((Term(1.0, np.where(free, WILD, 0)),), False)


Terms = tuple[Term, ...]
Rule = Callable[..., Sequence[Terms]]


def _pin(scope: _Scope, *scales: Scale) -> list[Terms]:
    for scale in scales:
        scope.pin(scale)
    return [()] * len(scope.node.outputs)


def _same(scope: _Scope, *scales: Scale) -> list[Terms]:
    return [scale.terms for scale in scales[: len(scope.node.outputs)]]


def _unscaled(scope: _Scope, *scales: Scale) -> list[Terms]:
    return [()] * len(scope.node.outputs)


def _additive(scope: _Scope, *scales: Scale) -> list[Terms]:
    return [scope.equate(scales, len(scope.out_shape()))]


def _compared(scope: _Scope, *scales: Scale) -> list[Terms]:
    scope.equate(scales, len(scope.out_shape()))
    return [()]


def _convert(scope: _Scope, scale: Scale) -> list[Terms]:
    if jnp.issubdtype(scope.params["new_dtype"], jnp.inexact):
        return [scale.terms]
    return _pin(scope, scale)


def _product(scope: _Scope, one: Scale, two: Scale) -> list[Terms]:
    ndim = len(scope.out_shape())
    return [(*_expand(one, ndim), *_expand(two, ndim))]


def _quotient(scope: _Scope, one: Scale, two: Scale) -> list[Terms]:
    ndim = len(scope.out_shape())
    divisor = _expand(two, ndim)
    if any((term.labels == WILD).any() for term in divisor):
        return _pin(scope, one, two)
    return [(*_expand(one, ndim), *_powered(divisor, -1.0))]


def _powered(terms: Iterable[Term], power: float) -> Terms:
    return tuple(Term(power * term.coefficient, term.labels) for term in terms)


def _power(power: float | Callable[[Any], float]) -> Rule:
    def rule(scope: _Scope, scale: Scale) -> list[Terms]:
        exponent = power(scope.params) if callable(power) else power
        if exponent <= 0 and any((term.labels == WILD).any() for term in scale.terms):
            return _pin(scope, scale)
        return [_powered(scale.terms, exponent)]

    return rule


def _pow(scope: _Scope, base: Scale, exponent: Scale) -> list[Terms]:
    value = scope.constant(1)
    if value is None or value.size != 1 or not base.terms or float(value.reshape(())) <= 0:
        return _pin(scope, base, exponent)
    return [_powered(_expand(base, len(scope.out_shape())), float(value.reshape(())))]


def _select(scope: _Scope, which: Scale, *cases: Scale) -> list[Terms]:
    return [scope.equate(cases, len(scope.out_shape()))]


def _clamp(scope: _Scope, low: Scale, value: Scale, high: Scale) -> list[Terms]:
    return [scope.equate((value, low, high), len(scope.out_shape()))]


def _reduce(scope: _Scope, scale: Scale) -> list[Terms]:
    axes = scope.params["axes"]
    return [_mapped(scope.along(scale.terms, axes), lambda x: x.squeeze(tuple(axes)))]


def _arg_reduce(scope: _Scope, scale: Scale) -> list[Terms]:
    scope.along(scale.terms, scope.params["axes"])
    return [()]


def _along_axis(key: str) -> Rule:
    def rule(scope: _Scope, *scales: Scale) -> list[Terms]:
        axis = scope.params[key]
        kept = [scope.along(scale.terms, (axis,)) for scale in scales]
        return (kept * 2)[: len(scope.node.outputs)]

    return rule


def _top_k(scope: _Scope, scale: Scale) -> list[Terms]:
    return [scope.along(scale.terms, (len(scope.shape(0)) - 1,)), ()]


def _window(scope: _Scope, scale: Scale) -> list[Terms]:
    axes = [a for a, n in enumerate(scope.params["window_dimensions"]) if n > 1]
    other = ("window_strides", "base_dilation", "window_dilation")
    moved = [a for a in range(len(scope.shape(0))) if any(scope.params[k][a] != 1 for k in other)]
    padded = [a for a, pad in enumerate(scope.params["padding"]) if any(pad)]
    return [scope.along(scale.terms, {*axes, *moved, *padded})]


def _mapped(terms: Iterable[Term], move: Callable[[np.ndarray], np.ndarray]) -> Terms:
    return tuple(Term(term.coefficient, move(term.labels)) for term in terms)


def _structural(move: Callable[[_Scope, np.ndarray], np.ndarray]) -> Rule:
    """An operation that moves entries: run on the label arrays themselves."""

    def rule(scope: _Scope, scale: Scale, *static: Scale) -> list[Terms]:
        return [_mapped(scale.terms, lambda labels: move(scope, labels))]

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


def _reshape(scope: _Scope, labels: np.ndarray) -> np.ndarray:
    if scope.params.get("dimensions") is not None:
        labels = labels.transpose(scope.params["dimensions"])
    return reshape_labels(labels, scope.shape(0), scope.out_shape())


def _broadcast_in_dim(scope: _Scope, labels: np.ndarray) -> np.ndarray:
    shape = [1] * len(scope.out_shape())
    for axis, target in enumerate(scope.params["broadcast_dimensions"]):
        shape[target] = labels.shape[axis]
    return labels.reshape(shape)


def _slice(scope: _Scope, labels: np.ndarray) -> np.ndarray:
    start, stop = scope.params["start_indices"], scope.params["limit_indices"]
    strides = scope.params["strides"] or (1,) * labels.ndim
    cut = zip(start, stop, strides, labels.shape, strict=True)
    return labels[tuple(slice(None) if n == 1 else slice(a, b, s) for a, b, s, n in cut)]


def _squeeze(scope: _Scope, labels: np.ndarray) -> np.ndarray:
    return labels.squeeze(tuple(scope.params["dimensions"]))


def _transpose(scope: _Scope, labels: np.ndarray) -> np.ndarray:
    return labels.transpose(scope.params["permutation"])


def _rev(scope: _Scope, labels: np.ndarray) -> np.ndarray:
    return np.flip(labels, scope.params["dimensions"])


def _pad(scope: _Scope, scale: Scale, value: Scale) -> list[Terms]:
    ndim = len(scope.out_shape())
    if not _is_wild(value.terms):
        return [scope.equate((scale, value), ndim)]

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

    return [_mapped(scale.terms, move)]


def _concatenate(scope: _Scope, *scales: Scale) -> list[Terms]:
    axis, ndim = scope.params["dimension"], len(scope.out_shape())
    arrays = [scope.single(scale, ndim) for scale in scales]
    if all(np.array_equal(array, arrays[0]) for array in arrays) and arrays[0].shape[axis] == 1:
        return [(Term(1.0, arrays[0]),)]
    shape = np.broadcast_shapes(
        *(tuple(1 if a == axis else n for a, n in enumerate(array.shape)) for array in arrays)
    )
    sizes = [scope.shape(k)[axis] for k in range(len(scales))]
    wide = [
        np.broadcast_to(array, [n if a == axis else m for a, m in enumerate(shape)])
        for array, n in zip(arrays, sizes, strict=True)
    ]
    return [(Term(1.0, np.concatenate(wide, axis)),)]


def _split(scope: _Scope, scale: Scale) -> list[Terms]:
    axis = scope.params["axis"]
    ends = np.cumsum(scope.params["sizes"])
    starts = ends - np.asarray(scope.params["sizes"])

    def cut(start: int, stop: int) -> Terms:
        where = (slice(None),) * axis + (slice(start, stop),)
        return _mapped(scale.terms, lambda x: x if x.shape[axis] == 1 else x[where])

    return [cut(start, stop) for start, stop in zip(starts, ends, strict=True)]


def _dynamic_slice(scope: _Scope, scale: Scale, *starts: Scale) -> list[Terms]:
    sizes, full = scope.params["slice_sizes"], scope.shape(0)
    known = [scope.constant(k + 1) for k in range(len(starts))]
    cut = [a for a, n in enumerate(sizes) if n < full[a]]
    terms = scope.along(scale.terms, [a for a in cut if known[a] is None])

    def move(labels: np.ndarray) -> np.ndarray:
        for a in cut:
            if labels.shape[a] > 1:
                begin = int(np.clip(known[a], 0, full[a] - sizes[a]))
                labels = labels[(slice(None),) * a + (slice(begin, begin + sizes[a]),)]
        return labels

    return [_mapped(terms, move)]


def _dynamic_update_slice(scope: _Scope, scale: Scale, update: Scale, *starts: Scale) -> list[Terms]:
    every = range(len(scope.shape(0)))
    return [
        scope.equate(
            [Scale(scope.along(s.terms, every), s.signal) for s in (scale, update)], len(every)
        )
    ]


def _gather(scope: _Scope, scale: Scale, indices: Scale) -> list[Terms]:
    numbers = scope.params["dimension_numbers"]
    sizes, full = scope.params["slice_sizes"], scope.shape(0)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    indexed = [a for a, n in enumerate(sizes) if n < full[a] or a in batching]
    known = scope.constant(1)
    if known is not None and _varies(scale.terms, indexed):
        return [_mapped(scale.terms, lambda labels: _gather_labels(scope, labels, known))]
    terms = scope.along(scale.terms, indexed)
    offsets = [a for a in range(len(full)) if a not in numbers.collapsed_slice_dims + batching]

    def move(labels: np.ndarray) -> np.ndarray:
        shape = [1] * len(scope.out_shape())
        for target, axis in zip(numbers.offset_dims, offsets, strict=True):
            shape[target] = labels.shape[axis]
        return labels.reshape(shape)

    return [_mapped(terms, move)]


def _gather_labels(scope: _Scope, labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Gathers at known indices; label numbers stay below 2^31."""
    wide = np.broadcast_to(labels, scope.shape(0)).astype(np.int32)
    params = {**scope.params, "fill_value": WILD}
    with jax.ensure_compile_time_eval():
        moved = scope.node.primitive.bind(jnp.asarray(wide), jnp.asarray(indices), **params)
    return np.asarray(moved).astype(np.int64)


def _place(terms: Iterable[Term], axes: Sequence[int], ndim: int) -> list[Term]:
    """Lays axis k of each label array out as axis ``axes[k]`` of ``ndim``."""
    order = np.argsort(axes)

    def move(labels: np.ndarray) -> np.ndarray:
        shape = [1] * ndim
        for axis, target in enumerate(axes):
            shape[target] = labels.shape[axis]
        return labels.transpose(order).reshape(shape)

    return [Term(term.coefficient, move(term.labels)) for term in terms]


def _dot_general(scope: _Scope, one: Scale, two: Scale) -> list[Terms]:
    (summed_one, summed_two), (batch_one, batch_two) = scope.params["dimension_numbers"]
    rank_one, rank_two = len(scope.shape(0)), len(scope.shape(1))
    rank = len(scope.out_shape())
    axes_one, axes_two = [0] * rank_one, [0] * rank_two
    for k, (a, b) in enumerate(zip(batch_one, batch_two, strict=True)):
        axes_one[a] = axes_two[b] = k
    for k, (a, b) in enumerate(zip(summed_one, summed_two, strict=True)):
        axes_one[a] = axes_two[b] = rank + k
    at = len(batch_one)
    for axes, used in ((axes_one, (*summed_one, *batch_one)), (axes_two, (*summed_two, *batch_two))):
        for axis in range(len(axes)):
            if axis not in used:
                axes[axis], at = at, at + 1
    total = rank + len(summed_one)
    summed = tuple(range(rank, total))
    terms = [*_place(one.terms, axes_one, total), *_place(two.terms, axes_two, total)]
    return [_mapped(scope.contract(terms, summed), lambda x: x.squeeze(summed))]


def _conv(scope: _Scope, image: Scale, kernel: Scale) -> list[Terms]:
    if scope.params["batch_group_count"] != 1:
        return _pin(scope, image, kernel)
    numbers, groups = scope.params["dimension_numbers"], scope.params["feature_group_count"]
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    space = len(lhs) - 2
    # Axes: batch, group, channel within the group (out), channel within the group (in), window.
    ndim = 4 + space

    def grouped(labels: np.ndarray, axis: int) -> np.ndarray:
        size = labels.shape[axis]
        parts = (groups, size // groups) if size > 1 else (1, 1)
        return labels.reshape(*labels.shape[:axis], *parts, *labels.shape[axis + 1 :])

    flat = scope.along(image.terms, lhs[2:])
    images = _mapped(flat, lambda x: grouped(x.transpose(lhs), 1))
    kernels = _mapped(kernel.terms, lambda x: grouped(x.transpose(rhs), 0))
    terms = [
        *_place(_mapped(images, lambda x: x.squeeze(tuple(range(3, 3 + space)))), (0, 1, 3), ndim),
        *_place(kernels, (1, 2, 3, *range(4, ndim)), ndim),
    ]
    kept = scope.contract(terms, tuple(range(3, ndim)))

    def merged(labels: np.ndarray) -> np.ndarray:
        labels = labels.squeeze(tuple(range(3, ndim)))
        old = (1, groups, scope.out_shape()[out[1]] // groups)
        features = reshape_labels(labels, (labels.shape[0], *old[1:]), (labels.shape[0], old[1] * old[2]))
        return features.reshape(*features.shape, *(1,) * space).transpose(np.argsort(out))

    return [_mapped(kept, merged)]


def _cond(scope: _Scope, which: Scale, *operands: Scale) -> list[Terms]:
    results = [scope.analysis.run(body, operands) for body in scope.node.bodies]
    return [
        scope.equate(outcome, len(scope.out_shape(k)))
        for k, outcome in enumerate(zip(*results, strict=True))
    ]


def _scan(scope: _Scope, *scales: Scale) -> list[Terms]:
    """Unrolled where stacked parameters differ between steps; else one step that maps to itself."""
    num_consts, num_carry = scope.params["num_consts"], scope.params["num_carry"]
    length, (body,) = scope.params["length"], scope.node.bodies
    consts = list(scales[:num_consts])
    carry = list(scales[num_consts : num_consts + num_carry])
    stacked = scales[num_consts + num_carry :]
    signal = any(scale.signal for scale in scales)

    def step(number: int, carry: list[Scale]) -> tuple[list[Scale], list[Scale]]:
        slices = [
            Scale(_mapped(x.terms, lambda y: y[0] if y.shape[0] == 1 else y[number]), x.signal)
            for x in stacked
        ]
        results = scope.analysis.run(body, [*consts, *carry, *slices])
        return results[:num_carry], results[num_carry:]

    if length == 0:
        return _pin(scope, *scales)
    varied = any(_varies(x.terms, (0,)) for x in stacked)
    outputs: list[list[Scale]] = []
    steps = range(length) if varied else range(min(length, 2))
    for number in reversed(steps) if scope.params["reverse"] else steps:
        entered = carry
        carry, ys = step(number, carry)
        carry = [Scale(x.terms, x.signal or signal) for x in carry]
        outputs.append(ys)
    ndims = [len(scope.out_shape(k)) for k in range(len(scope.node.outputs))]
    if varied:
        order = outputs[::-1] if scope.params["reverse"] else outputs
        return [*(x.terms for x in carry), *(_stack(scope, ys) for ys in zip(*order, strict=True))]
    if length > 1:
        carry = [
            Scale(scope.equate(pair, n), signal)
            for *pair, n in zip(carry, entered, ndims, strict=False)
        ]
    ys = [
        _mapped(scope.equate(each, n - 1), lambda x: x[None])
        for each, n in zip(zip(*outputs, strict=True), ndims[num_carry:], strict=True)
    ]
    return [*(x.terms for x in carry), *ys]


def _stack(scope: _Scope, scales: Sequence[Scale]) -> Terms:
    ndim = max((term.labels.ndim for scale in scales for term in scale.terms), default=0)
    arrays = [scope.single(scale, ndim) for scale in scales]
    if not ndim:
        return ()
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    return (Term(1.0, np.stack([np.broadcast_to(array, shape) for array in arrays])),)


_RULES_BY_NAME: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (
        _same,
        (
            *("neg", "abs", "copy", "stop_gradient", "reduce_precision", "name", "device_put"),
            *("sharding_constraint", "optimization_barrier", "copy_p", "real"),
        ),
    ),
    (_unscaled, ("sign", "is_finite")),
    (_additive, ("add", "sub", "add_jaxvals", "max", "min")),
    (_compared, ("eq", "ne", "ge", "gt", "le", "lt")),
    (_convert, ("convert_element_type",)),
    (_product, ("mul",)),
    (_quotient, ("div",)),
    (_power(lambda params: float(params["y"])), ("integer_pow",)),
    (_power(2.0), ("square",)),
    (_power(0.5), ("sqrt",)),
    (_power(-0.5), ("rsqrt",)),
    (_pow, ("pow",)),
    (_select, ("select_n",)),
    (_clamp, ("clamp",)),
    (_reduce, ("reduce_sum", "reduce_max", "reduce_min")),
    (_arg_reduce, ("argmax", "argmin")),
    (_along_axis("axis"), ("cumsum", "cummax", "cummin")),
    (_along_axis("dimension"), ("sort",)),
    (_top_k, ("top_k",)),
    (_window, ("reduce_window_sum", "reduce_window_max", "reduce_window_min")),
    (_structural(_reshape), ("reshape",)),
    (_structural(_broadcast_in_dim), ("broadcast_in_dim",)),
    (_structural(_slice), ("slice",)),
    (_structural(_squeeze), ("squeeze",)),
    (_structural(_transpose), ("transpose",)),
    (_structural(_rev), ("rev",)),
    (_pad, ("pad",)),
    (_concatenate, ("concatenate",)),
    (_split, ("split",)),
    (_dynamic_slice, ("dynamic_slice",)),
    (_dynamic_update_slice, ("dynamic_update_slice",)),
    (_gather, ("gather",)),
    (_dot_general, ("dot_general",)),
    (_conv, ("conv_general_dilated",)),
    (_cond, ("cond",)),
    (_scan, ("scan",)),
)

RULES: dict[Any, Rule] = {
    found: rule
    for rule, names in _RULES_BY_NAME
    for found in map(primitive, names)
    if found is not None
}
