"""Pruning by shares of the path norm, which no rescaling changes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond
from pathcond_jax.quantization import (
    PruningWarning,
    magnitude_saliency,
    path_saliency,
    prune,
)


def apply_fn(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    return x @ params[-1]["w"]


def network(widths=(3, 8, 6, 2), seed=0):
    rng = np.random.default_rng(seed)
    params = [
        {"w": rng.normal(size=(m, n)), "b": rng.normal(size=n)}
        for m, n in itertools.pairwise(widths)
    ]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    del params[-1]["b"]
    x = jax.ShapeDtypeStruct((1, widths[0]), jnp.float32)
    return params, pathcond.trace_spec(apply_fn, params, x)


params, spec = network()


def elsewhere(seed=1, sigma=2.0):
    rng = np.random.default_rng(seed)
    scales = [jnp.asarray(sigma * rng.normal(size=g.size), jnp.float32) for g in spec.groups]
    return pathcond.rescale(params, spec, scales)


@pytest.mark.parametrize("order", [1, 2])
def test_shares_are_entries_times_derivatives_of_the_path_norm(order):
    def total(powers):
        x = jnp.ones((1, 3))
        for layer in powers[:-1]:
            x = x @ layer["w"] + layer["b"][None]
        return (x @ powers[-1]["w"]).sum()

    powers = jax.tree.map(lambda leaf: jnp.abs(leaf) ** order, params)
    value, grads = jax.value_and_grad(total)(powers)
    wanted = jax.tree.map(lambda p, g: p * g / value, powers, grads)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        path_saliency(params, spec, order),
        wanted,
    )


def test_the_second_order_is_the_gram_diagonal_times_squares():
    gram = pathcond.gram_diagonal(params, spec)
    norm = pathcond.path_norm(params, spec)
    wanted = jax.tree.map(lambda p, g: p**2 * g / norm**2, params, gram)
    found = path_saliency(params, spec, 2)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("order", [1, 2])
def test_no_rescaling_changes_shares(order):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4),
        path_saliency(params, spec, order),
        path_saliency(elsewhere(), spec, order),
    )


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_shares_of_deep_networks_stay_in_range(order, size):
    layers = {f"layer{k:03}": {"w": size * jnp.ones((3, 3))} for k in range(150)}
    chain = pathcond.chain_spec(layers, list(layers))
    for share in jax.tree.leaves(path_saliency(layers, chain, order)):
        np.testing.assert_allclose(share, 1 / 9, rtol=1e-4)


def test_a_network_without_paths_has_no_shares():
    dead = jax.tree.map(jnp.zeros_like, params)
    for share in jax.tree.leaves(path_saliency(dead, spec)):
        assert not np.asarray(share).any()


def weights_kept(masks):
    return sum(int(layer["w"].sum()) for layer in masks), all(
        bool(layer["b"].all()) for layer in masks if "b" in layer
    )


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
def test_as_many_weights_are_kept_as_asked_and_all_biases(sparsity, steps):
    masks = prune(params, spec, sparsity, steps=steps)
    count = 3 * 8 + 8 * 6 + 6 * 2
    assert weights_kept(masks) == (round(count * (1 - sparsity)), True)


def test_every_representative_loses_the_same_weights_unless_by_magnitude():
    one, two = (prune(tree, spec, 0.6, steps=5) for tree in (params, elsewhere()))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    one, two = (
        prune(tree, spec, 0.6, saliency=magnitude_saliency) for tree in (params, elsewhere())
    )
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))
    conditioned = [pathcond.condition(t, spec, "enorm")[0] for t in (params, elsewhere())]
    one, two = (prune(tree, spec, 0.6, saliency=magnitude_saliency) for tree in conditioned)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_least_salient_weights_go():
    masks = prune(params, spec, 0.5, saliency=magnitude_saliency)
    pairs = [(abs(p["w"]), m["w"]) for p, m in zip(params, masks, strict=True)]
    cut = max(float(size[~mask].max(initial=0)) for size, mask in pairs)
    kept = min(float(size[mask].min(initial=np.inf)) for size, mask in pairs)
    assert cut < kept


def test_layers_that_are_lost_are_named():
    wide, wide_spec = network((40, 40, 40, 1))
    with pytest.warns(PruningWarning, match="'2/w'.*take more steps"):
        prune(
            [*wide[:-1], {"w": 1e-3 * wide[-1]["w"]}],
            wide_spec,
            0.98,
            saliency=magnitude_saliency,
        )


def test_steps_keep_layers_that_one_step_loses():
    """SynFlow's finding: a wide layer's shares are small, and one step cuts all of them."""
    wide, wide_spec = network((2, 60, 60, 2))
    with pytest.warns(PruningWarning, match="'1/w'"):
        prune(wide, wide_spec, 0.985)
    masks = prune(wide, wide_spec, 0.985, steps=50)
    assert all(layer["w"].any() for layer in masks)


def test_masks_are_made_under_jit():
    jitted = jax.jit(functools.partial(prune, spec=spec, sparsity=0.6, steps=3))
    jax.tree.map(np.testing.assert_array_equal, jitted(params), prune(params, spec, 0.6, steps=3))
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    assert all(mask.all() for mask in jax.tree.leaves(jitted(broken)))


def test_leaves_of_ones_own_choice_are_pruned():
    masks = prune(params, spec, 0.5, pruned=lambda path: path.endswith("b"))
    assert all(layer["w"].all() for layer in masks)
    assert sum(int(layer["b"].sum()) for layer in masks[:-1]) == 7


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("sparsity is 1.0; it is the share to cut", {"sparsity": 1.0}),
        ("sparsity is nan", {"sparsity": float("nan")}),
        ("steps is 0; there is at least one", {"sparsity": 0.5, "steps": 0}),
        ("no leaf to prune; .* 0/b, 0/w", {"sparsity": 0.5, "pruned": lambda path: False}),
        ("saliency has another structure", {"sparsity": 0.5, "saliency": lambda p, s: p[:1]}),
    ],
)
def test_bad_calls_are_named(message, options):
    with pytest.raises(pathcond.SpecError, match=message):
        prune(params, spec, **options)


def test_parameters_that_are_not_finite_are_refused():
    broken = [{**params[0], "w": params[0]["w"].at[0, 0].set(jnp.nan)}, *params[1:]]
    with pytest.raises(pathcond.SpecError, match="the saliency is not finite"):
        prune(broken, spec, 0.5)


def test_orders_are_one_or_two():
    with pytest.raises(pathcond.SpecError, match="order is 1 or 2, not 3"):
        path_saliency(params, spec, 3)
