"""What a model of another package is here, and how each kind of module becomes one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Model(NamedTuple):
    """A model as its package builds it.

    Attributes:
      apply_fn: ``apply_fn(params, *inputs)``.
      params: the parameters as the package initializes them.
      inputs: example inputs.
    """

    apply_fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]


MODELS: dict[str, Callable[[], Model]] = {}


def model(name: str, **options: Any) -> Callable:
    """Enters ``factory(**options)`` under ``package/name``."""

    def enter(factory: Callable[..., Model]) -> Callable[..., Model]:
        assert name not in MODELS, name
        MODELS[name] = functools.partial(factory, **options)
        return factory

    return enter


def normal(*shape: int) -> jax.Array:
    """A random input."""
    drawn = np.random.default_rng(1).normal(size=shape)
    return jnp.asarray(drawn, jnp.zeros(()).dtype)


def tokens(*shape: int, vocabulary: int) -> jax.Array:
    """Random token ids, none of them special."""
    return jnp.asarray(np.random.default_rng(1).integers(2, vocabulary, shape), jnp.int32)


def in_default_precision(leaf: Any) -> jax.Array:
    """The array in the default float dtype, if it is one of floats."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.zeros(()).dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def linen(module: Any, *inputs: Any, **options: Any) -> Model:
    """A Flax linen module; ``options`` go to ``init`` and ``apply``."""
    rngs = {name: jax.random.key(k) for k, name in enumerate(("params", "dropout", "drop_path"))}
    variables = jax.jit(functools.partial(module.init, **options))(rngs, *inputs)
    variables = jax.tree.map(in_default_precision, variables)
    return Model(functools.partial(module.apply, **options), variables, inputs)


def nnx_module(module: Any, *inputs: Any) -> Model:
    """A Flax nnx module, called for evaluation."""
    module.eval()
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    params, rest = jax.tree.map(in_default_precision, (params, rest))

    def apply_fn(params: Any, *inputs: Any) -> Any:
        return nnx.merge(graphdef, params, rest)(*inputs)

    return Model(apply_fn, params, inputs)


def equinox(module: Any, *inputs: Any, **options: Any) -> Model:
    """An Equinox module on a batch of examples; ``options`` go to its call."""
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def apply_fn(params: Any, *inputs: Any) -> Any:
        call = functools.partial(eqx.combine(params, static), **options)
        return jax.vmap(call)(*inputs)

    return Model(apply_fn, params, inputs)
