"""Operations that move entries."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from fuzzing.table import any_axis, of_axis, positions_below, unusual


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
    axis = any_axis(x, r)
    return r.choice(
        [
            lambda: jnp.tile(x, of_axis(x, axis, 2, 1)),
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
    axis = any_axis(x, r)
    n = x.shape[axis]
    index = r.choice(
        [program.n, positions_below(x.reshape(-1)[0], n), jnp.argmax(x.reshape(-1)), n - 1]
    )
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
