"""Parameters that are transformed, shared, normalized."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fuzzing.elementwise import any_unary
from fuzzing.table import any_axis, any_width, relu, unusual


@unusual
def dense_of_function(program, x, y, r):
    if not x.ndim:
        return None
    n, width = x.shape[-1], any_width(r)
    kernel = program.param(n, width)
    other = program.param(n, width)
    gain = program.param(width)
    function = any_unary(r)
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
    axis, eps = any_axis(x, r), r.choice([0.0, 0.0, 1e-3])
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
