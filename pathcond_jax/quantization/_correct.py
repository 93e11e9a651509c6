"""Bias correction: what quantization shifts on average goes back into the biases."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pathcond_jax._program.graph import Graph, Node
from pathcond_jax._program.primitives import find
from pathcond_jax._spec.trees import describe_leaves
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.quantization._affine import find_chains, known_values
from pathcond_jax.quantization._retrace import traced


def correct_biases(
    apply_fn: Callable[..., Any], params: PyTree, quantized: PyTree, *inputs: PyTree
) -> PyTree:
    """Moves biases so that the layers of a quantized network keep their means.

    Rounding a weight by ΔW shifts the outputs of its layer by ΔW E[x] on average, and such shifts
    add up over layers. One walk through the program, layer by layer, compares the mean of each
    channel on calibration data between the network and the quantized one, whose layers before are
    corrected already, and adds the difference to the layer's bias.

    Args:
      apply_fn: ``apply_fn(params, *inputs)`` in inference mode, batch normalization folded: layers
        without a bias are not corrected.
      params: the parameters before quantization, of the same representative.
      quantized: the parameters after it, as floating numbers: a tree like ``params``.
      *inputs: calibration data, some dozens of examples.

    Returns:
      ``quantized`` with other biases.

    Raises:
      SpecError: the trees differ, or no layer has a bias.

    Example:
      >>> import jax.numpy as jnp
      >>> from pathcond_jax.quantization import correct_biases
      >>> def apply_fn(params, x):
      ...     return x @ params["w"] + params["b"][None]
      >>> params = {"w": jnp.array([[1.4], [0.7]]), "b": jnp.array([1.0])}
      >>> rounded = {"w": jnp.round(params["w"]), "b": params["b"]}
      >>> correct_biases(apply_fn, params, rounded, jnp.ones((1, 2)))["b"].round(3).tolist()
      [1.1]

    References:
      Nagel, van Baalen, Blankevoort, Welling, *Data-free quantization through weight equalization
      and bias correction*, ICCV 2019, section 4.2 and appendix D.
    """
    leaves, treedef = describe_leaves(params)
    given, other = jax.tree.flatten(quantized)
    if other != treedef or [jnp.shape(v) for v in given] != [leaf.shape for leaf in leaves]:
        raise SpecError("quantized is no tree like params; pass what was made from these params")
    graph, _ = traced(apply_fn, params, inputs)
    biases = _biases(graph, len(leaves))
    if not biases:
        raise SpecError(
            "no layer to correct: no bias is added to the outputs of a dense layer or convolution"
        )
    corrected = jax.jit(lambda *values: _corrected(graph, biases, *values))
    return treedef.unflatten(corrected(jax.tree.leaves(params), given, jax.tree.leaves(inputs)))


class Bias(NamedTuple):
    """The input of the graph that a node adds to the outputs of a layer, and their axis."""

    number: int
    axis: int


_ADD = find("add")
_MOVES = frozenset(
    map(find, ("broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze"))
)


def _biases(graph: Graph, count: int) -> dict[int, Bias]:
    """By position of the node that adds it, the last bias of each layer."""
    known = known_values(graph, graph.inputs[:count])
    makers = {number: node for node in graph.nodes for number in node.outputs}
    uses = Counter(number for node in graph.nodes for number in node.inputs)
    found = {}
    for chain in find_chains(graph, known):
        for step in reversed(chain.steps):
            node = graph.nodes[step.node]
            number = _moved_from(makers, node.inputs[1 - step.operand])
            alone = number in graph.inputs and uses[number] == 1
            if node.primitive is _ADD and alone and graph.avals[number].size == chain.channels:
                found[step.node] = Bias(number, step.axis)
                break
    return found


def _moved_from(makers: Mapping[int, Node], number: int) -> int:
    """The value whose entries an operand has, in other places."""
    while number in makers and makers[number].primitive in _MOVES:
        number = makers[number].inputs[0]
    return number


def _corrected(
    graph: Graph,
    biases: Mapping[int, Bias],
    leaves: Sequence[jax.Array],
    quantized: Sequence[jax.Array],
    inputs: Sequence[Any],
) -> list[jax.Array]:
    moved = list(quantized)

    def keep(position: int, result: jax.Array) -> jax.Array:
        means[position] = _mean(result, biases[position].axis)
        return result

    def restore(position: int, result: jax.Array) -> jax.Array:
        number, axis = biases[position]
        change = means[position] - _mean(result, axis)
        place = graph.inputs.index(number)
        moved[place] = moved[place] + change.reshape(moved[place].shape).astype(moved[place].dtype)
        shape = [1] * result.ndim
        shape[axis] = result.shape[axis]
        return result + change.reshape(shape).astype(result.dtype)

    means: dict[int, jax.Array] = {}
    _walk(graph, biases, [*leaves, *inputs], keep)
    _walk(graph, biases, [*quantized, *inputs], restore)
    return moved


def _walk(
    graph: Graph,
    biases: Mapping[int, Bias],
    arguments: Sequence[Any],
    change: Callable[[int, jax.Array], jax.Array],
) -> None:
    """Runs the program, the result of each addition of a bias replaced by ``change`` of it."""
    values = dict(zip(graph.inputs, arguments, strict=True))
    for position, node in enumerate(graph.nodes):
        operands = [values[k] if k in values else graph.constants[k] for k in node.inputs]
        results = node.primitive.bind(*operands, **node.params)
        results = list(results) if node.primitive.multiple_results else [results]
        if position in biases:
            results = [change(position, results[0])]
        values.update(zip(node.outputs, results, strict=True))


def _mean(values: jax.Array, axis: int) -> jax.Array:
    return values.mean([k for k in range(values.ndim) if k != axis])
