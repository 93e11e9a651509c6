"""Program -> spec: the neuron groups whose rescaling provably leaves the outputs unchanged."""

import dataclasses
import functools
import inspect
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.graph import Graph, trace
from pathcond_jax._program.inference import inference_form
from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import describe_leaves, layer_path
from pathcond_jax._spec.types import Leaf, NeuronGroup, PyTree, SpecError
from pathcond_jax._symmetry.infer import infer


class Traced(NamedTuple):
    """A spec and the program in which its groups were found.

    Attributes:
      spec: what was found.
      graph: the program on the inputs that were given.
    """

    spec: ArchSpec
    graph: Graph


def infer_spec(
    apply_fn: Callable[..., Any],
    params: PyTree,
    inputs: Sequence[PyTree],
    *,
    trainable: Callable[[str], bool] | PyTree | None = None,
    groups: Sequence[NeuronGroup] | None = None,
    max_pool: str = "paths",
    rescale_state: bool = False,
) -> Traced:
    """What ``trace_spec`` finds, before it is checked; the arguments are those."""
    leaves, treedef = describe_leaves(params, trainable)
    if rescale_state:
        floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        leaves = tuple(
            dataclasses.replace(leaf, state=is_float and not leaf.trainable)
            for leaf, is_float in zip(leaves, floating, strict=True)
        )
    graph = trace(apply_fn, params, *inputs)
    _check_used(apply_fn, graph, leaves, jax.tree.leaves(params))
    found, explain, rounded = infer(graph, leaves) if groups is None else (groups, tuple, ())
    shapes = jax.tree.map(_shape_of, tuple(inputs))
    states = [k for k, leaf in enumerate(leaves) if not leaf.trainable]
    program = _one_example(apply_fn, params, shapes, graph, states)
    spec = ArchSpec(
        cast(tuple, found), leaves, treedef, explain, program, max_pool, apply_fn, shapes, rounded
    )
    return Traced(spec, graph)


def _shape_of(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(value), getattr(value, "dtype", jnp.result_type(value)))


def _one_example(
    apply_fn: Callable[..., Any],
    params: PyTree,
    inputs: PyTree,
    graph: Graph,
    states: Sequence[int],
) -> Graph:
    """The program of inference on one example: paths are those of one, whatever the batch."""
    graph = inference_form(graph, [graph.inputs[k] for k in states])
    values = [graph.avals[k] for k in graph.inputs[-len(jax.tree.leaves(inputs)) :]]
    values += [graph.avals[k] for k in graph.outputs]
    sizes = {aval.shape[0] if aval.shape else None for aval in values}
    if not jax.tree.leaves(inputs) or len(sizes) != 1 or sizes <= {None, 1}:
        return graph
    single = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    try:
        shorter = trace(apply_fn, params, *single)
        shorter = inference_form(shorter, [shorter.inputs[k] for k in states])
    except Exception:
        # The leading axis is no batch, or the model insists on its length, in whatever way.
        return graph
    whole = all(
        aval.shape == (1, *graph.avals[k].shape[1:])
        for aval, k in zip((shorter.avals[j] for j in shorter.outputs), graph.outputs, strict=True)
    )
    return shorter if whole else graph


def chain_spec(params: PyTree, layers: Sequence[str]) -> ArchSpec:
    """The spec of a chain of dense layers with ReLU between them, without an apply function.

    Args:
      params: pytree of arrays or shapes that holds, for each layer, a matrix (inputs, outputs)
        and optionally a vector (outputs,).
      layers: the names of the layers in forward order, keys of the tree such as ``"Dense_0"``.

    Returns:
      The spec.

    Raises:
      SpecError: a layer is unknown or not dense, shapes do not follow each other, or there are
        fewer than two layers.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)},
      ...           "Dense_1": {"kernel": jnp.ones((3, 1))}}
      >>> pathcond.chain_spec(params, ["Dense_0", "Dense_1"]).num_neurons
      3
    """
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers):
        raise SpecError(f"layers is a sequence of names, not {layers!r}")
    leaves, _ = describe_leaves(params)
    inside: dict[str, list[int]] = {}
    for k, leaf in enumerate(leaves):
        inside.setdefault(layer_path(leaf.path), []).append(k)
    chain = [_dense_layer(leaves, inside, name) for name in layers]
    if len(chain) < 2:
        raise SpecError(
            f"a chain needs two layers at least, not {list(layers)!r}: it has no neuron to rescale"
        )
    for (one, two), (name, after) in zip(
        itertools.pairwise(chain), itertools.pairwise(layers), strict=True
    ):
        if leaves[one[0]].shape[1] != leaves[two[0]].shape[0]:
            raise SpecError(
                f"layer {name!r} has {leaves[one[0]].shape[1]} outputs and the next one, "
                f"{after!r}, {leaves[two[0]].shape[0]} inputs: {leaves[one[0]].path} "
                f"{leaves[one[0]].shape}, {leaves[two[0]].path} {leaves[two[0]].shape}; matrices "
                "are (inputs, outputs) and layers come in forward order"
            )

    def apply_fn(params: PyTree, x: jax.Array) -> jax.Array:
        flat = jax.tree.leaves(params)
        for k, (kernel, bias) in enumerate(chain):
            x = x @ flat[kernel].astype(x.dtype)
            if bias is not None:
                x = x + flat[bias].astype(x.dtype)[None]
            x = jax.nn.relu(x) if k + 1 < len(chain) else x
        return x

    first = leaves[chain[0][0]]
    x = jax.ShapeDtypeStruct((1, first.shape[0]), first.dtype)
    return infer_spec(apply_fn, params, [x]).spec


