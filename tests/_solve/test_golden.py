"""Parity with the authors' PyTorch code, from parameters to Gram diagonal and log-scales.

The figures in ``golden/`` were measured by running it (Artim436/pathcond, e864e76).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_networks import GOLDEN, NETWORKS, conv_net, mlp

import pathcond_jax as pathcond


@pytest.fixture(params=NETWORKS, scope="module")
def golden(request):
    """The stored figures, the parameters as a tree, and the spec of the same network here."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        stored = dict(file)
    params = {str(name): jnp.asarray(stored[f"param/{name}"]) for name in stored["param_names"]}
    apply_fn = conv_net if request.param.startswith("conv") else mlp
    spec = pathcond.trace_spec(apply_fn, params, stored["x"], max_pool="max")
    return stored, params, spec


def flat(stored, tree):
    """The leaves in the order of the stored names."""
    return np.concatenate([np.ravel(tree[str(name)]) for name in stored["param_names"]])


def test_the_network_is_theirs(golden):
    stored, params, spec = golden
    outputs = spec.apply_fn(params, stored["x"])
    np.testing.assert_allclose(outputs, stored["y_before"], rtol=1e-5, atol=1e-6)
    assert spec.num_neurons == stored["n_hidden"]
    assert spec.num_parameters == stored["diag_G"].size


def test_gram_diagonal(golden):
    stored, params, spec = golden
    gram = jax.jit(pathcond.gram_diagonal, static_argnums=1)(params, spec)
    ours = flat(stored, gram).astype(np.float64)
    # The authors leave the average pool's factor 1/64 unsquared: all of their diagonal is 64 times.
    pooled = 64.0 if spec.apply_fn is conv_net else 1.0
    np.testing.assert_allclose(ours * pooled, stored["diag_G"], rtol=1e-5)


@pytest.mark.parametrize("sweeps", [1, 3, 10])
def test_log_scales_from_the_parameters(golden, sweeps):
    stored, params, spec = golden
    _, solution = pathcond.condition(params, spec, method="coordinate", max_steps=sweeps, tol=0.0)
    theirs = 0.5 * stored[f"Z_{sweeps}"]
    np.testing.assert_allclose(np.concatenate(solution.log_scales), theirs, atol=2e-5, rtol=0)
    pooled = np.log(64.0) if spec.apply_fn is conv_net else 0.0
    expected = stored[f"F_{sweeps}"] - spec.num_parameters * pooled
    np.testing.assert_allclose(solution.objective, expected, rtol=1e-6)


def test_conditioned_network_computes_the_same(golden):
    stored, params, spec = golden
    conditioned, _ = pathcond.condition(params, spec, method="coordinate", max_steps=10, tol=0.0)
    before, after = (np.asarray(spec.apply_fn(p, stored["x"])) for p in (params, conditioned))
    assert abs(after - before).max() <= 1e-6 * abs(before).max()
