"""Functions of entries, choices, casts, complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fuzzing.table import any_axis, positions_below, relu, unusual

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


def any_unary(r):
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
    function = any_unary(r)
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
    which = positions_below(y, 3)
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
    axis = any_axis(x, r)
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
