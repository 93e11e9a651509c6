"""Facts about the path lifting and its optimum, on the networks of the zoo that have one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from zoo import NETWORKS
from zoo.network import lenient

import pathcond_jax as pathcond
from pathcond_jax._action.check import random_log_scales

LIFTABLE = (
    *("mlp", "mlp-leaky", "mlp-prelu", "mlp-where", "mlp-abs", "mlp-dropout", "mlp-dropout-on"),
    *("masked-weights", "layer-applied-twice", "tied-autoencoder", "tied-deep-autoencoder"),
    *("ensemble", "scan-over-layers", "scan-over-layers-remat", "plain-jax", "equinox-mlp"),
    *("nnx-cnn", "haiku-resnet", "lenet", "lenet-average", "vgg16", "resnet18"),
    *("resnet-bottleneck", "densenet", "mobilenetv2", "unet-transpose", "unet-nearest"),
    *("unet-bilinear", "unet-circular"),
)


def traced(name):
    network = NETWORKS[name]()
    spec = pathcond.trace_spec(network.apply_fn, network.params, network.x)
    return network.params, spec, random_log_scales(jax.random.key(0), spec)


def relative(one, two):
    """The largest difference of any leaf, relative to the leaf's largest entry."""
    differences = jax.tree.map(
        lambda a, b: np.max(abs(a - b), initial=0) / max(np.max(abs(a), initial=0), 1e-30),
        *(jax.tree.map(np.asarray, tree) for tree in (one, two)),
    )
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize("name", LIFTABLE)
def test_what_rescaling_does_to_the_lifting_and_to_the_optimum(name):
    params, spec, log_scales = traced(name)

    @jax.jit
    def facts(params):
        norm, gram = pathcond.path_norm(params, spec), pathcond.gram_diagonal(params, spec)
        return norm, gram, pathcond.condition(params, spec) if spec.groups else None

    norm, gram, optimum = facts(params)
    norm_after, gram_after, same = facts(pathcond.rescale(params, spec, log_scales))

    np.testing.assert_allclose(norm_after, norm, rtol=1e-4)
    # g_i becomes g_i e^{2(Bz)_i}, as the inverse of a squared parameter does.
    assert relative(pathcond.rescale(gram, spec, log_scales, power=-2), gram_after) < 1e-4
    if name != "tied-autoencoder":
        # Only a neuron whose outputs are all dropped stays where it was.
        dropped = [
            jnp.where(z == 0, r, 0) for z, r in zip(optimum[1].log_scales, log_scales, strict=True)
        ]
        assert int(optimum[1].status) == pathcond.Status.CONVERGED
        assert sum(map(np.count_nonzero, dropped)) == (name == "mlp-dropout-on")
        assert relative(pathcond.rescale(optimum[0], spec, tuple(dropped)), same[0]) < 1e-4
    if name == "tied-deep-autoencoder":
        # A path that meets one entry k times counts k² times in its g, and Euler's relation k.
        return
    # Euler: what enters and what leaves a neuron carry the same paths.
    shares, total = [], 0.0
    for leaf, g, p in zip(spec.leaves, *map(jax.tree.leaves, (gram, params)), strict=True):
        share = np.sqrt(g) * np.asarray(p) if leaf.trainable else p
        shares.append(jnp.asarray(share))
        total += float(np.sum(share**2)) if leaf.trainable else 0.0
    for difference in pathcond.conserved_quantities(jax.tree.unflatten(spec.treedef, shares), spec):
        assert np.abs(difference).max() < 1e-5 * total


def test_a_convolution_is_a_dense_layer_with_shared_weights(x64):
    rng = np.random.default_rng(0)
    kernel, head = rng.normal(size=(3, 2, 4)), rng.normal(size=(6 * 4, 3))

    def convolution(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jax.nn.relu(x).reshape(x.shape[0], -1) @ params["head"]

    def dense(params, x):
        return jax.nn.relu(x.reshape(x.shape[0], -1) @ params["kernel"]) @ params["head"]

    place = np.zeros((6, 2, 6, 4, 3, 2, 4))
    for out in range(6):
        for tap in range(3):
            if 0 <= out + tap - 1 < 6:
                for i, o in np.ndindex(2, 4):
                    place[out + tap - 1, i, out, o, tap, i, o] = 1
    wide = np.einsum("aibotjk,tjk->aibo", place, kernel).reshape(12, 24)
    x = jnp.ones((1, 6, 2))
    grams = []
    for apply, weight in ((convolution, kernel), (dense, wide)):
        params = {"kernel": jnp.asarray(weight), "head": jnp.asarray(head)}
        grams.append(pathcond.gram_diagonal(params, pathcond.trace_spec(apply, params, x)))
    wide = np.asarray(grams[1]["kernel"]).reshape(6, 2, 6, 4)
    shared = np.einsum("aibotjk,aibo->tjk", place, wide)
    np.testing.assert_allclose(grams[0]["kernel"], shared, rtol=1e-12)
    np.testing.assert_allclose(grams[0]["head"], grams[1]["head"], rtol=1e-12)


def test_batch_normalization_is_the_folded_convolution(x64):
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), param_dtype=jnp.float64)(x)
            x = nn.BatchNorm(use_running_average=True, epsilon=0.0, param_dtype=jnp.float64)(x)
            return nn.Conv(2, (3, 3), param_dtype=jnp.float64)(nn.relu(x))

    class Folded(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), param_dtype=jnp.float64)(x))
            return nn.Conv(2, (3, 3), param_dtype=jnp.float64)(x)

    model, folded, x = Normalized(), Folded(), jnp.ones((1, 5, 5, 3))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 2.0, a.shape)),
        lenient(model.init)(jax.random.key(0), x),
    )
    params, stats = variables["params"], variables["batch_stats"]["BatchNorm_0"]
    first, scale = params["Conv_0"], params["BatchNorm_0"]["scale"] / jnp.sqrt(stats["var"])
    # γ and β, both of the affine map and of the shift by −mean, start or carry paths of their own:
    # so does a folded bias whose parts are listed one by one, with squares that add.
    bias = jnp.sqrt(
        (scale * first["bias"]) ** 2
        + (scale * stats["mean"]) ** 2
        + params["BatchNorm_0"]["bias"] ** 2
    )
    merged = {
        "Conv_0": {"kernel": np.asarray(first["kernel"]) * np.asarray(scale), "bias": bias},
        "Conv_1": params["Conv_1"],
    }
    norms = [
        pathcond.path_norm(tree, pathcond.trace_spec(lenient(net.apply), tree, x))
        for net, tree in ((model, variables), (folded, {"params": merged}))
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-12)
    # The weights behind see the same paths.
    grams = [
        pathcond.gram_diagonal(tree, pathcond.trace_spec(lenient(net.apply), tree, x))["params"][
            "Conv_1"
        ]
        for net, tree in ((model, variables), (folded, {"params": merged}))
    ]
    np.testing.assert_allclose(grams[0]["kernel"], grams[1]["kernel"], rtol=1e-12)
