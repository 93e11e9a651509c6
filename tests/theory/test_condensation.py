"""Condensation: directions, their number, and the tanh example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond


def tanh_example(scale, steps, seed=0):
    """50 tanh neurons on 80 points of a sum of sines, by gradient descent."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-4, 2, (80, 5))
    y = 3.5 * np.sin(5 * x + 1).sum(1)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)  # noqa: E731
    start = {
        "hidden": {"kernel": draw(5, 50), "bias": draw(50)},
        "output": {"kernel": draw(50, 1)},
    }
    x, y = x.astype(np.float32), y.astype(np.float32)

    def loss(params):
        hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        return 0.5 * jnp.mean(((hidden @ params["output"]["kernel"])[:, 0] - y) ** 2)

    def step(_, params):
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params))

    return x, y, start, jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, p))(start)


def signs_of(start, direction):
    """The side each neuron is predicted to take."""
    w = np.vstack([start["hidden"]["kernel"], start["hidden"]["bias"]])
    return np.sign(np.asarray(start["output"]["kernel"])[:, 0] + direction @ w)


@pytest.mark.parametrize(("seed", "scale", "cosine"), [(0, 5e-3, 0.9), (0, 5e-5, 0.97)])
def test_tanh_neurons_condense_as_predicted(seed, scale, cosine):
    x, y, start, trained = tanh_example(scale, 200, seed)
    direction, opposite = pathcond.condensation_directions(x, y)
    np.testing.assert_array_equal(opposite, -direction)
    spec = pathcond.chain_spec(start, ["hidden", "output"])
    (u,) = pathcond.neuron_orientations(trained, spec)
    cosines = np.asarray(u) @ direction
    np.testing.assert_array_equal(np.sign(cosines), signs_of(start, direction))
    assert np.abs(cosines).mean() > cosine
    shares = np.linalg.eigvalsh(np.asarray(u @ u.T))
    assert shares[-1] / shares.sum() > 0.9


def test_condensed_groups_are_the_two_signs():
    x, y, start, trained = tanh_example(5e-6, 300)
    direction, _ = pathcond.condensation_directions(x, y)
    spec = pathcond.chain_spec(start, ["hidden", "output"])
    (labels,) = pathcond.condensed_groups(trained, spec, tol=0.3)
    side = signs_of(start, direction)
    np.testing.assert_array_equal(labels, (side != side[0]).astype(int))
    assert pathcond.condensed_groups(trained, spec, tol=0.3, signed=False)[0].max() == 0
    assert pathcond.condensed_groups(start, spec, tol=0.3)[0].max() > 30


@pytest.mark.parametrize("multiplicity", [1, 2, 3, 4, 5])
def test_at_most_two_directions_per_multiplicity_on_a_line(multiplicity):
    angles = np.linspace(0, 2 * np.pi, 2001)[:-1]
    circle = np.stack([np.cos(angles), np.sin(angles)])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, y = rng.uniform(-1, 1, (30, 1)), rng.normal(size=30)
        found = pathcond.condensation_directions(x, y, multiplicity)
        assert 0 < len(found) <= 2 * multiplicity
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-12)
        # As many turning points as on a fine grid of the circle.
        h = y @ (np.hstack([x, np.ones_like(x)]) @ circle) ** multiplicity
        turns = np.sign(np.roll(h, -1) - h) != np.sign(h - np.roll(h, 1))
        assert turns.sum() == len(found)


def test_orientations_are_those_of_the_weights_whatever_the_scale():
    params = {
        "Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (3, 4)), "bias": jnp.ones(4)},
        "Dense_1": {"kernel": jax.random.normal(jax.random.key(1), (4, 2))},
    }
    spec = pathcond.chain_spec(params, ["Dense_0", "Dense_1"])
    (u,) = pathcond.neuron_orientations(params, spec)
    expected = np.vstack([params["Dense_0"]["kernel"], params["Dense_0"]["bias"]]).T
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(u, expected, atol=1e-6)
    rescaled = pathcond.rescale(params, spec, (jnp.array([-50.0, -1.0, 2.0, 50.0]),))
    np.testing.assert_allclose(pathcond.neuron_orientations(rescaled, spec)[0], u, atol=1e-6)


def test_orientations_of_convolutions_and_of_neurons_without_input():
    def apply_fn(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(x).reshape(x.shape[0], -1) @ params["dense"]

    params = {
        "conv": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)).at[..., 1].set(0),
        "dense": jax.random.normal(jax.random.key(1), (4 * 4 * 4, 3)),
    }
    spec = pathcond.trace_spec(apply_fn, params, jnp.ones((1, 4, 4, 2)))
    (u,) = pathcond.neuron_orientations(params, spec)
    assert u.shape == (4, 18)
    np.testing.assert_allclose(jnp.linalg.norm(u, axis=1), [1, 0, 1, 1], atol=1e-6)
    assert pathcond.condensed_groups(params, spec)[0].tolist() == [0, -1, 1, 2]


def test_bad_calls_are_named():
    with pytest.raises(pathcond.SpecError, match="multiplicity 2 with inputs of 3 dimensions"):
        pathcond.condensation_directions(np.ones((4, 3)), np.ones(4), 2)
    with pytest.raises(pathcond.SpecError, match="are needed"):
        pathcond.condensation_directions(np.ones(4), np.ones(4))
