"""Optimizer states go through a checkpoint, and training resumes bit for bit."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pathcond_jax as pathcond

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def loss(params):
    hidden = jax.nn.relu(X @ params["one"]["kernel"] + params["one"]["bias"][None])
    return jnp.mean((hidden @ params["two"]["kernel"] - 1) ** 2)


def test_training_resumes_bit_for_bit():
    rng = np.random.default_rng(1)
    params = {
        "one": {"kernel": rng.normal(size=(3, 5)), "bias": rng.normal(size=5)},
        "two": {"kernel": rng.normal(size=(5, 2))},
    }
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    spec = pathcond.chain_spec(params, ["one", "two"])
    inner = optax.chain(pathcond.scale_by_path(spec, every=3), optax.sgd(0.01, momentum=0.9))
    optimizer = pathcond.reconditioned(inner, spec, every=2, start=1, method="block")

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(3):
        params, state = step(params, state)
    saved = flax.serialization.to_bytes((params, state))
    for _ in range(3):
        params, state = step(params, state)

    blank = jax.tree.map(jnp.zeros_like, params)
    resumed = flax.serialization.from_bytes((blank, optimizer.init(blank)), saved)
    resumed = jax.tree.map(jnp.asarray, resumed)
    assert int(resumed[1].recondition.num_updates) == 3
    for _ in range(3):
        resumed = step(*resumed)
    chex.assert_trees_all_equal(resumed, (params, state))
    assert int(state.recondition.num_updates) == 6
    assert step._cache_size() == 1
