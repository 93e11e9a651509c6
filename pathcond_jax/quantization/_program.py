"""Programs of inference by the shapes of their inputs, and batches of inputs."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pathcond_jax._program.graph import Graph
from pathcond_jax._program.inference import inference_form
from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.quantization._retrace import traced
from pathcond_jax.quantization._sites import Site, sites

Batch = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A network traced for inputs of some shapes.

    Attributes:
      graph: the program; its inputs are the leaves of the parameters, then those of the inputs.
      sites: its products of activations with kernels.
      treedef: the structure of its outputs; None where running averages were left out of them.
    """

    graph: Graph
    sites: tuple[Site, ...]
    treedef: Any


def program(apply_fn: Callable[..., Any], spec: ArchSpec, inputs: tuple[PyTree, ...]) -> Program:
    """A network traced on the shapes of its parameters and inputs, once for each."""
    flat, tree = jax.tree.flatten(inputs)
    shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in flat)
    return _program(apply_fn, spec, tree, shapes)


@functools.lru_cache(maxsize=64)
def _program(
    apply_fn: Callable[..., Any], spec: ArchSpec, tree: Any, shapes: tuple[Any, ...]
) -> Program:
    leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in spec.leaves]
    inputs = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    whole, treedef = traced(apply_fn, jax.tree.unflatten(spec.treedef, leaves), inputs)
    states = [whole.inputs[k] for k, leaf in enumerate(spec.leaves) if not leaf.trainable]
    graph = inference_form(whole, states)
    return Program(graph, sites(graph, spec), treedef if graph is whole else None)


def numbered(batches: Iterable[Batch]) -> Iterator[tuple[int, tuple[PyTree, ...]]]:
    """Batches as tuples of inputs, checked, with their numbers.

    Raises:
      SpecError: there is none, or one is not finite or has nothing but zeros.
    """
    if hasattr(batches, "shape"):
        raise SpecError(
            f"batches is one array of shape {batches.shape}; pass a sequence of batches, "
            "[batch], each an array or a tuple of the inputs after the parameters"
        )
    number = -1
    for number, batch in enumerate(batches):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        _check(number, inputs)
        yield number, inputs
    if number < 0:
        raise SpecError("batches is empty; a few dozen examples are enough to calibrate on")


def _check(number: int, inputs: tuple[PyTree, ...]) -> None:
    floats = [
        x
        for x in map(jnp.asarray, jax.tree.leaves(inputs))
        if jnp.issubdtype(x.dtype, jnp.floating) and not is_traced(x)
    ]
    if not all(bool(jnp.isfinite(x).all()) for x in floats):
        raise SpecError(f"batch {number} has entries that are NaN or infinite; leave it out")
    if floats and not any(bool(x.any()) for x in floats):
        raise SpecError(f"batch {number} is all zeros, which says nothing about ranges")
