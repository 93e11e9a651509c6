"""Training of one network at a time, one call per step.

On CPU, XLA runs convolutions several times slower under ``vmap`` and within loops, where
:func:`pathcond_jax.experiments.training.train` has them.
"""

import functools
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
TrainApplyFn = Callable[[PyTree, jax.Array], tuple[jax.Array, PyTree]]


def fitted(
    train_apply_fn: TrainApplyFn,
    optimizer: optax.GradientTransformation,
    data: Dataset,
    variables: PyTree,
    *,
    seed: int,
    num_epochs: int,
    batch_size: int,
) -> PyTree:
    """Trains for classification.

    The same function and optimizer are compiled once.

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
    inputs, labels = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)
    rng, steps = np.random.default_rng(seed), num_steps(data, 1, batch_size)
    state = jax.jit(optimizer.init)(variables)
    for _ in range(num_epochs):
        order = rng.permutation(len(labels))[: steps * batch_size]
        for rows in order.reshape(-1, batch_size):
            variables, state = _step(
                variables, state, inputs, labels, rows, train_apply_fn, optimizer
            )
    return variables


@functools.partial(jax.jit, static_argnums=(5, 6))
def _step(
    variables: PyTree,
    state: optax.OptState,
    inputs: jax.Array,
    labels: jax.Array,
    rows: np.ndarray,
    train_apply_fn: TrainApplyFn,
    optimizer: optax.GradientTransformation,
) -> tuple[PyTree, optax.OptState]:
    """One step on some rows of the training set."""

    def loss(variables: PyTree) -> tuple[jax.Array, PyTree]:
        logits, updated = train_apply_fn(variables, inputs[rows])
        return training.cross_entropy(logits, labels[rows]), updated

    gradients, updated = jax.grad(loss, has_aux=True)(variables)
    updates, state = optimizer.update(gradients, state, variables)
    return optax.apply_updates(updated, updates), state


def num_steps(data: Dataset, num_epochs: int, batch_size: int) -> int:
    """How many steps :func:`fitted` takes."""
    return num_epochs * (len(data.train_labels) // batch_size)


def decaying(start: float, steps: int) -> Callable[[Any], jax.Array]:
    """A learning rate that falls from ``start`` to 0 along half a cosine."""
    return lambda count: start * 0.5 * (1 + jnp.cos(math.pi * count / steps))
