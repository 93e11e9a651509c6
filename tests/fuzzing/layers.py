"""Operations that scales pass."""

import jax
import jax.numpy as jnp
from jax import lax

from fuzzing.table import any_axis, any_width, laid_along, layer, relu


@layer
def dense(program, x, y, r):
    return x @ program.param(x.shape[-1], any_width(r)) if x.ndim else None


@layer
def dense_relu(program, x, y, r):
    if x.ndim:
        h = x @ program.param(x.shape[-1], any_width(r))
        return relu(h + laid_along(program.param(h.shape[-1]), h) if r.random() < 0.5 else h)


@layer
def dense_transposed(program, x, y, r):
    return x @ program.param(any_width(r), x.shape[-1]).T if x.ndim else None


@layer
def dense_on_an_axis(program, x, y, r):
    if x.ndim:
        axis = any_axis(x, r)
        kernel = program.param(x.shape[axis], any_width(r))
        return jnp.moveaxis(jnp.tensordot(x, kernel, (axis, 0)), -1, axis)


@layer
def residual(program, x, y, r):
    if x.ndim:
        width = any_width(r)
        h = relu(x @ program.param(x.shape[-1], width))
        return x + h @ program.param(width, x.shape[-1])


@layer
def rectified(program, x, y, r):
    return r.choice([relu, jax.nn.relu, lambda x: jnp.where(x > 0, x, 0.0)])(x)


@layer
def bias(program, x, y, r):
    return x + laid_along(program.param(x.shape[-1]), x) if x.ndim else None


@layer
def scale(program, x, y, r):
    if x.ndim:
        axis = r.choice([-1, -1, any_axis(x, r)])
        return x * laid_along(program.param(x.shape[axis]), x, axis)


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
            x, axis=any_axis(x, r), keepdims=r.random() < 0.3
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
        kernel = program.param(2, x.shape[-1], any_width(r))
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
