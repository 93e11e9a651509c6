"""How positive scales pass through operations: one rule per primitive.

A rule is given the log-scales of the operands and returns those of the results, after demanding
what they must satisfy. An operation without a rule fixes the scale of what it reads, which is
always sound.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.primitives import primitive
from pathcond_jax._symmetry import structural_rules
from pathcond_jax._symmetry.equations import Term
from pathcond_jax._symmetry.values import (
    Rule,
    Scale,
    Scope,
    Terms,
    expand,
    has_wild,
    mapped,
    powered,
    varies,
)

# Scans whose steps have scales of their own are unrolled up to this many operations.
_MAX_UNROLLED = 20_000


def pin(scope: Scope, *scales: Scale) -> list[Terms]:
    """The rule of operations without a rule: what they read keeps its scale."""
    scope.pin(*scales)
    return [()] * len(scope.node.outputs)


def _same(scope: Scope, *scales: Scale) -> list[Terms]:
    return [scale.terms for scale in scales[: len(scope.node.outputs)]]


def _unscaled(scope: Scope, *scales: Scale) -> list[Terms]:
    return [()] * len(scope.node.outputs)


def _alike(scope: Scope, scales: Sequence[Scale]) -> Terms:
    known = any(scope.is_constant(k) for k in range(len(scales)))
    because = "with a constant fixes the scale" if known else "needs operands of one scale"
    return scope.equate(scales, len(scope.out_shape()), because)


def _additive(scope: Scope, *scales: Scale) -> list[Terms]:
    return [_alike(scope, scales)]


def _compared(scope: Scope, *scales: Scale) -> list[Terms]:
    _alike(scope, scales)
    return [()]


def _convert(scope: Scope, scale: Scale) -> list[Terms]:
    if jnp.issubdtype(scope.params["new_dtype"], jnp.inexact):
        return [scale.terms]
    return pin(scope, scale)


def _product(scope: Scope, one: Scale, two: Scale) -> list[Terms]:
    ndim = len(scope.out_shape())
    return [(*expand(one, ndim), *expand(two, ndim))]


def _quotient(scope: Scope, one: Scale, two: Scale) -> list[Terms]:
    ndim = len(scope.out_shape())
    divisor = expand(two, ndim)
    if has_wild(divisor):
        return pin(scope, one, two)
    return [(*expand(one, ndim), *powered(divisor, -1.0))]


def _power(power: float | Callable[[Any], float]) -> Rule:
    def rule(scope: Scope, scale: Scale) -> list[Terms]:
        exponent = power(scope.params) if callable(power) else power
        if exponent <= 0 and has_wild(scale.terms):
            return pin(scope, scale)
        return [powered(scale.terms, exponent)]

    return rule


def _pow(scope: Scope, base: Scale, exponent: Scale) -> list[Terms]:
    value = scope.constant(1)
    if value is None or value.size != 1 or (value.item() <= 0 and has_wild(base.terms)):
        return pin(scope, base, exponent)
    return [powered(expand(base, len(scope.out_shape())), float(value.item()))]


def _select(scope: Scope, which: Scale, *cases: Scale) -> list[Terms]:
    return [scope.equate(cases, len(scope.out_shape()), "selects between values of several scales")]


def _clamp(scope: Scope, low: Scale, value: Scale, high: Scale) -> list[Terms]:
    return [scope.equate((value, low, high), len(scope.out_shape()), "bounds the value")]


def _reduce(scope: Scope, scale: Scale) -> list[Terms]:
    axes = scope.params["axes"]
    return [mapped(scope.along(scale.terms, axes), lambda x: x.squeeze(tuple(axes)))]


def _arg_reduce(scope: Scope, scale: Scale) -> list[Terms]:
    scope.along(scale.terms, scope.params["axes"])
    return [()]


def _along_axis(key: str) -> Rule:
    def rule(scope: Scope, *scales: Scale) -> list[Terms]:
        axis = scope.params[key]
        return [scope.along(scale.terms, (axis,)) for scale in scales]

    return rule


def _top_k(scope: Scope, scale: Scale) -> list[Terms]:
    ndim = len(scope.shape(0))
    # The oldest versions of JAX have no axis: it is the last.
    return [scope.along(scale.terms, (scope.params.get("axis", -1) % ndim,)), ()]


def _fourier(scope: Scope, scale: Scale) -> list[Terms]:
    ndim = len(scope.shape(0))
    return [scope.along(scale.terms, range(ndim - len(scope.params["fft_lengths"]), ndim))]


def _window(scope: Scope, scale: Scale) -> list[Terms]:
    axes = [a for a, n in enumerate(scope.params["window_dimensions"]) if n > 1]
    other = ("window_strides", "base_dilation", "window_dilation")
    moved = [a for a in range(len(scope.shape(0))) if any(scope.params[k][a] != 1 for k in other)]
    padded = [a for a, pad in enumerate(scope.params["padding"]) if any(pad)]
    return [scope.along(scale.terms, {*axes, *moved, *padded})]


def _place(terms: Iterable[Term], axes: Sequence[int], ndim: int) -> list[Term]:
    """Lays axis k of each label array out as axis ``axes[k]`` of ``ndim``."""
    order = np.argsort(axes)

    def move(labels: np.ndarray) -> np.ndarray:
        shape = [1] * ndim
        for axis, target in enumerate(axes):
            shape[target] = labels.shape[axis]
        return labels.transpose(order).reshape(shape)

    return [Term(term.coefficient, move(term.labels)) for term in terms]


def _dot_general(scope: Scope, one: Scale, two: Scale) -> list[Terms]:
    (summed_one, summed_two), (batch_one, batch_two) = scope.params["dimension_numbers"]
    rank_one, rank_two = len(scope.shape(0)), len(scope.shape(1))
    rank = len(scope.out_shape())
    axes_one, axes_two = [0] * rank_one, [0] * rank_two
    for k, (a, b) in enumerate(zip(batch_one, batch_two, strict=True)):
        axes_one[a] = axes_two[b] = k
    for k, (a, b) in enumerate(zip(summed_one, summed_two, strict=True)):
        axes_one[a] = axes_two[b] = rank + k
    at = len(batch_one)
    for axes, used in (
        (axes_one, (*summed_one, *batch_one)),
        (axes_two, (*summed_two, *batch_two)),
    ):
        for axis in range(len(axes)):
            if axis not in used:
                axes[axis], at = at, at + 1
    total = rank + len(summed_one)
    summed = tuple(range(rank, total))
    terms = [*_place(one.terms, axes_one, total), *_place(two.terms, axes_two, total)]
    return [scope.contract(terms, summed, (one, two))]


def _conv(scope: Scope, image: Scale, kernel: Scale) -> list[Terms]:
    if scope.params["batch_group_count"] != 1:
        return pin(scope, image, kernel)
    numbers, groups = scope.params["dimension_numbers"], scope.params["feature_group_count"]
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    space = len(lhs) - 2
    # Axes: batch, group, channel within the group (out), channel within the group (in), window.
    ndim = 4 + space

    def grouped(labels: np.ndarray, axis: int) -> np.ndarray:
        size = labels.shape[axis]
        parts = (groups, size // groups) if size > 1 else (1, 1)
        return labels.reshape(*labels.shape[:axis], *parts, *labels.shape[axis + 1 :])

    flat = scope.along(image.terms, lhs[2:], "slides along it")
    images = mapped(flat, lambda x: grouped(x.transpose(lhs), 1))
    window = scope.along(kernel.terms, rhs[2:], "sums over it")
    kernels = mapped(window, lambda x: grouped(x.transpose(rhs), 0))
    terms = [
        *_place(mapped(images, lambda x: x.squeeze(tuple(range(3, 3 + space)))), (0, 1, 3), ndim),
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


def _cond(scope: Scope, which: Scale, *operands: Scale) -> list[Terms]:
    results = [scope.analysis.run(body, operands) for body in scope.node.bodies]
    return [
        scope.equate(outcome, len(scope.out_shape(k)), "chooses between values of several scales")
        for k, outcome in enumerate(zip(*results, strict=True))
    ]


def _scan(scope: Scope, *scales: Scale) -> list[Terms]:
    """Unrolled where steps have scales of their own; else one step that maps to itself."""
    num_consts, num_carry = scope.params["num_consts"], scope.params["num_carry"]
    length, (body,) = scope.params["length"], scope.node.bodies
    if length == 0:
        return pin(scope, *scales)
    stacked = list(scales[num_consts + num_carry :])
    if length * len(body.nodes) > _MAX_UNROLLED:
        stacked = [Scale(scope.along(x.terms, (0,)), x.signal) for x in stacked]
    for x in stacked:
        scope.index(x, (0,))
    run = functools.partial(_scan_step, scope, scales[:num_consts], stacked)
    signal = any(scale.signal for scale in scales)
    unrolled = any(varies(x.terms, (0,)) for x in stacked)
    steps = range(length) if unrolled else range(min(length, 2))
    carry, outputs = list(scales[num_consts : num_consts + num_carry]), []
    for step in reversed(steps) if scope.params["reverse"] else steps:
        entered = carry
        results = run(step, carry)
        carry = [Scale(x.terms, x.signal or signal) for x in results[:num_carry]]
        outputs.append(results[num_carry:])
    ndims = [len(scope.out_shape(k)) for k in range(len(scope.node.outputs))]
    if unrolled:
        order = outputs[::-1] if scope.params["reverse"] else outputs
        ys = [
            structural_rules.stack(scope, each, n)
            for each, n in zip(zip(*order, strict=True), ndims[num_carry:], strict=True)
        ]
        return [*(x.terms for x in carry), *ys]
    kept = [x.terms for x in carry]
    if length > 1:
        because = "carries a value that another step leaves with another scale"
        kept = [
            scope.equate(pair, n, because) for *pair, n in zip(carry, entered, ndims, strict=False)
        ]
    because = "stacks values of several scales"
    return kept + [
        mapped(scope.equate(each, n - 1, because), lambda x: x[None])
        for each, n in zip(zip(*outputs, strict=True), ndims[num_carry:], strict=True)
    ]


def _scan_step(
    scope: Scope,
    consts: Sequence[Scale],
    stacked: Sequence[Scale],
    step: int,
    carry: Sequence[Scale],
) -> list[Scale]:
    slices = [
        Scale(mapped(x.terms, lambda y: y[0 if y.shape[0] == 1 else step]), x.signal, x.cause)
        for x in stacked
    ]
    return scope.analysis.run(scope.node.bodies[0], [*consts, *carry, *slices])


_RULES_BY_NAME: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (
        _same,
        (
            *("neg", "abs", "copy", "stop_gradient", "reduce_precision", "name", "device_put"),
            *("sharding_constraint", "optimization_barrier", "copy_p", "conj"),
            *("real", "imag"),
        ),
    ),
    (_unscaled, ("sign", "is_finite")),
    (_additive, ("add", "sub", "add_any", "max", "min", "rem", "complex")),
    (_compared, ("eq", "ne", "ge", "gt", "le", "lt", "atan2")),
    (_convert, ("convert_element_type",)),
    (_product, ("mul",)),
    (_quotient, ("div",)),
    (_power(lambda params: float(params["y"])), ("integer_pow",)),
    (_power(2.0), ("square",)),
    (_power(0.5), ("sqrt",)),
    (_power(-0.5), ("rsqrt",)),
    (_power(1 / 3), ("cbrt",)),
    (_pow, ("pow",)),
    (_select, ("select_n",)),
    (_clamp, ("clamp",)),
    (_reduce, ("reduce_sum", "reduce_max", "reduce_min")),
    (_arg_reduce, ("argmax", "argmin")),
    (_along_axis("axis"), ("cumsum", "cummax", "cummin")),
    (_along_axis("dimension"), ("sort",)),
    (_top_k, ("top_k",)),
    (_window, ("reduce_window_sum", "reduce_window_max", "reduce_window_min")),
    (structural_rules.structural(structural_rules.reshape), ("reshape",)),
    (structural_rules.structural(structural_rules.broadcast_in_dim), ("broadcast_in_dim",)),
    (structural_rules.slice_, ("slice",)),
    (structural_rules.structural(structural_rules.squeeze), ("squeeze",)),
    (structural_rules.structural(structural_rules.transpose), ("transpose",)),
    (structural_rules.structural(structural_rules.rev), ("rev",)),
    (structural_rules.pad, ("pad",)),
    (structural_rules.concatenate, ("concatenate",)),
    (structural_rules.split, ("split",)),
    (structural_rules.dynamic_slice, ("dynamic_slice",)),
    (structural_rules.dynamic_update_slice, ("dynamic_update_slice",)),
    (structural_rules.gather, ("gather",)),
    (
        structural_rules.scatter,
        ("scatter", "scatter_add", "scatter_sub", "scatter_max", "scatter_min"),
    ),
    (_fourier, ("fft",)),
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
