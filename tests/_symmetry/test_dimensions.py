"""One operation at a time: the neurons found are all diagonal rescalings that there are.

The dimension is counted numerically: that of the null space of the derivative of the outputs by
the logarithms of the parameters, at many parameters and inputs at once. A rule that demands too
little finds more neurons than that, one that demands too much finds fewer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import pathcond_jax as pathcond

_DRAWS = 24
_STEP = 1e-5
_SEEN = 1e-4


def dimension(apply_fn, shapes, input_shape):
    """How many independent diagonal rescalings leave the outputs as they are."""
    rng = np.random.default_rng(0)
    _, restore = ravel_pytree({name: np.zeros(shape) for name, shape in shapes.items()})
    outputs = jax.jit(lambda flat, x: ravel_pytree(apply_fn(restore(flat), x))[0])
    rows = []
    for _ in range(_DRAWS):
        # Large values too, so that bounds are met and positions change.
        params = {
            name: rng.uniform(0.3, 1.5, shape) * rng.choice([-3, -1, 1, 3], shape)
            for name, shape in shapes.items()
        }
        flat, _ = ravel_pytree(params)
        x = rng.normal(size=input_shape) * rng.choice([1, 3])

        # By differences: JAX has no derivative of some operations.
        steps = np.exp(_STEP * np.eye(flat.size))
        moved = [outputs(flat * step, x) - outputs(flat / step, x) for step in steps]
        jacobian = np.stack(moved, 1) / (2 * _STEP)
        size = abs(jacobian).max(1, keepdims=True)
        # Of outputs that hardly move, only rounding is seen.
        seen = size[:, 0] > _SEEN * (1.0 + abs(outputs(flat, x)))
        rows.append(jacobian[seen] / size[seen])
    matrix = np.concatenate(rows)
    # Entries that no output depends on move as they like.
    living = abs(matrix).max(0) > 1e-7
    return living.sum() - np.linalg.matrix_rank(matrix[:, living], tol=1e-5)


def traced(apply_fn, shapes, input_shape):
    params = {name: jax.ShapeDtypeStruct(shape, np.float64) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct(input_shape, np.float64)
    return pathcond.trace_spec(apply_fn, params, x)


MIXER = {"scale": (4,), "bias": (4,), "w": (3, 5), "c": (5,), "v": (5, 3), "d": (3,)}


def token_mixer(params, x):
    """The tokens of a normalized value mixed: what all channels gain, the first kernel may lose."""
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    tokens = jnp.swapaxes(normal * params["scale"] + params["bias"], -1, -2)
    mixed = jax.nn.gelu(tokens @ params["w"] + params["c"]) @ params["v"] + params["d"]
    return jnp.swapaxes(mixed, -1, -2)


def scaled_on_another_axis(params, x):
    return (x * params["scale"][:, None]) @ params["w"]


def scaled_on_three_axes(params, x):
    scales = params["a"][:, None, None] * params["b"][:, None] * params["c"]
    return jnp.tanh(x * scales)


def added_on_separate_axes(params, x):
    """Two sums over axes that must agree: what the rows differ by, the columns may not."""
    one = x * params["a"][:, None] * params["b"]
    two = x * params["c"][:, None] * params["d"]
    return jnp.tanh(jax.nn.relu(one + two) * params["e"])


def selected_on_separate_axes(params, x):
    one = x * params["a"][:, None] * params["b"]
    two = x * params["c"][:, None] * params["d"]
    return jnp.where(x > 0, one, two) * params["e"]


def outer_product_of_itself(params, x):
    """Both axes carry the same labels: a constant for both can only be 0."""
    h = x @ params["w"]
    return jnp.tanh(h[:, :, None] * h[:, None, :]) @ params["v"]


PRODUCTS = {"a": (3,), "b": (4,), "c": (3,), "d": (4,), "e": (4,)}

EXCHANGED = {
    token_mixer: (MIXER, (2, 3, 4), 1),
    scaled_on_another_axis: ({"scale": (3,), "w": (4, 2)}, (2, 3, 4), 1),
    scaled_on_three_axes: ({"a": (2,), "b": (3,), "c": (4,)}, (2, 3, 4), 2),
    added_on_separate_axes: (PRODUCTS, (2, 3, 4), 6),
    selected_on_separate_axes: (PRODUCTS, (2, 3, 4), 6),
    outer_product_of_itself: ({"w": (3, 4), "v": (4, 2)}, (2, 3), 0),
}

LAYERS = {"w": (3, 4), "v": (4, 2)}


def around(change):
    """A rectified layer, a change of its result, another layer."""

    def apply_fn(params, x):
        return change(jax.nn.relu(x @ params["w"]), params) @ params["v"]

    return apply_fn


SOME = np.zeros((5, 4), bool)
SOME[1, 1] = SOME[3, 2] = True

POSITIONS = {
    "a column overwritten by a constant": (lambda h, p: h.at[:, 1].set(1.0), 3),
    "a column overwritten by another": (lambda h, p: h.at[:, 1].set(h[:, 0]), 3),
    "two columns exchanged": (lambda h, p: h.at[:, jnp.array([0, 1])].set(h[:, [1, 0]]), 4),
    "a constant added to a column": (lambda h, p: h.at[:, 2].add(1.0), 3),
    "a column added to another": (lambda h, p: h.at[:, 2].add(h[:, 0]), 3),
    "subtracted": (lambda h, p: h.at[:, 2].subtract(2 * h[:, 2]), 4),
    "the larger one": (lambda h, p: h.at[:, 2].max(h[:, 0]), 3),
    "the smaller one": (lambda h, p: h.at[:, 2].min(h[:, 3]), 3),
    "added twice": (lambda h, p: h.at[:, jnp.array([1, 1])].add(h[:, :2]), 3),
    "written into zeros": (lambda h, p: jnp.zeros((5, 4)).at[:, ::-1].set(h), 4),
    "added into zeros": (lambda h, p: jnp.zeros((5, 4)).at[:, 1:].add(h[:, 1:]), 3),
    "added into ones": (lambda h, p: jnp.ones((5, 4)).at[:, 1:].add(h[:, 1:]), 0),
    "out of bounds": (lambda h, p: h.at[:, jnp.array([0, 9])].set(1.0, mode="drop"), 3),
    "clipped": (lambda h, p: h.at[:, jnp.array([9])].set(1.0, mode="clip"), 3),
    "multiplied": (lambda h, p: h.at[:, 1].multiply(h[:, 0]), 4),
    "multiplied by a constant": (lambda h, p: h.at[:, 1].multiply(3.0), 4),
    "a slice overwritten": (lambda h, p: jax.lax.dynamic_update_slice(h, h[:, :1], (0, 2)), 3),
    "a slice of ones": (lambda h, p: jax.lax.dynamic_update_slice(h, jnp.ones((5, 2)), (0, 9)), 2),
    "rectified at a column": (lambda h, p: (h - 1e-3 * h[:1]).at[:, 1].apply(jax.nn.relu), 4),
    "doubled at rows": (lambda h, p: h.at[jnp.array([0, 0, 9])].apply(lambda v: 2 * v), 4),
    "halved at an unknown row": (lambda h, p: h.at[jnp.argmax(h[:, 0])].apply(lambda v: v / 2), 4),
    "squared at an entry": (lambda h, p: h.at[0, 1].apply(jnp.square), 3),
    "raised at an unknown row": (lambda h, p: h.at[jnp.argmax(h[:, 0])].apply(lambda v: v + 1), 0),
    "rows in the order of each column": (
        lambda h, p: jnp.take_along_axis(h, jnp.argsort(h, 0), 0),
        4,
    ),
    "columns in the order of each row": (
        lambda h, p: jnp.take_along_axis(h, jnp.argsort(h, 1), 1),
        1,
    ),
    "ones at some entries of two columns": (lambda h, p: jnp.where(SOME, 1.0, h), 2),
    "some entries from another column": (lambda h, p: jnp.where(SOME, h[:, ::-1], h), 3),
}


where = jnp.where


def length(h):
    """The norm of each row, with a root that has a derivative at rows of zeros."""
    square = jnp.sum(h * h, -1, keepdims=True)
    return where(square == 0, 0.0, jnp.sqrt(where(square == 0, 1.0, square)))


def lengthened(h):
    """Rows by their norm in their own direction, by a guard of another shape than theirs."""
    size = jnp.sqrt(jnp.sum(h * h, -1, keepdims=True))
    return where(size != 0, h * h / where(size == 0, 1.0, size), 0.0)


def hypotenuse(one, two):
    """As older versions of JAX compute ``jnp.hypot``."""
    long, short = jnp.maximum(one, two), jnp.minimum(one, two)
    ratio = short / where(long == 0, 1.0, long)
    return where(long == 0, long, long * jnp.sqrt(1 + ratio * ratio))


GUARDS = {
    "a root of what is positive": (lambda h, p: where(h > 0, jnp.sqrt(where(h > 0, h, 1.0)), 0), 4),
    "of another half": (lambda h, p: where(h > 0, 0.0, jnp.sqrt(1 + where(h > 0, h, 1.0))), 0),
    "by another bound": (lambda h, p: where(h > 0, jnp.sqrt(where(h > 1, h, 2.0)), 0.0), 0),
    "shown elsewhere": (lambda h, p: where(h > 0, h, 0.0) + where(h > 0, h, 1.0), 0),
    "summed before it is chosen": (
        lambda h, p: where(h > 0, jnp.cumsum(where(h > 0, h, 1.0), 1), 0.0),
        0,
    ),
    "at other places": (lambda h, p: where(h > 0, where(h > 0, h, 1.0)[:, ::-1], 0.0), 0),
    "in a loop": (
        lambda h, p: jax.lax.map(lambda r: where(r > 0, jnp.sqrt(where(r > 0, r, 1.0)), 0), h),
        4,
    ),
    "the norm of rows": (lambda h, p: h * length(h), 1),
    "a guard that is repeated": (lambda h, p: lengthened(h), 1),
    "a hypotenuse": (lambda h, p: hypotenuse(h, 2 * h), 4),
}


def diagonal(params, x):
    return jax.nn.relu(x @ jnp.diag(params["d"])) @ params["w"]


def strided(params, x):
    h = jax.nn.relu(x @ params["w"])
    taken = jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 1), (1, 2), "VALID")
    return taken @ params["v"]


def product(params, x):
    h = jax.nn.relu(x @ params["w"]) + 1e-3 * params["b"] ** 2
    return jnp.prod(h, 1) * params["s"]


def reduced_by(start, operation):
    """A reduction by a program, as ``jax.lax`` writes it down."""

    def reduced(h, params):
        # Of two rows: the least and the product of many are often 0.
        return jax.lax.reduce(h[:2], start(params, h), lambda a, b: operation(a, b), (0,))[None]

    return reduced


def two_reductions(h, params):
    """A sum, and the largest value beside it, of which one is read."""
    zeros = np.zeros(2)
    total, largest = jax.lax.reduce(
        (h[:2], h[:2]),
        tuple(zeros),
        lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])),
        (0,),
    )
    return (total - largest)[None]


def windows_of(start, operation, padding="VALID"):
    def windows(h, params):
        return jax.lax.reduce_window(h, start(params, h), operation, (2, 1), (1, 1), padding)

    return windows


def two_windows(start):
    """Sums of windows and, beside them, the largest value, of which one is read."""

    def windows(h, params):
        total, largest = jax.lax.reduce_window(
            (h, h),
            (start, np.float64(0.0)),
            lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])),
            (2, 1),
            (1, 1),
            "VALID",
        )
        return total - largest

    return windows


def constant(value):
    return lambda params, h: np.float64(value)


def of_the_signal(params, h):
    return h[0, 0]


def padded_by(value, config):
    def padded(h, params):
        return jax.lax.pad(h, value(params, h), config)[:, :4]

    return padded


def cumulated(**options):
    return lambda h, params: jax.lax.cumprod(h[:, :4], 1, **options)


def raised_at_no_place(h, params):
    """A power that is put together when the program is traced."""
    return h ** jnp.full((5, 4), 2.0).at[0].multiply(1.0)


def repeated_by_counts(h, params):
    return jnp.repeat(h, jnp.array([2, 0, 1, 1]), 1, total_repeat_length=4)


def applied_at(h, params):
    return h.at[:, jnp.array([2, 2, 9])].apply(jnp.tanh)


PADDED = {
    "padded by a constant": (padded_by(constant(1.0), ((0, 0, 0), (1, 0, 0))), 3),
    "padded by an entry": (padded_by(of_the_signal, ((0, 0, 0), (1, 0, 0))), 3),
    "padded between": (padded_by(of_the_signal, ((0, 0, 0), (0, -1, 1))), 2),
    "cut off only": (padded_by(constant(1.0), ((-1, 0, 0), (-1, 1, 0))), 3),
    "padded rows": (padded_by(of_the_signal, ((1, 0, 0), (0, 0, 0))), 1),
    "padded rows by a constant": (padded_by(constant(1.0), ((1, 0, 0), (0, 0, 0))), 0),
}

REDUCTIONS = {
    "reduced by sums": (reduced_by(constant(0.0), jax.lax.add), 4),
    "reduced by sums from one": (reduced_by(constant(1.0), jax.lax.add), 0),
    "reduced by sums from an entry": (reduced_by(of_the_signal, jax.lax.add), 1),
    "reduced by maxima": (reduced_by(constant(-np.inf), jax.lax.max), 4),
    "reduced by minima": (reduced_by(constant(np.inf), jax.lax.min), 4),
    "reduced by products": (reduced_by(constant(1.0), jax.lax.mul), 4),
    "reduced by another program": (reduced_by(constant(0.0), lambda a, b: a + jnp.tanh(b)), 0),
    "reduced by a sum with weights": (reduced_by(constant(0.0), lambda a, b: a + 3.0 * b), 4),
    "the same from one": (reduced_by(constant(1.0), lambda a, b: a + 3.0 * b), 0),
    "two reductions at once": (two_reductions, 4),
    "windows multiplied": (windows_of(constant(1.0), jax.lax.mul), 4),
    "windows multiplied, some smaller": (windows_of(constant(1.0), jax.lax.mul, "SAME"), 0),
    "products so far": (cumulated(), 4),
    "products from the last one": (cumulated(reverse=True), 4),
    "a constant power": (raised_at_no_place, 4),
    "repeated": (repeated_by_counts, 3),
    "applied at positions": (applied_at, 3),
    "windows summed from one": (windows_of(constant(1.0), jax.lax.add), 0),
    "windows summed from an entry": (windows_of(of_the_signal, jax.lax.add), 1),
    "windows summed with weights": (windows_of(constant(0.0), lambda a, b: a + 2.0 * b), 4),
    "two windows at once": (two_windows(np.float64(0.0)), 4),
    "two windows at once from one": (two_windows(np.float64(1.0)), 0),
    "windows of another program": (windows_of(constant(0.0), lambda a, b: a + jnp.tanh(b)), 0),
    "a composite": (jax.lax.composite(lambda h, p: 2 * h, "test.doubled", version=1), 4),
}


def mixture(sizes):
    """Rows meet the kernels of their expert, and biases of all."""

    def apply_fn(params, x):
        groups = sizes(x)
        h = jax.lax.ragged_dot(x, params["w"], groups) + params.get("b", 0.0)
        return jax.lax.ragged_dot(jax.nn.relu(h), params["v"], groups)

    return apply_fn


def kernels_of_groups(params, x):
    """Rows summed group by group: the groups are an axis of the result."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    h = jax.nn.relu(x @ params["w"])
    summed = jax.lax.ragged_dot_general(x, h, np.array([2, 3], np.int32), numbers)
    return summed @ params["v"]


