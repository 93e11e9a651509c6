"""How control flow is built, read off shapes: versions of JAX name its parameters differently."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax

from pathcond_jax._program.graph import Graph, Node, part_for, zeros_for

T = TypeVar("T")
Avals = Mapping[int, jax.ShapeDtypeStruct]

# All that a scan has had in any version; its structure is read off the shapes.
SCAN_PARAMETERS = (
    *("jaxpr", "length", "reverse", "unroll", "linear", "_split_transpose"),
    *("num_consts", "num_carry", "ft_in", "ft_out"),
)


class Scan(NamedTuple):
    """A ``scan``: what its body reads and returns at each step.

    Attributes:
      body: the program of one step, (constants, carry, slices) -> (carry, slices).
      length: the number of steps.
      reverse: whether the last step comes first.
      num_consts: how many inputs are the same at every step.
      num_carry: how many go from step to step; the inputs after them are stacked slices.
    """

    body: Graph
    length: int
    reverse: bool
    num_consts: int
    num_carry: int

    def inputs(self, values: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
        """Values of the operation's inputs as constants, carry and stacked slices."""
        first = self.num_consts + self.num_carry
        return (
            list(values[: self.num_consts]),
            list(values[self.num_consts : first]),
            list(values[first:]),
        )

    def outputs(self, values: Sequence[T]) -> tuple[list[T], list[T]]:
        """Values of the operation's outputs, or of its body's, as carry and stacked slices."""
        return list(values[: self.num_carry]), list(values[self.num_carry :])

    def passes(self, k: int) -> bool:
        """Whether carry ``k`` leaves every step as it came."""
        return self.body.outputs[k] == self.body.inputs[self.num_consts + k]


class While(NamedTuple):
    """A ``while``: how its inputs are divided.

    Attributes:
      condition: the program (condition constants, carry) -> whether to go on.
      body: the program (body constants, carry) -> carry.
      num_condition_consts: how many inputs only the condition reads.
      num_body_consts: how many only the body reads; the inputs after them are the carry.
    """

    condition: Graph
    body: Graph
    num_condition_consts: int
    num_body_consts: int

    def inputs(self, values: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
        """Values of the inputs as constants of the condition, constants of the body and carry."""
        first = self.num_condition_consts + self.num_body_consts
        return (
            list(values[: self.num_condition_consts]),
            list(values[self.num_condition_consts : first]),
            list(values[first:]),
        )


def read_scan(node: Node, avals: Avals) -> Scan:
    """The structure of a ``scan``: outside of the body, a stacked value has one axis more."""
    (body,) = node.bodies
    num_stacked = _count_stacked(avals, node.inputs, body, body.inputs)
    num_carry = len(node.outputs) - _count_stacked(avals, node.outputs, body, body.outputs)
    return Scan(
        body,
        int(node.params["length"]),
        bool(node.params["reverse"]),
        len(node.inputs) - num_stacked - num_carry,
        num_carry,
    )


def live_part(loop: Scan, live: Collection[int]) -> Scan:
    """A loop without what it does for results that nobody reads.

    Such a carry passes from step to step as it came; such a stacked output is zero.

    Args:
      loop: the loop.
      live: the numbers of the results that are read.
    """
    body, live = loop.body, set(live)
    entering = body.inputs[loop.num_consts : loop.num_consts + loop.num_carry]
    while True:
        part, read = part_for(body, [body.outputs[k] for k in sorted(live)])
        more = {k for k, number in enumerate(entering) if number in read} - live
        if not more:
            break
        live |= more
    part, zeros = zeros_for(part, body.outputs[loop.num_carry :])
    dead = [*entering, *(zeros[number] for number in body.outputs[loop.num_carry :])]
    outputs = tuple(body.outputs[k] if k in live else dead[k] for k in range(len(dead)))
    return loop._replace(body=dataclasses.replace(part, outputs=outputs))


def read_while(node: Node) -> While:
    """The structure of a ``while``: its carry is what it returns."""
    condition, body = node.bodies
    num_carry = len(node.outputs)
    num_condition, num_body = (len(part.inputs) - num_carry for part in (condition, body))
    return While(condition, body, num_condition, num_body)


def stacked_axes(graph: Graph) -> dict[int, int]:
    """Per input of a program, over how many of its first axes nested scans run."""
    found = dict.fromkeys(graph.inputs, 0)
    for node in graph.nodes:
        for body in (body for body in node.bodies if len(body.inputs) == len(node.inputs)):
            inside = stacked_axes(body)
            for outer, inner in zip(node.inputs, body.inputs, strict=True):
                less = len(graph.avals[outer].shape) - len(body.avals[inner].shape)
                if outer in found:
                    found[outer] = max(found[outer], less + inside[inner])
    return found


def read_by_slices(graph: Graph) -> set[int]:
    """The inputs of a program that scans read slice by slice, and that nothing else reads."""
    slices: set[int] = set()
    whole = set(graph.outputs)
    for node in graph.nodes:
        first = len(node.inputs)
        if node.primitive.name == "scan":
            scan = read_scan(node, graph.avals)
            first = scan.num_consts + scan.num_carry
        whole.update(node.inputs[:first])
        slices.update(node.inputs[first:])
    return slices.intersection(graph.inputs) - whole


def _count_stacked(outer: Avals, outside: Sequence[int], body: Graph, inside: Sequence[int]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(len(outer[o].shape) > len(body.avals[i].shape) for o, i in pairs)
