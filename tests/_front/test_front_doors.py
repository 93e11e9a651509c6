"""The same job through every front door: the spec is found, the function stays, paths read well."""

import re

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from zoo.network import image, lenient, vector

import pathcond_jax as pathcond


class Model(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)])

    @lenient
    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.conv(x)))).mean((1, 2))
        return self.layers[1](nnx.relu(self.layers[0](x)))


@pytest.fixture
def model():
    return Model(nnx.Rngs(0))


def test_nnx_paths_are_those_of_the_module(model):
    spec = pathcond.nnx_spec(model, image(6))

    assert spec.num_neurons == 4 + 5
    assert [leaf.path for leaf in spec.leaves if leaf.trainable] == [
        "params/conv/bias",
        "params/conv/kernel",
        "params/layers/0/bias",
        "params/layers/0/kernel",
        "params/layers/1/bias",
        "params/layers/1/kernel",
        "params/norm/bias",
        "params/norm/scale",
    ]
    assert [group.name for group in spec.groups] == ["norm", "layers/0"]


def test_condition_nnx_updates_the_module_and_keeps_its_function(model):
    model.eval()
    kernel, before = model.layers[1].kernel[...], model(image(6))

    solution = pathcond.condition_nnx(model, image(6))

    assert solution.status == pathcond.Status.CONVERGED
    assert not np.allclose(model.layers[1].kernel[...], kernel)
    np.testing.assert_allclose(model(image(6)), before, atol=1e-5)


def test_condition_nnx_keeps_the_mode_and_takes_a_spec(model):
    spec = pathcond.nnx_spec(model, image(6))

    pathcond.condition_nnx(model, spec=spec)

    assert not model.norm.use_running_average
    assert not model.drop.deterministic
    assert pathcond.nnx_spec(model, image(6)).num_neurons == spec.num_neurons


def test_condition_nnx_takes_the_spec_where_condition_does(model):
    spec = pathcond.nnx_spec(model, image(6))
    by_name, by_place = nnx.clone(model), nnx.clone(model)

    pathcond.condition_nnx(by_name, spec=spec, criterion="enorm")
    pathcond.condition_nnx(by_place, spec, "enorm")

    for one, two in zip(
        jax.tree.leaves(nnx.state(by_name, nnx.Param)),
        jax.tree.leaves(nnx.state(by_place, nnx.Param)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)
    assert not np.allclose(by_place.layers[1].kernel[...], model.layers[1].kernel[...])
    with pytest.raises(pathcond.SpecError, match="got two specs"):
        pathcond.condition_nnx(model, spec, spec=spec)


def test_nnx_spec_works_from_shapes():
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))

    spec = pathcond.nnx_spec(abstract, jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32))

    assert spec.num_neurons == 9


def test_linen_with_mutable_collections_dropout_and_rngs():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))

    net, x = Net(), vector(6, 3)
    variables = lenient(net.init)(jax.random.key(0), x, train=False)

    @lenient
    def training(variables, x):
        rngs = {"dropout": jax.random.key(1)}
        return net.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])

    @lenient
    def inference(variables, x):
        return net.apply(variables, x, train=False)

    specs = [pathcond.trace_spec(fn, variables, x) for fn in (training, inference)]

    assert [spec.num_neurons for spec in specs] == [4, 4]
    assert str(specs[0].groups[0].incoming) == str(specs[1].groups[0].incoming)
    for spec in specs:
        assert pathcond.check_spec(spec, variables, x, trials=1) < 1e-5


def test_equinox():
    model, x = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0)), vector(5, 3)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    spec = pathcond.trace_spec(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, x)
    params, _ = pathcond.condition(params, spec)
    conditioned = eqx.combine(params, static)

    assert spec.num_neurons == 8
    assert spec.groups[0].incoming[0].path == "layers/0/weight"
    assert not np.allclose(conditioned.layers[0].weight, model.layers[0].weight)
    np.testing.assert_allclose(jax.vmap(conditioned)(x), jax.vmap(model)(x), atol=1e-5)


def test_haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 5, 2])(x)))
    x = vector(5, 3)
    params = lenient(net.init)(jax.random.key(0), x)
    spec = pathcond.trace_spec(lenient(net.apply), params, x)
    conditioned, _ = pathcond.condition(params, spec)

    assert spec.num_neurons == 9
    assert spec.groups[0].name == "mlp/~/linear_0"
    before, after = lenient(net.apply)(params, x), lenient(net.apply)(conditioned, x)
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_plain_jax():
    params = {"w": vector(3, 4, seed=1), "v": vector(4, 2, seed=2)}
    spec = pathcond.trace_spec(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], params, vector(5, 3))
    conditioned, _ = pathcond.condition(params, spec)

    assert spec.num_neurons == 4
    assert pathcond.check_spec(spec, conditioned) < 1e-5


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (
            lambda nnx_model, _, x: pathcond.trace_spec(nnx_model, x),
            "call nnx_spec(model, *inputs)",
        ),
        (lambda _, linen_model, x: pathcond.trace_spec(linen_model, {}, x), "pass model.apply"),
        (lambda _, linen_model, x: pathcond.nnx_spec(linen_model, x), "call trace_spec("),
    ],
)
def test_a_module_at_the_wrong_door_is_told_the_right_one(call, advice):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
    with pytest.raises(pathcond.SpecError, match=re.escape(advice)):
        call(model, nn.Dense(4), jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        (nnx.Linear(3, 4, rngs=nnx.Rngs(0)), "call condition_nnx(model, *inputs)"),
        (nn.Dense(4), "pass its variables"),
    ],
)
def test_a_module_in_place_of_parameters_is_told_what_to_pass(module, advice):
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    spec = pathcond.trace_spec(lambda p, x: nn.relu(x @ p["w"]) @ p["v"], params, jnp.ones((2, 3)))
    with pytest.raises(pathcond.SpecError, match=re.escape(advice)):
        pathcond.condition(module, spec)
