"""The training loop of every experiment: many runs at once, whole epochs on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pathcond_jax.experiments.data import Array, Dataset

PyTree = Any
ApplyFn = Callable[..., Any]
MakeOptimizer = Callable[[jax.Array], optax.GradientTransformation]


class Curves(NamedTuple):
    """Measured at the end of each epoch on the whole set: arrays (runs, epochs).

    The accuracies of a network with non-finite loss are nan.
    """

    train_loss: Any
    train_accuracy: Any
    test_loss: Any
    test_accuracy: Any


class Goal(NamedTuple):
    """What to minimize and what to report beside it.

    Attributes:
      loss: maps outputs (batch, ...) and labels (batch, ...) to a scalar.
      score: the same; it fills the accuracies of ``Curves``.
    """

    loss: Callable[[jax.Array, Array], jax.Array]
    score: Callable[[jax.Array, Array], jax.Array]


class TrainState(NamedTuple):
    """Everything that changes while training; ``epoch`` counts finished epochs."""

    params: PyTree
    opt_state: optax.OptState
    epoch: jax.Array


def train(
    apply_fn: ApplyFn,
    make_optimizer: MakeOptimizer,
    data: Dataset,
    params: PyTree,
    keys: jax.Array,
    learning_rates: jax.Array,
    *,
    num_epochs: int,
    batch_size: int,
    epochs_per_call: int = 1,
    on_epochs: Callable[[int], None] = lambda _: None,
    goal: Goal | None = None,
    train_apply_fn: ApplyFn | None = None,
    between: Callable[[PyTree, int], PyTree] | None = None,
) -> tuple[PyTree, Curves]:
    """Trains many runs of one network together.

    Args:
      apply_fn: maps parameters and inputs (batch, ...) to logits (batch, classes).
      make_optimizer: maps a learning rate to an optimizer, such as ``optax.sgd``.
      data: the data set, copied to the device once.
      params: parameters with a leading axis of length ``runs``.
      keys: (runs,) random keys; runs with equal keys see the same batches.
      learning_rates: (runs,).
      num_epochs: passes over the training set.
      batch_size: examples per step; what is left over in an epoch is dropped.
      epochs_per_call: how many epochs to run between two calls of ``on_epochs``.
      on_epochs: called with the number of epochs just finished.
      goal: what to minimize and report; None: ``CLASSIFICATION``.
      train_apply_fn: for networks with running statistics: maps parameters and inputs to the
        outputs in training mode and the parameters with new statistics.
      between: maps all parameters and the number of finished epochs to the parameters to go on
        with; called every ``epochs_per_call`` epochs. The optimizer's state is kept.

    Returns:
      The trained parameters, and curves of numpy arrays (runs, num_epochs).
    """
    if not 0 < batch_size <= len(data.train_labels):
        raise ValueError(f"batch_size {batch_size} for {len(data.train_labels)} training examples")
    advance = partial(
        run_epochs,
        apply_fn=apply_fn,
        make_optimizer=make_optimizer,
        batch_size=batch_size,
        goal=goal or CLASSIFICATION,
        train_apply_fn=train_apply_fn,
    )
    data = jax.device_put(data)
    state = jax.vmap(partial(init_state, make_optimizer=make_optimizer))(params, learning_rates)
    parts = []
    for start in range(0, num_epochs, epochs_per_call):
        count = min(epochs_per_call, num_epochs - start)
        state, curves = advance(state, data, keys, learning_rates, num_epochs=count)
        parts.append(jax.device_get(curves))
        if between is not None and start + count < num_epochs:
            state = state._replace(params=between(state.params, start + count))
        on_epochs(count)
    return state.params, Curves(
        *(np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    )


def init_state(
    params: PyTree, learning_rate: jax.Array, make_optimizer: MakeOptimizer
) -> TrainState:
    """The state of one run before its first epoch."""
    return TrainState(params, make_optimizer(learning_rate).init(params), jnp.zeros((), jnp.int32))


@partial(
    jax.jit,
    static_argnames=(
        "apply_fn",
        "make_optimizer",
        "num_epochs",
        "batch_size",
        "goal",
        "train_apply_fn",
    ),
)
def run_epochs(
    states: TrainState,
    data: Dataset,
    keys: jax.Array,
    learning_rates: jax.Array,
    *,
    apply_fn: ApplyFn,
    make_optimizer: MakeOptimizer,
    num_epochs: int,
    batch_size: int,
    goal: Goal,
    train_apply_fn: ApplyFn | None,
) -> tuple[TrainState, Curves]:
    """Some epochs of every run; one compiled program."""
    num_batches = data.train_labels.shape[0] // batch_size

    def loss_fn(params: PyTree, inputs: Array, labels: Array) -> tuple[jax.Array, PyTree]:
        if train_apply_fn is None:
            return goal.loss(apply_fn(params, inputs), labels), None
        outputs, updated = train_apply_fn(params, inputs)
        return goal.loss(outputs, labels), updated

    def run(
        state: TrainState, key: jax.Array, learning_rate: jax.Array
    ) -> tuple[TrainState, Curves]:
        optimizer = make_optimizer(learning_rate)

        def step(
            carry: tuple[PyTree, optax.OptState], rows: jax.Array
        ) -> tuple[tuple[PyTree, optax.OptState], None]:
            params, opt_state = carry
            inputs, labels = data.train_inputs[rows], data.train_labels[rows]
            grads, updated = jax.grad(loss_fn, has_aux=True)(params, inputs, labels)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            # Statistics have no gradient in training mode: their updates are zero.
            params = params if updated is None else updated
            return (optax.apply_updates(params, updates), opt_state), None

        def epoch(state: TrainState, _: None) -> tuple[TrainState, Curves]:
            order = jax.random.permutation(
                jax.random.fold_in(key, state.epoch), data.train_labels.shape[0]
            )
            batches = order[: num_batches * batch_size].reshape(num_batches, batch_size)
            (params, opt_state), _ = jax.lax.scan(step, (state.params, state.opt_state), batches)
            curves = measure(apply_fn, params, data, batch_size, goal)
            return TrainState(params, opt_state, state.epoch + 1), curves

        return jax.lax.scan(epoch, state, length=num_epochs)

    return jax.vmap(run)(states, keys, learning_rates)


def measure(
    apply_fn: ApplyFn, params: PyTree, data: Dataset, batch_size: int, goal: Goal
) -> Curves:
    """Loss and score of one network on both parts of the data: scalars."""
    inputs = jnp.concatenate([data.train_inputs, data.test_inputs])
    outputs = predict(apply_fn, params, inputs, batch_size)
    train_outputs, test_outputs = jnp.split(outputs, [data.train_inputs.shape[0]])
    return Curves(
        goal.loss(train_outputs, data.train_labels),
        goal.score(train_outputs, data.train_labels),
        goal.loss(test_outputs, data.test_labels),
        goal.score(test_outputs, data.test_labels),
    )


def predict(apply_fn: ApplyFn, params: PyTree, inputs: Array, batch_size: int) -> jax.Array:
    """The outputs (examples, ...) of a network that treats examples independently."""
    # Under vmap over runs, the activations of the whole set would not fit a CPU's cache.
    return jax.lax.map(lambda x: apply_fn(params, x[None])[0], inputs, batch_size=batch_size)


def cross_entropy(logits: jax.Array, labels: Array) -> jax.Array:
    """The mean cross-entropy of logits (batch, classes) and labels (batch,)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: jax.Array, labels: Array) -> jax.Array:
    """The fraction of labels (batch,) that logits (batch, classes) get right; nan if not finite."""
    right = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    return jnp.where(jnp.isfinite(logits).all(), right, jnp.nan)


def squared_error(outputs: jax.Array, targets: Array) -> jax.Array:
    """The mean squared error of outputs and targets of one shape."""
    return jnp.mean(jnp.square(outputs - targets))


def explained(outputs: jax.Array, targets: Array) -> jax.Array:
    """The fraction of the targets' variance that the outputs explain; nan if not finite."""
    variance = jnp.mean(jnp.square(targets - jnp.mean(targets, axis=0, keepdims=True)))
    fraction = 1 - squared_error(outputs, targets) / variance
    return jnp.where(jnp.isfinite(outputs).all(), fraction, jnp.nan)


CLASSIFICATION = Goal(cross_entropy, accuracy)
RECONSTRUCTION = Goal(squared_error, explained)


def epochs_to(curve: np.ndarray, threshold: float) -> np.ndarray:
    """The first epoch, from 1, at which each curve (..., epochs) reaches a threshold, or inf."""
    reached = np.asarray(curve) >= threshold
    return np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1.0, np.inf)
