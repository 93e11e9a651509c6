"""Where a program scales and shifts the outputs of a layer, channel by channel.

A *chain* begins at a dense layer or a convolution and follows what is computed from its outputs as
long as each result is read once, and added to, multiplied by or moved around with values of the
parameters alone that differ along the channels only. All of it is ``a_c y + b_c`` for channel c.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.graph import Graph, Node
from pathcond_jax._program.primitives import find


class Step(NamedTuple):
    """One addition or multiplication of a chain.

    Attributes:
      node: position among the graph's nodes.
      operand: which of its operands the chain is; the other one is the parameters'.
      axis: of the channels.
    """

    node: int
    operand: int
    axis: int


class Chain(NamedTuple):
    """A layer and what scales and shifts its channels.

    Attributes:
      layer: position of the dense layer or convolution among the graph's nodes.
      kernel: value id of its kernel.
      kernel_axis: of the output channels.
      channels: how many there are.
      steps: what follows.
    """

    layer: int
    kernel: int
    kernel_axis: int
    channels: int
    steps: tuple[Step, ...]


class Known(NamedTuple):
    """What depends on parameters alone.

    Attributes:
      reads: from a value id to the inputs of the graph that it is computed from.
      axes: from a value id to the axes along which it may differ.
    """

    reads: dict[int, frozenset[int]]
    axes: dict[int, frozenset[int]]


_ADD, _SUB, _MUL, _DIV = map(find, ("add", "sub", "mul", "div"))
_BROADCAST, _RESHAPE, _SQUEEZE, _TRANSPOSE = map(
    find, ("broadcast_in_dim", "reshape", "squeeze", "transpose")
)
_ELEMENTWISE = frozenset(
    map(
        find,
        (
            *("add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "square", "integer_pow", "pow"),
            *("exp", "max", "min", "clamp", "abs", "convert_element_type", "copy"),
        ),
    )
)


def known_values(graph: Graph, leaves: Collection[int]) -> Known:
    """What the program computes from its inputs ``leaves`` alone."""
    reads = {number: frozenset((number,)) for number in leaves}
    reads |= dict.fromkeys(graph.constants, frozenset())
    axes = {number: _long(graph, number) for number in reads}
    for node in graph.nodes:
        if node.effect or not all(number in reads for number in node.inputs):
            continue
        read = frozenset().union(*(reads[number] for number in node.inputs))
        for number in node.outputs:
            reads[number] = read
            axes[number] = _axes(graph, node, number, axes)
    return Known(reads, axes)


def find_chains(graph: Graph, known: Known) -> Iterator[Chain]:
    """The chains of a program that have a step, each as long as can be."""
    readers: dict[int, list[int]] = {}
    for position, node in enumerate(graph.nodes):
        for number in node.inputs:
            readers.setdefault(number, []).append(position)
    uses = Counter({number: len(found) for number, found in readers.items()})
    uses.update(graph.outputs)
    for position, node in enumerate(graph.nodes):
        layer = _layer(graph, node, known)
        if layer is None or uses[layer.kernel] != 1:
            continue
        value, axis, steps = node.outputs[0], layer.axis, []
        while uses[value] == 1 and value in readers:
            (reader,) = readers[value]
            following = graph.nodes[reader]
            operand = _scaled_or_shifted(graph, following, value, axis, known)
            moved = _moved(graph, following, axis)
            if operand is not None:
                steps.append(Step(reader, operand, axis))
            elif moved is not None:
                axis = moved
            else:
                break
            value = following.outputs[0]
        if steps:
            channels = graph.avals[node.outputs[0]].shape[layer.axis]
            yield Chain(position, layer.kernel, layer.kernel_axis, channels, tuple(steps))


def channel_axes(graph: Graph, known: Known) -> dict[int, int]:
    """The axes of the channels of values that layers make, and what keeps their shape."""
    found: dict[int, int] = {}
    for node in graph.nodes:
        layer = _layer(graph, node, known)
        if layer is not None:
            found[node.outputs[0]] = layer.axis
            continue
        axes = [(number, found[number]) for number in node.inputs if number in found]
        if not axes or len(node.outputs) != 1:
            continue
        number, axis = axes[0]
        alike = graph.avals[number].shape == graph.avals[node.outputs[0]].shape
        moved = _moved(graph, node, axis)
        if node.primitive in _ELEMENTWISE and alike and {one for _, one in axes} == {axis}:
            found[node.outputs[0]] = axis
        elif moved is not None:
            found[node.outputs[0]] = moved
    return found


def coefficients(
    graph: Graph, chain: Chain, values: Mapping[int, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The factors a and the terms b of a chain, (channels,) each.

    Args:
      graph: the program.
      chain: one of its chains.
      values: what is computed from parameters alone, by value id.
    """
    dtype = graph.avals[graph.nodes[chain.layer].outputs[0]].dtype
    factor, term = jnp.ones(chain.channels, dtype), jnp.zeros(chain.channels, dtype)
    for step in chain.steps:
        node = graph.nodes[step.node]
        other = _per_channel(jnp.asarray(values[node.inputs[1 - step.operand]]), step.axis)
        factor, term = _STEPS[node.primitive, step.operand](factor, term, other)
    return factor, term


