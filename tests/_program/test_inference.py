"""Path lifting reads batch normalization as inference does, in whichever mode it was traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from zoo.network import image

import pathcond_jax as pathcond


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        def norm():
            return nn.BatchNorm(use_running_average=not train)

        x = nn.relu(norm()(nn.Conv(4, (3, 3))(x)))
        x = nn.relu(x + norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def variables():
    drawn = Residual().init(jax.random.key(0), image(6), train=False)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda a: jax.random.uniform(next(keys), a.shape, a.dtype, 0.5, 1.5), drawn)


@pytest.fixture(scope="module")
def inference(variables):
    return pathcond.trace_spec(Residual().apply, variables, image(6), train=False)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_spec_of_training_mode_has_the_paths_of_inference(variables, inference, batch):
    x = jax.ShapeDtypeStruct((batch, *image(6).shape[1:]), jnp.float32)
    training = pathcond.trace_spec(
        Residual().apply, variables, x, train=True, mutable=["batch_stats"]
    )

    gram, expected = (pathcond.gram_diagonal(variables, s) for s in (training, inference))
    assert training.num_neurons == inference.num_neurons
    for leaf, other in zip(jax.tree.leaves(gram), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4)


def test_conditioning_by_a_spec_of_training_mode_keeps_both_functions(variables, inference):
    x = jax.random.normal(jax.random.key(2), (5, *image(6).shape[1:]))
    training = pathcond.trace_spec(
        Residual().apply, variables, x, train=True, mutable=["batch_stats"]
    )
    moved, solution = pathcond.condition(variables, training)

    expected, _ = pathcond.condition(variables, inference)
    assert solution.status == pathcond.Status.CONVERGED
    for leaf, other in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-3)
    for options in ({"train": False}, {"train": True, "mutable": ["batch_stats"]}):
        before, after = (
            jax.tree.leaves(Residual().apply(tree, x, **options))[0] for tree in (variables, moved)
        )
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_an_average_that_is_put_out_keeps_its_scale_in_both_modes():
    """Without a variance to divide by, the mean moves with its neurons, and they are pinned."""

    def centred(variables, x):
        params, running = variables["params"], variables["running"]
        hidden = jax.nn.relu(x @ params["w"])
        mean = hidden.mean(0)
        outputs = (hidden - mean[None]) @ params["v"]
        return outputs, 0.9 * running + 0.1 * mean

    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    variables = {"params": params, "running": jnp.ones(4)}
    spec = pathcond.trace_spec(centred, variables, jnp.ones((5, 3)))
    assert spec.num_neurons == 0
    # 3 · 4 paths of inputs and 4 of running means end in each of 2 outputs.
    assert pathcond.path_norm(variables, spec, order=1) == 2 * (3 * 4 + 4)
