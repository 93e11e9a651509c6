"""Early alignment: the three-point example of Boursier and Flammarion, and its ingredients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond

X = np.array([[-0.75], [-0.5], [0.125]], np.float32)
Y = np.array([1.1, 0.1, 0.8], np.float32)
LEAST_SQUARES = 0.1750427


def trained(scale, steps, mode="balanced", seed=0):
    """Gradient descent on the mean squared error; the parameters and the loss."""
    params = pathcond.two_layer_init(jax.random.key(seed), 1, 200, scale=scale, mode=mode)
    network = pathcond.chain_spec(params, ["hidden", "output"]).apply_fn

    def loss(params):
        return jnp.mean((network(params, X)[:, 0] - Y) ** 2)

    def step(_, params):
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params))

    params = jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, p))(params)
    return params, float(loss(params))


def neurons(params):
    """Input weights with biases, output weights, and which neurons some example activates."""
    w = np.vstack([params["hidden"]["kernel"], params["hidden"]["bias"]])
    active = (np.hstack([X, np.ones_like(X)]) @ w > 0).any(0)
    return w, np.asarray(params["output"]["kernel"])[:, 0], active


@pytest.mark.parametrize("mode", ["balanced", "dominated"])
def test_small_initialization_ends_at_least_squares(mode):
    design = np.hstack([X, np.ones_like(X)])
    solution = np.linalg.lstsq(design, Y)[0]
    assert np.mean((design @ solution - Y) ** 2) == pytest.approx(LEAST_SQUARES, abs=1e-7)
    for steps in (10_000, 150_000):
        params, loss = trained(1e-3, steps, mode)
        assert loss == pytest.approx(LEAST_SQUARES, abs=1e-6)
    w, a, _ = neurons(params)
    np.testing.assert_allclose(w @ a, solution, atol=1e-4)


def test_large_initialization_fits():
    assert trained(1.0, 20_000)[1] < 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_neurons_align_with_the_extremal_vector_before_they_grow(seed):
    (extremal,) = pathcond.extremal_vectors(X, Y)
    np.testing.assert_allclose(extremal, [-0.2583, 0.6667], atol=1e-4)
    assert np.degrees(np.arctan2(extremal[1], extremal[0])) == pytest.approx(111.18, abs=0.005)
    params, _ = trained(1e-4, 600, seed=seed)
    w, a, active = neurons(params)
    assert (active & (a > 0)).sum() > 40
    assert not (active & (a < 0)).any()
    angles = np.degrees(np.arctan2(w[1], w[0]))[active]
    np.testing.assert_allclose(angles, 111.1, atol=0.2)
    cosines = np.asarray(pathcond.alignment(params, X, Y))
    assert cosines[active].min() > 0.9999
    assert (cosines[~active] == 0).all()


def test_rescaling_turns_no_neuron_but_changes_the_regime():
    params = pathcond.two_layer_init(jax.random.key(0), 3, 10, mode="dominated")
    spec = pathcond.chain_spec(params, ["hidden", "output"])
    x, y = jax.random.normal(jax.random.key(1), (6, 3)), jnp.arange(6.0)
    (before,) = pathcond.conserved_quantities(params, spec)
    rescaled = pathcond.rescale(params, spec, (jnp.full(10, 2.0),))
    (after,) = pathcond.conserved_quantities(rescaled, spec)
    assert (before > 0).all()
    assert (after < 0).all()
    np.testing.assert_allclose(
        pathcond.alignment(rescaled, x, y), pathcond.alignment(params, x, y), atol=1e-6
    )


@pytest.mark.parametrize("bias", [True, False])
def test_modes_fix_the_sign_of_the_conserved_quantity(bias):
    signs = {}
    for mode in pathcond.TWO_LAYER_MODES:
        params = pathcond.two_layer_init(jax.random.key(3), 4, 50, scale=0.1, mode=mode, bias=bias)
        assert ("bias" in params["hidden"]) == bias
        spec = pathcond.chain_spec(params, ["hidden", "output"])
        (c,) = pathcond.conserved_quantities(params, spec)
        size = float(jnp.sum(params["output"]["kernel"] ** 2))
        signs[mode] = (float(c.min()) / size, float(c.max()) / size)
    assert max(map(abs, signs["balanced"])) < 1e-7
    assert signs["dominated"][0] > 0
    assert signs["unbalanced"][0] < 0


def test_scale_is_that_of_each_neuron_over_the_root_of_their_number():
    params = pathcond.two_layer_init(jax.random.key(0), 300, 400, scale=0.5, mode="unbalanced")
    for leaf in jax.tree.leaves(params):
        assert float(jnp.std(leaf)) == pytest.approx(0.5 / 20, rel=0.15)
    with pytest.raises(pathcond.SpecError, match="no mode 'lazy'"):
        pathcond.two_layer_init(jax.random.key(0), 1, 2, mode="lazy")


def test_extremal_vectors_do_not_depend_on_how_they_are_enumerated():
    rng = np.random.default_rng(0)
    for _ in range(10):
        x, y = rng.normal(size=(8, 2)), rng.normal(size=8)
        by_sector = pathcond.extremal_vectors(x, y, bias=False)
        # A third coordinate of 0 leaves the cones and hides that the problem is planar.
        flat = pathcond.extremal_vectors(np.hstack([x, np.zeros((8, 1))]), y, bias=False)
        np.testing.assert_allclose(flat[:, :2], by_sector, atol=1e-12)
        for vector in by_sector:
            force = (y[:, None] * x)[x @ vector > 0].sum(0) / 8
            np.testing.assert_allclose(force, vector, atol=1e-12)


def test_bad_calls_are_named():
    with pytest.raises(pathcond.SpecError, match="too many activation patterns"):
        pathcond.extremal_vectors(np.ones((21, 3)), np.ones(21))
    with pytest.raises(pathcond.SpecError, match=r"\(3, 1\) and targets \(2,\)"):
        pathcond.extremal_vectors(X, Y[:2])
    with pytest.raises(pathcond.SpecError, match="two-layer network"):
        pathcond.alignment({"Dense_0": {"kernel": X}}, X, Y)
    params = pathcond.two_layer_init(jax.random.key(0), 2, 3)
    with pytest.raises(pathcond.SpecError, match="inputs have 1 features, the network 2"):
        pathcond.alignment(params, X, Y)
