"""Training of one network at a time, one call per step.

On CPU, XLA runs convolutions several times slower under ``vmap`` and within loops, where
:func:`pathcond_jax.experiments.training.train` has them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pathcond_jax.experiments import training
from pathcond_jax.experiments.data import Dataset

PyTree = Any


def fitted(
    train_apply_fn: Callable[[PyTree, jax.Array], tuple[jax.Array, PyTree]],
    optimizer: optax.GradientTransformation,
    data: Dataset,
    variables: PyTree,
    *,
    seed: int,
    num_epochs: int,
    batch_size: int,
) -> PyTree:
    """Trains for classification.

    Args:
      train_apply_fn: maps variables and inputs to logits and the variables with new statistics.
      optimizer: whose learning rate follows a schedule of its own.
      data: whose training part is used.
      variables: to start from.
      seed: of the order of examples.
      num_epochs: passes over the training set.
      batch_size: examples per step; what is left over in an epoch is dropped.

    Returns:
      The trained variables.
    """

    def loss(variables: PyTree, x: jax.Array, y: jax.Array) -> tuple[jax.Array, PyTree]:
        logits, updated = train_apply_fn(variables, x)
        return training.cross_entropy(logits, y), updated

    @jax.jit
    def step(
        variables: PyTree, state: optax.OptState, x: jax.Array, y: jax.Array
    ) -> tuple[PyTree, optax.OptState]:
        gradients, updated = jax.grad(loss, has_aux=True)(variables, x, y)
        updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(updated, updates), state

    inputs, labels = np.asarray(data.train_inputs), np.asarray(data.train_labels)
    rng, steps = np.random.default_rng(seed), num_steps(data, 1, batch_size)
    state = jax.jit(optimizer.init)(variables)
    for _ in range(num_epochs):
        order = rng.permutation(len(labels))[: steps * batch_size]
        for rows in order.reshape(-1, batch_size):
            variables, state = step(variables, state, inputs[rows], labels[rows])
    return variables


def num_steps(data: Dataset, num_epochs: int, batch_size: int) -> int:
    """How many steps :func:`fitted` takes."""
    return num_epochs * (len(data.train_labels) // batch_size)


def decaying(start: float, steps: int) -> Callable[[Any], jax.Array]:
    """A learning rate that falls from ``start`` to 0 along half a cosine."""
    return lambda count: start * 0.5 * (1 + jnp.cos(math.pi * count / steps))


def subset(data: Dataset, num_train: int, num_test: int) -> Dataset:
    """Some of the training examples, always the same, and the first of the test set."""
    rows = np.random.default_rng(0).permutation(len(data.train_labels))[:num_train]
    return Dataset(
        train_inputs=data.train_inputs[rows],
        train_labels=data.train_labels[rows],
        test_inputs=data.test_inputs[:num_test],
        test_labels=data.test_labels[:num_test],
    )
