"""The training loops that people have, with one line added: the real packages, small networks."""

from typing import Any

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from zoo.network import lenient, vector

import pathcond_jax as pathcond

X, Y = vector(16, 6, 6, 1), vector(16, 3, seed=2)
EVERY = 3


def squared_error(outputs):
    return jnp.mean((outputs - Y) ** 2)


def assert_same_function(before, after):
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=2e-5)


def recipe(spec, **options):
    """The optimizer of a transformer, conditioned every third update."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    return pathcond.reconditioned(inner, spec, every=EVERY, method="block", **options)


def expect_moves(state, number):
    """What the state of an optimizer says after an update."""
    state = state.recondition
    assert int(state.num_updates) == number
    assert int(state.status) == pathcond.Status.CONVERGED
    assert int(state.num_altered) == 0
    assert any(np.any(np.asarray(z)) for z in state.log_scales) == (number % EVERY == 0)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.wide = nnx.Linear(5, 7, rngs=rngs)
        self.narrow = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        return x + self.narrow(nnx.relu(self.wide(x)))


class CNN(nnx.Module):
    """The network of Flax's MNIST example, small, with blocks that are scanned and remat'ed."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dense = nnx.Linear(36, 5, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(Block))(rngs)
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        x = self.drop(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def forward(block, x):
            return block(x)

        return self.out(forward(self.blocks, x))


def evaluated(model):
    """Its outputs in evaluation mode."""
    still = nnx.clone(model)
    still.eval()
    return lenient(still)(X)


def test_nnx_optimizer():
    """MNIST with nnx.Optimizer: one compilation, and the function stays at each due step."""
    model = lenient(CNN)(nnx.Rngs(0))
    spec = lenient(pathcond.nnx_spec)(model, X)
    optimizer = nnx.Optimizer(model, recipe(spec), wrt=nnx.Param)
    plain = nnx.Optimizer(
        model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), wrt=nnx.Param
    )
    traces = []

    def step(model, optimizer, batch_stats):
        traces.append(optimizer.tx)
        gradients = nnx.grad(lambda model: squared_error(model(X)))(model)
        statistics = {"batch_stats": nnx.state(model, nnx.BatchStat)} if batch_stats else {}
        optimizer.update(model, gradients, **statistics)

    train = nnx.jit(lenient(step), static_argnames="batch_stats")
    twin = nnx.clone(model)
    for number in range(1, 2 * EVERY + 2):
        # The same step from the same parameters, with the optimizer's state but no conditioning.
        nnx.update(twin, nnx.state(model))
        nnx.update(plain.opt_state, nnx.state(optimizer.opt_state.inner_state))
        train(twin, plain, batch_stats=False)
        train(model, optimizer, batch_stats=True)
        expect_moves(optimizer.opt_state, number)
        assert_same_function(evaluated(twin), evaluated(model))
        moved = not np.allclose(model.out.kernel[...], twin.out.kernel[...], rtol=1e-4)
        assert moved == (number % EVERY == 0)
    assert len(traces) == 2