def with_values(
    graph: Graph, known: Known, leaves: Mapping[int, jax.Array]
) -> dict[int, jax.Array]:
    """Everything that the program computes from parameters alone, by value id."""
    values = dict(leaves)
    for node in graph.nodes:
        if all(number in known.reads for number in node.inputs) and not node.effect:
            operands = [values[k] if k in values else graph.constants[k] for k in node.inputs]
            results = node.primitive.bind(*operands, **node.params)
            results = results if node.primitive.multiple_results else [results]
            values.update(zip(node.outputs, results, strict=True))
    for node in graph.nodes:
        values.update({k: graph.constants[k] for k in node.inputs if k in graph.constants})
    return values


# By primitive and by which operand the chain is: from a, b and the other operand to a and b.
_STEPS = {
    (_ADD, 0): lambda a, b, other: (a, b + other),
    (_ADD, 1): lambda a, b, other: (a, b + other),
    (_SUB, 0): lambda a, b, other: (a, b - other),
    (_SUB, 1): lambda a, b, other: (-a, other - b),
    (_MUL, 0): lambda a, b, other: (a * other, b * other),
    (_MUL, 1): lambda a, b, other: (a * other, b * other),
    (_DIV, 0): lambda a, b, other: (a / other, b / other),
}


class _Layer(NamedTuple):
    kernel: int
    kernel_axis: int
    axis: int


def _convolution(node: Node, kernel: int) -> tuple[int, int] | None:
    """The axes of the output channels, in the kernel and in the result."""
    if kernel != 1:
        return None
    numbers = node.params["dimension_numbers"]
    return numbers.rhs_spec[0], numbers.out_spec[1]


def _product(node: Node, kernel: int, ranks: tuple[int, int]) -> tuple[int, int] | None:
    contracted, batch = node.params["dimension_numbers"]
    free = [
        [k for k in range(rank) if k not in (*contracted[side], *batch[side])]
        for side, rank in enumerate(ranks)
    ]
    if batch[kernel] or len(free[kernel]) != 1:
        return None
    return free[kernel][0], len(free[0]) if kernel == 1 else 0


def _layer(graph: Graph, node: Node, known: Known) -> _Layer | None:
    """A dense layer or convolution whose kernel is an input of the graph, as it is."""
    if node.primitive not in _LAYERS:
        return None
    kernels = [k for k, number in enumerate(node.inputs) if number in known.reads]
    if len(kernels) != 1 or node.inputs[kernels[0]] not in graph.inputs:
        return None
    (kernel,) = kernels
    one, two = (len(graph.avals[number].shape) for number in node.inputs)
    axes = _LAYERS[node.primitive](node, kernel, (one, two))
    return None if axes is None else _Layer(node.inputs[kernel], *axes)


_LAYERS = {
    find("conv_general_dilated"): lambda node, kernel, ranks: _convolution(node, kernel),
    find("dot_general"): _product,
}


def _scaled_or_shifted(graph: Graph, node: Node, value: int, axis: int, known: Known) -> int | None:
    """Which operand the chain is, if the other one differs along its channels only."""
    if len(node.inputs) != 2 or node.inputs[0] == node.inputs[1]:
        return None
    operand = node.inputs.index(value)
    other = node.inputs[1 - operand]
    kept = graph.avals[node.outputs[0]] == graph.avals[value]
    if (node.primitive, operand) not in _STEPS or other not in known.reads or not kept:
        return None
    return operand if known.axes[other] <= {axis} else None


def _moved(graph: Graph, node: Node, axis: int) -> int | None:
    """Where an operation that only moves entries puts the axis."""
    if node.primitive not in (_BROADCAST, _RESHAPE, _SQUEEZE, _TRANSPOSE):
        return None
    before, after = (graph.avals[k].shape for k in (node.inputs[0], node.outputs[0]))
    if len(node.inputs) != 1 or np.prod(before) != np.prod(after):
        return None
    if node.primitive is _TRANSPOSE:
        return int(node.params["permutation"].index(axis))
    if node.primitive is _BROADCAST:
        return int(node.params["broadcast_dimensions"][axis])
    ahead = np.prod(before[:axis])
    places = [
        k for k, size in enumerate(after) if size == before[axis] and np.prod(after[:k]) == ahead
    ]
    return places[0] if places else None


def _long(graph: Graph, number: int) -> frozenset[int]:
    return frozenset(k for k, size in enumerate(graph.avals[number].shape) if size > 1)


def _axes(
    graph: Graph, node: Node, number: int, axes: Mapping[int, frozenset[int]]
) -> frozenset[int]:
    """The axes along which a value of parameters alone may differ."""
    everywhere = _long(graph, number)
    shape = graph.avals[number].shape
    if node.primitive is _BROADCAST:
        dimensions = node.params["broadcast_dimensions"]
        return frozenset(dimensions[k] for k in axes[node.inputs[0]])
    if node.primitive in (_RESHAPE, _SQUEEZE):
        before = graph.avals[node.inputs[0]].shape
        places = [[k for k, size in enumerate(s) if size > 1] for s in (before, shape)]
        if [before[k] for k in places[0]] != [shape[k] for k in places[1]]:
            return everywhere
        place = dict(zip(*places, strict=True))
        return frozenset(place[k] for k in axes[node.inputs[0]])
    ranks = {len(graph.avals[k].shape) for k in node.inputs} - {0}
    if node.primitive in _ELEMENTWISE and ranks <= {len(shape)}:
        return frozenset().union(*(axes[k] for k in node.inputs))
    return everywhere


def _per_channel(value: jax.Array, axis: int) -> jax.Array:
    """A value that differs along one axis only, as a vector or a scalar."""
    if not value.ndim:
        return value
    index: list[Any] = [0] * value.ndim
    index[axis] = slice(None)
    return value[tuple(index)]
