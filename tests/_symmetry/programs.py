"""Random programs from operations that scales pass, pass in part, and do not pass."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

OPERATIONS = {}
_MAX_SIZE = 128


def operation(function):
    """Enters an operation ``function(program, x, y, k)`` that returns a value, or None to pass."""
    OPERATIONS[function.__name__] = function
    return function


class Program:
    """A list of steps as a function ``program(params, x)``; its parameters are in ``shapes``."""

    def __init__(self, steps):
        self.steps = steps
        self.shapes = {}
        self.used = []
        jax.eval_shape(self, None, jax.ShapeDtypeStruct(self.input_shape, jnp.zeros(()).dtype))

    input_shape = (2, 3, 4)

    def __call__(self, params, x):
        self._params, self._count, values = params, 0, [x]
        for name, *choice in self.steps:
            x, y = (values[-1 - k % len(values)] for k in choice[:2])
            self._share = bool(choice[2] & 8)
            result = OPERATIONS[name](self, x, y, choice[2])
            if result is not None and 0 < result.size <= _MAX_SIZE and result.ndim <= 4:
                values.append(result)
                self.used.append(name)
        return values[-2:] if self.steps[0][1] % 3 == 0 else values[-1]

    def param(self, *shape):
        """The next parameter, or one of the same shape once more."""
        alike = [name for name in self.shapes if self.shapes[name] == shape]
        if self._params is None:
            known = list(self.shapes)[: self._count]
            alike = [name for name in alike if name in known]
        else:
            alike = [name for name in alike if int(name[1:]) < self._count]
        name = alike[0] if self._share and alike else f"p{self._count}"
        # Traced on other shapes, it may ask for a parameter that it does not have.
        if self._params is None:
            self.shapes.setdefault(name, shape)
        self._count += name == f"p{self._count}"
        return jnp.ones(shape) if self._params is None else self._params[name]

    def draw(self, seed):
        rng = np.random.default_rng(seed)
        return {
            name: jnp.asarray(rng.uniform(0.3, 1.5, s) * rng.choice([-1, 1], s))
            for name, s in self.shapes.items()
        }


def programs(max_steps=9):
    """A strategy of lists of steps."""
    number = st.integers(0, 15)
    step = st.tuples(st.sampled_from(sorted(OPERATIONS)), number, number, number)
    # Layers are frequent, so that there is something to rescale.
    layer = st.tuples(st.sampled_from(["dense", "dense", "relu", "bias", "scale"]), *[number] * 3)
    return st.lists(step | layer, min_size=3, max_size=max_steps)


def _rows(p, shape):
    """A parameter (features,) laid out to broadcast."""
    return p.reshape((1,) * (len(shape) - 1) + p.shape)


def _wide(k):
    return 2 + k % 3


def _pooled(x, start, reduce, axis):
    window = [2 if a == axis else 1 for a in range(x.ndim)]
    return lax.reduce_window(x, start, reduce, window, (1,) * x.ndim, "SAME")


@operation
def dense(program, x, y, k):
    return x @ program.param(x.shape[-1], _wide(k))


@operation
def dense_square(program, x, y, k):
    return x @ program.param(x.shape[-1], x.shape[-1])


@operation
def dense_transposed(program, x, y, k):
    return x @ program.param(_wide(k), x.shape[-1]).T


@operation
def dense_on_an_axis(program, x, y, k):
    axis = k % x.ndim
    return jnp.moveaxis(
        jnp.tensordot(x, program.param(x.shape[axis], _wide(k)), (axis, 0)), -1, axis
    )


@operation
def dense_to_heads(program, x, y, k):
    return (
        jnp.einsum("...i,ihd->...hd", x, program.param(x.shape[-1], 2, 2)) if x.ndim < 4 else None
    )


@operation
def dense_from_heads(program, x, y, k):
    if x.ndim > 2:
        return jnp.einsum("...hd,hdo->...o", x, program.param(*x.shape[-2:], _wide(k)))


@operation
def dense_per_row(program, x, y, k):
    if x.ndim == 3:
        return jnp.einsum("bti,tio->bto", x, program.param(x.shape[1], x.shape[2], _wide(k)))


@operation
def dense_masked(program, x, y, k):
    kernel = program.param(x.shape[-1], _wide(k))
    return x @ (kernel * np.tri(*kernel.shape, k % 3 - 1))


@operation
def dense_standardized(program, x, y, k):
    kernel = program.param(x.shape[-1], _wide(k))
    kernel = kernel - kernel.mean(0, keepdims=True)
    return x @ (kernel / jnp.sqrt(jnp.square(kernel).sum(0, keepdims=True) + (k % 2) * 1e-3))


@operation
def dense_normalized(program, x, y, k):
    kernel = program.param(x.shape[-1], _wide(k))
    norm = jnp.sqrt(jnp.square(kernel).sum(k % 2, keepdims=True))
    return x @ (kernel / norm * program.param(_wide(k))[None])


@operation
def dense_of_function(program, x, y, k):
    function = [jnp.abs, jnp.exp, jnp.square, jnp.tanh, jnp.negative][k % 5]
    return x @ function(program.param(x.shape[-1], _wide(k)))


@operation
def dense_sum(program, x, y, k):
    n = _wide(k)
    return x @ (program.param(x.shape[-1], n) + program.param(x.shape[-1], 2) @ program.param(2, n))


@operation
def dense_from_stack(program, x, y, k):
    return x @ program.param(2, x.shape[-1], _wide(k))[k % 2]


@operation
def dense_two_from_stack(program, x, y, k):
    stack = program.param(2, x.shape[-1], x.shape[-1])
    return jax.nn.relu(x @ stack[0]) @ stack[1]


@operation
def dense_joined(program, x, y, k):
    n = x.shape[-1]
    return x @ jnp.concatenate([program.param(n, 2), program.param(n, 2)], 1)


@operation
def dense_parts(program, x, y, k):
    kernel = program.param(x.shape[-1], 4)
    return jnp.stack([x @ kernel[:, :2], jax.nn.relu(x @ kernel[:, 2:])], 0) if x.ndim < 4 else None


@operation
def dense_split_rows(program, x, y, k):
    if x.shape == y.shape:
        kernel = program.param(2 * x.shape[-1], _wide(k))
        return jax.nn.relu(x @ kernel[: x.shape[-1]]) - y @ kernel[x.shape[-1] :]


@operation
def diagonal(program, x, y, k):
    return x @ jnp.diag(program.param(x.shape[-1]))


@operation
def bias(program, x, y, k):
    return x + _rows(program.param(x.shape[-1]), x.shape)


@operation
def scale(program, x, y, k):
    return x * _rows(program.param(x.shape[-1]), x.shape)


@operation
def scale_on_an_axis(program, x, y, k):
    axis = k % x.ndim
    shape = [n if a == axis else 1 for a, n in enumerate(x.shape)]
    return x * program.param(x.shape[axis]).reshape(shape)


@operation
def scalar(program, x, y, k):
    return x * program.param() if k % 2 else x + program.param()


@operation
def divide(program, x, y, k):
    return x / _rows(program.param(x.shape[-1]), x.shape)


@operation
def two_scales(program, x, y, k):
    return x * _rows(program.param(x.shape[-1]) * program.param(x.shape[-1]), x.shape)


@operation
def prelu(program, x, y, k):
    return jnp.where(x > 0, x, x * _rows(program.param(x.shape[-1]), x.shape))


@operation
def tied_twice(program, x, y, k):
    kernel = program.param(x.shape[-1], _wide(k))
    return jax.nn.relu(x @ kernel) @ kernel.T


@operation
def bilinear(program, x, y, k):
    return jnp.einsum("...i,ij,...j->...", x, program.param(x.shape[-1], x.shape[-1]), x)[..., None]


@operation
def convolution(program, x, y, k):
    if x.ndim == 3:
        groups = 2 if x.shape[-1] % 2 == 0 and k & 1 else 1
        kernel = program.param(3, x.shape[-1] // groups, 2 * _wide(k))
        return lax.conv_general_dilated(
            x, kernel, (1 + k // 8,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )  # fmt: skip


@operation
def convolution_transposed(program, x, y, k):
    if x.ndim == 3:
        kernel = program.param(2, x.shape[-1], _wide(k))
        return lax.conv_transpose(x, kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@operation
def recurrent(program, x, y, k):
    if x.ndim == 3:
        into, back = program.param(x.shape[-1], 3), program.param(3, 3)
        act = [jax.nn.relu, jnp.tanh, jnp.abs][k % 3]

        def step(h, row):
            h = act(row @ into + h @ back)
            return h, h * (1 if k % 2 else 2)

        start = jnp.zeros((x.shape[0], 3))
        h, ys = lax.scan(step, start, jnp.moveaxis(x, 1, 0), reverse=bool(k & 1))
        return h if k & 4 else ys


@operation
def scanned_layers(program, x, y, k):
    stack = program.param(3, x.shape[-1], x.shape[-1])

    def step(h, kernel):
        return jax.nn.relu(h @ kernel) + (h if k % 2 else 0), h.sum(-1)

    h, ys = lax.scan(jax.checkpoint(step), x, stack, reverse=bool(k & 4))
    return ys if k & 2 else h


@operation
def vmapped(program, x, y, k):
    kernels = program.param(2, x.shape[-1], _wide(k))
    return jax.vmap(lambda w: jax.nn.relu(x @ w))(kernels) if x.ndim < 4 else None


@operation
def taken(program, x, y, k):
    table = program.param(5, x.shape[-1])
    rows = jnp.argmax(x, -1) if k % 2 else jnp.broadcast_to(jnp.arange(x.shape[-2]), x.shape[:-1])
    return x + jnp.take(table, rows, axis=0)


@operation
def unary(program, x, y, k):
    return [
        jax.nn.relu, jax.nn.leaky_relu, jnp.abs, jnp.negative, jnp.square, jnp.sign, jnp.tanh,
        jax.nn.gelu, jax.nn.relu6, jax.nn.softmax, jnp.floor, lax.stop_gradient, jnp.sin,
        jax.nn.silu, lambda x: jnp.sqrt(jnp.abs(x)), jax.nn.elu,
    ][k](x)  # fmt: skip


@operation
def relu(program, x, y, k):
    return [jax.nn.relu, lambda x: jnp.maximum(0.0, x), lambda x: jnp.where(x > 0, x, 0)][k % 3](x)


@operation
def constant(program, x, y, k):
    c = jnp.asarray([-1.0, 0.0, 0.5, 2.0][k % 4])
    return [lambda: x * c, lambda: x + c, lambda: jnp.maximum(x, c), lambda: jnp.minimum(x, c)][
        k // 4
    ]()


@operation
def threshold(program, x, y, k):
    c = [0.0, 0.0, 0.5][k % 3]
    return [
        jnp.where(x > c, x, 0), jnp.where(x > c, x, -2 * x), jnp.where(x > c, 1.0, 0.0),
        jnp.clip(x, 0, None if k % 2 else 1.5), (x > c).astype(x.dtype) * x,
    ][k % 5]  # fmt: skip


@operation
def masked(program, x, y, k):
    mask = np.arange(x.shape[-1]) % 2 == k % 2
    fill = [0.0, -np.inf, 1.0][k % 3]
    masked = jnp.where(jnp.broadcast_to(mask, x.shape), x, fill)
    return jnp.maximum(masked, -5.0) if fill == -np.inf and k & 4 else masked


@operation
def normalized(program, x, y, k):
    eps = (k % 2) * 1e-2
    return [
        lambda: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps + 1e-9),
        lambda: x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps),
        lambda: x / (jnp.abs(x).max(0, keepdims=True) + eps),
        lambda: x / jnp.linalg.norm(x),
    ][k // 4]()


@operation
def arranged(program, x, y, k):
    n, axis = x.shape[-1], k % x.ndim
    return [
        lambda: x.reshape(x.shape[0], -1), lambda: jnp.swapaxes(x, 0, axis), lambda: x[..., ::-1],
        lambda: jnp.roll(x, 1, axis), lambda: x[..., : max(n - 1, 1)], lambda: x[..., k % n, None],
        lambda: jnp.pad(x, [(0, int(a == axis)) for a in range(x.ndim)]), lambda: x[None],
        lambda: jnp.pad(x, [(int(a == axis), 0) for a in range(x.ndim)], constant_values=1.0),
        lambda: jnp.repeat(x, 2, axis), lambda: x.squeeze(axis) if x.shape[axis] == 1 else None,
        lambda: jnp.take(x, np.array([0, n - 1, 0]), -1), lambda: jnp.tile(x, 2),
        lambda: jnp.concatenate(jnp.split(x, n, -1)[::-1], -1), lambda: x.reshape(-1, n),
        lambda: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 1)], mode="wrap"),
    ][k]()  # fmt: skip


@operation
def reduced(program, x, y, k):
    axis = k % x.ndim
    return [
        lambda: x.sum(axis), lambda: x.mean(axis, keepdims=True), lambda: x.max(axis),
        lambda: x.min(axis, keepdims=True), lambda: jnp.cumsum(x, axis), lambda: jnp.sort(x, axis),
        lambda: lax.cummax(x, axis), lambda: lax.top_k(x, min(2, x.shape[-1]))[0],
        lambda: x.prod(axis), lambda: jnp.argmax(x, axis).astype(x.dtype), lambda: x.std(axis),
        lambda: jax.nn.logsumexp(x, axis), lambda: jnp.median(x, axis),
        lambda: x - x.mean(axis, keepdims=True),
        lambda: _pooled(x, -np.inf, lax.max, x.ndim - 1), lambda: _pooled(x, 0.0, lax.add, 0),
    ][k]() if x.ndim > 1 else None  # fmt: skip


@operation
def written(program, x, y, k):
    n = x.shape[-1]
    return [
        lambda: x.at[..., 0].set(0.0), lambda: x.at[..., k % n].add(1.0),
        lambda: lax.dynamic_update_slice(x, x[..., :1], (0,) * (x.ndim - 1) + (n - 1,)),
        lambda: jax.ops.segment_sum(x, np.arange(len(x)) % 2, 2), lambda: x.at[0].multiply(2.0),
        lambda: jnp.zeros_like(x).at[jnp.argmax(x[..., 0].reshape(-1)) % len(x)].add(x[0]),
    ][k % 6]()  # fmt: skip


@operation
def controlled(program, x, y, k):
    which = x.sum() > 0
    return [
        lambda: lax.cond(which, lambda x: x, lambda x: -2 * x, x),
        lambda: lax.cond(which, lambda x: x, jnp.tanh, x),
        lambda: lax.while_loop(lambda c: jnp.abs(c).max() > 1, lambda c: c / 2, x),
        lambda: lax.fori_loop(0, 2, lambda _, c: jax.nn.relu(c) + x, x),
        lambda: jax.jit(jax.nn.relu)(x),
        lambda: lax.dynamic_slice_in_dim(x, jnp.argmax(x.reshape(-1)) % 2, 1, x.ndim - 1),
        lambda: lax.switch(jnp.argmax(x.reshape(-1)[:2]), [jnp.abs, jax.nn.relu], x),
        lambda: x.astype(jnp.int32).astype(x.dtype),
    ][k % 8]()  # fmt: skip


@operation
def binary(program, x, y, k):
    if x.shape == y.shape:
        return [
            lambda: x + y, lambda: x - y, lambda: jnp.maximum(x, y), lambda: x * y,
            lambda: x / (1e-9 + jnp.abs(y)), lambda: jnp.where(x > y, x, y), lambda: x + y + x,
            lambda: jax.nn.relu(x) * jax.nn.sigmoid(y), lambda: jnp.where(y > 0, x, 0),
            lambda: x * jnp.sign(y), lambda: jnp.where(x > y, 2 * x, 3 * x), lambda: x + 2 * y,
            lambda: jnp.arctan2(x, y), lambda: jnp.stack([x, y]), lambda: jnp.hypot(x, y),
            lambda: jnp.minimum(x, y),
        ][k]()  # fmt: skip


@operation
def skip(program, x, y, k):
    return x + y if x.shape == y.shape else None


@operation
def joined(program, x, y, k):
    if x.shape[:-1] == y.shape[:-1]:
        return jnp.concatenate([x, y], -1)


@operation
def attention(program, x, y, k):
    if x.ndim == 3:
        n = x.shape[-1]
        q, key, v = (x @ program.param(n, 2) for _ in range(3))
        scores = q @ jnp.swapaxes(key, 1, 2)
        weights = [jax.nn.softmax, jax.nn.relu, jnp.abs][k % 3](scores)
        return weights @ v


@operation
def contracted(program, x, y, k):
    if x.shape == y.shape and x.ndim == 3:
        return jnp.einsum(["bti,bsi->bts", "bti,btj->bij", "bti,bti->bt"][k % 3], x, y)