def known_sizes(x):
    return np.array([2, 3], np.int32)


def sizes_of_input(x):
    first = (x[:, 0] > 0).sum(dtype=np.int32)
    return jnp.stack([first, 5 - first])


EXPERTS = {"w": (2, 3, 4), "v": (2, 4, 2)}

EXPERTS_CASES = {
    "experts with known rows": (mixture(known_sizes), EXPERTS, (5, 3), 8),
    "experts with rows of the input": (mixture(sizes_of_input), EXPERTS | {"b": (4,)}, (5, 3), 4),
}


def carried_in_vain(params, x):
    """A loop that also carries what nobody reads."""

    def step(carry, row):
        h, unread = carry
        made = jax.nn.relu(row @ params["w"])
        return (h + made, jnp.tanh(unread + made)), jnp.exp(made)

    (h, _), _ = jax.lax.scan(step, (jnp.zeros(4), jnp.ones(4)), x)
    return h @ params["v"]


def carried_and_read(params, x):
    """A loop whose one result reads what it carries beside it."""

    def step(carry, row):
        h, other = carry
        made = jax.nn.relu(row @ params["w"])
        return (h + other, made), made

    (h, _), _ = jax.lax.scan(step, (jnp.zeros(4), jnp.ones(4)), x)
    return h @ params["v"]


