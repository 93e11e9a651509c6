"""A program without the values that its selections never choose.

In ``where(x > 0, sqrt(where(x > 0, x, 1)), 0)`` the 1 only keeps the root, and its derivative, from
what no entry of the result shows. The program ``where(x > 0, sqrt(x), 0)`` has the same values, and
its scales are not tied to the 1. The same goes for the norm of a vector that may be zero.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable
from typing import NamedTuple

import jax
import numpy as np

from pathcond_jax._program.graph import Graph, Node, part_for
from pathcond_jax._program.kinds import ELEMENTWISE
from pathcond_jax._program.primitives import find

_SELECT, _BROADCAST = find("select_n"), find("broadcast_in_dim")
_NOT, _EQUAL, _UNEQUAL = find("not"), find("eq"), find("ne")
_LOGIC = frozenset(map(find, ("and", "ge", "gt", "le", "lt", "or", "xor")))

# Operations each entry of whose result is made of the operands' entries at its own place.
_OWN_PLACE = frozenset(
    map(
        find,
        (
            *("abs", "add", "and", "atan2", "cbrt", "clamp", "complex", "conj"),
            *("convert_element_type", "copy", "div", "eq", "ge", "gt", "imag", "integer_pow"),
            *("is_finite", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow"),
            *("real", "rem", "rsqrt", "select_n", "sign", "sqrt", "square", "stop_gradient"),
            *("sub", "xor", *ELEMENTWISE),
        ),
    )
) - {None}

# Predicates are compared, and guards looked for, through so many operations.
_DEEPEST_PREDICATE, _DEEPEST_GUARD = 4, 32


class _Predicate(NamedTuple):
    """What a predicate is made of: those that are equal here have the same values.

    Attributes:
      base: an operation and what it is made of, or the number of a value.
      holds: whether it is true where that is, and not where that is not.
    """

    base: Hashable
    holds: bool = True


class _Chosen(NamedTuple):
    """Which case a predicate chooses at the places where a value matters.

    Attributes:
      predicate: chooses.
      shape: of the predicate; () chooses everywhere.
      case: the number of the case.
    """

    predicate: _Predicate
    shape: tuple[int, ...]
    case: int


def without_guards(graph: Graph) -> Graph:
    """The program, of the same values, without what stands where no selection chooses it.

    A value that is only seen where a predicate chooses one case of a selection may be computed from
    the same case of earlier selections by this predicate, as long as each of its entries is made of
    entries at the same place.
    """
    writer = _Writer(graph)
    parts = [writer.written(node) for node in graph.nodes]
    if all(part == (node,) for part, node in zip(parts, graph.nodes, strict=True)):
        return graph
    nodes = tuple(node for part in parts for node in part)
    avals = {**graph.avals, **writer.avals}
    return part_for(dataclasses.replace(graph, nodes=nodes, avals=avals), graph.outputs)[0]


class _Writer:
    """Writes the operations of one program anew."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.avals: dict[int, jax.ShapeDtypeStruct] = {}
        self._first = max(graph.avals, default=0) + 1
        self._makers = {number: node for node in graph.nodes for number in node.outputs}
        self._repeated = self._met_twice()
        self._found: dict[tuple[int, _Chosen], int] = {}
        self._made: list[Node] = []

    def written(self, node: Node) -> tuple[Node, ...]:
        """A node, after those that it needs; itself alone if nothing changes."""
        bodies = tuple(map(without_guards, node.bodies))
        if any(new is not old for new, old in zip(bodies, node.bodies, strict=True)):
            return (dataclasses.replace(node, bodies=bodies),)
        if node.primitive is not _SELECT or node.inputs[0] not in self._repeated:
            return (node,)
        which, *cases = node.inputs
        predicate, shape = self._predicate(which), self.graph.avals[which].shape
        seen = [self._seen(case, _Chosen(predicate, shape, k)) for k, case in enumerate(cases)]
        made, self._made = self._made, []
        inputs = (which, *seen)
        unchanged = inputs == node.inputs
        return (*made, node if unchanged else dataclasses.replace(node, inputs=inputs))

    def _met_twice(self) -> frozenset[int]:
        """The predicates by which another selection chooses too, maybe before they are repeated."""
        chosen_by = [node.inputs[0] for node in self.graph.nodes if node.primitive is _SELECT]
        # A selection by a known mask is followed entry by entry.
        chosen_by = [number for number in chosen_by if number not in self.graph.constants]
        bases = {number: _bases(self._predicate(number)) for number in chosen_by}
        count = Counter(base for number in chosen_by for base in bases[number])
        return frozenset(n for n in chosen_by if any(count[base] > 1 for base in bases[n]))

    def _predicate(self, number: int, depth: int = _DEEPEST_PREDICATE) -> _Predicate:
        node, shape = self._makers.get(number), self.graph.avals[number].shape
        if node is None or not depth:
            return _Predicate(self._constant(number))
        operands = tuple(self._predicate(k, depth - 1) for k in node.inputs)
        if node.primitive is _BROADCAST:
            (one,) = operands
            moved = (shape, node.params["broadcast_dimensions"], self._shape(node.inputs[0]))
            return one._replace(base=(_BROADCAST.name, moved, one._replace(holds=True)))
        if node.primitive is _NOT and self.graph.avals[number].dtype == bool:
            return operands[0]._replace(holds=not operands[0].holds)
        if node.primitive in (_EQUAL, _UNEQUAL):
            # Also where one operand is no number.
            return _Predicate((_EQUAL.name, shape, operands), node.primitive is _EQUAL)
        if node.primitive in _LOGIC:
            return _Predicate((node.primitive.name, shape, operands))
        return _Predicate(number)

    def _shape(self, number: int) -> tuple[int, ...]:
        return self.graph.avals[number].shape

    def _constant(self, number: int) -> Hashable:
        """A number by its value, anything else by its place."""
        aval = self.graph.avals[number]
        plain = aval.shape == () and isinstance(aval.dtype, np.dtype)
        if plain and number in self.graph.constants:
            value = self.graph.constants.stored(number)
            if not isinstance(value, Node):
                return (str(aval.dtype), np.asarray(value, aval.dtype).tobytes())
        return number

    def _seen(self, number: int, chosen: _Chosen, depth: int = _DEEPEST_GUARD) -> int:
        """A value that agrees with ``number`` wherever a predicate chooses a case."""
        node = self._makers.get(number)
        if node is None or not depth:
            return number
        if (number, chosen) not in self._found:
            self._found[number, chosen] = self._agreeing(number, node, chosen, depth - 1)
        return self._found[number, chosen]

    def _agreeing(self, number: int, node: Node, chosen: _Chosen, depth: int) -> int:
        if node.primitive is _SELECT:
            case = self._case(node.inputs[0], chosen)
            if case is not None:
                return self._seen(node.inputs[1 + case], chosen, depth)
        if node.primitive is _BROADCAST:
            return self._made_of(number, node, chosen, node.params["broadcast_dimensions"], depth)
        if node.primitive in _OWN_PLACE:
            return self._made_of(number, node, chosen, tuple(range(len(chosen.shape))), depth)
        return number

    def _case(self, which: int, chosen: _Chosen) -> int | None:
        """The case that a selection by ``which`` chooses, if that is known."""
        predicate = self._predicate(which)
        if predicate.base != chosen.predicate.base or self._shape(which) != chosen.shape:
            return None
        return chosen.case if predicate.holds == chosen.predicate.holds else 1 - chosen.case

    def _made_of(
        self, number: int, node: Node, chosen: _Chosen, axes: tuple[int, ...], depth: int
    ) -> int:
        """The result of an operation on what its operands, laid along ``axes``, may be."""
        known = [self._before_broadcast(chosen, axes, self._shape(k)) for k in node.inputs]
        inputs = tuple(
            k if before is None else self._seen(k, before, depth)
            for k, before in zip(node.inputs, known, strict=True)
        )
        if inputs == node.inputs:
            return number
        copy = self._first + len(self.avals)
        self.avals[copy] = self.graph.avals[number]
        self._made.append(dataclasses.replace(node, inputs=inputs, outputs=(copy,)))
        return copy

    def _before_broadcast(
        self, chosen: _Chosen, axes: tuple[int, ...], shape: tuple[int, ...]
    ) -> _Chosen | None:
        """What is known of an operand of a given shape, laid along ``axes``; None: nothing."""
        if chosen.shape == () or (shape == chosen.shape and axes == tuple(range(len(shape)))):
            return chosen
        base = chosen.predicate.base
        moved = (chosen.shape, axes, shape)
        if not isinstance(base, tuple) or base[:2] != (_BROADCAST.name, moved):
            return None
        return _Chosen(base[2]._replace(holds=chosen.predicate.holds), shape, chosen.case)


def _bases(predicate: _Predicate) -> list[Hashable]:
    """What a predicate is made of, and what it was before it was broadcast."""
    base = predicate.base
    if isinstance(base, tuple) and base[0] == _BROADCAST.name:
        return [base, *_bases(base[2])]
    return [base]