def _dense_layer(
    leaves: Sequence[Leaf], layers: Mapping[str, Sequence[int]], name: str
) -> tuple[int, int | None]:
    """The positions of a layer's matrix and vector, ``layers`` those of the leaves of each."""
    ending = "/" + name.strip("/")
    found = [layer for layer in layers if f"/{layer}".endswith(ending)]
    if not found:
        raise SpecError(f"no layer {name!r}; the tree has {', '.join(map(repr, layers))}")
    if len(found) > 1 and name.strip("/") not in found:
        raise SpecError(
            f"layer {name!r} could be any of {', '.join(map(repr, found))}; give more of the path"
        )
    inside = layers[name.strip("/") if len(found) > 1 else found[0]]
    for k in inside:
        if not leaves[k].trainable:
            raise SpecError(
                f"layer {name!r}: {leaves[k].path!r} has dtype {leaves[k].dtype} and is not "
                'trainable; a chain needs floats, under "params" if the tree has that key'
            )
    kernels = [k for k in inside if len(leaves[k].shape) == 2]
    biases = [k for k in inside if len(leaves[k].shape) == 1]
    if len(kernels) != 1 or len(biases) > 1 or len(inside) != len(kernels) + len(biases):
        shapes = ", ".join(f"{leaves[k].path} {leaves[k].shape}" for k in inside)
        raise SpecError(
            f"layer {name!r} is not dense (one matrix and at most one vector): {shapes}"
        )
    return kernels[0], biases[0] if biases else None


def _check_used(
    apply_fn: Callable[..., Any], graph: Graph, leaves: Sequence[Leaf], values: Sequence[Any]
) -> None:
    """A function that computes with parameters of its own says nothing about those it is given."""
    used = {i for node in graph.nodes for i in node.inputs} | set(graph.outputs)
    trained = [k for k, leaf in enumerate(leaves) if leaf.trainable]
    idle = [k for k in trained if graph.inputs[k] not in used]
    advice = (
        "compute with the parameters that apply_fn is given, as in "
        "`lambda params, x: model.apply(params, x)` or `nnx.merge(graphdef, params)(x)`"
    )
    for k in idle:
        for node in graph.nodes:
            if any(_is_captured(graph.constants.get(i), leaves[k], values[k]) for i in node.inputs):
                raise SpecError(
                    f"apply_fn closes over its parameters: {node.operation}"
                    f"{f' at {node.source}' if node.source else ''} uses a constant of shape "
                    f"{leaves[k].shape}, and nothing uses the argument {leaves[k].path!r}; {advice}"
                )
    if len(idle) == len(trained):
        raise SpecError(
            f"apply_fn{defined_at(apply_fn)} uses none of the trainable parameters it is given, "
            f"such as {leaves[idle[0]].path!r}; if it closes over them, {advice}"
        )


def _is_captured(constant: Any, leaf: Leaf, value: Any) -> bool:
    if constant is None or not leaf.shape or np.shape(constant) != leaf.shape:
        return False
    if is_traced(value) or isinstance(value, jax.ShapeDtypeStruct):
        return True
    # Where values are known, another constant of that shape may be a mask or an initial state.
    constant, value = np.asarray(constant), np.asarray(value)
    return bool((constant == value).all() and (value != value.flat[0]).any())


def defined_at(function: Callable[..., Any]) -> str:
    function = function.func if isinstance(function, functools.partial) else function
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" at {os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code else ""
