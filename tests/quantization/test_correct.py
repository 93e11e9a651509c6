"""Biases that take up what rounding shifts on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pathcond_jax as pathcond
from pathcond_jax.quantization import correct_biases


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 8):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
        return nn.Dense(4)(x.mean((1, 2)))


def rounded(params, bits):
    """One scale per kernel."""

    def one(leaf):
        step = jnp.abs(leaf).max() / (2 ** (bits - 1) - 1)
        return jnp.round(leaf / step) * step if leaf.ndim > 1 else leaf

    return jax.tree.map(one, params)


def images(seed, count):
    return jnp.abs(jax.random.normal(jax.random.key(seed), (count, 6, 6, 3)))


model = Net()
params = model.init(jax.random.key(0), images(1, 1))
quantized = rounded(params, 3)
corrected = correct_biases(model.apply, params, quantized, images(1, 64))


def test_outputs_keep_their_means_on_the_data():
    wanted = model.apply(params, images(1, 64)).mean(0)
    np.testing.assert_allclose(model.apply(corrected, images(1, 64)).mean(0), wanted, atol=1e-5)
    before = model.apply(quantized, images(1, 64)).mean(0)
    assert float(jnp.abs(before - wanted).max()) > 1e-2


def test_the_error_shrinks_on_other_data():
    wanted = model.apply(params, images(2, 256))
    before, after = (
        float(jnp.square(model.apply(tree, images(2, 256)) - wanted).mean())
        for tree in (quantized, corrected)
    )
    assert after < 0.5 * before


def test_every_layer_keeps_its_mean_and_kernels_stay():
    def first(tree):
        conv = nn.Conv(8, (3, 3))
        return conv.apply({"params": tree["params"]["Conv_0"]}, images(1, 64)).mean((0, 1, 2))

    np.testing.assert_allclose(first(corrected), first(params), atol=1e-5)
    for one, two in zip(jax.tree.leaves(quantized), jax.tree.leaves(corrected), strict=True):
        if one.ndim > 1:
            np.testing.assert_array_equal(one, two)
        else:
            assert (one != two).any()


def test_what_was_not_quantized_is_not_moved():
    same = correct_biases(model.apply, params, params, images(1, 8))
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_bad_calls_are_named():
    with pytest.raises(pathcond.SpecError, match="no tree like params"):
        correct_biases(model.apply, params, quantized["params"], images(1, 8))
    bare = {"w": jnp.ones((2, 3))}
    with pytest.raises(pathcond.SpecError, match="no bias is added"):
        correct_biases(lambda p, x: x @ p["w"], bare, bare, jnp.ones((1, 2)))
