"""Finetuning penalties: formulas, exponents, and what gradient descent finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import pathcond_jax as pathcond


def vector(*values):
    return jnp.asarray(values, jnp.zeros(()).dtype)


@pytest.mark.parametrize(("feature", "order"), [(1e-3, 1.151), (1.0, 1.887), (1e3, 2.0)])
def test_finetuning_goes_from_sparse_to_dense_with_larger_features(x64, feature, order):
    found, _ = pathcond.order_and_dependence(pathcond.ptft_penalty, vector(1.0), vector(feature))
    assert float(found) == pytest.approx(order, abs=5e-4)


@pytest.mark.parametrize("feature", [1e-3, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("penalty", [pathcond.ptft_penalty, pathcond.mtl_penalty])
def test_order_and_dependence_sum_to_the_degree_of_the_penalty(x64, penalty, feature):
    exponents = pathcond.order_and_dependence(penalty, vector(1.0, 0.3), vector(feature, 1.0))
    assert float(sum(exponents)) == pytest.approx(1.0, abs=1e-12)


def test_a_readout_scale_breaks_the_law(x64):
    def penalty(beta, beta_aux):
        return pathcond.ptft_penalty(beta, beta_aux, 1.0)

    order, dependence = pathcond.order_and_dependence(penalty, vector(1.0), vector(1.0))
    assert abs(float(order + dependence) - 1.0) > 0.1


def test_the_penalty_loses_no_digits_to_small_coefficients():
    # s q(2β/s) → β²/s.
    assert float(pathcond.ptft_penalty(vector(1e-3), vector(1.0))) == pytest.approx(1e-6, rel=1e-5)


def test_gradient_descent_on_the_diagonal_network_finds_the_least_penalty(x64):
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(3, 6)), rng.normal(size=3)
    aux, gamma = rng.uniform(0.05, 1.0, 6), 0.3
    x, y, gamma = jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(gamma)
    start = {"w": jnp.sqrt(jnp.asarray([aux, aux])), "v": jnp.full((2, 6), gamma)}

    def coefficients(params):
        plus, minus = params["w"] * params["v"]
        return plus - minus

    def loss(params):
        return 0.5 * jnp.sum((x @ coefficients(params) - y) ** 2)

    def step(_, params):
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(loss)(params))

    trained = jax.jit(lambda p: jax.lax.fori_loop(0, 40000, step, p))(start)
    assert float(loss(trained)) < 1e-20

    particular = np.linalg.lstsq(inputs, targets)[0]
    null = np.linalg.svd(inputs)[2][3:].T

    def cost(free):
        return pathcond.ptft_penalty(jnp.asarray(particular + null @ free), jnp.asarray(aux), gamma)

    best = scipy.optimize.minimize(
        lambda free: float(cost(free)),
        np.zeros(3),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000},
    )
    found = np.asarray(coefficients(trained))
    # Gradient flow finds the minimum exactly, steps of 1e-3 up to about that.
    np.testing.assert_allclose(found, particular + null @ best.x, atol=1e-3)
    other = np.asarray(particular)
    assert float(cost(np.zeros(3))) > float(cost(null.T @ (found - other))) + 1e-2


def test_the_relu_penalty_is_the_least_over_the_norm(x64):
    rng = np.random.default_rng(1)
    m = np.exp(np.linspace(-9, 4, 400001))
    for _ in range(10):
        beta, aux, readout = rng.uniform(0, 2, 3)
        c = rng.uniform(-1, 1)
        costs = (beta / m - readout) ** 2 + m**2 + aux - 2 * m * np.sqrt(aux) * c
        penalty = pathcond.relu_finetuning_penalty(vector(beta), vector(aux), vector(c), readout)
        assert float(penalty) == pytest.approx(costs.min(), abs=1e-8)
        assert float(penalty) <= costs.min() + 1e-12


def test_the_relu_penalty_solves_the_quartic_and_has_the_gradient_of_a_minimum(x64):
    beta, aux, c, readout = 0.8, 0.6, 0.4, 0.3
    start = np.sqrt(aux)
    roots = np.roots([1, -start * c, 0, readout * beta, -(beta**2)])
    m = roots[(np.abs(roots.imag) < 1e-12) & (roots.real > 0)].real
    costs = (beta / m - readout) ** 2 + m**2 + aux - 2 * m * start * c
    penalty = lambda b: pathcond.relu_finetuning_penalty(b, vector(aux), vector(c), readout)  # noqa: E731
    assert float(penalty(vector(beta))) == pytest.approx(costs.min(), rel=1e-12)
    best = m[costs.argmin()]
    (slope,) = jax.grad(penalty)(vector(beta))
    assert float(slope) == pytest.approx(2 * (beta / best - readout) / best, rel=1e-9)


def test_scaling_a_network_without_biases_scales_its_output_by_the_power_of_its_depth():
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((4, 5), (5, 3), (3, 2))
    params = {f"l{k}": {"w": jax.random.normal(keys[k], s)} for k, s in enumerate(sizes)}
    network = pathcond.chain_spec(params, list(params)).apply_fn
    x = jnp.ones((2, 4))
    scaled = network(pathcond.scale_network(params, 0.5), x)
    np.testing.assert_allclose(scaled, 0.125 * network(params, x), rtol=1e-6)


def test_scaling_leaves_counters_and_batch_statistics_alone():
    params = {"params": {"w": jnp.ones(2, jnp.bfloat16)}, "batch_stats": {"mean": jnp.ones(2)}}
    scaled = pathcond.scale_network(params, 3.0)
    assert scaled["params"]["w"].dtype == jnp.bfloat16
    assert scaled["params"]["w"].tolist() == [3.0, 3.0]
    assert scaled["batch_stats"]["mean"].tolist() == [1.0, 1.0]
