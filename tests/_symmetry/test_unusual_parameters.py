"""Operations with parameters that are not the usual ones: nothing is changed, little is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pathcond_jax as pathcond

RNG = np.random.default_rng(0)
W, U, V, X = (RNG.normal(size=shape) for shape in ((3, 5), (5, 5), (5, 2), (4, 3)))
PARAMS = {
    "w": W,
    "u": U,
    "v": V,
    "w2": W + 1,
    "u3": U[:3, :3],
    "v1": V[:1],
    "v7": np.concatenate([V, V[:2]]),
    "v4": np.concatenate([V, -V]),
}


def hidden(params, x):
    return jax.nn.relu(x @ params["w"])


def applied_column(params, x):
    return hidden(params, x).at[:, 0].apply(jnp.tanh) @ params["v"]


def applied_row(params, x):
    return hidden(params, x).at[0].apply(lambda v: v + 1) @ params["v"]


def applied_somewhere(params, x):
    """At a position that depends on the input, all columns are pinned."""
    return hidden(params, x).at[:, jnp.argmax(x[0])].apply(jnp.tanh) @ params["v"]


def filled_known(params, x):
    rows = jnp.take(hidden(params, x), jnp.array([0, 1, 7]), axis=0, mode="fill", fill_value=1.0)
    return rows @ params["v"]


def filled_unknown(params, x):
    places = jnp.argsort(x[:, 0]) + 2
    rows = jnp.take(hidden(params, x), places, axis=0, mode="fill", fill_value=1.0)
    return rows @ params["v"]


def filled_inside(params, x):
    rows = jnp.take(hidden(params, x), jnp.array([0, 1, 3]), axis=0, mode="fill", fill_value=1.0)
    return rows @ params["v"]


def filled_along(params, x):
    places = jnp.array([[0], [9], [1], [2]])
    taken = jnp.take_along_axis(hidden(params, x), places, 1, mode="fill", fill_value=2.0)
    return taken @ params["v1"]


def dependent_on_platform(params, x):
    h = lax.platform_dependent(hidden(params, x), cpu=lambda h: h + h, default=lambda h: 2 * h)
    return h @ params["v"]


def reshaped_backward(params, x):
    h = lax.reshape(hidden(params, x), (5, 4), dimensions=(1, 0))
    return params["v"].T @ h


def raveled_backward(params, x):
    return hidden(params, x).ravel(order="F").reshape(5, 4).T @ params["v"]


def raveled_under_vmap(params, x):
    rows = jax.vmap(lambda r: r.ravel(order="F"))(hidden(params, x)[:, None, :])
    return rows @ params["v"]


def added(params, x):
    return jax.nn.relu(x @ params["w"] + (2 * x) @ params["w2"]) @ params["v"]


def added_by_vjp(params, x):
    """The same sum, made by the transpose of a copy: ``add_any``."""
    copies = jax.linear_transpose(lambda y: (y, y), jnp.zeros((4, 5)))
    (total,) = copies((x @ params["w"], (2 * x) @ params["w2"]))
    return jax.nn.relu(total) @ params["v"]


def subtracted(params, x):
    return jax.nn.relu(x @ params["w"]).at[0:1].subtract(hidden(params, x)[1:2]) @ params["v"]


def added_negative(params, x):
    return jax.nn.relu(x @ params["w"]).at[0:1].add(-hidden(params, x)[1:2]) @ params["v"]


def delayed(params, x):
    """A carry that comes out two steps later than it goes in."""

    def step(carry, row):
        one, two, _ = carry
        return (jax.nn.relu(row @ params["w"] + one @ params["u"]), one, jnp.tanh(two)), None

    zeros = jnp.zeros(5)
    (_, _, last), _ = lax.scan(step, (zeros, zeros, zeros), x)
    return last @ params["v"]


def much_delayed(params, x):
    def step(carry, row):
        first, *rest = carry
        entering = jax.nn.relu(row @ params["w"])
        return (entering, first, *rest[:-1]), jnp.sin(rest[-1])

    _, outputs = lax.scan(step, (jnp.zeros(5),) * 5, jnp.concatenate([x, x]))
    return outputs @ params["v"]


def recurrent(params, x):
    def step(carry, row):
        carry = jax.nn.relu(row @ params["w"] + carry @ params["u"])
        return carry, carry

    return lax.scan(step, jnp.zeros(5), x)[1] @ params["v"]


def recurrent_from_one(params, x):
    def step(carry, row):
        return jax.nn.relu(row @ params["w"] + carry @ params["u"]), None

    return lax.scan(step, jnp.ones(5), x)[0] @ params["v"]


def written(params, x):
    reference = jax.new_ref(jnp.zeros((4, 5)))
    reference[...] = hidden(params, x)
    return jnp.tanh(reference[...]) @ params["v"]


def printed(params, x):
    h = hidden(params, x)
    jax.debug.callback(lambda h: None, h)
    return h @ params["v"]


def called_back(params, x):
    h = hidden(params, x)
    shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
    return jax.pure_callback(np.tanh, shape, h, vmap_method="sequential") @ params["v"]


def passed_on(params, x):
    """Each step leaves another scale: in a loop that is short enough to be written out."""

    def step(carry, _):
        one, two = carry
        return (jax.nn.relu(two), jax.nn.relu(one @ params["u3"])), two

    (_, last), seen = lax.scan(step, (x, jnp.zeros((4, 3))), None, length=3)
    return (last + seen[0]) @ params["v"][:3]


def read_by_no_later_step(params, x):
    """What a step adds to one value reaches the other a step later, when the loop is over."""

    def step(carry, _):
        one, two = carry
        return (two, one + 1.0), None

    h = hidden(params, x)
    return lax.scan(step, (h, h), None, length=1)[0][0] @ params["v"]


def looped(params, x):
    count = (x[0, 0] > -100).astype(jnp.int32) + 2
    state = (jnp.int32(0), hidden(params, x))
    _, h = lax.while_loop(
        lambda s: s[0] < count, lambda s: (s[0] + 1, jax.nn.relu(s[1] @ params["u"])), state
    )
    return h @ params["v"]


def halved(params, x):
    h = lax.fori_loop(0, 3, lambda _, h: h / 2, hidden(params, x))
    return h @ params["v"]


def mapped(params, x):
    return lax.map(lambda row: jax.nn.relu(row @ params["w"]) @ params["v"], x)


def scanned_together(params, x):
    return lax.associative_scan(jnp.maximum, hidden(params, x)) @ params["v"]


def repeated(params, x):
    return jnp.tile(hidden(params, x), (2, 1)) @ params["v"]


def repeated_channels(params, x):
    return jnp.tile(hidden(params, x), (1, 2)) @ params["v4"]


def stacked(params, x):
    h = jnp.stack([hidden(params, x), jax.nn.relu((-x) @ params["w"])], axis=1)
    return h.sum(1) @ params["v"]


def unstacked(params, x):
    rows = jnp.unstack(hidden(params, x), axis=1)
    return sum(row[:, None] * params["v"][k][None] for k, row in enumerate(rows))


def padded_with_a_parameter(params, x):
    padding = ((0, -1, 1), (1, 1, 0))
    return lax.pad(hidden(params, x), params["v"][0, 0], padding) @ params["v7"]


def padded_and_cut(params, x):
    return lax.pad(hidden(params, x), params["v"][0, 0], ((0, 0, 0), (1, -1, 0))) @ params["v"]


# Neurons that each has; the layers of the programs are 5 wide.
PROGRAMS = {
    dependent_on_platform: 5,
    # The column is pinned, the others are not.
    applied_column: 4,
    applied_row: 0,
    applied_somewhere: 0,
    filled_known: 0,
    filled_unknown: 0,
    filled_inside: 5,
    filled_along: 0,
    reshaped_backward: 5,
    raveled_backward: 5,
    raveled_under_vmap: 5,
    added: 5,
    added_by_vjp: 5,
    subtracted: 5,
    added_negative: 5,
    delayed: 0,
    much_delayed: 0,
    recurrent: 5,
    recurrent_from_one: 0,
    written: 0,
    printed: 5,
    called_back: 0,
    passed_on: 1,
    read_by_no_later_step: 5,
    looped: 5,
    halved: 5,
    mapped: 5,
    scanned_together: 5,
    repeated: 5,
    repeated_channels: 5,
    stacked: 5,
    unstacked: 5,
    # All channels and the filling have one scale.
    padded_with_a_parameter: 1,
    padded_and_cut: 4,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_function_and_number_of_neurons(program):
    params, x = jax.tree.map(jnp.asarray, (PARAMS, X))
    spec = pathcond.trace_spec(program, params, x)
    scales = tuple(jnp.asarray(RNG.normal(size=group.size)) for group in spec.groups)
    before = program(params, x)
    after = program(pathcond.rescale(params, spec, scales), x)

    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-12)
    assert spec.num_neurons == PROGRAMS[program], spec
