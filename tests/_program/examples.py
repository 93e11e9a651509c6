"""For each primitive that the rules know, programs in which it occurs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ad_checkpoint, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

X = jax.ShapeDtypeStruct((4, 6), np.float32)
IMAGE = jax.ShapeDtypeStruct((2, 6, 6, 4), np.float32)
KERNEL = jax.ShapeDtypeStruct((3, 3, 4, 4), np.float32)
SCALAR = jax.ShapeDtypeStruct((), np.float32)
COMPLEX = jax.ShapeDtypeStruct((4, 6), np.complex64)
PLACES = jax.ShapeDtypeStruct((3, 1), np.int32)
PLACE = jax.ShapeDtypeStruct((), np.int32)

_GATHERED = lax.GatherDimensionNumbers((1,), (0,), (0,))
_SCATTERED = lax.ScatterDimensionNumbers((1,), (0,), (0,))


def _scatter(operation: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    updates = jax.ShapeDtypeStruct((3, 6), np.float32)
    return lambda x, i, u: operation(x, i, u, _SCATTERED), (X, PLACES, updates)


def _constrained(x: jax.Array) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()[:1]), ("devices",))
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def _unary(*names: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    return {name: (getattr(lax, name), (X,)) for name in names}


def _binary(*names: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    return {name: (getattr(lax, name), (X, X)) for name in names}


def _windowed(start: float, operation: Callable[..., Any]) -> tuple[Any, tuple[Any, ...]]:
    def window(x: jax.Array) -> jax.Array:
        return lax.reduce_window(
            x, np.float32(start), operation, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )

    return window, (IMAGE,)


EXAMPLES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    **_unary("neg", "abs", "sign", "is_finite", "square", "sqrt", "rsqrt", "cbrt", "exp", "exp2"),
    **_unary("expm1", "log", "log1p", "tanh", "logistic", "sin", "cos", "erf", "stop_gradient"),
    **_unary("optimization_barrier"),
    **_binary("add", "sub", "mul", "div", "max", "min", "rem", "pow", "atan2"),
    **_binary("eq", "ne", "ge", "gt", "le", "lt", "complex"),
    "add_any": (lambda x: jax.vjp(lambda y: jnp.sin(y) + jnp.cos(y), x)[1](x), (X,)),
    "real": (lax.real, (COMPLEX,)),
    "imag": (lax.imag, (COMPLEX,)),
    "conj": (lax.conj, (COMPLEX,)),
    "copy": (jnp.array, (X,)),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 7), (X,)),
    "name": (lambda x: ad_checkpoint.checkpoint_name(x, "x"), (X,)),
    "device_put": (lambda x: jax.device_put(x, jax.devices()[0]), (X,)),
    "sharding_constraint": (_constrained, (X,)),
    "convert_element_type": (lambda x: x.astype(jnp.bfloat16), (X,)),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), (X,)),
    "select_n": (lambda x: lax.select_n(x > 0, x, x), (X,)),
    "clamp": (lambda x: lax.clamp(x, x, x), (X,)),
    "reduce_sum": (lambda x: x.sum(0), (X,)),
    "reduce_max": (lambda x: x.max(0), (X,)),
    "reduce_min": (lambda x: x.min(0), (X,)),
    "reduce_prod": (lambda x: x.prod(0), (X,)),
    "argmax": (lambda x: lax.argmax(x, 0, jnp.int32), (X,)),
    "argmin": (lambda x: lax.argmin(x, 0, jnp.int32), (X,)),
    "cumsum": (lambda x: lax.cumsum(x, 0), (X,)),
    "cummax": (lambda x: lax.cummax(x, 0), (X,)),
    "cumprod": (lambda x: lax.cumprod(x, 0), (X,)),
    "cummin": (lambda x: lax.cummin(x, 0), (X,)),
    "sort": (lambda x: lax.sort(x, dimension=0), (X,)),
    "top_k": (lambda x: lax.top_k(x, 2), (X,)),
    "reduce_window_sum": _windowed(0.0, lax.add),
    "reduce_window_max": _windowed(-np.inf, lax.max),
    "reduce_window_min": _windowed(np.inf, lax.min),
    "reduce": (lambda x: lax.reduce(x, np.float32(1), lambda a, b: lax.mul(a, b), (0,)), (X,)),
    "reduce_window": _windowed(1.0, lax.mul),
    "reshape": (lambda x: lax.reshape(x, (6, 4)), (X,)),
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (2, 4, 6), (1, 2)), (X,)),
    "slice": (lambda x: x[1:3], (X,)),
    "squeeze": (lambda x: lax.squeeze(x[:1], (0,)), (X,)),
    "transpose": (lambda x: x.T, (X,)),
    "rev": (lambda x: lax.rev(x, (0,)), (X,)),
    "pad": (lambda x: jnp.pad(x, 1), (X,)),
    "tile": (lambda x: jnp.tile(x, (2, 1)), (X,)),
    "stack": (lambda x: jnp.stack([x, x]), (X,)),
    "unstack": (jnp.unstack, (X,)),
    "concatenate": (lambda x: lax.concatenate([x, x], 0), (X,)),
    "split": (lambda x: lax.split(x, (1, 3)), (X,)),
    "dynamic_slice": (lambda x, i: lax.dynamic_slice_in_dim(x, i, 2), (X, PLACE)),
    "dynamic_update_slice": (
        lambda x, i: lax.dynamic_update_slice_in_dim(x, x[:2], i, 0),
        (X, PLACE),
    ),
    "gather": (lambda x, i: lax.gather(x, i, _GATHERED, (1, 6)), (X, PLACES)),
    "scatter": _scatter(lax.scatter),
    "scatter-add": _scatter(lax.scatter_add),
    "scatter-max": _scatter(lax.scatter_max),
    "scatter-min": _scatter(lax.scatter_min),
    "scatter-mul": _scatter(lax.scatter_mul),
    "scatter-sub": (lambda x: x.at[0].subtract(x[0]), (X,)),
    "fft": (lambda x: jnp.fft.rfft(x), (X,)),
    "dot_general": (lambda x: x @ x.T, (X,)),
    "ragged_dot_general": (
        lambda x, sizes: lax.ragged_dot(x, jnp.stack([x.T, x.T, x.T]), sizes[:, 0]),
        (X, PLACES),
    ),
    "conv_general_dilated": (
        lambda x, k: lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (IMAGE, KERNEL),
    ),
    "cond": (lambda x, i: lax.switch(i, (lambda y: y, lambda y: 2 * y), x), (X, PLACE)),
    "scan": (lambda x: lax.scan(lambda c, y: (c + y, c * y), x[0], x), (X,)),
    "while": (
        lambda x, i: lax.while_loop(lambda c: c[0] < i, lambda c: (c[0] + 1, c[1] + x), (0, x)),
        (X, PLACE),
    ),
}

# Comparisons by total order, which JAX makes only while it compiles a sort.
WITHOUT_EXAMPLE = {"eq_to", "le_to", "lt_to"}
