"""Conserved quantities of gradient flow: their number, their change per step, choosing them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import NETWORKS

import pathcond_jax as pathcond
from pathcond_jax._spec.trees import leaf_path


def paths(params):
    """The products of weights along all paths of a dense chain with biases, by last neuron."""
    reached = None
    for kernel, bias in params:
        if reached is None:
            reached = kernel
        else:
            reached = (reached[:, :, None] * kernel[None]).reshape(-1, kernel.shape[1])
        reached = reached if bias is None else jnp.concatenate([reached, bias[None]])
    return reached


def random_chain(rng, widths, last_bias):
    dtype = jnp.zeros(()).dtype
    layers = [
        (jnp.asarray(rng.normal(size=pair), dtype), jnp.asarray(rng.normal(size=pair[1]), dtype))
        for pair in itertools.pairwise(widths)
    ]
    return layers if last_bias else [*layers[:-1], (layers[-1][0], None)]


@pytest.mark.parametrize("widths", [(2, 3, 4, 2, 2), (5, 3, 2), (3, 4, 4, 2), (2, 9, 3)])
@pytest.mark.parametrize("last_bias", [True, False])
def test_relu_networks_have_a_law_for_each_neuron(widths, last_bias):
    params = random_chain(np.random.default_rng(0), widths, last_bias)
    assert pathcond.num_conservation_laws(paths, params) == sum(widths[1:-1])


def test_the_product_of_three_numbers_has_two_laws(x64):
    product = lambda x: x[0] * x[1] * x[2]  # noqa: E731
    for seed in range(3):
        point = jax.random.normal(jax.random.key(seed), (3,))
        assert pathcond.num_conservation_laws(product, point) == 2


@pytest.mark.parametrize("sizes", [(2, 2, 5), (2, 3, 2), (3, 2, 4), (1, 2, 3), (4, 3, 2)])
def test_two_layer_linear_networks(sizes):
    n, m, r = sizes
    k = min(n + m, r)
    keys = jax.random.split(jax.random.key(0))
    u, v = (jax.random.normal(key, (s, r)) for key, s in zip(keys, (n, m), strict=True))
    found = pathcond.num_conservation_laws(lambda uv: uv[0] @ uv[1].T, (u, v))
    assert found == k * (2 * r + 1 - k) // 2


def test_brackets_are_needed_and_found():
    # The gradients of x₂ and x₁ + x₂ x₃² span planes that no surface is tangent to.
    found = pathcond.num_conservation_laws(
        lambda x: jnp.stack([x[1], x[0] + x[1] * x[2] ** 2]), jnp.array([0.3, -0.8, 1.2])
    )
    assert found == 0


def test_constants_conserve_everything():
    assert pathcond.num_conservation_laws(lambda x: jnp.ones(2), jnp.ones(4)) == 4


@pytest.mark.parametrize("name", ["mlp", "lenet", "scan-over-layers", "recurrent-scan"])
def test_one_step_changes_each_quantity_by_the_square_of_the_step(x64, name):
    found = NETWORKS[name]()
    spec = pathcond.trace_spec(found.apply_fn, found.params, found.x)
    shape = jax.eval_shape(found.apply_fn, found.params, found.x).shape
    target = jax.random.normal(jax.random.key(0), shape)

    @jax.jit
    def gradients(params):
        return jax.grad(lambda p: jnp.mean((found.apply_fn(p, found.x) - target) ** 2))(params)

    grads, eta = gradients(found.params), 0.01
    trained = {leaf.path for leaf in spec.leaves if leaf.trainable}
    stepped = jax.tree_util.tree_map_with_path(
        lambda key, p, g: p - eta * g if leaf_path(key) in trained else p, found.params, grads
    )
    before, after, change = (
        np.concatenate(pathcond.conserved_quantities(tree, spec))
        for tree in (found.params, stepped, grads)
    )
    assert np.abs(change).max() > 1e-4
    size = np.abs(before).max() + 1
    np.testing.assert_allclose(after - before, eta**2 * change, atol=1e-13 * size)


def quantities(params, spec):
    return np.concatenate(pathcond.conserved_quantities(params, spec))


@pytest.mark.parametrize("name", ["mlp", "scan-over-layers"])
def test_every_target_is_reached_once_on_the_orbit(x64, name):
    found = NETWORKS[name]()
    params, spec = found.params, pathcond.trace_spec(found.apply_fn, found.params, found.x)
    keys = jax.random.split(jax.random.key(0), (2, len(spec.groups)))
    target = tuple(
        3 * jax.random.normal(k, (g.size,)) for k, g in zip(keys[0], spec.groups, strict=True)
    )
    elsewhere = tuple(
        jax.random.normal(k, (g.size,)) for k, g in zip(keys[1], spec.groups, strict=True)
    )
    moved, solution = pathcond.rescale_to(params, spec, target)
    assert int(solution.status) == pathcond.Status.CONVERGED
    np.testing.assert_allclose(quantities(moved, spec), np.concatenate(target), atol=1e-9)
    before, after = (found.apply_fn(p, found.x) for p in (params, moved))
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-12)
    other, _ = pathcond.rescale_to(pathcond.rescale(params, spec, elsewhere), spec, target)
    for one, two in zip(jax.tree.leaves(moved), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-8, atol=1e-10)


def test_target_zero_is_enorm_and_where_one_is_needs_no_step(x64):
    found = NETWORKS["mlp"]()
    params, spec = found.params, pathcond.trace_spec(found.apply_fn, found.params, found.x)
    zero = tuple(jnp.zeros(group.size) for group in spec.groups)
    moved, _ = pathcond.rescale_to(params, spec, zero)
    balanced, _ = pathcond.condition(params, spec, "enorm")
    for one, two in zip(jax.tree.leaves(moved), jax.tree.leaves(balanced), strict=True):
        np.testing.assert_allclose(two, one, atol=1e-9)
    _, stay = pathcond.rescale_to(params, spec, pathcond.conserved_quantities(params, spec))
    assert max(float(jnp.abs(z).max()) for z in stay.log_scales) < 1e-9


def test_targets_in_single_precision():
    found = NETWORKS["lenet"]()
    params, spec = found.params, pathcond.trace_spec(found.apply_fn, found.params, found.x)
    target = tuple(jnp.linspace(-2.0, 2.0, group.size) for group in spec.groups)
    moved, solution = pathcond.rescale_to(params, spec, target)
    assert int(solution.status) == pathcond.Status.CONVERGED
    np.testing.assert_allclose(quantities(moved, spec), np.concatenate(target), atol=1e-3)


def test_a_target_must_have_the_shapes_of_the_groups():
    found = NETWORKS["plain-jax"]()
    spec = pathcond.trace_spec(found.apply_fn, found.params, found.x)
    with pytest.raises(pathcond.SpecError, match="target has shapes"):
        pathcond.rescale_to(found.params, spec, (jnp.zeros(2),))
