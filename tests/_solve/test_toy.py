"""The paper's figure 1: one neuron, three parameters, and gradient descent from three starts."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond

STEPS, LEARNING_RATE, THRESHOLD = 15000, 5e-3, 1e-3


class Toy(NamedTuple):
    """The network u · ReLU(v x + w)."""

    u: jax.Array
    v: jax.Array
    w: jax.Array


# The starts are (v, w, u) in the paper.
STARTS = {"A": (4.0, 3.0, 1.0), "B": (2.0, 4.0, 1.0), "C": (4.0, -2.0, 1.0)}
HITS = {"A": 801, "B": 1660, "C": 3450}

with np.load(pathlib.Path(__file__).parents[1] / "golden" / "toy_figure_1.npz") as file:
    stored = dict(file)


def toy_apply(params, x):
    hidden = jax.nn.relu(x[:, None] @ params.v + params.w[None])
    return (hidden @ params.u)[:, 0]


def start(name):
    v, w, u = STARTS[name]
    return Toy(u=jnp.full((1, 1), u), v=jnp.full((1, 1), v), w=jnp.full((1,), w))


def conditioned(params):
    spec = pathcond.trace_spec(toy_apply, params, stored["X"])
    return pathcond.condition(params, spec, method="coordinate")[0]


@jax.jit
def losses(params, x):
    """The loss before each of the steps of gradient descent."""

    def loss(params):
        return jnp.mean((toy_apply(params, x) - jax.nn.relu(x)) ** 2)

    def step(params, _):
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads), value

    return jax.lax.scan(step, params, length=STEPS)[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", STARTS)
class TestFigureOne:
    def test_rescaled_parameters(self, name):
        result = np.concatenate([leaf.ravel() for leaf in conditioned(start(name))])
        np.testing.assert_allclose(result, stored[f"rescaled_{name}"], rtol=1e-6)

    def test_conditioned_descent_hits_at_their_step(self, name):
        values = np.asarray(losses(conditioned(start(name)), jnp.asarray(stored["X"])))
        assert np.argmax(values < THRESHOLD) == HITS[name]
        assert values[-1] < 1e-16
        theirs = stored[f"loss_path_{name}"]
        np.testing.assert_allclose(values[::100], theirs, rtol=1e-6, atol=1e-20)

    def test_plain_descent_never_hits(self, name):
        values = np.asarray(losses(start(name), jnp.asarray(stored["X"])))
        assert (values > THRESHOLD).all()
        np.testing.assert_allclose(values[::100], stored[f"loss_plain_{name}"], rtol=1e-9)