def products_of_kernels(params, x):
    return jax.nn.relu(x @ (params["a"] * params["b"])) @ params["v"]


def kernels_on_one_another(params, x):
    """Where one meets the other, axes and all; what it meets itself, it cannot exchange."""
    return x @ (params["a"] * params["b"].T * params["a"])


def products_of_windows(params, x):
    """Windows over a hem of fewer factors, and over rows of a kernel with scales of their own."""
    factors = jax.lax.reduce_window(
        params["w"],
        1.0,
        lambda a, b: a * b,
        (2, 1),
        (1, 1),
        ((1, 0), (0, 0)),
        base_dilation=(1, 1),
        window_dilation=(1, 1),
    )
    return jax.nn.relu(x @ factors) @ params["v"]


def groups_of_examples(params, x):
    numbers = ("NHC", "HIO", "NHC")
    h = jax.lax.conv_general_dilated(
        x, params["w"], (1,), "VALID", dimension_numbers=numbers, batch_group_count=2
    )
    return jax.nn.relu(h) @ params["v"]


OTHERWISE = {
    products_of_kernels: ({"a": (3, 4), "b": (3, 4), "v": (4, 2)}, (5, 3), 16),
    kernels_on_one_another: ({"a": (3, 4), "b": (4, 3)}, (5, 3), 12),
    products_of_windows: (LAYERS, (5, 3), 4),
    groups_of_examples: ({"w": (2, 3, 4), "v": (4, 2)}, (4, 3, 3), 4),
    carried_in_vain: (LAYERS, (5, 3), 4),
    carried_and_read: (LAYERS, (5, 3), 0),
    kernels_of_groups: (LAYERS, (5, 3), 4),
    diagonal: ({"d": (3,), "w": (3, 2)}, (5, 3), 3),
    strided: ({"w": (3, 4), "v": (2, 2)}, (5, 3), 2),
    product: ({"w": (3, 3), "b": (3,), "s": ()}, (5, 3), 3),
}

