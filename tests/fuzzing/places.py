"""Entries taken from and put to positions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fuzzing.table import any_axis, positions_below, relu, unusual


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
            lambda: positions_below(x.reshape(-1)[:2], n),
            lambda: positions_below(x.reshape(-1)[:2], n + 2),
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
    axis = any_axis(x, r)
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
            lambda: jnp.take_along_axis(x, positions_below(x, n), axis),
            lambda: x + jnp.take(table, positions_below(x[..., 0], 3), 0),
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
                x, positions_below(x.reshape(-1)[:2], n + 1)[:, None], numbers, sizes,
                mode=r.choice(["fill", "clip", "promise_in_bounds"]), fill_value=fill,
            ),
            lambda: jax.vmap(lambda row, i: jnp.take(row, i, 0, mode=mode, fill_value=fill))(
                x, positions_below(x.reshape(x.shape[0], -1)[:, 0], 3)
            ) if x.ndim > 1 else None,
            lambda: jnp.choose(positions_below(x, 2), [x, 2 * x], mode="clip"),
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
    segments = r.choice(
        [np.arange(n) % 2, positions_below(x.reshape(n, -1)[:, 0], 2), np.arange(n) % 3]
    )
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
            lambda: jnp.zeros_like(x).at[positions_below(x[..., 0].reshape(-1)[0], n)].add(x[0]),
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
                x, positions_below(x.reshape(n, -1)[:, 0], 2)
            ) if x.ndim > 1 else None,
            lambda: jax.vmap(lambda row, i: row.at[i].add(1.0))(
                x, positions_below(x.reshape(n, -1)[:, 0], 2)
            ) if x.ndim > 1 else None,
            lambda: jnp.put_along_axis(
                x, jnp.zeros((1,) * x.ndim, int), jnp.zeros((1,) * x.ndim), 0, inplace=False
            ),
            lambda: jnp.bincount(positions_below(x.reshape(-1), 3), x.reshape(-1), length=3),
            lambda: jnp.fill_diagonal(x, 0.0, inplace=False) if x.ndim == 2 else None,
            lambda: jax.grad(lambda v: lax.square(v[jnp.asarray([0, 0, -1])]).sum())(x),
        ]
    )()  # fmt: skip
