"""Keras 3 on JAX: the stateless call, with the variables in two lists."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo.network import lenient, vector

import pathcond_jax as pathcond

X, Y = vector(8, 6, 6, 1), vector(8, 3, seed=2)


@pytest.fixture
def keras(monkeypatch, tmp_path):
    """The package, which asks for its backend and writes its settings when it is imported."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return importlib.import_module("keras")


@lenient
def test_keras(keras):
    """Adam on the trainable variables; the others are handed over as they are at each update."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(5, activation="relu"),
            layers.Dropout(0.3),
            layers.Dense(3),
        ]
    )
    params = [variable.value for variable in model.trainable_variables]
    state = [variable.value for variable in model.non_trainable_variables]

    def apply_fn(variables, x, training):
        return model.stateless_call(variables["params"], variables["state"], x, training=training)

    def evaluated(params, state):
        return apply_fn({"params": params, "state": state}, X, training=False)[0]

    shapes = {"params": params, "state": state}
    spec = pathcond.trace_spec(apply_fn, shapes, X, training=False)
    assert spec.num_neurons == 4 + 5
    optimizer = pathcond.reconditioned(optax.adamw(1e-2), spec, every=3, method="block")
    opt_state = optimizer.init(params)

    @jax.jit
    def train(params, state, opt_state):
        def loss(params):
            outputs, state_after = apply_fn({"params": params, "state": state}, X, training=True)
            return jnp.mean((outputs - Y) ** 2), state_after

        gradients, state = jax.grad(loss, has_aux=True)(params)
        updates, after = optimizer.update(gradients, opt_state, params, non_trainable=state)
        plain, _ = optax.adamw(1e-2).update(gradients, opt_state.inner_state, params)
        twin = optax.apply_updates(params, plain)
        return optax.apply_updates(params, updates), state, after, twin

    for number in range(1, 7):
        params, state, opt_state, twin = train(params, state, opt_state)
        np.testing.assert_allclose(
            evaluated(twin, state), evaluated(params, state), rtol=1e-4, atol=1e-5
        )
        moved = not np.allclose(twin[-2], params[-2], rtol=1e-3)
        assert moved == (number % 3 == 0)
        assert int(opt_state.recondition.num_altered) == 0
    assert train._cache_size() == 1
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    for variable, value in zip(variables, [*params, *state], strict=True):
        variable.assign(value)
    np.testing.assert_allclose(model(X, training=False), evaluated(params, state), rtol=1e-5)
