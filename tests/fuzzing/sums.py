"""Reductions, orders, windows, contractions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fuzzing.table import any_axis, relu, unusual


@unusual
def reduced(program, x, y, r):
    if not x.ndim:
        return None
    axis = any_axis(x, r)
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
    axis, reverse = any_axis(x, r), r.random() < 0.5
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
    axis = any_axis(x, r)
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
    axis = any_axis(x, r)
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
