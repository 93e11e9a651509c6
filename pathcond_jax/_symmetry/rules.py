"""How positive scales pass through operations: one rule per primitive.

A rule is given the log-scales of the operands and returns those of the results, after demanding
what they must satisfy. It declares the parameters of the primitive that it takes account of. An
operation without a rule, or with a parameter that its rule does not know, fixes the scale of what
it reads, which is always sound.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pathcond_jax._program import kinds
from pathcond_jax._program.primitives import find, runs_only
from pathcond_jax._symmetry import product_rules, structural_rules
from pathcond_jax._symmetry.equations import Term
from pathcond_jax._symmetry.homogeneous import keeps_scale
from pathcond_jax._symmetry.terms import (
    Terms,
    axes_of,
    has_wild,
    is_wild,
    mapped,
    powered,
    support,
    varies,
)
from pathcond_jax._symmetry.values import MAX_JOINT, RULES, Scale, ScaleRule, Scope, expand, pin

rule = RULES.rule

# Selections between values by a known mask of so many entries are followed one by one.
_FEW = 1 << 12

# What is smaller is taken for a constant that only keeps a divisor from 0, in explanations.
_EPSILON = 1e-2


@rule("neg", "abs", "stop_gradient", "optimization_barrier", "copy", "real", "imag")
@rule("reduce_precision", reads=("exponent_bits", "mantissa_bits"))
@rule("device_put", reads=("devices", "srcs", "copy_semantics"))
@rule("sharding_constraint", reads=("layout", "context_mesh", "unconstrained_dims"))
@rule("conj", reads=("input_dtype",))
@rule("name", reads=("name",))
def _same(scope: Scope, *scales: Scale) -> list[Terms]:
    return [scale.terms for scale in scales[: len(scope.node.outputs)]]


@rule("sign", "is_finite")
def _unscaled(scope: Scope, *scales: Scale) -> list[Terms]:
    return [()] * len(scope.node.outputs)


def _alike(scope: Scope, scales: Sequence[Scale]) -> Terms:
    known = any(scope.is_constant(k) for k in range(len(scales)))
    fixed = any(not scale.terms for scale in scales)
    because = "meets an operand whose scale is fixed" if fixed else "needs operands of one scale"
    because = "with a constant fixes the scale" if known else because
    return scope.equate(scales, len(scope.out_shape()), because)


@rule("sub", "min", "rem", "complex")
def _additive(scope: Scope, *scales: Scale) -> list[Terms]:
    return [_alike(scope, scales)]


@rule("add", "add_any", "max")
def _sum(scope: Scope, *scales: Scale) -> list[Terms]:
    """A sum or maximum, of which one operand may be the ε of a normalization."""
    for k, other in ((0, 1), (1, 0)):
        epsilon = _epsilon(scope, k)
        if epsilon and not has_wild(scales[other].terms):
            terms = expand(scales[other], len(scope.out_shape()))
            because = scope.because("with a constant fixes the scale", epsilon=epsilon)
            scope.analysis.vanish(terms, because)
            return [terms]
    return [_alike(scope, scales)]


def _epsilon(scope: Scope, k: int) -> float:
    """The one small number that operand ``k`` is everywhere, else 0."""
    value = scope.constant(k)
    if value is None or not value.size or not jnp.issubdtype(value.dtype, jnp.floating):
        return 0.0
    low, high = float(value.min()), float(value.max())
    return low if low == high and 0.0 < low < _EPSILON else 0.0


@rule("eq", "ne", "ge", "gt", "le", "lt", "eq_to", "le_to", "lt_to", "atan2")
def _compared(scope: Scope, *scales: Scale) -> list[Terms]:
    _alike(scope, scales)
    return [()]


@rule("convert_element_type", reads=("new_dtype", "weak_type"))
def _convert(scope: Scope, scale: Scale) -> list[Terms]:
    if jnp.issubdtype(scope.params["new_dtype"], jnp.inexact):
        return [scale.terms]
    return pin(scope, scale)


@rule("mul", reads=("out_dtype",))
def _product(scope: Scope, one: Scale, two: Scale) -> list[Terms]:
    ndim = len(scope.out_shape())
    _ask_to_exchange(scope, one, two)
    return [(*expand(one, ndim), *expand(two, ndim))]


@rule("div")
def _quotient(scope: Scope, one: Scale, two: Scale) -> list[Terms]:
    ndim = len(scope.out_shape())
    divisor = expand(two, ndim)
    if has_wild(divisor):
        return pin(scope, one, two)
    _ask_to_exchange(scope, one, two)
    return [(*expand(one, ndim), *powered(divisor, -1.0))]


def _ask_to_exchange(scope: Scope, one: Scale, two: Scale) -> None:
    """Kernels that meet entry by entry exchange a scale at each entry, not only along axes."""
    leaves = [
        {leaf for term in scale.terms for leaf, _ in scope.leaf_blocks(term)}
        for scale in (one, two)
    ]
    shared = axes_of(one.terms) & axes_of(two.terms)
    if one.signal or two.signal or len(shared) < 2 or leaves[0] & leaves[1]:
        return
    for scale in (one, two):
        scope.ask_to_join(term for term in scale.terms if support(term) & shared)


def _power(power: float | Callable[[Any], float]) -> ScaleRule:
    def powered_scale(scope: Scope, scale: Scale) -> list[Terms]:
        exponent = power(scope.params) if callable(power) else power
        if exponent <= 0 and has_wild(scale.terms):
            return pin(scope, scale)
        return [powered(scale.terms, exponent)]

    return powered_scale


rule("integer_pow", reads=("y",))(_power(lambda params: float(params["y"])))
rule("square")(_power(2.0))
rule("sqrt")(_power(0.5))
rule("rsqrt")(_power(-0.5))
rule("cbrt")(_power(1 / 3))


@rule("pow")
def _pow(scope: Scope, base: Scale, exponent: Scale) -> list[Terms]:
    value = scope.constant(1)
    if value is None or not value.size or (value != value.reshape(-1)[0]).any():
        return pin(scope, base, exponent)
    power = float(value.reshape(-1)[0])
    if not math.isfinite(power) or (power <= 0 and has_wild(base.terms)):
        return pin(scope, base, exponent)
    return [powered(expand(base, len(scope.out_shape())), power)]


@rule("select_n")
def _select(scope: Scope, which: Scale, *cases: Scale) -> list[Terms]:
    mask, shape = scope.constant(0), scope.out_shape()
    if mask is not None and math.prod(shape) <= _most_followed(mask, cases):
        # What a known mask leaves of a diagonal or block has the scales of these entries only.
        chosen = np.broadcast_to(np.asarray(mask, np.int64), shape)
        arrays = [np.broadcast_to(scope.single(case, len(shape)), shape) for case in cases]
        return [(Term(1.0, structural_rules.narrowed(np.choose(chosen, arrays))),)]
    return [scope.equate(cases, len(shape), "selects between values of several scales")]


def _most_followed(mask: np.ndarray, cases: Sequence[Scale]) -> int:
    """The size up to which a known mask is followed entry by entry."""
    if any(is_wild(case.terms) for case in cases):
        return MAX_JOINT if _meets_zeros(mask, cases) else -1
    return _FEW


def _meets_zeros(mask: np.ndarray, cases: Sequence[Scale]) -> bool:
    """Whether a mask puts zeros into a value along axes on which its scale varies.

    A masked kernel keeps the labels of its axes, which are its neurons; one for each entry would
    hide them. Only where no more than a diagonal is left are its entries what is scaled.
    """
    masked = [axis for axis, n in enumerate(mask.shape) if n > 1]
    rest = [k for k, case in enumerate(cases) if not is_wild(case.terms)]
    diagonal = np.isin(mask, rest).sum(-1).max(initial=0) <= 1 if mask.ndim else False
    followed = [cases[k] for k in rest if diagonal or cases[k].signal]
    return len(rest) < len(cases) and any(varies(case.terms, masked) for case in followed)


@rule("clamp")
def _clamp(scope: Scope, low: Scale, value: Scale, high: Scale) -> list[Terms]:
    return [scope.equate((value, low, high), len(scope.out_shape()), "bounds the value")]


@rule("reduce_sum", "reduce_max", "reduce_min", reads=("axes",))
def _reduce(scope: Scope, scale: Scale) -> list[Terms]:
    axes = scope.params["axes"]
    return [mapped(scope.along(scale.terms, axes), lambda x: x.squeeze(tuple(axes)))]


_UNUSUAL = "has an unusual 'jaxpr'"
_is_product = runs_only("mul")


def _multiplies(scope: Scope) -> bool:
    return _is_product(scope.params["jaxpr"])


@rule("reduce", reads=("dimensions", "computation", "jaxpr"))
def _reduce_by(scope: Scope, *scales: Scale) -> list[Terms]:
    """A reduction by a program, from values of the same scale."""
    axes = tuple(scope.params["dimensions"])
    values, starts = scales[: len(scales) // 2], scales[len(scales) // 2 :]
    if _multiplies(scope):
        scope.pin(*starts)
        return product_rules.product_along(scope, values[0], axes)
    (body,) = scope.node.bodies
    if not keeps_scale(scope.analysis, body, scaled=len(scales)):
        return pin(scope, *scales, because=_UNUSUAL)
    kept = [scope.along(scale.terms, axes) for scale in values]
    reduced = [Scale(mapped(terms, lambda x: x.squeeze(axes))) for terms in kept]
    return [_started(scope, reduced, starts)] * len(values)


def _started(scope: Scope, scales: Sequence[Scale], starts: Sequence[Scale]) -> Terms:
    ndim = len(scope.out_shape())
    return scope.equate((*scales, *starts), ndim, "starts from a value of another scale")


@rule("argmax", "argmin", reads=("axes", "index_dtype"))
def _arg_reduce(scope: Scope, scale: Scale) -> list[Terms]:
    scope.along(scale.terms, scope.params["axes"])
    return [()]


def _along_axis(key: str) -> ScaleRule:
    def uniform_along(scope: Scope, *scales: Scale) -> list[Terms]:
        axis = scope.params[key]
        return [scope.along(scale.terms, (axis,)) for scale in scales]

    return uniform_along


rule("cumsum", "cummax", "cummin", reads=("axis", "reverse"))(_along_axis("axis"))
rule("sort", reads=("dimension", "is_stable", "num_keys"))(_along_axis("dimension"))


@rule("top_k", reads=("k", "axis", "is_stable"))
def _top_k(scope: Scope, scale: Scale) -> list[Terms]:
    ndim = len(scope.shape(0))
    # The oldest versions of JAX have no axis: it is the last.
    return [scope.along(scale.terms, (scope.params.get("axis", -1) % ndim,)), ()]


@rule("fft", reads=("fft_type", "fft_lengths"))
def _fourier(scope: Scope, scale: Scale) -> list[Terms]:
    ndim = len(scope.shape(0))
    return [scope.along(scale.terms, range(ndim - len(scope.params["fft_lengths"]), ndim))]


_WINDOW = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", reads=_WINDOW)
def _window(scope: Scope, scale: Scale) -> list[Terms]:
    axes = [a for a, n in enumerate(scope.params["window_dimensions"]) if n > 1]
    dilated = [a for a, n in enumerate(scope.params["base_dilation"]) if n > 1]
    padded = [a for a, pad in enumerate(scope.params["padding"]) if any(pad)]
    # Along the other axes, windows of one entry: those that the strides meet.
    met = tuple(slice(None, None, stride) for stride in scope.params["window_strides"])
    kept = scope.along(scale.terms, {*axes, *dilated, *padded})
    return [mapped(kept, lambda labels: labels[met])]


@rule("reduce_window", reads=(*_WINDOW, "jaxpr"), requires={"consts": ()})
def _window_by(scope: Scope, *scales: Scale) -> list[Terms]:
    """Windows reduced by a program, from values of the same scale."""
    values, starts = scales[: len(scales) // 2], scales[len(scales) // 2 :]
    if _multiplies(scope):
        product = product_rules.product_of_windows(scope, values[0])
        if product is None:
            return pin(scope, *scales)
        scope.pin(*starts)
        return [product]
    (body,) = scope.node.bodies
    if not keeps_scale(scope.analysis, body, scaled=len(scales)):
        return pin(scope, *scales, because=_UNUSUAL)
    reduced = [Scale(_window(scope, scale)[0], scale.signal) for scale in values]
    return [_started(scope, reduced, starts)] * len(values)


def _place(terms: Iterable[Term], axes: Sequence[int], ndim: int) -> list[Term]:
    """Lays axis k of each label array out as axis ``axes[k]`` of ``ndim``."""
    order = np.argsort(axes)

    def move(labels: np.ndarray) -> np.ndarray:
        shape = [1] * ndim
        for axis, target in enumerate(axes):
            shape[target] = labels.shape[axis]
        return labels.transpose(order).reshape(shape)

    return [Term(term.coefficient, move(term.labels)) for term in terms]


def _layout(
    numbers: Any, ranks: tuple[int, int], grouped: tuple[int, ...] = ()
) -> tuple[list[int], list[int], int]:
    """Where the axes of two factors lie among the axes of a product, then the axes summed over.

    Args:
      numbers: the axes summed over and those of a batch, of both factors.
      ranks: of the factors.
      grouped: the axes of the second factor that are no axes of the product: they lie nowhere.

    Returns:
      The places of the axes of both factors, and the rank of the product.
    """
    (summed_one, summed_two), (batch_one, batch_two) = numbers
    axes_one, axes_two = ([-1] * rank for rank in ranks)
    for k, (a, b) in enumerate(zip(batch_one, batch_two, strict=True)):
        axes_one[a] = axes_two[b] = k
    at = len(batch_one)
    for axes, used in (
        (axes_one, (*summed_one, *batch_one)),
        (axes_two, (*summed_two, *batch_two, *grouped)),
    ):
        for axis in range(len(axes)):
            if axis not in used:
                axes[axis], at = at, at + 1
    for k, (a, b) in enumerate(zip(summed_one, summed_two, strict=True)):
        axes_one[a] = axes_two[b] = at + k
    return axes_one, axes_two, at


def _contracted(
    scope: Scope, factors: tuple[Scale, Scale], layout: tuple[list[int], list[int], int]
) -> Terms:
    (one, two), (axes_one, axes_two, rank) = factors, layout
    total = max((rank - 1, *axes_one, *axes_two)) + 1
    terms = [*_place(one.terms, axes_one, total), *_place(two.terms, axes_two, total)]
    return scope.contract(terms, tuple(range(rank, total)), factors)


@rule("dot_general", reads=("dimension_numbers", "preferred_element_type"))
def _dot_general(scope: Scope, one: Scale, two: Scale) -> list[Terms]:
    ranks = len(scope.shape(0)), len(scope.shape(1))
    layout = _layout(scope.params["dimension_numbers"], ranks)
    return [_contracted(scope, (one, two), layout)]


@rule(
    "ragged_dot_general",
    reads=("ragged_dot_dimension_numbers", "preferred_element_type"),
    requires={"group_offset": None},
)
def _ragged_dot(scope: Scope, one: Scale, two: Scale, sizes: Scale) -> list[Terms]:
    """Rows of one factor that meet the matrix of their group, or are summed group by group.

    Groups of unknown sizes may have any rows: their matrices have one scale.
    """
    numbers = scope.params["ragged_dot_dimension_numbers"]
    (summed, _), (batch, _) = numbers.dot_dimension_numbers
    (rows,), groups = numbers.lhs_ragged_dimensions, tuple(numbers.rhs_group_dimensions)
    ranks = len(scope.shape(0)), len(scope.shape(1))
    layout = _layout(numbers.dot_dimension_numbers, ranks, groups)
    if rows in batch or bool(groups) == (rows in summed):
        return pin(scope, one, two)
    if not groups:
        # The groups are an axis of the result, along which the scale is one.
        return [mapped(_contracted(scope, (one, two), layout), lambda x: x[None])]
    (axis,) = groups
    known = scope.constant(2)
    if (
        known is None
        or known.ndim != 1
        or known.min(initial=0) < 0
        or known.sum() != scope.shape(0)[rows]
    ):
        met = scope.along(two.terms, groups)
    else:
        scope.index(two, groups)
        group = np.repeat(np.arange(len(known)), known)
        met = mapped(two.terms, lambda x: x if x.shape[axis] == 1 else x.take(group, axis))
    layout[1][axis] = layout[0][rows]
    return [_contracted(scope, (one, two._replace(terms=met)), layout)]


@rule(
    "conv_general_dilated",
    reads=(
        *("dimension_numbers", "feature_group_count", "batch_group_count", "window_strides"),
        *("padding", "lhs_dilation", "rhs_dilation", "preferred_element_type"),
    ),
)
def _conv(scope: Scope, image: Scale, kernel: Scale) -> list[Terms]:
    """Each group of channels meets kernels of its own; or each group of examples does.

    Groups of examples are not laid side by side: their results are the channels of one example.
    """
    numbers, of_examples = scope.params["dimension_numbers"], scope.params["batch_group_count"]
    groups = scope.params["feature_group_count"] * of_examples
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    space = len(lhs) - 2
    # Axes: batch, group, channel within the group (out), channel within the group (in), window.
    ndim = 4 + space

    def grouped(labels: np.ndarray, axis: int) -> np.ndarray:
        size = labels.shape[axis]
        parts = (groups, size // groups) if size > 1 else (1, 1)
        return labels.reshape(*labels.shape[:axis], *parts, *labels.shape[axis + 1 :])

    flat = scope.along(image.terms, lhs[2:], "slides along it")
    divided, axes = (0, (1, 0, 3)) if of_examples > 1 else (1, (0, 1, 3))
    images = mapped(flat, lambda x: grouped(x.transpose(lhs), divided))
    window = scope.along(kernel.terms, rhs[2:], "sums over it")
    kernels = mapped(window, lambda x: grouped(x.transpose(rhs), 0))
    terms = [
        *_place(mapped(images, lambda x: x.squeeze(tuple(range(3, 3 + space)))), axes, ndim),
        *_place(kernels, (1, 2, 3, *range(4, ndim)), ndim),
    ]
    kept = scope.contract(terms, tuple(range(3, ndim)), (image, kernel))

    def merged(labels: np.ndarray) -> np.ndarray:
        old = (1, groups, scope.out_shape()[out[1]] // groups)
        features = structural_rules.reshape_labels(
            labels, (labels.shape[0], *old[1:]), (labels.shape[0], old[1] * old[2])
        )
        return features.reshape(*features.shape, *(1,) * space).transpose(np.argsort(out))

    return [mapped(kept, merged)]


@rule("cond", reads=("branches", "branches_platforms"))
def _cond(scope: Scope, which: Scale, *operands: Scale) -> list[Terms]:
    results = [scope.analysis.run(body, operands) for body in scope.node.bodies]
    return [
        scope.equate(outcome, len(scope.out_shape(k)), "chooses between values of several scales")
        for k, outcome in enumerate(zip(*results, strict=True))
    ]


RULES.no_rule("no power of a positive scale comes out of it", *kinds.ELEMENTWISE)
for _reason, _names in kinds.OPAQUE.items():
    RULES.no_rule(_reason, *(name for name in _names if find(name) not in RULES))
RULES.no_rule("other scales may choose other entries", "approx_top_k")
