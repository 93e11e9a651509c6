"""The check of ``trace_spec``: wrong rules are caught and named, right specs never fail it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pathcond_jax as pathcond
from pathcond_jax._lifting.interpreter import RULES as LIFTING
from pathcond_jax._program.primitives import find
from pathcond_jax._symmetry.values import RULES as SYMMETRY
from pathcond_jax._symmetry.values import mapped

RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(np.asarray(RNG.normal(size=shape), "float32"))
    for name, shape in {"w": (3, 5), "u": (5, 5), "v": (5, 2), "v4": (4, 2)}.items()
}
X = jnp.asarray(np.asarray(RNG.normal(size=(4, 3)), "float32"))


@contextlib.contextmanager
def registered(name, rule, table=SYMMETRY):
    """``rule`` in place of the one of a primitive of JAX."""
    primitive = find(name)
    before = table.get(primitive)
    pathcond.register_rule(primitive, **{table.analysis: rule})
    try:
        yield
    finally:
        table._entries.pop(primitive)
        if before is not None:
            table._entries[primitive] = before


def same(scope, scale, *others):
    return [scale.terms]


def hidden(params, x):
    return jax.nn.relu(x @ params["w"])


def tanh(params, x):
    return jnp.tanh(hidden(params, x)) @ params["v"]


def shifted(params, x):
    return (hidden(params, x) + 1.0) @ params["v"]


def applied(params, x):
    first = jnp.argmax(x[:, 0])
    return hidden(params, x).at[first].apply(jnp.tanh) @ params["v"]


def filled(params, x):
    return (
        jnp.take(hidden(params, x), jnp.array([0, 7]), 0, mode="fill", fill_value=1) @ params["v"]
    )


def reordered(params, x):
    columns = lax.reshape(hidden(params, x), (20,), dimensions=(1, 0))
    return columns.reshape(4, 5) @ params["v"]


def delayed(params, x):
    def step(carry, row):
        one, two, _ = carry
        return (jax.nn.relu(row @ params["w"] + one @ params["u"]), one, jnp.tanh(two)), None

    zeros = jnp.zeros(5)
    (_, _, last), _ = lax.scan(step, (zeros, zeros, zeros), x)
    return last @ params["v"]


def started_at_one(params, x):
    count = (x[0, 0] > -100).astype(jnp.int32) + 2
    state = (jnp.int32(0), jnp.ones((4, 5)), hidden(params, x))
    _, total, _ = lax.while_loop(
        lambda s: s[0] < count, lambda s: (s[0] + 1, s[1] + s[2], s[2]), state
    )
    return total @ params["v"]


def squared(params, x):
    return jnp.square(hidden(params, x)) @ params["v"]


def reshaped_without_order(scope, scale):
    one, two = scope.shape(0), scope.out_shape()
    return [mapped(scale.terms, lambda x: np.broadcast_to(x, one).reshape(two))]


def body_run_twice(scope, *scales):
    """What a loop once did: two steps were taken for a fixed point."""
    (body,) = scope.node.bodies
    count = len(scope.node.outputs)
    consts, rest = list(scales[:-4]), list(scales[-4:])
    stacked = [rest[3]._replace(terms=mapped(rest[3].terms, lambda x: x[0]))]
    carry = rest[:3]
    for _ in range(2):
        carry = scope.analysis.run(body, [*consts, *carry, *stacked])[:count]
    return [scale.terms for scale in carry]


def begun_with_zeros(scope, *scales):
    """The total is taken to have the scale of what is added."""
    return [(), scales[1].terms]


# A program, a primitive, a wrong rule for it, and the operation and line that must be named.
WRONG = {
    "an activation": (tanh, "tanh", same, "tanh at test_verify.py"),
    "an offset": (shifted, "add", same, "add at test_verify.py"),
    "a scatter that applies a function": (applied, "scatter", same, "(applied)"),
    "a gather that fills": (filled, "gather", same, "(filled)"),
    "a reshape in another order": (reordered, "reshape", reshaped_without_order, "(reordered)"),
    "a scan with a delay": (delayed, "scan", body_run_twice, "scan at test_verify.py"),
    "a loop that starts at one": (started_at_one, "while", begun_with_zeros, "(started_at_one)"),
    "a power": (squared, "square", same, "(squared)"),
    "a sum": (
        lambda params, x: jnp.cumsum(hidden(params, x), 1) @ params["v"],
        *("cumsum", same, "cumsum at"),
    ),
    "a maximum with one": (
        lambda params, x: jnp.maximum(x @ params["w"], 1.0) @ params["v"],
        *("max", same, "test_verify.py"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_raises_and_is_named(name):
    program, primitive, rule, named = WRONG[name]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, X))
    with registered(primitive, rule):
        unchecked = pathcond.trace_spec(program, PARAMS, X, check=False)
        assert pathcond.check_spec(unchecked, PARAMS, X) > 1e-3
        for params, x in ((PARAMS, X), shapes):
            with pytest.raises(pathcond.WrongSpecError, match="please report") as raised:
                pathcond.trace_spec(program, params, x)
            assert named in str(raised.value)


def test_the_smallest_failing_neuron_is_named():
    program = lambda params, x: jnp.tanh(hidden(params, x))[:, 2:4] @ params["u"][2:4]  # noqa: E731
    with registered("tanh", same), pytest.raises(pathcond.WrongSpecError) as raised:
        pathcond.trace_spec(program, PARAMS, X)
    # The first of the two that are read: the others enter no output.
    assert "neuron 0 of group 'w' (w[1] -> u[0])" in str(raised.value)


def noisy(params, x):
    """A logistic map: what is rounded away decides."""
    h = hidden(params, x)
    y = jax.nn.sigmoid(h @ params["v"])
    return lax.fori_loop(0, 200, lambda _, y: 3.99 * y * (1 - y), y)


def cancelling(params, x):
    h = hidden(params, x)
    return h @ params["v"] - h @ params["v"] * 1


def stepped(params, x):
    return jnp.round(1e3 * (hidden(params, x) @ params["v"]))


def infinite(params, x):
    return jnp.log(hidden(params, x) @ params["v"] * 0)


def called_back(params, x):
    y = hidden(params, x)
    return jax.pure_callback(_raise, y, y) @ params["v"]


def _raise(x):
    raise AssertionError("the check calls nothing of the user's")


def printing(params, x):
    h = hidden(params, x)
    jax.debug.callback(_raise, h)
    return h @ params["v"]


def half(params, x):
    w, v = (params[k].astype(jnp.float16) for k in "wv")
    h = jax.nn.relu(x.astype(jnp.float16) @ w) * jnp.float16(6e4)
    return (h @ v).astype(jnp.float32)


def integers(params, x):
    return jnp.argmax(hidden(params, x) @ params["v"], 1)


def solved(params, x):
    h = hidden(params, x) @ params["v"]
    return jnp.linalg.solve(h.T @ h + jnp.eye(2), h.T)


def written(params, x):
    reference = jax.new_ref(jnp.zeros((4, 5)))
    reference[...] = hidden(params, x)
    return reference[...] @ params["v"]


def random(params, x, key):
    h = hidden(params, x)
    return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0) @ params["v"]


RIGHT = (noisy, cancelling, stepped, infinite, called_back, printing, half, integers, solved)


@pytest.mark.parametrize("program", RIGHT, ids=lambda program: program.__name__)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e-30, 1e30, np.nan])
def test_nothing_else_fails(program, size):
    params = jax.tree.map(lambda p: p * jnp.float32(size), PARAMS)
    pathcond.trace_spec(program, params, X)
    pathcond.trace_spec(program, PARAMS, X * jnp.float32(size))
    pathcond.trace_spec(program, params, jax.ShapeDtypeStruct(X.shape, X.dtype))


def test_effects_random_keys_and_inputs_of_any_kind():
    pathcond.trace_spec(written, PARAMS, X)
    pathcond.trace_spec(random, PARAMS, X, jax.random.key(0))
    pathcond.trace_spec(random, PARAMS, X, jax.eval_shape(lambda: jax.random.key(0)))
    table = {"e": jnp.ones((7, 5)), "v": PARAMS["v"]}
    embedded = lambda params, i: jax.nn.relu(params["e"][i]) @ params["v"]  # noqa: E731
    for places in (jnp.zeros((2, 3), jnp.int32), jax.ShapeDtypeStruct((2, 3), jnp.int32)):
        assert pathcond.trace_spec(embedded, table, places).num_neurons == 5


def test_under_jit_numbers_are_drawn():
    @jax.jit
    def traced(params, x):
        assert pathcond.trace_spec(lambda p, x: hidden(p, x) @ p["v"], params, x).num_neurons == 5
        with registered("tanh", same), pytest.raises(pathcond.WrongSpecError):
            pathcond.trace_spec(tanh, params, x)
        return x

    traced(PARAMS, X)


def test_nothing_global_is_changed():
    before = np.geterr(), np.random.get_state()[1].copy(), jax.config.jax_enable_x64  # noqa: NPY002
    with registered("tanh", same), pytest.raises(pathcond.WrongSpecError):
        pathcond.trace_spec(tanh, PARAMS, X)
    assert np.geterr() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert jax.config.jax_enable_x64 == before[2]


def test_groups_of_the_callers_own_are_trusted():
    (group,) = pathcond.trace_spec(shifted_right, PARAMS, X).groups
    assert pathcond.trace_spec(tanh, PARAMS, X, groups=[group]).num_neurons == 5


def shifted_right(params, x):
    return hidden(params, x) @ params["v"]


def test_large_networks_are_tried_on_one_example_or_returned_as_they_are():
    shapes = {"w": (1000, 1000), "v": (1000, 2)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    x = jax.ShapeDtypeStruct((1 << 17, 1000), jnp.float32)
    with registered("tanh", same), pytest.raises(pathcond.WrongSpecError):
        pathcond.trace_spec(tanh, params, x)
    wide = {"w": (1000, 70_000), "v": (70_000, 2)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in wide.items()}
    with registered("tanh", same):
        assert pathcond.trace_spec(tanh, params, x).num_neurons == 70_000


def scaled(params, x):
    return jax.nn.relu(hidden(params, x) @ params["u"] * params["b"][None]) @ params["v"]


def first_operand(run, node, values):
    return values[:1]


def of_the_first_operand(run, node, values):
    return [run.combined(lambda x: x.sum(1, keepdims=True) + 0 * x, values[0])]


# A program, a primitive, a wrong rule for its paths, and the operation and line to be named.
WRONG_LIFTINGS = {
    "a factor that is left out": (scaled, "mul", first_operand, "mul at test_verify.py"),
    "a mixture": (scaled, "max", of_the_first_operand, "at test_verify.py"),
}


@pytest.mark.parametrize("name", WRONG_LIFTINGS)
def test_a_wrong_lifting_raises_and_is_named(name):
    program, primitive, rule, named = WRONG_LIFTINGS[name]
    params = {**PARAMS, "b": jnp.arange(1.0, 6.0)}
    with registered(primitive, rule, LIFTING):
        assert pathcond.trace_spec(program, params, X, check=False).num_neurons == 15
        with pytest.raises(pathcond.WrongSpecError, match="path lifting") as raised:
            pathcond.trace_spec(program, params, X)
    assert named in str(raised.value)
