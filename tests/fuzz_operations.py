"""What random programs are made of: layers, and operations with unusual parameters.

An operation ``operation(program, x, y, r)`` takes two earlier values and a random.Random, and
returns a new value, or None where it does not apply. Parameters come from ``program.param``, which
must be asked outside of the bodies of loops.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

LAYERS = {}
UNUSUAL = {}


def layer(function):
    """Enters an operation that scales pass."""
    LAYERS[function.__name__] = function
    return function


def unusual(function):
    """Enters an operation, or a family of them."""
    UNUSUAL[function.__name__] = function
    return function


def relu(x):
    """The positive part, without the function that JAX wraps around it."""
    return jnp.maximum(x, 0.0)


def _rows(p, x, axis=-1):
    """A vector laid out along an axis of ``x``."""
    shape = [1] * x.ndim
    shape[axis] = p.shape[0]
    return p.reshape(shape)


def _width(r):
    return r.choice([1, 2, 3, 3, 4])


def _axis(x, r):
    return r.randrange(x.ndim)


def _of_axis(x, axis, value, other=0):
    return [value if a == axis else other for a in range(x.ndim)]


def _integers(x, size):
    """Positions below ``size`` that depend on values."""
    return (jnp.floor(jnp.abs(x) * 3.0) % size).astype(jnp.int32)


def _predicate(program, x, r):
    """A scalar boolean: of a value, of a parameter, of an input."""
    return r.choice(
        [
            lambda: x.sum() > 0,
            lambda: x.reshape(-1)[0] > x.reshape(-1)[-1],
            lambda: program.param() > 0,
            lambda: program.n > 1,
            lambda: jnp.any(x > 1.0),
            lambda: jnp.all(program.param(2) < 2.0),
        ]
    )()


# --- layers ---------------------------------------------------------------------------------------


@layer
def dense(program, x, y, r):
    return x @ program.param(x.shape[-1], _width(r)) if x.ndim else None


@layer
def dense_relu(program, x, y, r):
    if x.ndim:
        h = x @ program.param(x.shape[-1], _width(r))
        return relu(h + _rows(program.param(h.shape[-1]), h) if r.random() < 0.5 else h)


@layer
def dense_transposed(program, x, y, r):
    return x @ program.param(_width(r), x.shape[-1]).T if x.ndim else None


@layer
def dense_on_an_axis(program, x, y, r):
    if x.ndim:
        axis = _axis(x, r)
        kernel = program.param(x.shape[axis], _width(r))
        return jnp.moveaxis(jnp.tensordot(x, kernel, (axis, 0)), -1, axis)


@layer
def residual(program, x, y, r):
    if x.ndim:
        width = _width(r)
        h = relu(x @ program.param(x.shape[-1], width))
        return x + h @ program.param(width, x.shape[-1])


@layer
def rectified(program, x, y, r):
    return r.choice([relu, jax.nn.relu, lambda x: jnp.where(x > 0, x, 0.0)])(x)


@layer
def bias(program, x, y, r):
    return x + _rows(program.param(x.shape[-1]), x) if x.ndim else None


@layer
def scale(program, x, y, r):
    if x.ndim:
        axis = r.choice([-1, -1, _axis(x, r)])
        return x * _rows(program.param(x.shape[axis]), x, axis)


@layer
def scalar(program, x, y, r):
    return x * program.param()


@layer
def skip(program, x, y, r):
    return r.choice([jnp.add, jnp.subtract, jnp.maximum])(x, y) if x.shape == y.shape else None


@layer
def absolute(program, x, y, r):
    return jnp.abs(x)


@layer
def leaky(program, x, y, r):
    return r.choice(
        [
            lambda: jax.nn.leaky_relu(x),
            lambda: jnp.where(x > 0, x, -2 * x),
            lambda: jnp.maximum(x, 0.5 * x),
            lambda: jnp.where(x > 0, x, x * program.param()),
        ]
    )()


@layer
def total(program, x, y, r):
    if x.ndim > 1:
        return r.choice([jnp.sum, jnp.mean, jnp.max])(
            x, axis=_axis(x, r), keepdims=r.random() < 0.3
        )


@layer
def joined(program, x, y, r):
    if x.ndim and x.shape[:-1] == y.shape[:-1]:
        return jnp.concatenate([x, y], -1)


@layer
def constant_factor(program, x, y, r):
    return x * r.choice([0.5, 2.0, -1.0, 3.0])


@layer
def turned(program, x, y, r):
    if x.ndim > 1:
        return r.choice([lambda: jnp.swapaxes(x, -1, -2), lambda: x.reshape(x.shape[0], -1)])()


@layer
def convolved(program, x, y, r):
    if x.ndim == 3:
        kernel = program.param(2, x.shape[-1], _width(r))
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )


# --- elementwise ----------------------------------------------------------------------------------

_UNARY = tuple(
    name
    for name in (
        *("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e"),
        *("cbrt", "ceil", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2"),
        *("expm1", "floor", "is_finite", "lgamma", "log", "log1p", "logistic", "neg", "round"),
        *("rsqrt", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh", "reciprocal"),
        *("stop_gradient", "optimization_barrier", "full_like"),
    )
    if hasattr(lax, name)
)


def _unary(r):
    name = r.choice(_UNARY)
    function = getattr(lax, name)
    if name == "full_like":
        return lambda x: function(x, 2.0)
    if name == "round":
        method = r.choice(list(lax.RoundingMethod))
        return lambda x: function(x, method)
    return lambda x: function(x).astype(x.dtype)


@unusual
def unary(program, x, y, r):
    function = _unary(r)
    return r.choice(
        [
            lambda: function(x),
            lambda: x * function(y) if x.shape == y.shape else function(x),
            lambda: x * function(program.param()),
            lambda: x + function(x),
            lambda: function(jnp.abs(x)),
        ]
    )()


@unusual
def homogeneous_unary(program, x, y, r):
    return r.choice(
        [
            lambda: lax.sqrt(jnp.abs(x)),
            lambda: lax.square(relu(x)),
            lambda: lax.cbrt(x),
            lambda: lax.integer_pow(x, r.choice([-2, -1, 0, 1, 2, 3])),
            lambda: lax.sqrt(lax.square(x)),
            lambda: lax.pow(jnp.abs(x), r.choice([0.5, 2.0, 1.0, -1.0])),
            lambda: lax.pow(jnp.abs(x), jnp.asarray(r.choice([0, 1, 2]))),
            lambda: lax.rsqrt(lax.square(x)) * x * x,
            lambda: x * lax.sign(x),
            lambda: x / lax.stop_gradient(jnp.abs(x).max()),
        ]
    )()


@unusual
def binary(program, x, y, r):
    y = y if y.shape == x.shape else program.param(x.shape[-1]) if x.ndim else program.param()
    y = jnp.broadcast_to(y, x.shape)
    return r.choice(
        [
            lambda: lax.atan2(x, y),
            lambda: lax.rem(x, y),
            lambda: lax.nextafter(x, y),
            lambda: lax.pow(jnp.abs(x), y),
            lambda: lax.max(x, y),
            lambda: lax.min(x, y),
            lambda: lax.sub(x, y),
            lambda: lax.div(x, y),
            lambda: lax.mul(x, y),
            lambda: lax.div(x, jnp.abs(y) + 1e-3),
            lambda: lax.igamma(jnp.abs(x) + 0.5, jnp.abs(y)),
            lambda: lax.igammac(jnp.abs(x) + 0.5, jnp.abs(y)),
            lambda: lax.zeta(jnp.abs(x) + 1.5, jnp.abs(y) + 0.5),
            lambda: lax.polygamma(jnp.ones_like(x), jnp.abs(y) + 0.5),
            lambda: lax.betainc(jnp.abs(x) + 0.5, jnp.abs(y) + 0.5, jnp.full_like(x, 0.3)),
            lambda: jnp.hypot(x, y),
            lambda: jnp.copysign(x, y),
            lambda: jnp.heaviside(x, y),
            lambda: jnp.logaddexp(x, y),
            lambda: jnp.fmod(x, 2.0),
            lambda: jnp.floor_divide(x, y),
            lambda: jnp.mod(x, y),
            lambda: jnp.ldexp(x, 2),
            lambda: jnp.nan_to_num(x, nan=1.0),
            lambda: x * lax.sign(y),
            lambda: x * (y > 0),
            lambda: relu(x) * jax.nn.sigmoid(y),
            lambda: jnp.where(x > y, x, y),
            lambda: jnp.where(jnp.abs(x) < jnp.abs(y), 2 * x, 3 * x),
            lambda: lax.max(lax.min(x, y), -x),
        ]
    )()


@unusual
def selected(program, x, y, r):
    y = y if y.shape == x.shape else 2 * x
    which = _integers(y, 3)
    return r.choice(
        [
            lambda: lax.select_n(which, x, 2 * x, 3 * y),
            lambda: lax.select_n(which, x, jnp.ones_like(x), y),
            lambda: lax.select_n(jnp.asarray(program.n % 2 == 0), x, 2 * x),
            lambda: lax.select_n(which, x, jnp.zeros_like(x), -x),
            lambda: lax.clamp(y, x, y + jnp.abs(x)),
            lambda: lax.clamp(-1.0, x, 1.0),
            lambda: lax.clamp(program.param(), x, program.param()),
            lambda: lax.clamp(0.0, x, np.inf),
            lambda: lax.clamp(-jnp.abs(y), x, jnp.abs(y)),
            lambda: jnp.where(program.param() > 0, x, 2 * x),
            lambda: jnp.where(y > 0, 5 * x, x),
            lambda: jnp.where(x > 0, x, y),
            lambda: jnp.where(x != 0, x, 7.0),
            lambda: jnp.where(x >= x.max(), x, 0.0),
            lambda: jnp.where(jnp.isnan(x), 1.0, x),
            lambda: jnp.where(np.arange(x.size).reshape(x.shape) % 2 == 0, x, r.choice([0.0, 1.0])),
            lambda: jnp.select([x > 1, y > 0], [x, 2 * y], 0.0),
            lambda: jnp.piecewise(x, [x < 0, x >= 0], [lambda v: -v, lambda v: 2 * v]),
            lambda: x[..., 0] * (x[..., -1] == y[..., 0]),
        ]
    )()


@unusual
def cast(program, x, y, r):
    narrow = r.choice([jnp.float32, jnp.bfloat16, jnp.float16])
    return r.choice(
        [
            lambda: x.astype(narrow).astype(x.dtype),
            lambda: relu(x.astype(narrow)).astype(x.dtype),
            lambda: lax.reduce_precision(x, 8, 7),
            lambda: x.astype(jnp.int32).astype(x.dtype),
            lambda: (x > 0).astype(x.dtype) * x,
            lambda: x.astype(bool).astype(x.dtype),
            lambda: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int64), x.dtype),
            lambda: lax.bitcast_convert_type(
                lax.bitcast_convert_type(x, jnp.int64) & 0x7FFFFFFFFFFFFFFF, x.dtype
            ),
            lambda: lax.shift_left(x.astype(jnp.int32), jnp.full(x.shape, 1, jnp.int32)).astype(
                x.dtype
            ),
            lambda: lax.population_count(x.astype(jnp.int32)).astype(x.dtype),
            lambda: x * (jnp.logical_not(y > 0) if x.shape == y.shape else 1),
            lambda: x * jnp.logical_xor(x > 0, x > 1),
            lambda: x * ((x > 0) & (x < 2)),
            lambda: lax.convert_element_type(x, jnp.complex128).real,
            lambda: jnp.signbit(x) * x,
            lambda: jnp.frexp(x)[0],
        ]
    )()


@unusual
def complex_numbers(program, x, y, r):
    if not x.ndim:
        return None
    y = y if y.shape == x.shape else jnp.flip(x, -1) if x.ndim else x
    z = lax.complex(x, r.choice([y, jnp.zeros_like(x), 2 * x, jnp.ones_like(x)]))
    return r.choice(
        [
            lambda: jnp.abs(z),
            lambda: lax.real(z) + lax.imag(z),
            lambda: lax.real(lax.conj(z) * z),
            lambda: jnp.angle(z),
            lambda: lax.real(z * 1j),
            lambda: lax.imag(z / (1 + 2j)),
            lambda: lax.real(z @ (program.param(x.shape[-1], 2) + 0j)),
            lambda: lax.real(jnp.exp(z)),
            lambda: lax.real(lax.sqrt(z)),
        ]
    )()


@unusual
def fourier(program, x, y, r):
    if not x.ndim:
        return None
    axis = _axis(x, r)
    return r.choice(
        [
            lambda: jnp.abs(jnp.fft.fft(x, axis=axis)),
            lambda: jnp.fft.ifft(jnp.fft.fft(x, axis=axis), axis=axis).real,
            lambda: jnp.fft.irfft(jnp.fft.rfft(x, axis=axis), n=x.shape[axis], axis=axis),
            lambda: jnp.fft.fft2(x).imag if x.ndim > 1 else None,
            lambda: lax.fft(x + 0j, lax.FftType.IFFT, (x.shape[-1],)).real,
            lambda: jnp.abs(lax.fft(x, lax.FftType.RFFT, (x.shape[-1],))),
            lambda: jnp.fft.fft(x, n=2, axis=axis).real,
            lambda: jnp.fft.fftshift(x, axis),
        ]
    )()


# --- arrangement ----------------------------------------------------------------------------------


@unusual
def reshaped(program, x, y, r):
    if x.ndim < 1:
        return None
    order = list(range(x.ndim))
    r.shuffle(order)
    sizes = [x.shape[a] for a in order]
    turned_sizes = [
        [x.size],
        sizes,
        sizes[::-1],
        [sizes[0], x.size // sizes[0]],
        [x.size // sizes[-1], sizes[-1]],
        [1, *sizes],
    ]
    new = r.choice(turned_sizes)
    return r.choice(
        [
            lambda: lax.reshape(x, new, dimensions=order),
            lambda: lax.reshape(x, new, dimensions=order),
            lambda: x.ravel(order="F"),
            lambda: jnp.reshape(x, new, order="F"),
            lambda: jnp.reshape(x, new),
            lambda: x.transpose(order),
            lambda: lax.rev(x, tuple(order[: r.randrange(x.ndim) + 1])),
            lambda: jnp.rot90(x) if x.ndim > 1 else None,
            lambda: jnp.expand_dims(x, r.randrange(x.ndim + 1)),
            lambda: jnp.squeeze(x),
            lambda: lax.collapse(x, 0, x.ndim),
            lambda: jnp.ravel(x, order=r.choice("CFKA") if r.random() < 0.3 else "F"),
        ]
    )()


@unusual
def repeated(program, x, y, r):
    if not x.ndim:
        return None
    axis = _axis(x, r)
    return r.choice(
        [
            lambda: jnp.tile(x, _of_axis(x, axis, 2, 1)),
            lambda: jnp.tile(x, (2,) + (1,) * x.ndim),
            lambda: jnp.stack([x, 2 * x], r.randrange(x.ndim + 1)),
            lambda: jnp.stack([x, y], axis) if x.shape == y.shape else None,
            lambda: jnp.stack(list(x)[::-1]),
            lambda: jnp.unstack(x, axis=axis)[-1],
            lambda: functools.reduce(jnp.maximum, jnp.unstack(x, axis=axis)),
            lambda: jnp.repeat(x, 2, axis),
            lambda: jnp.repeat(x, np.arange(x.shape[axis]) % 2 + 1, axis),
            lambda: jnp.roll(x, r.choice([1, -1]), r.choice([None, axis])),
            lambda: jnp.roll(x, program.n, axis),
            lambda: jnp.concatenate([x, x[::-1]], axis),
            lambda: jnp.concatenate([x, jnp.zeros_like(x)], axis),
            lambda: jnp.concatenate([jnp.ones_like(x), x], axis),
            lambda: jnp.concatenate([program.param(*x.shape), x], axis),
            lambda: jnp.split(x, x.shape[axis], axis)[-1],
            lambda: lax.split(x, [1, x.shape[axis] - 1], axis)[1],
            lambda: jnp.array_split(x, 2, axis)[0],
            lambda: jnp.concatenate(jnp.split(x, x.shape[-1], -1)[::-1], -1),
            lambda: lax.broadcast_in_dim(x, (2, *x.shape), tuple(range(1, x.ndim + 1))),
            lambda: lax.broadcast(x, (1, 2)),
            lambda: jnp.broadcast_arrays(x, x[:1])[1],
            lambda: jnp.meshgrid(x.reshape(-1)[:3], x.reshape(-1)[:2])[0],
            lambda: jnp.kron(x, np.ones((1, 2))) if x.ndim == 2 else None,
            lambda: jnp.diag(x) if x.ndim == 2 else jnp.diag(x.reshape(-1)[:3]),
            lambda: jnp.triu(x) if x.ndim == 2 else None,
            lambda: jnp.delete(x, 0, axis),
            lambda: jnp.insert(x, 1, 0.0, axis),
            lambda: jnp.append(x, x[:1], 0),
        ]
    )()


@unusual
def padded(program, x, y, r):
    if not x.ndim:
        return None
    config = [(r.choice([-1, 0, 0, 1]), r.choice([0, 1, -1]), r.choice([0, 0, 1])) for _ in x.shape]
    fill = r.choice([0.0, 0.0, 1.0, -np.inf])
    mode = r.choice(["wrap", "edge", "reflect", "symmetric", "mean", "maximum", "linear_ramp"])
    return r.choice(
        [
            lambda: lax.pad(x, jnp.asarray(fill, x.dtype), config),
            lambda: lax.pad(x, jnp.zeros((), x.dtype), config),
            lambda: lax.pad(x, program.param(), config),
            lambda: lax.pad(x, x.reshape(-1)[0], config),
            lambda: jnp.pad(x, [(0, int(n > 1)) for n in x.shape], mode=mode),
            lambda: jnp.pad(x, 1, constant_values=2.0) if x.size < 10 else None,
        ]
    )()


@unusual
def sliced(program, x, y, r):
    if not x.ndim:
        return None
    axis = _axis(x, r)
    n = x.shape[axis]
    index = r.choice([program.n, _integers(x.reshape(-1)[0], n), jnp.argmax(x.reshape(-1)), n - 1])
    index = jnp.asarray(index, jnp.int32)
    zero = jnp.zeros_like(index)
    return r.choice(
        [
            lambda: lax.slice_in_dim(x, 0, n, 2, axis),
            lambda: lax.slice_in_dim(x, n - 1, n, 1, axis),
            lambda: lax.dynamic_slice_in_dim(x, index, r.choice([1, max(n - 1, 1)]), axis),
            lambda: lax.dynamic_index_in_dim(x, index, axis, keepdims=r.random() < 0.5),
            lambda: lax.dynamic_slice(x, [index] * x.ndim, [max(m - 1, 1) for m in x.shape]),
            lambda: lax.dynamic_update_slice_in_dim(x, 2 * x, index, axis),
            lambda: lax.dynamic_update_index_in_dim(x, lax.index_in_dim(x, 0, axis), index, axis),
            lambda: lax.dynamic_update_slice(
                x, jnp.zeros((1,) * x.ndim, x.dtype), (index,) + (zero,) * (x.ndim - 1)
            ),
            lambda: lax.dynamic_update_slice(
                x, jnp.ones((1,) * x.ndim, x.dtype), (0,) * (x.ndim - 1) + (n - 1,)
            ),
            lambda: x[..., ::-2],
            lambda: x[None, ..., -1],
            lambda: x[index] if x.ndim > 1 else None,
            lambda: x[jnp.asarray([0, -1])],
            lambda: x[..., np.array([True, False, True, False])[: x.shape[-1]]],
        ]
    )()


# --- reductions -----------------------------------------------------------------------------------


@unusual
def reduced(program, x, y, r):
    if not x.ndim:
        return None
    axis = _axis(x, r)
    axes = (axis,) if r.random() < 0.7 else tuple(range(x.ndim))
    return r.choice(
        [
            lambda: x.prod(axes),
            lambda: x.min(axes, keepdims=True),
            lambda: x.max(axes),
            lambda: jnp.argmax(x, axis).astype(x.dtype),
            lambda: x * (jnp.argmin(x, axis, keepdims=True) == 0),
            lambda: lax.argmax(x, axis, jnp.int32).astype(x.dtype),
            lambda: x * jnp.any(x > 1, axis, keepdims=True),
            lambda: x * jnp.all(x > 0, axis, keepdims=True),
            lambda: lax.reduce(x, jnp.zeros((), x.dtype), lax.add, axes),
            lambda: lax.reduce(x, jnp.zeros((), x.dtype), lax.max, axes),
            lambda: lax.reduce(x, jnp.zeros((), x.dtype), lambda a, b: a + 2 * b, axes),
            lambda: lax.reduce(x, jnp.ones((), x.dtype), lax.add, axes),
            lambda: lax.reduce(x, program.param(), lax.add, axes),
            lambda: lax.reduce((x, 2 * x), (jnp.zeros((), x.dtype),) * 2, _two_sums, axes)[1],
            lambda: x.std(axes),
            lambda: x.var(axes),
            lambda: jax.nn.logsumexp(x, axes),
            lambda: jnp.median(x, axis),
            lambda: jnp.quantile(x, 0.3, axis),
            lambda: jnp.ptp(x, axis),
            lambda: x - x.mean(axis, keepdims=True),
            lambda: jnp.average(x, axis, weights=jnp.abs(x)),
            lambda: jnp.linalg.norm(x, axis=axis),
            lambda: jnp.linalg.norm(x, ord=r.choice([1, np.inf, 0]), axis=axis),
            lambda: jnp.count_nonzero(x > 0, axis).astype(x.dtype),
            lambda: x.sum(axis, where=np.arange(x.shape[-1]) > 0),
            lambda: x.max(axis, initial=r.choice([0.0, 1.0])),
            lambda: x.sum(axis, initial=1.0),
            lambda: jnp.nansum(x, axis),
            lambda: jnp.trace(x) if x.ndim > 1 else None,
        ]
    )()


def _two_sums(a, b):
    return a[0] + b[0], a[1] + 3 * b[1]


@unusual
def cumulative(program, x, y, r):
    if not x.ndim:
        return None
    axis, reverse = _axis(x, r), r.random() < 0.5
    combine = r.choice(
        [jnp.add, jnp.maximum, jnp.multiply, lambda a, b: a + 0.5 * b, lambda a, b: b + relu(a) * 0]
    )
    return r.choice(
        [
            lambda: lax.cumsum(x, axis, reverse),
            lambda: lax.cumprod(x, axis, reverse),
            lambda: lax.cummax(x, axis, reverse),
            lambda: lax.cummin(x, axis, reverse),
            lambda: lax.cumlogsumexp(x, axis, reverse),
            lambda: lax.associative_scan(combine, x, reverse, axis),
            lambda: lax.associative_scan(_affine, (jnp.abs(x) / 4, x), reverse, axis)[1],
            lambda: lax.associative_scan(
                _affine, (jnp.broadcast_to(program.param(x.shape[-1]), x.shape), x), axis=0
            )[1],
            lambda: jnp.diff(x, axis=axis),
            lambda: jnp.ediff1d(x),
            lambda: jnp.convolve(x.reshape(-1)[:4], program.param(2)),
            lambda: jnp.interp(x, jnp.arange(3.0), jnp.asarray([0.0, 2.0, 1.0])),
            lambda: jnp.gradient(x, axis=axis),
            lambda: jnp.trapezoid(x, axis=axis),
        ]
    )()


def _affine(one, two):
    return one[0] * two[0], two[0] * one[1] + two[1]


@unusual
def sorted_(program, x, y, r):
    if not x.ndim:
        return None
    axis = _axis(x, r)
    other = y if y.shape == x.shape else 2 * x
    k = min(2, x.shape[-1])
    return r.choice(
        [
            lambda: lax.sort(x, axis),
            lambda: lax.sort((x, other), axis, num_keys=1)[1],
            lambda: lax.sort((x, other), axis, num_keys=2)[0],
            lambda: lax.sort((jnp.floor(x), other), axis, is_stable=False, num_keys=1)[1],
            lambda: lax.sort_key_val(x, other, axis)[1],
            lambda: lax.sort((np.arange(x.size).reshape(x.shape)[::-1], x), axis, num_keys=1)[1],
            lambda: jnp.argsort(x, axis).astype(x.dtype),
            lambda: jnp.take_along_axis(other, jnp.argsort(x, axis), axis),
            lambda: lax.top_k(x, k)[0],
            lambda: lax.top_k(x, 1, axis=axis)[0],
            lambda: lax.top_k(x, k)[1].astype(x.dtype),
            lambda: jnp.take_along_axis(other, lax.top_k(x, k)[1], -1),
            lambda: lax.approx_max_k(x, 1, axis)[0],
            lambda: jnp.partition(x, 0, axis),
            lambda: jnp.sort(x, axis, descending=True),
            lambda: jnp.searchsorted(jnp.sort(x.reshape(-1)), x).astype(x.dtype),
            lambda: jnp.digitize(x, np.array([0.0, 1.0])).astype(x.dtype),
            lambda: jnp.histogram(x, 3)[0].astype(x.dtype),
        ]
    )()


@unusual
def windowed(program, x, y, r):
    if not x.ndim:
        return None
    window = [r.choice([1, 2]) for _ in x.shape]
    strides = [r.choice([1, 1, 2]) for _ in x.shape]
    spread = {"base_dilation": [r.choice([1, 1, 2]) for _ in x.shape]}
    spread["window_dilation"] = [r.choice([1, 1, 2]) for _ in x.shape]
    spread = spread if r.random() < 0.5 else {}
    pads = r.choice(["SAME", "VALID", [(r.choice([0, 1]), r.choice([0, 1])) for _ in x.shape]])

    def pooled(x, start=-np.inf, combine=lax.max):
        start = np.asarray(start, x.dtype) if isinstance(start, float) else start
        return lax.reduce_window(x, start, combine, window, strides, pads, **spread)

    return r.choice(
        [
            lambda: pooled(x),
            lambda: pooled(x, 0.0),
            lambda: pooled(x, 1.0),
            lambda: pooled(x, 0.0, lax.add),
            lambda: pooled(x, 1.0, lax.add),
            lambda: pooled(x, np.inf, lax.min),
            lambda: pooled(x, 1.0, lax.mul),
            lambda: pooled(x, 0.0, lambda a, b: a + b * 2.0),
            lambda: pooled(x, program.param(), lax.add),
            lambda: jax.grad(lambda x: pooled(x, 0.0, lax.add).sum())(x) * x,
            lambda: jax.grad(lambda x: lax.square(pooled(x)).sum())(x),
            lambda: jax.vjp(pooled, x)[1](pooled(x))[0],
        ]
    )()


# --- contractions ---------------------------------------------------------------------------------


@unusual
def convolution(program, x, y, r):
    if x.ndim not in (3, 4):
        return None
    space = x.ndim - 2
    dilation = r.choice([None, (2,) * space])
    lhs = r.sample("NC" + "WH"[:space], x.ndim)
    rhs = r.sample("IO" + "WH"[:space], x.ndim)
    out = r.sample("NC" + "WH"[:space], x.ndim)
    batch, features = x.shape[lhs.index("N")], x.shape[lhs.index("C")]
    groups = r.choice([g for g in (1, 2, 3, 4) if features % g == 0])
    batches = r.choice([g for g in (1, 2, 3) if batch % g == 0]) if groups == 1 else 1
    sizes = {"I": features // groups, "O": max(groups, batches) * r.choice([1, 2])}
    sizes |= {letter: r.choice([1, 2]) for letter in "WH"}
    shape = [sizes[letter] for letter in rhs]
    kernel = program.param(*shape)
    kernel = r.choice([kernel, kernel, jnp.abs(kernel), lax.rev(kernel, (0,))])
    pads = [(r.choice([0, 1, -1]), r.choice([0, 1])) for _ in range(space)]
    return lax.conv_general_dilated(
        x,
        kernel,
        [r.choice([1, 2]) for _ in range(space)],
        pads if dilation else r.choice(["SAME", "VALID", pads]),
        lhs_dilation=dilation,
        rhs_dilation=r.choice([None, (2,) * space]),
        dimension_numbers=("".join(lhs), "".join(rhs), "".join(out)),
        feature_group_count=groups,
        batch_group_count=batches,
    )


@unusual
def convolution_otherwise(program, x, y, r):
    if x.ndim != 3:
        return None
    numbers = ("NWC", "WIO", "NWC")
    width = x.shape[-1]
    return r.choice(
        [
            lambda: lax.conv_transpose(
                x, program.param(2, width, 2), (2,), "SAME", dimension_numbers=numbers
            ),
            lambda: lax.conv_transpose(
                x, program.param(2, 3, width), (1,), "VALID", dimension_numbers=numbers,
                transpose_kernel=True,
            ),
            lambda: lax.conv_general_dilated_patches(
                x, (2,), (1,), "VALID", dimension_numbers=numbers
            ),
            lambda: lax.conv_general_dilated(
                program.param(2, 3, x.shape[1]), x, (1,), "SAME", dimension_numbers=numbers
            ),
            lambda: lax.conv_general_dilated(x, x, (1,), "SAME", dimension_numbers=numbers)
            if x.shape[1] == width
            else None,
            lambda: lax.conv_general_dilated_local(
                x, program.param(x.shape[1], width, 2), (1,), "VALID", (1,),
                dimension_numbers=numbers,
            ),
            lambda: jax.vmap(
                lambda k: lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=numbers),
                out_axes=r.choice([0, -1]),
            )(program.param(2, 2, width, 1)),
            lambda: jax.vmap(
                lambda row, k: lax.conv_general_dilated(
                    row[None], k, (1,), "SAME", dimension_numbers=numbers
                )[0]
            )(x, program.param(x.shape[0], 1, width, 2)),
        ]
    )()  # fmt: skip


@unusual
def contraction(program, x, y, r):
    if x.ndim < 2:
        return None
    n = x.shape[-1]
    axis = _axis(x, r)
    kernel = program.param(x.shape[axis], 2, n)
    same = y.shape == x.shape
    return r.choice(
        [
            lambda: lax.dot_general(x, kernel, (((axis,), (0,)), ((), ()))),
            lambda: lax.dot_general(kernel, x, (((0,), (axis,)), ((), ()))),
            lambda: lax.dot_general(
                x, kernel, (((axis, x.ndim - 1), (0, 2)), ((), ())) if axis < x.ndim - 1
                else (((axis,), (2,)), ((), ())),
            ),
            lambda: lax.dot_general(x, kernel, (((axis,), (0,)), ((x.ndim - 1,), (2,))))
            if axis < x.ndim - 1 else None,
            lambda: lax.dot_general(x, kernel, (((), ()), ((axis,), (0,)))),
            lambda: lax.dot_general(
                x, kernel, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float64
            ),
            lambda: lax.dot_general(x, y, (((axis,), (axis,)), ((), ()))) if same else None,
            lambda: jnp.einsum("...i,...j->...ij", x, y) if same else None,
            lambda: jnp.einsum("...i,ij,...j->...", x, program.param(n, n), x),
            lambda: jnp.einsum("bi,bij->bj", x, program.param(x.shape[0], n, 2))
            if x.ndim == 2 else None,
            lambda: jnp.einsum("...i,hio->...oh", x, program.param(2, n, 2)),
            lambda: jnp.outer(x, program.param(2)) if x.size < 20 else None,
            lambda: jnp.vdot(x, y) * x if same else None,
            lambda: jnp.cross(x, y) if same and n == 3 else None,
            lambda: jnp.matmul(x, jnp.swapaxes(x, -1, -2)),
            lambda: jnp.tensordot(x, program.param(*x.shape, 2), x.ndim),
            lambda: lax.ragged_dot(
                x, program.param(2, n, 2), np.array([1, x.shape[0] - 1], np.int32)
            )
            if x.ndim == 2 else None,
            lambda: lax.ragged_dot(
                x, program.param(2, n, 2), jnp.stack([program.n, x.shape[0] - program.n])
            ) if x.ndim == 2 else None,
            lambda: jnp.dot(x, program.param(n, 2), precision="highest"),
            lambda: jnp.inner(x, program.param(2, n)),
        ]
    )()  # fmt: skip


@unusual
def attention(program, x, y, r):
    if x.ndim == 3:
        n, width = x.shape[-1], r.choice([1, 2])
        q, key, v = (x @ program.param(n, width) for _ in range(3))
        weights = r.choice([jax.nn.softmax, relu, jnp.abs])(q @ jnp.swapaxes(key, 1, 2))
        weights = jnp.where(np.tri(x.shape[1], dtype=bool)[None], weights, 0.0)
        return weights @ v @ program.param(width, n)


@unusual
def linear_algebra(program, x, y, r):
    square = program.param(2, 2)
    if r.random() < 0.5 and x.size > 3:
        square = x.reshape(-1)[:4].reshape(2, 2)
    positive = square @ square.T + 0.1 * np.eye(2)
    v = x.reshape(-1)[:2]
    linear = jax.scipy.linalg
    return r.choice(
        [
            lambda: jnp.linalg.cholesky(positive),
            lambda: jnp.linalg.qr(square)[1],
            lambda: jnp.linalg.qr(square)[0],
            lambda: jnp.linalg.svd(square)[1],
            lambda: jnp.linalg.eigh(positive)[0],
            lambda: jnp.linalg.solve(square, v),
            lambda: jnp.linalg.inv(square) @ v,
            lambda: jnp.linalg.det(square) * v,
            lambda: jnp.linalg.slogdet(square)[1] + v,
            lambda: linear.solve_triangular(square, v, lower=True),
            lambda: linear.solve_triangular(square, v, trans=1, unit_diagonal=True),
            lambda: linear.lu(square)[2],
            lambda: linear.expm(square) @ v,
            lambda: linear.cho_solve(linear.cho_factor(positive), v),
            lambda: lax.linalg.tridiagonal_solve(v, 3 + jnp.abs(v), v, v[:, None]),
            lambda: lax.linalg.householder_product(square, v),
            lambda: lax.custom_linear_solve(
                lambda u: positive @ u, v, lambda f, b: linear.solve(positive, b), symmetric=True
            ),
            lambda: jnp.linalg.matrix_power(square, 2) @ v,
            lambda: jnp.linalg.pinv(square) @ v,
        ]
    )()


# --- gather and scatter ---------------------------------------------------------------------------


def _indices(program, x, n, r):
    """Positions on an axis of size ``n``, some of them outside of it."""
    return r.choice(
        [
            lambda: np.array([0, n - 1, 0]),
            lambda: np.array([0, n + 3]),
            lambda: np.array([-1, 0]),
            lambda: np.array([-n - 2, 1 % n]),
            lambda: np.array(n - 1),
            lambda: np.array([[0], [n - 1]]),
            lambda: _integers(x.reshape(-1)[:2], n),
            lambda: _integers(x.reshape(-1)[:2], n + 2),
            lambda: program.n[None],
            lambda: jnp.argmax(x.reshape(-1)) % n,
            lambda: np.array([0], np.uint8),
            lambda: np.array([], np.int32),
        ]
    )()


@unusual
def gathered(program, x, y, r):
    if not x.ndim:
        return None
    axis = _axis(x, r)
    n = x.shape[axis]
    index = _indices(program, x, n, r)
    mode = r.choice(["fill", "fill", "clip", "wrap", None])
    fill = r.choice([None, 0.0, 1.0, 2.0])
    table = program.param(3, x.shape[-1])
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, x.ndim + 1)), collapsed_slice_dims=(), start_index_map=(axis,)
    )
    sizes = [1 if a == axis else r.choice([m, max(m - 1, 1)]) for a, m in enumerate(x.shape)]
    along = jnp.ravel(index)[:1] if jnp.size(index) else np.array([0])
    along = jnp.broadcast_to(along.reshape((1,) * x.ndim), x.shape)
    return r.choice(
        [
            lambda: jnp.take(x, index, axis, mode=mode, fill_value=fill),
            lambda: jnp.take(x, index, axis, mode="fill", fill_value=fill),
            lambda: jnp.take(x, index),
            lambda: x.at[index].get(mode=mode, fill_value=fill),
            lambda: jnp.moveaxis(x, axis, 0)[index],
            lambda: jnp.take_along_axis(x, along, axis, mode=mode, fill_value=fill),
            lambda: jnp.take_along_axis(x, _integers(x, n), axis),
            lambda: x + jnp.take(table, _integers(x[..., 0], 3), 0),
            lambda: x * table[program.n % 3],
            lambda: jnp.take(table, jnp.argmax(x, -1), 0, mode="fill", fill_value=1.0),
            lambda: x @ jnp.take(program.param(3, x.shape[-1], 2), program.n, 0),
            lambda: x[..., np.array([0, -1]), None],
            lambda: x[np.array([0, -1])[:, None], np.array([0, 1])] if x.ndim > 1 else None,
            lambda: lax.gather(
                x, jnp.asarray([[0], [n - 1]]), numbers, sizes, mode=mode or "clip",
                fill_value=fill,
            ),
            lambda: lax.gather(
                x, _integers(x.reshape(-1)[:2], n + 1)[:, None], numbers, sizes,
                mode=r.choice(["fill", "clip", "promise_in_bounds"]), fill_value=fill,
            ),
            lambda: jax.vmap(lambda row, i: jnp.take(row, i, 0, mode=mode, fill_value=fill))(
                x, _integers(x.reshape(x.shape[0], -1)[:, 0], 3)
            ) if x.ndim > 1 else None,
            lambda: jnp.choose(_integers(x, 2), [x, 2 * x], mode="clip"),
            lambda: jnp.compress(np.array([True, False, True])[:n], x, axis, size=1),
        ]
    )()  # fmt: skip


@unusual
def scattered(program, x, y, r):
    if not x.ndim:
        return None
    index = _indices(program, x, x.shape[0], r)
    where = r.choice(
        [
            lambda: (index,),
            lambda: (..., r.randrange(x.shape[-1])),
            lambda: (..., index),
            lambda: (0,),
        ]
    )()
    reference = x.at[where]
    mode = r.choice([None, None, "drop", "clip", "fill", "promise_in_bounds"])
    method = r.choice(
        [
            "set",
            "add",
            "multiply",
            "mul",
            "divide",
            "power",
            "min",
            "max",
            "apply",
            "apply",
            "subtract",
        ]
    )
    if method == "apply":
        function = r.choice([jnp.tanh, lambda v: v + 1, lambda v: 2 * v, jnp.abs, jnp.square, relu])
        return reference.apply(function, mode=mode)
    if method == "power":
        return reference.power(r.choice([2, 1, 0]), mode=mode)
    target = reference.get().shape
    value = r.choice(
        [
            lambda: 0.0,
            lambda: 1.0,
            lambda: 2 * reference.get(),
            lambda: x.reshape(-1)[0],
            lambda: program.param(),
            lambda: jnp.flip(reference.get(), -1) if target else 1.0,
            lambda: jnp.broadcast_to(y.reshape(-1)[0], target),
        ]
    )()
    return getattr(reference, method)(
        value, mode=mode, unique_indices=False, indices_are_sorted=r.random() < 0.2
    )


@unusual
def scattered_otherwise(program, x, y, r):
    if not x.ndim:
        return None
    n = x.shape[0]
    segments = r.choice([np.arange(n) % 2, _integers(x.reshape(n, -1)[:, 0], 2), np.arange(n) % 3])
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, x.ndim + 1)),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=(0,),
    )
    updates = x[None, :1]
    place = r.choice([jnp.asarray([[0]]), jnp.asarray([[n + 1]]), program.n[None, None]])
    raw = r.choice(
        ["scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub"]
    )
    return r.choice(
        [
            lambda: jax.ops.segment_sum(x, segments, 2),
            lambda: jax.ops.segment_max(x, segments, 2),
            lambda: relu(jax.ops.segment_max(x, segments, 2)),
            lambda: jax.ops.segment_min(x, segments, 3),
            lambda: jax.ops.segment_prod(x, segments, 2),
            lambda: jnp.zeros_like(x).at[_integers(x[..., 0].reshape(-1)[0], n)].add(x[0]),
            lambda: jnp.zeros((n + 1, *x.shape[1:]), x.dtype).at[jnp.arange(n)].set(x),
            lambda: jnp.ones((n + 1, *x.shape[1:]), x.dtype).at[np.arange(n)[::-1]].add(x),
            lambda: jnp.zeros_like(x).at[np.zeros(n, int)].max(x),
            lambda: getattr(lax, raw)(
                x, place, r.choice([updates, 0 * updates, updates * 2]), numbers,
                mode=r.choice(["clip", "drop", "fill"]),
            ),
            lambda: lax.scatter_apply(x, place, jnp.square, numbers, update_shape=updates.shape)
            if hasattr(lax, "scatter_apply") else None,
            lambda: jax.vmap(lambda row, i: row.at[i].set(0.0))(
                x, _integers(x.reshape(n, -1)[:, 0], 2)
            ) if x.ndim > 1 else None,
            lambda: jax.vmap(lambda row, i: row.at[i].add(1.0))(
                x, _integers(x.reshape(n, -1)[:, 0], 2)
            ) if x.ndim > 1 else None,
            lambda: jnp.put_along_axis(
                x, jnp.zeros((1,) * x.ndim, int), jnp.zeros((1,) * x.ndim), 0, inplace=False
            ),
            lambda: jnp.bincount(_integers(x.reshape(-1), 3), x.reshape(-1), length=3),
            lambda: jnp.fill_diagonal(x, 0.0, inplace=False) if x.ndim == 2 else None,
            lambda: jax.grad(lambda v: lax.square(v[jnp.asarray([0, 0, -1])]).sum())(x),
        ]
    )()  # fmt: skip


# --- parameters -----------------------------------------------------------------------------------


@unusual
def dense_of_function(program, x, y, r):
    if not x.ndim:
        return None
    n, width = x.shape[-1], _width(r)
    kernel = program.param(n, width)
    other = program.param(n, width)
    gain = program.param(width)
    function = _unary(r)
    stack = program.param(2, n, width)
    functions = [
        lambda: jnp.exp(kernel), lambda: jnp.abs(kernel), lambda: lax.square(kernel),
        lambda: function(kernel), lambda: kernel + other, lambda: kernel * other,
        lambda: jnp.maximum(kernel, other), lambda: kernel * (other > 0),
        lambda: kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True) * gain,
        lambda: kernel / jnp.sqrt(lax.square(kernel).sum(0, keepdims=True) + 1e-3) * gain,
        lambda: (kernel - kernel.mean(0)) / (kernel.std(0) + r.choice([0.0, 1e-2])) * gain,
        lambda: kernel / kernel.sum(), lambda: kernel / jnp.abs(kernel).max(1, keepdims=True),
        lambda: jax.nn.softmax(kernel, r.choice([0, 1])), lambda: jnp.sort(kernel, 0),
        lambda: jnp.cumsum(kernel, r.choice([0, 1])), lambda: lax.stop_gradient(kernel),
        lambda: kernel.astype(jnp.float32).astype(x.dtype),
        lambda: jnp.where(kernel > 0, kernel, 0.1 * kernel), lambda: jnp.round(kernel),
        lambda: kernel * np.tri(n, width, r.choice([-1, 0])), lambda: stack[r.choice([0, 1])],
        lambda: stack[program.n % 2], lambda: stack.sum(0), lambda: stack[0] * stack[1],
        lambda: stack[jnp.argmax(gain) % 2], lambda: kernel * gain, lambda: kernel + gain,
        lambda: program.param(n, 2) @ program.param(2, width),
        lambda: jnp.concatenate([kernel, other], r.choice([1])),
        lambda: jnp.kron(program.param(n, 1), program.param(1, width)),
        lambda: program.param(width, n).T, lambda: program.param(n * width).reshape(n, width),
        lambda: program.param(n * width).reshape((n, width), order="F"),
        lambda: lax.reshape(program.param(width, n), (n, width), dimensions=(1, 0)),
        lambda: kernel[::-1, ::-1], lambda: jnp.roll(kernel, 1, 0), lambda: kernel[:, :1],
        lambda: jnp.tile(program.param(n, 1), (1, 2)), lambda: jnp.repeat(kernel, 2, 1),
        lambda: kernel.at[0].set(0.0), lambda: kernel.at[0].set(1.0),
        lambda: kernel.at[:, 0].add(gain[0]),
        lambda: jnp.pad(kernel, ((0, 0), (0, 1))), lambda: jnp.clip(kernel, -1, 1),
        lambda: jnp.clip(kernel, 0, None), lambda: kernel - other, lambda: kernel * kernel.sum(),
        lambda: lax.fori_loop(0, 2, lambda _, w: w * 0.5, kernel),
        lambda: lax.cond(gain[0] > 0, lambda w: w, lambda w: 2 * w, kernel),
        lambda: kernel * jnp.exp(program.param()), lambda: kernel * program.param(),
        lambda: kernel / program.param(), lambda: kernel + 1.0, lambda: 2.0 * kernel,
        lambda: jnp.linalg.qr(kernel)[0], lambda: kernel - 0.1 * jax.grad(
            lambda w: lax.square(relu(x @ w)).sum()
        )(kernel),
    ]  # fmt: skip
    return x @ r.choice(functions)()


@unusual
def tied(program, x, y, r):
    if not x.ndim:
        return None
    n = x.shape[-1]
    kernel, square = program.param(n, 3), program.param(n, n)
    vector = program.param(n)
    return r.choice(
        [
            lambda: relu(x @ kernel) @ kernel.T,
            lambda: relu(x @ square) @ square,
            lambda: relu(x @ square) @ square.T,
            lambda: x * vector + vector,
            lambda: relu(x * vector) / vector,
            lambda: relu(x + vector) - vector,
            lambda: (x @ kernel) @ program.param(3, n) * vector * vector,
            lambda: x @ square + vector @ square,
            lambda: x * vector[0] * vector,
            lambda: x * jnp.abs(vector) + relu(vector),
            lambda: jnp.where(vector > 0, x, 2 * x),
            lambda: jnp.where(x > vector, x, 0.0),
            lambda: jnp.maximum(x, vector) * vector,
            lambda: x * jnp.exp(vector) * vector,
            lambda: x * vector / (jnp.abs(vector).sum() + 1e-12),
            lambda: x * lax.stop_gradient(vector) / vector,
            lambda: (x @ kernel).max(-1, keepdims=True) * vector,
            lambda: x * jnp.prod(vector),
            lambda: x @ jnp.diag(vector),
            lambda: x * program.param() * program.param(),
            lambda: x + program.param(),
            lambda: x @ (square + np.eye(n)),
        ]
    )()


@unusual
def normalized(program, x, y, r):
    if not x.ndim:
        return None
    axis, eps = _axis(x, r), r.choice([0.0, 0.0, 1e-3])
    return r.choice(
        [
            lambda: (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + eps),
            lambda: x / jnp.sqrt(lax.square(x).mean(axis, keepdims=True) + eps),
            lambda: x / (jnp.abs(x).max(axis, keepdims=True) + eps),
            lambda: x / (jnp.abs(x).sum() + eps),
            lambda: jax.nn.softmax(x, axis),
            lambda: jax.nn.standardize(x, axis),
            lambda: jax.nn.glu(x) if x.shape[-1] % 2 == 0 else None,
            lambda: jax.nn.one_hot(jnp.argmax(x, -1), 3, dtype=x.dtype),
            lambda: getattr(
                jax.nn,
                r.choice(["gelu", "silu", "elu", "relu6", "celu", "selu", "hard_tanh", "mish"]),
            )(x),
            lambda: x / lax.stop_gradient(jnp.abs(x).max()),
            lambda: lax.pmax(x, ()) if x.size else None,
        ]
    )()


# --- control flow ---------------------------------------------------------------------------------


@unusual
def recurrent(program, x, y, r):
    """A scan with several carries, some of which pass values on steps later."""
    if x.ndim < 2:
        return None
    n = x.shape[-1]
    into, back, other = program.param(n, 3), program.param(3, 3), program.param(3, 3)
    start = r.choice([program.param(3), jnp.zeros(3), jnp.zeros(3), jnp.ones(3)])
    act = r.choice([relu, relu, jnp.tanh, jnp.abs])
    rows = jnp.moveaxis(x, r.choice([0, x.ndim - 2]), 0)
    state = jnp.broadcast_to(start, (*rows.shape[1:-1], 3))
    zeros = jnp.zeros_like(state)
    kind = r.randrange(8)

    def step(carry, row):
        a, b, c = carry
        new = [
            lambda: (act(row @ into + a @ back), a, b),
            lambda: (relu(row @ into + a @ other), act(a @ back), b),
            lambda: (relu(row @ into), relu(a @ back), jnp.tanh(b)),
            lambda: (b, c, relu(row @ into)),
            lambda: (row @ into, jnp.maximum(a, b), c + a),
            lambda: (relu(row @ into + c @ back), a, b),
            lambda: (jnp.abs(row @ into) * 0.5, b + a, jnp.where(a > 0, c, b)),
            lambda: (a + row @ into, act(b), c),
        ][kind]()
        return new, new[r_out]

    r_out, which = r.randrange(3), r.randrange(4)
    carry, ys = lax.scan(
        step,
        (state, zeros, r.choice([zeros, state])),
        rows,
        reverse=r.random() < 0.4,
        unroll=r.choice([1, 1, 2]),
    )
    return ys if which == 3 else carry[which]


@unusual
def shift_register(program, x, y, r):
    """A delay longer than one step, then something that scales do not pass."""
    if x.ndim < 2:
        return None
    delay, length = r.choice([2, 3, 4]), r.choice([3, 5, 7])
    back = program.param(x.shape[-1], x.shape[-1])
    last = r.choice([jnp.tanh, relu, lambda v: v, lambda v: v + 1.0])

    def step(carry, _):
        return (relu(carry[-1] @ back), *carry[: delay - 2], last(carry[delay - 2])), carry[-1]

    zeros = jnp.zeros_like(x)
    carry, ys = lax.scan(step, (x, *[zeros] * (delay - 1)), length=length)
    return r.choice([carry[-1], carry[0], ys[-1], ys.sum(0)])


@unusual
def scanned_layers(program, x, y, r):
    if not x.ndim:
        return None
    n = x.shape[-1]
    stack, biases = program.param(3, n, n), program.param(3, n)
    kind = r.randrange(5)

    def step(h, layer):
        kernel, bias_ = layer
        h = [
            lambda: relu(h @ kernel),
            lambda: relu(h @ kernel + bias_),
            lambda: h + relu(h @ kernel),
            lambda: h * bias_,
            lambda: jnp.abs(h @ kernel) * bias_,
        ][kind]()
        return h, h[..., 0]

    step = r.choice([step, jax.checkpoint(step), jax.jit(step)])
    h, ys = lax.scan(step, x, (stack, biases), reverse=r.random() < 0.4)
    return ys if r.random() < 0.2 else h


@unusual
def loop(program, x, y, r):
    if not x.ndim:
        return None
    kernel = program.param(x.shape[-1], x.shape[-1])
    y = y if y.shape == x.shape else x
    steps = r.choice([0, 1, 2, 3])
    body = r.choice(
        [
            lambda i, h: relu(h) + y,
            lambda i, h: relu(h @ kernel),
            lambda i, h: 0.5 * h,
            lambda i, h: h + i,
            lambda i, h: h.at[i % h.shape[0]].set(0.0),
            lambda i, h: h.at[i % h.shape[0]].add(y[0]),
            lambda i, h: jnp.roll(h, 1, 0),
            lambda i, h: lax.dynamic_update_index_in_dim(h, y[0], i % 2, 0),
            lambda i, h: jnp.where(i > 0, jnp.tanh(h), h),
            lambda i, h: jnp.maximum(h, y),
        ]
    )
    counted = functools.partial(
        lax.while_loop, body_fun=lambda c: (c[0] + 1, body(c[0], c[1])), init_val=(0, x)
    )
    return r.choice(
        [
            lambda: lax.fori_loop(0, steps, body, x),
            lambda: lax.fori_loop(0, program.n, body, x),
            lambda: counted(lambda c: c[0] < 2)[1],
            lambda: lax.while_loop(lambda h: jnp.abs(h).max() > 1, lambda h: h / 2, x),
            lambda: counted(lambda c: (c[0] < 3) & (c[1].sum() < 5))[1],
            lambda: lax.while_loop(
                lambda c: c[0] < program.n, lambda c: (c[0] + 1, c[2], c[1]), (0, x, y)
            )[1],
            lambda: lax.scan(lambda h, i: (body(i, h), h[..., 0]), x, jnp.arange(3))[0],
            lambda: lax.scan(lambda h, _: ((h[1], body(0, h[0])), None), (x, y), length=3)[0][0],
        ]
    )()  # fmt: skip


@unusual
def branched(program, x, y, r):
    y = y if y.shape == x.shape else x
    kernel = program.param(x.shape[-1], x.shape[-1]) if x.ndim else program.param()
    predicate = _predicate(program, x, r)
    index = r.choice([program.n, _integers(x.reshape(-1)[0], 3), jnp.argmax(x.reshape(-1)[:3])])
    branches = [
        lambda x, y: x, lambda x, y: -2 * x, lambda x, y: y, lambda x, y: relu(x),
        lambda x, y: jnp.tanh(x), lambda x, y: x @ kernel, lambda x, y: jnp.zeros_like(x),
        lambda x, y: jnp.ones_like(x), lambda x, y: x + y, lambda x, y: x * y,
    ]  # fmt: skip
    chosen = [r.choice(branches[: r.choice([4, 10])]) for _ in range(3)]
    return r.choice(
        [
            lambda: lax.cond(predicate, *chosen[:2], x, y),
            lambda: lax.switch(index, chosen, x, y),
            lambda: jax.vmap(
                lambda x, y: lax.cond(
                    x.reshape(-1)[0] > 0, lambda x, y: x, lambda x, y: r.choice([2, 3]) * y, x, y
                )
            )(x, y),
            lambda: lax.platform_dependent(x, cpu=lambda x: 2 * x, default=lambda x: x),
            lambda: lax.cond(predicate, lambda: x, lambda: 2 * x),
        ]
    )()


@unusual
def wrapped(program, x, y, r):
    """Further steps inside of a call or of a transformation."""
    inner = program.inner
    parameters = program.taken

    def custom_jvp(x):
        function = jax.custom_jvp(lambda x: inner(x))
        function.defjvps(lambda t, out, x: t * 0 if out.shape != x.shape else t)
        return function(x)

    def custom_vjp(x):
        function = jax.custom_vjp(lambda x: inner(x))
        function.defvjp(lambda x: (inner(x), x), lambda x, g: (x,))
        return function(x)

    explicit = jax.jit(lambda x, parameters: program.inner(x, parameters))
    return r.choice(
        [
            lambda: jax.jit(inner)(x),
            lambda: explicit(x, parameters),
            lambda: jax.checkpoint(inner)(x),
            lambda: jax.checkpoint(jax.jit(inner), prevent_cse=False)(x),
            lambda: custom_jvp(x),
            lambda: custom_vjp(x),
            lambda: jax.vmap(inner, in_axes=x.ndim - 1, out_axes=0)(x),
            lambda: jax.vmap(inner, out_axes=-1)(x),
            lambda: jax.vmap(inner)(jnp.stack([x, 2 * x])),
            lambda: lax.map(inner, x),
            lambda: lax.cond(program.n > 1, inner, inner, x),
            lambda: jax.named_call(inner, name="block")(x),
            lambda: jax.jvp(inner, (x,), (x,))[1],
            lambda: jax.jvp(inner, (x,), (jnp.ones_like(x),))[1],
            lambda: jax.vjp(inner, x)[1](inner(x))[0],
            lambda: jax.grad(lambda x: inner(x).sum())(x) + x,
            lambda: jax.linearize(inner, x)[1](x),
            lambda: lax.stop_gradient(inner(x)),
            lambda: lax.composite(lambda x, parameters: program.inner(x, parameters), "my.block")(
                x, parameters
            ),
            lambda: lax.scan(lambda c, row: (c, inner(row)), 0, x)[1],
            lambda: jax.jacfwd(inner)(x[..., 0].reshape(-1)[:2]),
        ]
    )()


@unusual
def collective(program, x, y, r):
    """Collectives over the axis of a vmap."""
    if x.ndim < 2:
        return None
    each = r.choice(
        [
            lambda v: lax.psum(v, "i"),
            lambda v: lax.pmean(v, "i"),
            lambda v: v - lax.pmax(v, "i"),
            lambda v: lax.pmin(v, "i"),
            lambda v: lax.all_gather(v, "i")[0],
            lambda v: lax.ppermute(v, "i", [(0, 0)]) if x.shape[0] == 1 else v,
            lambda v: v * (lax.axis_index("i") + 1),
            lambda v: v + lax.axis_index("i"),
            lambda v: lax.psum(1, "i") * v,
        ]
    )
    return jax.vmap(each, axis_name="i")(x)


@unusual
def reference(program, x, y, r):
    """Mutable array references."""
    make = getattr(jax, "new_ref", None) or getattr(jax, "array_ref", None)
    if make is None or x.ndim < 1:
        return None
    kind = r.randrange(7)

    def body(x):
        ref = make(x)
        if kind == 0:
            ref[...] = 2 * ref[...]
        elif kind == 1:
            ref[0] = ref[0] * 0 + 1.0
        elif kind == 2:
            ref[0] += 1.0
        elif kind == 3:
            other = make(jnp.zeros_like(x))
            other[...] = relu(ref[...])
            return other[...]
        elif kind == 4:
            lax.fori_loop(0, 2, lambda i, _: ref.__setitem__(Ellipsis, relu(ref[...])), None)
        elif kind == 5:
            ref[...] = jnp.tanh(ref[...])
        return ref[...]

    return jax.jit(body)(x) if r.random() < 0.4 else body(x)


@unusual
def callback(program, x, y, r):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def observed(function):
        function()
        return x

    return r.choice(
        [
            lambda: observed(lambda: jax.debug.callback(_ignore, x)),
            lambda: observed(lambda: jax.debug.callback(_ignore, x, ordered=True)),
            lambda: jax.pure_callback(_tanh, shape, x, vmap_method="expand_dims"),
            lambda: jax.pure_callback(_double, shape, x, vmap_method="expand_dims"),
            lambda: jax.experimental.io_callback(_double, shape, x),
            lambda: jax.experimental.io_callback(_double, shape, x, ordered=True),
        ]
    )()


def _ignore(x):
    return None


def _tanh(x):
    return np.tanh(x)


def _double(x):
    return 2 * np.asarray(x)


@unusual
def drawn(program, x, y, r):
    if not x.ndim:
        return None
    key = jax.random.key(r.randrange(3))
    return r.choice(
        [
            lambda: x + jax.random.normal(key, x.shape, x.dtype),
            lambda: x * jax.random.bernoulli(key, 0.5, x.shape),
            lambda: x * jax.random.uniform(jax.random.fold_in(key, program.n), x.shape, x.dtype),
            lambda: jax.random.permutation(key, x, axis=_axis(x, r)),
            lambda: jax.random.gamma(key, jnp.abs(x) + 1.0),
            lambda: x * jax.random.categorical(key, x).astype(x.dtype)[..., None],
            lambda: x + lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), x.shape)[1].astype(x.dtype),
            lambda: x * jax.random.randint(key, x.shape, 0, 2).astype(x.dtype),
        ]
    )()


@unusual
def named(program, x, y, r):
    """Operations that change nothing."""
    return r.choice(
        [
            lambda: jnp.copy(x),
            lambda: lax.stop_gradient(x),
            lambda: lax.optimization_barrier((x, y))[0],
            lambda: checkpoint_name(x, "x"),
            lambda: jax.device_put(x),
            lambda: lax.with_sharding_constraint(
                x, jax.sharding.SingleDeviceSharding(jax.devices()[0])
            ),
            lambda: jnp.asarray(x, x.dtype),
            lambda: lax.expand_dims(x, (0,)),
            lambda: x + jnp.zeros_like(x),
            lambda: x * jnp.ones_like(x),
            lambda: jax.lax.convert_element_type(x, x.dtype),
            lambda: lax.reduce_and(x > 0, (0,)) * x,
        ]
    )()
