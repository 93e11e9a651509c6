"""A program traced in training mode as inference runs it, with running statistics."""

import dataclasses
from collections.abc import Collection

import numpy as np

from pathcond_jax._program.graph import Constants, Graph, Node
from pathcond_jax._program.primitives import find

_ADD, _MULTIPLY = find("add"), find("mul")


def inference_form(graph: Graph, states: Collection[int]) -> Graph:
    """The program with running averages in place of what they are averages of.

    A network in training mode normalizes by the mean and variance of the batch, and returns the
    running averages that inference will use, ``m · running + (1 − m) · batch``. Such an output says
    which value of the program a state stands for: with the state in its place, and without the new
    averages among the outputs, the program is that of inference. What may be rescaled in the one
    may be in the other: an average that is put out does not change, nor does what it is of.

    Args:
      graph: the program.
      states: the ids of inputs that are not trained.

    Returns:
      The program of inference, its inputs the same; ``graph`` itself where no output is a running
      average.
    """
    makers = {number: node for node in graph.nodes for number in node.outputs}
    averaged = {
        number: found
        for number in graph.outputs
        if number in makers and (found := _averaged(graph, makers, makers[number], states))
    }
    outputs = tuple(k for k in graph.outputs if k not in averaged and k not in states)
    if not averaged or not outputs:
        return graph
    instead = {batch: running for running, batch in averaged.values()}
    kept: list[Node] = []
    alive = set(outputs)
    for node in reversed(graph.nodes):
        if node.effect or alive.intersection(node.outputs):
            inputs = tuple(instead.get(k, k) for k in node.inputs)
            kept.append(dataclasses.replace(node, inputs=inputs))
            alive.update(inputs)
    constants = Constants(
        {k: graph.constants.stored(k) for k in graph.constants}, graph.constants.keys() & alive
    )
    return dataclasses.replace(
        graph, outputs=outputs, nodes=tuple(reversed(kept)), constants=constants
    )


def _averaged(
    graph: Graph, makers: dict[int, Node], node: Node, states: Collection[int]
) -> tuple[int, int] | None:
    """The state and the value of the batch of which a node returns ``m·state + (1 − m)·value``."""
    if node.primitive is not _ADD:
        return None
    one, two = (_multiple(graph, makers.get(number)) for number in node.inputs)
    if one is None or two is None:
        return None
    for (weight, state), (other, value) in ((one, two), (two, one)):
        alike = graph.avals[state] == graph.avals[value]
        if state in states and value not in states and alike and abs(weight + other - 1) < 1e-5:
            return state, value
    return None


def _multiple(graph: Graph, node: Node | None) -> tuple[float, int] | None:
    """The constant and the value of which a node returns the product."""
    if node is None or node.primitive is not _MULTIPLY:
        return None
    for constant, value in (node.inputs, node.inputs[::-1]):
        if constant in graph.constants and not graph.avals[constant].shape:
            return float(np.asarray(graph.constants[constant])), value
    return None