CASES = EXCHANGED | OTHERWISE
CHANGES = POSITIONS | PADDED | REDUCTIONS | GUARDS
NAMED = {name: (around(change), LAYERS, (5, 3), n) for name, (change, n) in CHANGES.items()}
NAMED |= {function.__name__: (function, *case) for function, case in CASES.items()}
NAMED |= EXPERTS_CASES


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMED)
def test_neurons_are_all_dimensions(name):
    apply_fn, shapes, input_shape, expected = NAMED[name]

    with jax.numpy_rank_promotion("allow"):
        spec = traced(apply_fn, shapes, input_shape)

        assert (spec.num_neurons, dimension(apply_fn, shapes, input_shape)) == (expected, expected)


@pytest.mark.usefixtures("x64")
def test_a_divisor_takes_up_no_neuron():
    """Of w / s, both could take up the scale of one neuron: its other side is v, as for others."""
    shapes = LAYERS | {"s": ()}

    def divided(params, x):
        return jax.nn.relu(x @ params["w"]) / params["s"] @ params["v"]

    spec = traced(divided, shapes, (5, 3))

    (group,) = spec.groups
    assert [str(incidence) for incidence in group.incoming] == ["w[1]"]
    assert [str(incidence) for incidence in group.outgoing] == ["v[0]"]
    # One dimension more moves s and v in the same direction: entries would only grow.
    assert (group.size, dimension(divided, shapes, (5, 3))) == (4, 5)
