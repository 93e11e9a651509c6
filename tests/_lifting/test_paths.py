"""Paths listed one by one have the norm that lifting computes without listing them."""

import jax
import jax.numpy as jnp
import numpy as np

import pathcond_jax as pathcond


def test_no_path_goes_through_an_empty_value(x64):
    def network(params, x):
        h = jax.nn.relu(x @ params["w"])
        nothing = jax.nn.relu(h[:, :0]) * 2.0
        return jnp.concatenate([h, nothing], 1) @ params["v"]

    params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "v": jnp.array([[2.0], [-1.0]])}
    spec = pathcond.trace_spec(network, params, jnp.ones((1, 2)))
    paths = np.sort(np.asarray(pathcond.lifted(params, spec)))
    np.testing.assert_allclose(paths, [-0.5, 2.0, 2.0, 6.0])
    np.testing.assert_allclose(np.linalg.norm(paths), pathcond.path_norm(params, spec))
