"""A network that refuses path lifting only at its head is told to return the logits."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from zoo.network import draw, lenient

import pathcond_jax as pathcond

x = jnp.ones((2, 4))
key = jax.random.key(0)


class Linen(nn.Module):
    head: object
    hidden: object = nn.relu

    @nn.compact
    def __call__(self, x):
        x = self.hidden(nn.Dense(6)(x))
        return self.head(nn.Dense(3)(x))


def in_linen(head, **options):
    model = Linen(head, **options)
    return model.apply, draw(jax.eval_shape(lenient(model.init), key, x))


def in_nnx(head):
    rngs = nnx.Rngs(0)
    first, last = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
    graphdef, params = nnx.split(nnx.Sequential(first, nnx.relu, last, head))
    return lambda p, x: nnx.merge(graphdef, p)(x), params


def in_equinox(head):
    model = eqx.nn.MLP(4, 3, 6, 1, final_activation=head, key=key)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def one(params, x):
        return eqx.combine(params, static)(x)

    return lambda p, x: jax.vmap(one, (None, 0))(p, x), params


def in_haiku(head):
    net = hk.without_apply_rng(hk.transform(lambda x: head(hk.nets.MLP([6, 3])(x))))
    return net.apply, draw(jax.eval_shape(lenient(net.init), key, x))


def error_of(apply_fn, params):
    spec = pathcond.trace_spec(lenient(apply_fn), params, x)
    with pytest.raises(pathcond.NotPathLiftableError) as error:
        pathcond.path_norm(params, spec)
    return str(error.value)


HEADS = {jax.nn.softmax: "softmax", jax.nn.log_softmax: "log_softmax", jax.nn.sigmoid: ""}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("framework", [in_linen, in_nnx, in_equinox, in_haiku])
def test_a_head_is_left_to_the_loss(framework, head):
    # Equinox applies its last activation to each output alone.
    if framework is in_equinox:
        head = jax.nn.sigmoid
    said = error_of(*framework(head))
    assert "let apply_fn return the logits" in said
    assert f"go into {HEADS[head]}" in said
    assert "test_head.py:" in said


def two_outputs(x):
    return jax.nn.softmax(x), x


def test_one_output_of_several_is_a_head():
    assert "let apply_fn return the logits" in error_of(*in_linen(two_outputs))


@pytest.mark.parametrize("hidden", [jax.nn.gelu, jax.nn.softmax, jnp.tanh])
def test_no_advice_where_parameters_follow(hidden):
    said = error_of(*in_linen(lambda x: x, hidden=hidden))
    assert "logits" not in said
    assert "criterion='enorm'" in said


def test_no_advice_where_the_outputs_depend_on_more():
    said = error_of(*in_linen(lambda y: jax.nn.sigmoid(y) * jnp.sum(x)))
    assert "logits" in said

    def gated(params, x):
        return jax.nn.sigmoid(x @ params["w"]) * (x @ params["v"])

    params = {"w": jnp.ones((4, 3)), "v": jnp.ones((4, 3))}
    spec = pathcond.trace_spec(gated, params, x)
    with pytest.raises(pathcond.NotPathLiftableError, match="sigmoid") as error:
        pathcond.path_norm(params, spec)
    assert "logits" not in str(error.value)
