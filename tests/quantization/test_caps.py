"""Clipped activations whose bounds move with their neurons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

import pathcond_jax as pathcond
from pathcond_jax.quantization import CappingWarning, caps_as_parameters, fold_batch_norm


class MobileBlocks(nn.Module):
    """ReLU6 after batch normalization, around a depthwise convolution."""

    @nn.compact
    def __call__(self, x):
        for features, groups in ((8, 1), (8, 8), (6, 1)):
            x = nn.Conv(features, (3, 3), feature_group_count=groups, use_bias=False)(x)
            x = nn.relu6(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(4)(x.mean((1, 2)))


def images(count):
    return 20.0 * jax.random.normal(jax.random.key(1), (count, 5, 5, 3))


def assert_same(one, two):
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-6 * float(jnp.abs(one).max()))


def test_folded_networks_with_relu6_are_rescaled_together_with_their_caps():
    model = MobileBlocks()
    variables = model.init(jax.random.key(0), images(1))
    folded, params = fold_batch_norm(model.apply, variables, images(1))
    capped, tree = caps_as_parameters(folded, params, images(1))
    assert [cap.shape for cap in tree["caps"].values()] == [(8,), (8,), (6,)]
    assert_same(model.apply(variables, images(4)), capped(tree, images(4)))

    spec = pathcond.trace_spec(capped, tree, images(1), rescale_state=True)
    assert spec.num_neurons == 8 + 8 + 6
    moved, _ = pathcond.condition(tree, spec, "equalize")
    for before, after in zip(tree["caps"].values(), moved["caps"].values(), strict=True):
        assert float(jnp.abs(jnp.log(after / before)).max()) > 0.05
    outputs = jax.jit(capped)(moved, images(4))
    assert_same(model.apply(variables, images(4)), outputs)
    # The caps bind: without them the function is another one.
    free = {**moved, "caps": jax.tree.map(lambda cap: 1e6 * cap, moved["caps"])}
    assert float(jnp.abs(capped(free, images(4)) - outputs).max()) > 1e-2


CLIPS = {
    "clip": lambda x: jnp.clip(x, -0.5, 2.0),
    "clamp": lambda x: jax.lax.clamp(-0.5, x, 2.0),
    "minimum": lambda x: jnp.minimum(x, 1.0),
    "axis 1": lambda x: jnp.clip(x.T, -0.5, 2.0).T,
}


def test_folded_and_capped_networks_are_exported_for_any_number_of_examples():
    model = MobileBlocks()
    variables = model.init(jax.random.key(0), images(1))
    folded, params = fold_batch_norm(model.apply, variables, images(1))
    capped, tree = caps_as_parameters(folded, params, images(1))
    examples = jax.ShapeDtypeStruct(export.symbolic_shape("b, 5, 5, 3"), jnp.float32)
    exported = export.export(jax.jit(lambda x: capped(tree, x)))(examples)
    assert_same(model.apply(variables, images(3)), exported.call(images(3)))


@pytest.mark.parametrize("clip", CLIPS)
def test_both_bounds_move(clip):
    def apply_fn(params, x):
        return CLIPS[clip](x @ params["w"]) @ params["v"]

    params = {"w": 3.0 * jnp.arange(1.0, 7.0).reshape(2, 3), "v": jnp.ones((3, 1))}
    x = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
    capped, tree = caps_as_parameters(apply_fn, params, x)
    assert len(tree["caps"]) == (1 if clip == "minimum" else 2)
    spec = pathcond.trace_spec(capped, tree, x, rescale_state=True)
    assert spec.num_neurons == 3
    moved, _ = pathcond.condition(tree, spec, "enorm")
    assert_same(apply_fn(params, x), capped(moved, x))


def test_zero_is_no_cap():
    params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}
    _, tree = caps_as_parameters(
        lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], params, jnp.ones((1, 2))
    )
    assert tree["caps"] == {}


def test_bounds_of_no_layers_channels_are_named():
    params = {"w": jnp.ones((2, 3))}
    with pytest.warns(CappingWarning, match="min at test_caps.py:.*stays a constant"):
        capped, tree = caps_as_parameters(
            lambda p, x: jnp.minimum(x, 1.0) @ p["w"], params, jnp.ones((1, 2))
        )
    assert tree["caps"] == {}
    assert capped(tree, 3.0 * jnp.ones((1, 2))).tolist() == [[2.0, 2.0, 2.0]]


def test_a_tree_that_has_caps_is_refused():
    with pytest.raises(pathcond.SpecError, match='key "caps" already'):
        caps_as_parameters(lambda p, x: x, {"caps": jnp.ones(2)}, jnp.ones((1, 2)))
