"""Frequent primitives in numpy, for the fuzzer: every value has a leading axis of samples.

A rule ``rule(eqn, *values)`` returns the result, or None where it is JAX that has to run it.
"""

import string

import numpy as np


def _elementwise(function):
    def rule(eqn, *values):
        # A scalar takes part in operations of any rank.
        rank = max(value.ndim for value in values)
        return function(
            *(v if v.ndim == rank else v.reshape(-1, *(1,) * (rank - 1)) for v in values)
        )

    return rule


def _floats_only(function):
    apply = _elementwise(function)

    def rule(eqn, *values):
        return apply(eqn, *values) if values[0].dtype in (np.float64, np.float32) else None

    return rule


def _select(which, *cases):
    if len(cases) == 2 and which.dtype == bool:
        return np.where(which, cases[1], cases[0])
    shape = np.broadcast_shapes(which.shape, *(case.shape for case in cases))
    return np.choose(np.broadcast_to(which, shape), [np.broadcast_to(c, shape) for c in cases])


def _convert(eqn, value):
    dtype = eqn.params["new_dtype"]
    if value.dtype.kind in "fc" and np.dtype(dtype).kind not in "f":
        return None
    return value.astype(dtype)


def _broadcast_in_dim(eqn, value, *sizes):
    if sizes:
        return None
    target = [1] * len(eqn.params["shape"])
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        target[place] = value.shape[axis + 1]
    wide = value.reshape(len(value), *target)
    return np.broadcast_to(wide, (len(value), *eqn.params["shape"]))


def _reshape(eqn, value, *sizes):
    if sizes:
        return None
    order = eqn.params.get("dimensions")
    if order is not None:
        value = value.transpose(0, *(axis + 1 for axis in order))
    return value.reshape(len(value), *eqn.params["new_sizes"])


def _transpose(eqn, value):
    return value.transpose(0, *(axis + 1 for axis in eqn.params["permutation"]))


def _squeeze(eqn, value):
    return value.squeeze(tuple(axis + 1 for axis in eqn.params["dimensions"]))


def _expand_dims(eqn, value):
    return np.expand_dims(value, tuple(axis + 1 for axis in eqn.params["dimensions"]))


def _rev(eqn, value):
    return np.flip(value, tuple(axis + 1 for axis in eqn.params["dimensions"]))


def _slice(eqn, value):
    bounds = (eqn.params[k] for k in ("start_indices", "limit_indices"))
    strides = eqn.params["strides"] or (1,) * (value.ndim - 1)
    return value[(slice(None), *map(slice, *bounds, strides))]


def _concatenate(eqn, *values):
    count = max(map(len, values))
    wide = [np.broadcast_to(v, (count, *v.shape[1:])) for v in values]
    return np.concatenate(wide, eqn.params["dimension"] + 1)


def _pad(eqn, value, fill):
    count = max(len(value), len(fill))
    config = eqn.params["padding_config"]
    inner = [
        n + max(n - 1, 0) * gap for n, (_, _, gap) in zip(value.shape[1:], config, strict=True)
    ]
    wide = [n + max(low, 0) + max(high, 0) for n, (low, high, _) in zip(inner, config, strict=True)]
    result = np.empty((count, *wide), value.dtype)
    result[...] = fill.reshape(-1, *(1,) * len(wide))
    place = [
        slice(max(low, 0), max(low, 0) + n, gap + 1)
        for n, (low, _, gap) in zip(inner, config, strict=True)
    ]
    result[(slice(None), *place)] = value
    keep = [
        slice(max(-low, 0), n - max(-high, 0))
        for n, (low, high, _) in zip(wide, config, strict=True)
    ]
    return result[(slice(None), *keep)]


def _reduce(function):
    def rule(eqn, value):
        return function(value, axis=tuple(axis + 1 for axis in eqn.params["axes"]))

    return rule


def _arg_reduce(function):
    def rule(eqn, value):
        return function(value, axis=eqn.params["axes"][0] + 1)

    return rule


def _cumulative(function):
    def rule(eqn, value):
        axis = eqn.params["axis"] + 1
        if eqn.params["reverse"]:
            return np.flip(function(np.flip(value, axis), axis=axis), axis)
        return function(value, axis=axis)

    return rule


