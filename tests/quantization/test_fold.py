"""Batch normalization goes into the layer before it, and the function stays."""

import functools
import warnings

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pathcond_jax as pathcond
from pathcond_jax.quantization import FoldingWarning, fold_batch_norm

normalized = functools.partial(nn.BatchNorm, use_running_average=True)


class Blocks(nn.Module):
    """A plain, a depthwise and a pointwise convolution, a residual sum, two dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(normalized()(nn.Conv(6, (3, 3), use_bias=False)(x)))
        y = nn.relu(normalized()(nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False)(x)))
        y = normalized(use_scale=False)(nn.Conv(6, (1, 1))(y))
        x = nn.relu(x + y)
        x = nn.relu(normalized(use_bias=False)(nn.Dense(5)(x.mean((1, 2)))))
        return nn.Dense(3)(x)


def drawn(tree, seed=0):
    """Random numbers in place of all, positive for variances."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape)
        positive = "var" in jax.tree_util.keystr(path)
        return jnp.asarray(np.exp(value) if positive else value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def images(count, size=5, channels=3):
    return jax.random.normal(jax.random.key(1), (count, size, size, channels))


def assert_same(one, two, rtol=2e-6):
    scale = float(jnp.abs(one).max())
    np.testing.assert_allclose(one, two, rtol=0, atol=rtol * scale)


def quietly(function, *args):
    """Whatever is not folded is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FoldingWarning)
        return function(*args)


model = Blocks()
variables = drawn(jax.eval_shape(model.init, jax.random.key(0), images(1)))
folded, params = quietly(fold_batch_norm, model.apply, variables, images(1))


def test_linen_networks_lose_their_statistics_and_keep_their_function():
    assert set(params) == {"params"}
    # The biases of the convolutions have no other place than those of their normalizations.
    kept = {name: set(layer) for name, layer in params["params"].items()}
    assert kept["Conv_0"] == {"kernel"}
    assert kept["BatchNorm_0"] == {"bias"}
    assert kept["Dense_1"] == {"kernel", "bias"}
    assert sum(len(layer) for layer in kept.values()) == 2 * 5
    for count in (1, 4):
        assert_same(model.apply(variables, images(count)), folded(params, images(count)))
        assert_same(folded(params, images(count)), jax.jit(folded)(params, images(count)))


def test_folded_networks_are_traced_and_conditioned():
    spec = pathcond.trace_spec(folded, params, images(1))
    assert spec.num_neurons == 6 + 6 + 5
    moved, solution = pathcond.condition(params, spec, "equalize")
    assert max(float(jnp.abs(z).max()) for z in solution.log_scales) > 0.1
    assert_same(model.apply(variables, images(4)), folded(moved, images(4)), 1e-5)


def test_folding_runs_under_jit_and_grad():
    loss = jax.jit(jax.grad(lambda p: folded(p, images(2)).sum()))
    assert jax.tree.structure(loss(params)) == jax.tree.structure(params)


def test_nnx_modules_are_folded():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.out = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    graphdef, params, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    tree = drawn({"params": nnx.to_pure_dict(params), "state": nnx.to_pure_dict(state)})

    def apply_fn(tree, x):
        for part, pure in ((params, tree["params"]), (state, tree["state"])):
            nnx.replace_by_pure_dict(part, pure)
        return nnx.merge(graphdef, params, state)(x)

    function, found = quietly(fold_batch_norm, apply_fn, tree, images(1))
    assert "state" not in found
    assert_same(apply_fn(tree, images(3)), function(found, images(3)))


def test_haiku_networks_are_folded():
    def network(x, train):
        x = hk.Conv2D(4, 3)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=train)
        return hk.Linear(2)(jax.nn.relu(x).mean((1, 2)))

    transformed = hk.without_apply_rng(hk.transform_with_state(network))
    made = transformed.init(jax.random.key(0), images(1), True)
    names = ("params", "state")
    tree = dict(zip(names, made, strict=True))
    tree["params"] = drawn(tree["params"])
    tree["state"] = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.5, drawn(tree["state"]))

    def apply_fn(tree, x):
        return transformed.apply(tree["params"], tree["state"], x, False)[0]

    function, found = quietly(fold_batch_norm, apply_fn, tree, images(1))
    assert_same(apply_fn(tree, images(3)), function(found, images(3)))
    # The state that counts steps is read by nothing.
    assert not jax.tree.leaves(found.get("state", {}))


def test_equinox_layers_are_folded_under_vmap():
    keys = jax.random.split(jax.random.key(0), 2)
    conv, linear = eqx.nn.Conv2d(3, 4, 3, key=keys[0]), eqx.nn.Linear(4, 2, key=keys[1])

    def apply_fn(tree, x):
        def one(x):
            statistics, scale = tree["batch_stats"], tree["params"]["scale"]
            y = tree["params"]["conv"](x)
            y = (y - statistics["mean"][:, None, None]) / jnp.sqrt(
                statistics["var"][:, None, None] + 1e-5
            )
            y = jax.nn.relu(y * scale[:, None, None] + tree["params"]["shift"][:, None, None])
            return tree["params"]["linear"](y.mean((1, 2)))

        return jax.vmap(one)(x)

    four = jnp.linspace(0.5, 2.0, 4)
    learned = {"conv": conv, "linear": linear, "scale": four, "shift": four - 1}
    tree = {"params": learned, "batch_stats": {"mean": four, "var": four}}
    x = jnp.moveaxis(images(3), 3, 1)
    function, found = quietly(fold_batch_norm, apply_fn, tree, x[:1])
    assert "batch_stats" not in found
    assert_same(apply_fn(tree, x), function(found, x))


def test_what_comes_before_the_layer_is_named():
    class PreActivation(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(nn.relu(normalized(name="first")(x)))
            return nn.Dense(2)(nn.relu(normalized(name="second")(x)).mean((1, 2)))

    network = PreActivation()
    tree = drawn(jax.eval_shape(network.init, jax.random.key(0), images(1)))
    with pytest.warns(FoldingWarning, match="batch_stats/first/mean: sub.* at test_fold.py:"):
        function, found = fold_batch_norm(network.apply, tree, images(1))
    assert set(found["batch_stats"]) == {"first"}
    assert_same(network.apply(tree, images(2)), function(found, images(2)))


STAYS = {
    "read twice": lambda p, mean, x, y: (y - mean) * p["scale"][None] + y,
    "an activation between": lambda p, mean, x, y: (jnp.tanh(y) - mean) * p["scale"][None],
    "another kernel": lambda p, mean, x, y: (y - mean) * p["scale"][None] + jnp.tanh(x) @ p["w"],
}


@pytest.mark.parametrize("case", STAYS)
def test_what_is_no_affine_map_of_a_layer_of_its_own_stays(case):
    def apply_fn(tree, x):
        p, mean = tree["params"], tree["batch_stats"]["mean"][None]
        return STAYS[case](p, mean, x, x @ p["w"])

    tree = drawn(
        {
            "params": {"w": jnp.ones((3, 3)), "scale": jnp.ones(3)},
            "batch_stats": {"mean": jnp.ones(3)},
        }
    )
    x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    with pytest.warns(FoldingWarning, match="batch_stats/mean: sub"):
        function, found = fold_batch_norm(apply_fn, tree, x)
    np.testing.assert_array_equal(found["params"]["w"], tree["params"]["w"])
    assert_same(apply_fn(tree, x), function(found, x))


def test_training_mode_is_named():
    def apply_fn(tree, x):
        p, mean = tree["params"], tree["batch_stats"]["mean"]
        y = x @ p["w"]
        batch = y.mean(0)
        return (y - batch[None]) * p["scale"][None], 0.9 * mean + 0.1 * batch

    tree = drawn(
        {
            "params": {"w": jnp.ones((3, 3)), "scale": jnp.ones(3)},
            "batch_stats": {"mean": jnp.ones(3)},
        }
    )
    with pytest.warns(FoldingWarning, match="not in inference mode: batch_stats/mean: "):
        fold_batch_norm(apply_fn, tree, jnp.ones((2, 3)))


def test_a_network_without_normalization_comes_back_as_it_is():
    tree = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}

    def apply_fn(tree, x):
        return jax.nn.relu(x @ tree["w"] + tree["b"][None])

    function, found = quietly(fold_batch_norm, apply_fn, tree, jnp.ones((1, 3)))
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert_same(apply_fn(tree, jnp.ones((2, 3))), function(found, jnp.ones((2, 3))))


def test_parameters_of_another_network_are_refused():
    with pytest.raises(pathcond.SpecError, match="11 parameters given, the folded network has 10"):
        folded({**params, "more": jnp.ones(2)}, images(1))
