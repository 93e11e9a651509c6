"""Programs that are traced anew for inputs of other shapes."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.graph import Graph, trace
from pathcond_jax._spec.types import PyTree

Plan = TypeVar("Plan")


def traced(
    apply_fn: Callable[..., Any], variables: PyTree, inputs: Sequence[PyTree]
) -> tuple[Graph, Any]:
    """The program of ``apply_fn`` and the structure of its outputs.

    Args:
      apply_fn: ``apply_fn(variables, *inputs)``.
      variables: arrays or shapes; their leaves are the first inputs of the graph.
      inputs: arrays or shapes; theirs are the rest.
    """
    structure: list[Any] = []

    def flat(variables: PyTree, *inputs: PyTree) -> list[Any]:
        found, tree = jax.tree.flatten(apply_fn(variables, *inputs))
        structure.append(tree)
        return found

    return trace(flat, *map(shapes_of, (variables, *inputs))), structure[-1]


def once_per_shape(make: Callable[[tuple[Any, ...]], Plan]) -> Callable[[tuple[Any, ...]], Plan]:
    """``make``, which depends on the shapes and dtypes of its inputs only, called once for each."""
    made: dict[Any, Plan] = {}

    def plan(inputs: tuple[Any, ...]) -> Plan:
        flat, tree = jax.tree.flatten(inputs)
        key = tree, tuple((np.shape(value), jnp.result_type(value)) for value in flat)
        if key not in made:
            made[key] = make(inputs)
        return made[key]

    return plan


def shapes_of(tree: PyTree) -> PyTree:
    """The shapes and dtypes of a tree of arrays."""
    return jax.tree.map(
        lambda value: jax.ShapeDtypeStruct(
            np.shape(value), getattr(value, "dtype", jnp.result_type(value))
        ),
        tree,
    )