def _dot_general(eqn, one, two):
    (summed_one, summed_two), (batch_one, batch_two) = eqn.params["dimension_numbers"]
    letters = iter(string.ascii_lowercase)
    names_one = [next(letters) for _ in one.shape[1:]]
    names_two = [next(letters) for _ in two.shape[1:]]
    for a, b in zip((*summed_one, *batch_one), (*summed_two, *batch_two), strict=True):
        names_two[b] = names_one[a]
    out = [names_one[a] for a in batch_one]
    out += [n for a, n in enumerate(names_one) if a not in (*summed_one, *batch_one)]
    out += [n for b, n in enumerate(names_two) if b not in (*summed_two, *batch_two)]
    if one.dtype != np.float64 or two.dtype != np.float64:
        return None
    # The axis of samples, Z, may be of size 1 in either.
    return np.einsum(f"Z{''.join(names_one)},Z{''.join(names_two)}->Z{''.join(out)}", one, two)


def _dynamic_slice(eqn, value, *starts):
    sizes = eqn.params["slice_sizes"]
    count = max(map(len, (value, *starts)))
    tops = [n - size for n, size in zip(value.shape[1:], sizes, strict=True)]
    first = [
        np.clip(np.broadcast_to(s, (count,)).astype(int), 0, top)
        for s, top in zip(starts, tops, strict=True)
    ]
    wide = np.broadcast_to(value, (count, *value.shape[1:]))
    at = [np.arange(count).reshape(-1, *(1,) * len(sizes))]
    for axis, size in enumerate(sizes):
        shape = [1] * (len(sizes) + 1)
        shape[axis + 1] = size
        at.append(first[axis].reshape(-1, *(1,) * len(sizes)) + np.arange(size).reshape(shape))
    return wide[tuple(at)]


def _iota(eqn, *sizes):
    if sizes:
        return None
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    one = [1] * len(shape)
    one[axis] = shape[axis]
    return np.broadcast_to(np.arange(shape[axis]).reshape(one), shape)[None]


def _sort(eqn, *values):
    if len(values) > 1 or values[0].dtype.kind not in "fi":
        return None
    return np.sort(values[0], eqn.params["dimension"] + 1)


def _logistic(x):
    return 1.0 / (1.0 + np.exp(-x))


def _identity(x):
    return x


def _integer_pow(eqn, value):
    # As XLA does: repeated products, so that powers of two stay exact.
    power = eqn.params["y"]
    if value.dtype.kind != "f":
        return None
    product = np.ones_like(value)
    for _ in range(abs(power)):
        product = product * value
    return 1 / product if power < 0 else product


RULES = {
    **{
        name: _elementwise(function)
        for name, function in {
            "neg": np.negative, "abs": np.abs, "copy": _identity, "copy_p": _identity,
            "stop_gradient": _identity, "name": _identity, "real": np.real, "imag": np.imag,
            "conj": np.conj, "add": np.add, "add_any": np.add, "sub": np.subtract,
            "mul": np.multiply, "max": np.maximum, "min": np.minimum, "eq": np.equal,
            "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal, "select_n": _select, "is_finite": np.isfinite,
        }.items()
    },
    **{
        name: _floats_only(function)
        for name, function in {
            "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "exp": np.exp, "log": np.log,
            "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "sqrt": np.sqrt, "cbrt": np.cbrt,
            "logistic": _logistic, "square": np.square, "log1p": np.log1p, "expm1": np.expm1,
            "div": np.divide, "pow": np.power, "atan2": np.arctan2, "rem": np.fmod,
            "rsqrt": lambda x: 1 / np.sqrt(x), "exp2": np.exp2,
            "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
        }.items()
    },
    "convert_element_type": _convert, "broadcast_in_dim": _broadcast_in_dim, "reshape": _reshape,
    "transpose": _transpose, "squeeze": _squeeze, "rev": _rev, "slice": _slice,
    "expand_dims": _expand_dims, "concatenate": _concatenate, "pad": _pad,
    "reduce_sum": _reduce(np.sum), "reduce_max": _reduce(np.max), "reduce_min": _reduce(np.min),
    "reduce_prod": _reduce(np.prod), "reduce_and": _reduce(np.all), "reduce_or": _reduce(np.any),
    "argmax": _arg_reduce(np.argmax), "argmin": _arg_reduce(np.argmin),
    "cumsum": _cumulative(np.cumsum), "cumprod": _cumulative(np.cumprod),
    "cummax": _cumulative(np.maximum.accumulate), "cummin": _cumulative(np.minimum.accumulate),
    "dot_general": _dot_general, "dynamic_slice": _dynamic_slice, "iota": _iota, "sort": _sort,
    "integer_pow": _integer_pow,
}  # fmt: skip
