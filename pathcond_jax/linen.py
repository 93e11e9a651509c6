"""For training loops of Flax linen: a train state that hands its statistics to the optimizer."""

import dataclasses
from typing import Any

import optax
from flax.training import train_state

_OWN = {field.name for field in dataclasses.fields(train_state.TrainState)}


class TrainState(train_state.TrainState):
    """Flax's ``TrainState``, whose optimizer sees the fields that a subclass adds.

    ``tx.update`` of Flax's own is given gradients and parameters alone. An optimizer whose
    criterion reads more, as the path criterion reads the running statistics of batch normalization,
    then has to say that they are missing. Derive from this class instead and nothing else changes:
    ``batch_stats`` and whatever other fields there are go to ``tx.update`` under their names, as
    ``apply_gradients`` is about to leave them.

    Example:
      >>> from typing import Any
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import linen as nn
      >>> import pathcond_jax as pathcond
      >>> from pathcond_jax.linen import TrainState
      >>> class State(TrainState):
      ...     batch_stats: Any
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
      ...         return nn.Dense(1)(nn.relu(x))
      >>> variables = Net().init(jax.random.key(0), jnp.ones((1, 2)), train=False)
      >>> spec = pathcond.trace_spec(Net().apply, variables, jnp.ones((1, 2)), train=False)
      >>> tx = pathcond.reconditioned(optax.sgd(0.1), spec, every=1)
      >>> state = State.create(apply_fn=Net().apply, tx=tx, **variables)
      >>> gradients = jax.tree.map(jnp.ones_like, state.params)
      >>> state = state.apply_gradients(grads=gradients, batch_stats=state.batch_stats)
      >>> int(state.opt_state.recondition.num_updates)
      1
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """Flax's ``apply_gradients`` with the added fields as extra arguments of ``tx.update``.

        Args:
          grads: gradients, a tree like ``params``.
          **kwargs: fields to replace, such as the new ``batch_stats``.

        Returns:
          The state after the update.
        """
        tx = optax.with_extra_args_support(self.tx)
        added = {
            field.name: kwargs.get(field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in _OWN
        }

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            return tx.update(updates, state, params, **added)

        seeing = self.replace(tx=optax.GradientTransformation(tx.init, update))
        updated = super(TrainState, seeing).apply_gradients(grads=grads, **kwargs)
        return updated.replace(tx=self.tx)
