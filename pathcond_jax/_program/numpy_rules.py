"""What each operation computes, in numpy: the rules of :mod:`pathcond_jax._program.evaluation`.

A rule is given the operation, the shapes of all values and the operands. Whatever has no rule here,
or has parameters that its rule does not declare, is run by JAX.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from pathcond_jax._program.evaluation import RULES, Avals
from pathcond_jax._program.graph import Node

rule = RULES.rule


def _elementwise(function: Callable[..., Any], *names: str, reads: Sequence[str] = ()) -> None:
    rule(*names, reads=reads)(lambda node, avals, *values: [function(*values)])


def _of_integers(floats: Callable[..., Any], integers: Callable[..., Any]) -> Callable[..., Any]:
    return lambda one, two: (floats if one.dtype.kind in "fc" else integers)(one, two)


def _truncated(one: Any, two: Any) -> Any:
    quotient = np.where(two == 0, -1, one // np.where(two == 0, 1, two))
    inexact = (quotient * two != one) & ((one < 0) != (two < 0)) & (two != 0)
    return quotient + inexact.astype(quotient.dtype)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


for _names, _function in {
    ("add", "add_any"): np.add,
    ("sub",): np.subtract,
    ("neg",): np.negative,
    ("abs",): np.abs,
    ("max",): np.maximum,
    ("min",): np.minimum,
    ("div",): _of_integers(np.divide, _truncated),
    ("rem",): _of_integers(np.fmod, lambda x, y: np.where(y == 0, x, np.fmod(x, y))),
    ("pow",): np.power,
    ("atan2",): np.arctan2,
    ("sign",): np.sign,
    ("square",): np.square,
    ("sqrt",): np.sqrt,
    ("cbrt",): np.cbrt,
    ("rsqrt",): lambda x: 1 / np.sqrt(x),
    ("exp",): np.exp,
    ("exp2",): np.exp2,
    ("expm1",): np.expm1,
    ("log",): np.log,
    ("log2",): np.log2,
    ("log1p",): np.log1p,
    ("sin",): np.sin,
    ("cos",): np.cos,
    ("tan",): np.tan,
    ("sinh",): np.sinh,
    ("cosh",): np.cosh,
    ("tanh",): np.tanh,
    ("asin",): np.arcsin,
    ("acos",): np.arccos,
    ("atan",): np.arctan,
    ("asinh",): np.arcsinh,
    ("acosh",): np.arccosh,
    ("atanh",): np.arctanh,
    ("erf",): special.erf,
    ("erfc",): special.erfc,
    ("erf_inv",): special.erfinv,
    ("lgamma",): special.gammaln,
    ("logistic",): _sigmoid,
    ("floor",): np.floor,
    ("ceil",): np.ceil,
    ("is_finite",): np.isfinite,
    ("eq", "eq_to"): np.equal,
    ("ne",): np.not_equal,
    ("ge",): np.greater_equal,
    ("gt",): np.greater,
    ("le", "le_to"): np.less_equal,
    ("lt", "lt_to"): np.less,
    ("and",): np.bitwise_and,
    ("or",): np.bitwise_or,
    ("xor",): np.bitwise_xor,
    ("not",): np.invert,
    ("shift_left",): np.left_shift,
    ("clamp",): lambda low, x, high: np.minimum(np.maximum(x, low), high),
    ("real",): np.real,
    ("imag",): np.imag,
    ("complex",): lambda one, two: one + 1j * two,
    ("stop_gradient", "copy"): lambda x: x,
}.items():
    _elementwise(_function, *_names)

_elementwise(np.multiply, "mul", reads=("out_dtype",))
_elementwise(np.conj, "conj", reads=("input_dtype",))
_elementwise(lambda x: x, "name", reads=("name",))
_elementwise(lambda x: x, "reduce_precision", reads=("exponent_bits", "mantissa_bits"))
_elementwise(
    lambda x: x, "sharding_constraint", reads=("layout", "context_mesh", "unconstrained_dims")
)


@rule("optimization_barrier")
@rule("device_put", reads=("devices", "srcs", "copy_semantics"))
def _as_they_are(node: Node, avals: Avals, *values: Any) -> list[Any]:
    return list(values)


@rule("convert_element_type", reads=("new_dtype", "weak_type"))
def _convert(node: Node, avals: Avals, value: Any) -> list[Any]:
    if value.dtype.kind == "f" and np.dtype(node.params["new_dtype"]).kind in "iu":
        bounds = np.iinfo(node.params["new_dtype"])
        value = np.nan_to_num(np.clip(np.trunc(value), bounds.min, bounds.max))
    return [value]


@rule("integer_pow", reads=("y",))
def _integer_pow(node: Node, avals: Avals, value: Any) -> list[Any]:
    y = node.params["y"]
    return [value**y if y >= 0 else 1 / value**-y]


@rule("round", reads=("rounding_method",))
def _round(node: Node, avals: Avals, value: Any) -> list[Any]:
    if int(node.params["rounding_method"]):
        return [np.round(value)]
    return [np.trunc(value + np.copysign(0.5, value))]


@rule("select_n")
def _select(node: Node, avals: Avals, which: Any, *cases: Any) -> list[Any]:
    if len(cases) == 2:
        return [np.where(which, cases[1], cases[0])]
    return [np.select([which == k for k in range(len(cases))], cases, cases[-1])]


@rule("iota", reads=("dtype", "shape", "dimension"))
def _iota(node: Node, avals: Avals, *sizes: Any) -> list[Any]:
    shape, axis = node.params["shape"], node.params["dimension"]
    along = [n if a == axis else 1 for a, n in enumerate(shape)]
    return [np.broadcast_to(np.arange(shape[axis]).reshape(along), shape)]


@rule("broadcast_in_dim", reads=("shape", "broadcast_dimensions"))
def _broadcast(node: Node, avals: Avals, value: Any, *sizes: Any) -> list[Any]:
    shape, kept = node.params["shape"], node.params["broadcast_dimensions"]
    laid_out = [1] * len(shape)
    for axis, size in zip(kept, value.shape, strict=True):
        laid_out[axis] = size
    return [np.broadcast_to(value.reshape(laid_out), shape)]


@rule("reshape", reads=("new_sizes",), requires={"dimensions": None})
def _reshape(node: Node, avals: Avals, value: Any, *sizes: Any) -> list[Any]:
    return [value.reshape(node.params["new_sizes"])]


@rule("squeeze", reads=("dimensions",))
def _squeeze(node: Node, avals: Avals, value: Any) -> list[Any]:
    return [value.squeeze(tuple(node.params["dimensions"]))]


@rule("transpose", reads=("permutation",))
def _transpose(node: Node, avals: Avals, value: Any) -> list[Any]:
    return [value.transpose(node.params["permutation"])]


@rule("rev", reads=("dimensions",))
def _rev(node: Node, avals: Avals, value: Any) -> list[Any]:
    return [np.flip(value, tuple(node.params["dimensions"]))]


@rule("concatenate", reads=("dimension",))
def _concatenate(node: Node, avals: Avals, *values: Any) -> list[Any]:
    return [np.concatenate(values, node.params["dimension"])]


@rule("split", reads=("sizes", "axis"))
def _split(node: Node, avals: Avals, value: Any) -> list[Any]:
    return np.split(value, np.cumsum(node.params["sizes"])[:-1], node.params["axis"])


@rule("stack", reads=("axis",))
def _stack(node: Node, avals: Avals, *values: Any) -> list[Any]:
    return [np.stack(values, node.params["axis"])]


@rule("unstack", reads=("axis",))
def _unstack(node: Node, avals: Avals, value: Any) -> list[Any]:
    return list(np.moveaxis(value, node.params["axis"], 0))


@rule("tile", reads=("reps",))
def _tile(node: Node, avals: Avals, value: Any) -> list[Any]:
    return [np.tile(value, node.params["reps"])]


@rule("slice", reads=("start_indices", "limit_indices", "strides"))
def _slice(node: Node, avals: Avals, value: Any) -> list[Any]:
    starts, limits = node.params["start_indices"], node.params["limit_indices"]
    strides = node.params["strides"] or (1,) * value.ndim
    return [value[tuple(map(slice, starts, limits, strides))]]


def _window(sizes: Sequence[int], shape: Sequence[int], starts: Sequence[Any]) -> Any:
    """The slices at ``starts``, moved inside."""
    first = [min(max(int(s), 0), n - k) for s, n, k in zip(starts, shape, sizes, strict=True)]
    return tuple(slice(f, f + k) for f, k in zip(first, sizes, strict=True))


@rule("dynamic_slice", reads=("slice_sizes",))
def _dynamic_slice(node: Node, avals: Avals, value: Any, *starts: Any) -> list[Any]:
    return [value[_window(node.params["slice_sizes"], value.shape, starts)]]


@rule("dynamic_update_slice")
def _dynamic_update_slice(
    node: Node, avals: Avals, value: Any, update: Any, *starts: Any
) -> list[Any]:
    made = value.copy()
    made[_window(update.shape, value.shape, starts)] = update
    return [made]


_GATHER = ("dimension_numbers", "slice_sizes", "mode", "fill_value")


@rule("gather", reads=(*_GATHER, "unique_indices", "indices_are_sorted"))
def _gather(node: Node, avals: Avals, value: Any, places: Any) -> list[Any]:
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    out = avals[node.outputs[0]].shape
    batch_axes = [a for a in range(len(out)) if a not in numbers.offset_dims]
    offset_axes = iter(numbers.offset_dims)
    index: list[Any] = []
    inside: Any = np.ones((), bool)
    for axis, (n, size) in enumerate(zip(value.shape, sizes, strict=True)):
        start: Any = np.zeros((), np.int64)
        if axis in numbers.start_index_map:
            found = places[..., numbers.start_index_map.index(axis)].astype(np.int64)
            laid_out = [out[a] if a in batch_axes else 1 for a in range(len(out))]
            start = found.reshape(laid_out)
            inside = inside & (start >= 0) & (start <= n - size)
            start = np.clip(start, 0, n - size)
        elif axis in numbers.operand_batching_dims:
            k = numbers.operand_batching_dims.index(axis)
            start = _along(batch_axes[numbers.start_indices_batching_dims[k]], n, len(out))
        if axis not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims):
            start = start + _along(next(offset_axes), size, len(out))
        index.append(start)
    taken = np.broadcast_to(value[tuple(index)], out)
    if "FILL" in str(node.params["mode"]):
        filling = node.params["fill_value"]
        taken = np.where(inside, taken, _nothing(value.dtype) if filling is None else filling)
    return [taken]


def _along(axis: int, size: int, ndim: int) -> np.ndarray:
    return np.arange(size).reshape([size if a == axis else 1 for a in range(ndim)])


def _nothing(dtype: Any) -> Any:
    if dtype.kind in "fc":
        return np.nan
    return True if dtype.kind == "b" else np.iinfo(dtype).min or np.iinfo(dtype).max


def _reducing(name: str, function: Callable[..., Any]) -> None:
    rule(name, reads=("axes",))(
        lambda node, avals, value: [function(value, axis=tuple(node.params["axes"]))]
    )


_LEAST: dict[str, Callable[..., Any]] = {
    "max": lambda dtype: -np.inf if dtype.kind == "f" else np.iinfo(dtype).min,
    "min": lambda dtype: np.inf if dtype.kind == "f" else np.iinfo(dtype).max,
    "sum": lambda dtype: 0,
}
for _name, _ufunc in {
    **{"reduce_sum": np.add, "reduce_prod": np.multiply, "reduce_and": np.bitwise_and},
    **{"reduce_or": np.bitwise_or, "reduce_xor": np.bitwise_xor},
}.items():
    _reducing(_name, _ufunc.reduce)


def _extreme(name: str, ufunc: np.ufunc) -> None:
    def reduce(node: Node, avals: Avals, value: Any) -> list[Any]:
        least = _LEAST[name](value.dtype) if value.dtype.kind != "b" else name == "min"
        return [ufunc.reduce(value, axis=tuple(node.params["axes"]), initial=least)]

    rule(f"reduce_{name}", reads=("axes",))(reduce)


_extreme("max", np.maximum)
_extreme("min", np.minimum)


def _place(name: str, function: Callable[..., Any]) -> None:
    rule(name, reads=("axes", "index_dtype"))(
        lambda node, avals, value: [function(value, axis=node.params["axes"][0])]
    )


_place("argmax", np.argmax)
_place("argmin", np.argmin)


def _cumulative(name: str, ufunc: np.ufunc) -> None:
    def along(node: Node, avals: Avals, value: Any) -> list[Any]:
        axis = node.params["axis"]
        turned = np.flip(value, axis) if node.params["reverse"] else value
        made = ufunc.accumulate(turned, axis)
        return [np.flip(made, axis) if node.params["reverse"] else made]

    rule(name, reads=("axis", "reverse"))(along)


_cumulative("cumsum", np.add)
_cumulative("cumprod", np.multiply)
_cumulative("cummax", np.maximum)
_cumulative("cummin", np.minimum)


@rule("sort", reads=("dimension", "is_stable", "num_keys"))
def _sort(node: Node, avals: Avals, key: Any, *others: Any) -> list[Any]:
    axis = node.params["dimension"]
    keys = [key, *others][: node.params["num_keys"]]
    order = np.lexsort(keys[::-1], axis)
    return [np.take_along_axis(value, order, axis) for value in (key, *others)]


@rule("top_k", reads=("k", "axis", "is_stable"))
def _top_k(node: Node, avals: Avals, value: Any) -> list[Any]:
    axis = node.params.get("axis", value.ndim - 1)
    order = np.argsort(-value if value.dtype.kind == "f" else ~value, axis, kind="stable")
    order = np.take(order, range(node.params["k"]), axis)
    return [np.take_along_axis(value, order, axis), order]


@rule("dot_general", reads=("dimension_numbers", "preferred_element_type"))
def _dot(node: Node, avals: Avals, one: Any, two: Any) -> list[Any]:
    (contract_one, contract_two), (batch_one, batch_two) = node.params["dimension_numbers"]
    left, free_one, batch = _as_matrices(one, batch_one, contract_one)
    right, free_two, _ = _as_matrices(two, batch_two, contract_two)
    return [(left @ np.swapaxes(right, -1, -2)).reshape(*batch, *free_one, *free_two)]


def _as_matrices(value: Any, batch: Sequence[int], contract: Sequence[int]) -> tuple[Any, Any, Any]:
    """An array as (batch, free, contracted), and the shapes of its free and batch axes."""
    free = [a for a in range(value.ndim) if a not in (*batch, *contract)]
    shapes = [[value.shape[a] for a in axes] for axes in (batch, free, contract)]
    flat = value.transpose([*batch, *free, *contract]).reshape([math.prod(s) for s in shapes])
    return flat, shapes[1], shapes[0]


@rule("pad", reads=("padding_config",))
def _pad(node: Node, avals: Avals, value: Any, filling: Any) -> list[Any]:
    return [_padded(value, node.params["padding_config"], filling)]


def _padded(value: Any, padding: Sequence[tuple[int, int, int]], filling: Any) -> Any:
    """Per axis (low, high, inner): entries more, or fewer if negative, at its ends and between."""
    if not any(map(any, padding)):
        return value
    spread = [max(n + (n - 1) * p[2], 0) for n, p in zip(value.shape, padding, strict=True)]
    shape = [n + max(p[0], 0) + max(p[1], 0) for n, p in zip(spread, padding, strict=True)]
    made = np.full(shape, filling, value.dtype)
    into = tuple(
        slice(max(p[0], 0), max(p[0], 0) + n, p[2] + 1)
        for n, p in zip(spread, padding, strict=True)
    )
    made[into] = value
    ends = [n + min(p[1], 0) for n, p in zip(shape, padding, strict=True)]
    return made[tuple(slice(-min(p[0], 0), end) for end, p in zip(ends, padding, strict=True))]


def _windows(
    value: Any,
    sizes: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    dilation: Sequence[int],
    *,
    filling: Any,
) -> Any:
    """(positions ..., entries of a window ...), one of each per axis of ``value``."""
    ends = [(low, high, d - 1) for (low, high), d in zip(padding, base_dilation, strict=True)]
    padded = _padded(value, ends, filling)
    reach = [(n - 1) * d + 1 for n, d in zip(sizes, dilation, strict=True)]
    seen = np.lib.stride_tricks.sliding_window_view(padded, reach)
    return seen[
        (*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilation))
    ]


_WINDOW = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")


def _pooled(name: str, ufunc: np.ufunc) -> None:
    def pool(node: Node, avals: Avals, value: Any) -> list[Any]:
        sizes, strides, padding, base, dilation = (node.params[key] for key in _WINDOW)
        outside = _LEAST[name](value.dtype)
        seen = _windows(value, sizes, strides, padding, base, dilation, filling=outside)
        return [ufunc.reduce(seen, axis=tuple(range(value.ndim, 2 * value.ndim)))]

    rule(f"reduce_window_{name}", reads=_WINDOW)(pool)


_pooled("max", np.maximum)
_pooled("min", np.minimum)
_pooled("sum", np.add)


@rule(
    "conv_general_dilated",
    reads=(
        *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"),
        *("feature_group_count", "batch_group_count", "preferred_element_type"),
    ),
)
def _convolution(node: Node, avals: Avals, value: Any, kernel: Any) -> list[Any]:
    params, numbers = node.params, node.params["dimension_numbers"]
    value, kernel = value.transpose(numbers.lhs_spec), kernel.transpose(numbers.rhs_spec)
    spatial = value.ndim - 2
    seen = _windows(
        value,
        (1, 1, *kernel.shape[2:]),
        (1, 1, *params["window_strides"]),
        ((0, 0), (0, 0), *params["padding"]),
        (1, 1, *params["lhs_dilation"]),
        (1, 1, *params["rhs_dilation"]),
        filling=0.0,
    )
    # (batch, features, positions ..., 1, 1, window ...)
    seen = seen.reshape(*seen.shape[: spatial + 2], *seen.shape[spatial + 4 :])
    batch, features, *positions = seen.shape[: spatial + 2]
    by_features, by_batch = params["feature_group_count"], params["batch_group_count"]
    groups, outputs = by_features * by_batch, kernel.shape[0]
    seen = seen.reshape(
        by_batch, batch // by_batch, by_features, features // by_features, *seen.shape[2:]
    )
    order = (0, 2, 1, *range(4, 4 + spatial), 3, *range(4 + spatial, 4 + 2 * spatial))
    rows = batch // by_batch * math.prod(positions)
    left = seen.transpose(order).reshape(groups, rows, math.prod(kernel.shape[1:]))
    right = kernel.reshape(groups, outputs // groups, -1)
    made = (left @ right.transpose(0, 2, 1)).reshape(
        groups, batch // by_batch, *positions, outputs // groups
    )
    made = np.moveaxis(made, (0, -1), (1, 2))
    made = made.reshape(batch // by_batch, outputs, *positions)
    return [made.transpose(np.argsort(numbers.out_spec))]


# Random numbers need not be those of JAX's keys, which here are arrays of zeros.
@rule("random_seed", "random_wrap", "random_fold_in", "random_clone", reads=("impl",))
@rule("random_split", reads=("shape",))
def _key(node: Node, avals: Avals, *values: Any) -> list[Any]:
    return [np.zeros(avals[node.outputs[0]].shape, np.uint32)]


@rule("random_bits", reads=("bit_width", "shape"))
@rule("random_unwrap")
@rule("threefry2x32")
def _bits(node: Node, avals: Avals, *values: Any) -> list[Any]:
    generator = np.random.default_rng(node.outputs[0])
    made = [avals[number] for number in node.outputs]
    return [generator.integers(0, np.iinfo(a.dtype).max, a.shape, a.dtype, True) for a in made]


@rule("bitcast_convert_type", reads=("new_dtype",))
def _bitcast(node: Node, avals: Avals, value: Any) -> list[Any]:
    (number,) = node.inputs
    bits = np.ascontiguousarray(value, avals[number].dtype)
    return [bits.view(node.params["new_dtype"]).reshape(avals[node.outputs[0]].shape)]


@rule("shift_right_logical")
def _shift_right_logical(node: Node, avals: Avals, value: Any, by: Any) -> list[Any]:
    unsigned = np.dtype(f"u{value.dtype.itemsize}")
    shifted = np.right_shift(value.view(unsigned), by.view(unsigned)).view(value.dtype)
    return [np.where((by >= 0) & (by < 8 * value.dtype.itemsize), shifted, 0)]


@rule("shift_right_arithmetic")
def _shift_right_arithmetic(node: Node, avals: Avals, value: Any, by: Any) -> list[Any]:
    return [np.right_shift(value, np.clip(by, 0, 8 * value.dtype.itemsize - 1))]
