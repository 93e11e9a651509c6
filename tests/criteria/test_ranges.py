"""Equal ranges have one answer: the same parameters from every representative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond
from pathcond_jax import criteria


def convolved(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def inverted_residuals(params, x):
    """Two blocks of expansion, depthwise convolution and projection on a residual stream."""
    x = jax.nn.relu(convolved(x, params["stem"]))
    for expand, depthwise, project in params["blocks"]:
        y = jax.nn.relu(convolved(x, expand))
        y = jax.nn.relu(convolved(y, depthwise, y.shape[-1]))
        x = x + convolved(y, project)
    return x.mean((1, 2)) @ params["head"]


def network(width=6, hidden=24):
    rng = np.random.default_rng(0)

    def kernel(*shape):
        spread = np.exp(rng.normal(size=shape[-1]))
        return jnp.asarray(rng.normal(size=shape) * spread, jnp.float32)

    params = {
        "stem": kernel(3, 3, 3, width),
        "blocks": [
            (kernel(1, 1, width, hidden), kernel(3, 3, 1, hidden), kernel(1, 1, hidden, width))
            for _ in range(2)
        ],
        "head": kernel(width, 4),
    }
    image = jax.ShapeDtypeStruct((1, 5, 5, 3), jnp.float32)
    return params, pathcond.trace_spec(inverted_residuals, params, image)


params, spec = network()


def log_scales(seed, sigma):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(sigma * rng.normal(size=g.size), jnp.float32) for g in spec.groups)


def largest_difference(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return max(float(abs(a - b).max() / abs(a).max()) for a, b in pairs)


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_every_representative_gets_the_same_parameters(sigma):
    wanted, solution = pathcond.condition(params, spec, "equalize")
    assert pathcond.Status(int(solution.status)).name == "CONVERGED"
    for seed in (0, 1):
        moved = pathcond.rescale(params, spec, log_scales(seed, sigma))
        found, solution = pathcond.condition(moved, spec, "equalize")
        assert pathcond.Status(int(solution.status)).name == "CONVERGED"
        assert largest_difference(wanted, found) < 1e-4


def test_ranges_agree_at_other_points_too():
    """Why the start matters: sweeps that start elsewhere end elsewhere."""
    wanted, _ = pathcond.condition(params, spec, "equalize")
    other, solution = pathcond.condition(params, spec, "equalize", initial=log_scales(0, 3.0))
    assert float(solution.objective) < 1e-4
    assert largest_difference(wanted, other) > 1e-2


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_activations_name_one_answer(alpha):
    ranges = tuple(jnp.exp(z) for z in log_scales(2, 1.0))
    wanted, _ = pathcond.condition(params, spec, criteria.activation(ranges, alpha))
    z = log_scales(3, 2.0)
    moved = pathcond.rescale(params, spec, z)
    moved_ranges = tuple(a * jnp.exp(s) for a, s in zip(ranges, z, strict=True))
    found, _ = pathcond.condition(moved, spec, criteria.activation(moved_ranges, alpha))
    assert largest_difference(wanted, found) < 1e-4
    started = criteria.activation(ranges, alpha).solve(params, spec, initial=z)
    assert largest_difference(wanted, pathcond.rescale(params, spec, started)) < 1e-4
