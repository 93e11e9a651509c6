"""Loops, branches and recurrences, with delays."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fuzzing.table import any_predicate, positions_below, relu, unusual


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
            lambda: lax.while_loop(
                lambda h: (jnp.abs(h).max() > 1) & (jnp.abs(h).max() < jnp.inf), lambda h: h / 2, x
            ),
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
    predicate = any_predicate(program, x, r)
    index = r.choice(
        [program.n, positions_below(x.reshape(-1)[0], 3), jnp.argmax(x.reshape(-1)[:3])]
    )
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
