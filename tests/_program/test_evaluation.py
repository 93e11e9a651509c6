"""Programs run in numpy compute what JAX computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXAMPLES
from jax import lax

# The rules enter themselves into their table when they are imported.
from pathcond_jax._program import evaluation, numpy_rules, primitives  # noqa: F401
from pathcond_jax._program.graph import trace

RNG = np.random.default_rng(0)
X = jax.ShapeDtypeStruct((4, 6), np.float32)
IMAGE = jax.ShapeDtypeStruct((4, 7, 6, 4), np.float32)
WHOLE = jax.ShapeDtypeStruct((4, 6), np.int32)


def drawn(shape):
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return RNG.integers(-3, 4, shape.shape).astype(shape.dtype)
    values = RNG.normal(size=shape.shape)
    if jnp.issubdtype(shape.dtype, jnp.complexfloating):
        values = values + 1j * RNG.normal(size=shape.shape)
    return values.astype(shape.dtype)


def convolved(kernel_shape, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = jax.ShapeDtypeStruct(kernel_shape, np.float32)
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return (
        lambda x, k: lax.conv_general_dilated(x, k, dimension_numbers=numbers, **options),
        (IMAGE, kernel),
    )


def taken(mode, fill_value=None):
    return (
        lambda x, i: jnp.take(x, i, axis=1, mode=mode, fill_value=fill_value),
        (X, jax.ShapeDtypeStruct((2, 3), np.int32)),
    )


PROGRAMS = {
    **{f"{name} of itself": example for name, example in EXAMPLES.items()},
    **{
        name: (getattr(lax, name), (X,))
        for name in (
            *("tan", "sinh", "cosh", "asinh", "atan", "erfc", "lgamma", "floor", "ceil", "round"),
            "erf_inv",
        )
    },
    "round to even": (jnp.round, (X,)),
    "integers divided": (lambda x, y: lax.div(x, y) + lax.rem(x, y), (WHOLE, WHOLE)),
    "bits": (lambda x, y: (x & y) | ~x ^ (x << 1), (WHOLE, WHOLE)),
    "shifts": (
        lambda x, y: (lax.shift_right_logical(x, abs(y)), lax.shift_right_arithmetic(x, abs(y))),
        (WHOLE, WHOLE),
    ),
    "floats cast to integers": (lambda x: (9 * x).astype(jnp.int8).astype(jnp.float32), (X,)),
    "bits of floats": (lambda x: lax.bitcast_convert_type(x, jnp.int32), (X,)),
    "negative powers": (lambda x: lax.integer_pow(x, -3), (X,)),
    "padded and cut": (lambda x: lax.pad(x, np.float32(2), ((-1, 2, 1), (3, -2, 0))), (X,)),
    "cut at both ends": (lambda x: lax.pad(x, np.float32(0), ((-1, -1, 2), (-2, 0, 0))), (X,)),
    "summed backward": (lambda x: lax.cumsum(x, 1, reverse=True), (X,)),
    "multiplied": (lambda x: lax.cumprod(x, 0), (X,)),
    "sorted by two": (lambda x, y: lax.sort((y, x), dimension=1, num_keys=2), (X, WHOLE)),
    "order": (jnp.argsort, (X,)),
    "first of integers": (lambda x: lax.top_k(x, 3), (WHOLE,)),
    "truths": (lambda x: ((x > 0).any(0), (x > 0).all(1), (x > 0).max(0)), (X,)),
    "one of three": (lambda x, w: lax.select_n(abs(w) % 3, x, 2 * x, 3 * x), (X, WHOLE)),
    "filled": taken("fill"),
    "filled with a number": taken("fill", 7.0),
    "clipped": taken("clip"),
    "wrapped": taken("wrap"),
    "taken along": (
        lambda x, i: jnp.take_along_axis(x, i, 1, mode="clip"),
        (X, jax.ShapeDtypeStruct((4, 2), np.int32)),
    ),
    "taken by rows": (
        lambda x, i: jax.vmap(lambda row, k: lax.dynamic_slice(row, (k,), (2,)))(x, i),
        (X, jax.ShapeDtypeStruct((4,), np.int32)),
    ),
    "einsum": (lambda x, y: jnp.einsum("abcd,abed->ace", x, y), (IMAGE, IMAGE)),
    "outer": (lambda x, y: jnp.einsum("ab,cd->adcb", x, y), (X, X)),
    "no axis summed": (lambda x, y: jnp.einsum("ab,ab->ab", x, y), (X, X)),
    "strided": convolved((3, 2, 4, 5), window_strides=(2, 3), padding=((1, 0), (-1, 2))),
    "dilated": convolved(
        (3, 2, 4, 5), rhs_dilation=(2, 1), lhs_dilation=(1, 2), padding=((2, 1), (0, 3))
    ),
    "depthwise": convolved((3, 3, 1, 8), feature_group_count=4),
    "grouped": convolved((2, 2, 2, 6), feature_group_count=2, padding="VALID"),
    "batches apart": convolved((2, 2, 4, 6), batch_group_count=2),
    "transposed": (
        lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME"),
        (IMAGE, jax.ShapeDtypeStruct((3, 2, 4, 5), np.float32)),
    ),
    "channels first": (
        lambda x, k: lax.conv(x, k, (1, 2), "SAME"),
        (IMAGE, jax.ShapeDtypeStruct((3, 7, 2, 2), np.float32)),
    ),
    "dilated windows": (
        lambda x: lax.reduce_window(
            x, -np.float32(np.inf), lax.max, (1, 2, 2, 1), (1, 1, 2, 1), "SAME",
            base_dilation=(1, 2, 1, 1), window_dilation=(1, 2, 1, 1),
        ),
        (IMAGE,),
    ),
    "averaged": (
        lambda x: lax.reduce_window(x, np.float32(0), lax.add, (2, 3), (1, 1), "SAME"),
        (X,),
    ),
    "backward": (lambda x: lax.scan(lambda c, y: (c + y, c * y), x[0], x, reverse=True), (X,)),
    "scanned without results": (lambda x: lax.scan(lambda c, y: (c + y, None), x[0], x)[0], (X,)),
    "no step": (lambda x: lax.scan(lambda c, y: (c + y, c * y), x[0], x[:0]), (X,)),
    "counted": (lambda x: lax.fori_loop(0, 3, lambda k, y: y * k + x, x), (X,)),
    "decided": (lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), (X,)),
    "solved, which has no rule": (lambda x: jnp.linalg.solve(x[:, :4], x), (X,)),
    "attention": (lambda x: jax.nn.softmax(x @ x.T) @ jax.nn.gelu(x), (X,)),
    "a constant": (lambda x: (x + jnp.tril(jnp.ones((4, 6))), jnp.arange(3)), (X,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_results_are_those_of_jax(name):
    program, shapes = PROGRAMS[name]
    arguments = jax.tree.map(drawn, shapes)

    with np.errstate(all="ignore"):
        found = evaluation.run(trace(program, *arguments), [evaluation.held(a) for a in arguments])

    wanted = jax.tree.leaves(jax.jit(program)(*arguments))
    for one, two in zip(found, wanted, strict=True):
        assert one.shape == two.shape
        # JAX rounds to 8 bits there, and here nothing is rounded.
        rounded = two.dtype == jnp.bfloat16 or "reduce_precision" in name
        tolerance = 1e-2 if rounded else 2e-5
        np.testing.assert_allclose(one, np.asarray(two, one.dtype), tolerance, tolerance)


def test_few_frequent_operations_are_left_to_jax():
    occurring = {
        eqn.primitive
        for program, shapes in EXAMPLES.values()
        for eqn in jax.make_jaxpr(program)(*shapes).jaxpr.eqns
        if eqn.primitive not in primitives.calls()
    }
    left = {p.name for p in occurring if p not in evaluation.RULES}
    rare = {"fft", "ragged_dot_general", "reduce", "reduce_window"}
    assert all(name.startswith("scatter") for name in left - rare)
    assert evaluation.RULES.unresolved <= set(primitives.ABSENT)


def test_floats_are_float64_whatever_the_program_says():
    program = lambda x: (x.astype(jnp.bfloat16) * 3).astype(jnp.float32)  # noqa: E731
    (found,) = evaluation.run(trace(program, X), [np.full((4, 6), 1 + 1e-12)])
    assert found[0, 0] == 3 * (1 + 1e-12)


def test_random_numbers_need_no_jax_and_are_the_same_in_every_run():
    def program(key, x):
        return x + jax.random.normal(jax.random.split(key)[0], x.shape)

    graph = trace(program, jax.random.key(0), X)
    arguments = [evaluation.held(jax.random.key(0)), np.zeros((4, 6))]
    (one,), (two,) = (evaluation.run(graph, arguments) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert np.isfinite(one).all()
    assert np.unique(one).size == one.size


def test_what_calls_the_user_or_never_ends_is_not_run():
    called = lambda x: jax.pure_callback(np.sin, X, x)  # noqa: E731
    endless = lambda x: lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y * 0, x)  # noqa: E731
    for program in (called, endless):
        with pytest.raises(evaluation.CannotRunError):
            evaluation.run(trace(program, X), [np.zeros((4, 6))])


def test_work_counts_products_and_repetitions():
    once = evaluation.work(trace(lambda x: x @ x, jax.ShapeDtypeStruct((300, 300), np.float32)))
    assert once == pytest.approx(300**3, rel=0.2)
    step = lambda c, _: (c @ c, None)  # noqa: E731
    scanned = trace(lambda x: lax.scan(step, x, length=10)[0], jnp.ones((300, 300)))
    assert evaluation.work(scanned) == pytest.approx(10 * once, rel=0.1)
    kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), np.float32)
    image = jax.ShapeDtypeStruct((1, 50, 50, 64), np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")
    convolution = trace(
        lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers),
        image,
        kernel,
    )
    assert evaluation.work(convolution) == pytest.approx(2500 * 9 * 64 * 64, rel=0.3)
