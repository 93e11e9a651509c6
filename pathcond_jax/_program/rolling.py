"""Runs of equal blocks of operations, each of which reads what the one before it made.

A network of equal layers is a program in which the same operations follow each other again and
again. :func:`rolled` puts one operation, of the primitive ``RUN``, in the place of each such run;
an analysis may then treat a block once for all. Blocks are equal if they run the same operations
on values of the same shapes, each reads one value of the block before it, parameters that nothing
else reads, and equal constants, and if nothing else of what it makes is read outside. Where
anything else is found the operations stay as they are.

To be read from :func:`rolled` down: where operations repeat (:func:`_periods`), and what of it is
a run (:func:`_run`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.graph import Graph, Node

# Fewer blocks than this compile as fast one by one, and then run faster than a loop, which reads
# copies of their parameters side by side; blocks of more operations are not looked for.
FEWEST, _LONGEST = 16, 256
# Constants of more entries than this are equal only if they are one.
_COMPARED = 1 << 16


class _Run:
    """A run of equal blocks, as the primitive of an operation."""

    name = "run of equal blocks"
    multiple_results = True


RUN: Any = _Run()


class _Block(NamedTuple):
    """One block as an image of the first.

    Attributes:
      values: the id in the first block -> the id here, of all that is read or made.
      entry: the value that it reads of the block before it.
    """

    values: Mapping[int, int]
    entry: int


@functools.lru_cache(maxsize=64)
def rolled(graph: Graph, trainable: tuple[bool, ...]) -> Graph:
    """The program with one operation in place of each run of equal blocks.

    Its ``bodies`` are one program, from the parameters of a block and its entry to the entry of the
    next; its inputs are the parameters of all blocks in turn, and the entry of the first.

    Args:
      graph: the program; its first inputs are parameters.
      trainable: whether each of them is.
    """
    reader = _Reader(graph, trainable)
    taken: dict[int, tuple[int, Node]] = {}
    for start, period in _periods(reader.signatures()):
        beginnings = _beginnings(start, period)
        # A run repeats itself after every multiple of its period, too: as often as it is long.
        if not any(_apart(taken, begin, begin + FEWEST * period) for begin in beginnings):
            continue
        begin, blocks = max(
            (_run(reader, begin, period) for begin in beginnings), key=lambda run: len(run[1])
        )
        end = begin + period * len(blocks)
        if len(blocks) >= FEWEST and _apart(taken, begin, end):
            taken[begin] = end, reader.node(begin, period, blocks)
    nodes: list[Node] = []
    position = 0
    for begin, (end, node) in sorted(taken.items(), key=lambda run: run[0]):
        nodes += [*graph.nodes[position:begin], node]
        position = end
    return dataclasses.replace(graph, nodes=(*nodes, *graph.nodes[position:]))


def _apart(taken: Mapping[int, tuple[int, Node]], begin: int, end: int) -> bool:
    """Whether no run has taken any of some places."""
    return all(end <= first or begin >= last for first, (last, _) in taken.items())


def _beginnings(start: int, period: int) -> list[int]:
    """Where a run may begin: a block earlier, because its entry is of another kind; or anywhere.

    Only one of the ways to cut a stream of operations may cut through a single value.
    """
    return [max(start - period, 0), *range(start, start + period)]


def _periods(signatures: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where, and after how many operations, a program repeats itself; the longest runs first."""
    array = np.asarray(signatures)
    found = []
    for period in range(1, min(len(array) // FEWEST, _LONGEST) + 1):
        same = np.concatenate([[False], array[:-period] == array[period:], [False]])
        (edges,) = np.nonzero(same[1:] != same[:-1])
        for start, end in edges.reshape(-1, 2).tolist():
            # With one block whose entry is of another kind.
            if end - start >= (FEWEST - 2) * period:
                found.append((start, end + period, period))
    # What covers most, by the shortest blocks.
    for start, _, period in sorted(found, key=lambda run: (run[0] - run[1], run[2])):
        yield start, period


class _Reader:
    """What is known of a program's values."""

    def __init__(self, graph: Graph, trainable: tuple[bool, ...]) -> None:
        self.graph = graph
        self.trainable = dict(zip(graph.inputs, trainable, strict=False))
        self.readers: dict[int, set[int]] = {}
        for place, node in enumerate(graph.nodes):
            for number in node.inputs:
                self.readers.setdefault(number, set()).add(place)
        for number in graph.outputs:
            self.readers.setdefault(number, set()).add(len(graph.nodes))
        numbers: dict[Any, int] = {}
        self.operations = [
            numbers.setdefault(self._operation(node), len(numbers)) for node in graph.nodes
        ]

    def signatures(self) -> list[int]:
        """A number for each operation; equal ones may be parts of equal blocks."""
        made: dict[int, tuple[int, int]] = {}
        numbers: dict[Any, int] = {}
        found = []
        for place, node in enumerate(self.graph.nodes):
            operands = tuple(
                (self.kind(k), place - made[k][0] if k in made else 0, made.get(k, (0, 0))[1])
                for k in node.inputs
            )
            key = (self.operations[place], operands)
            found.append(numbers.setdefault(key, len(numbers)))
            made.update({k: (place, number) for number, k in enumerate(node.outputs)})
        return found

    def _operation(self, node: Node) -> Any:
        """What is equal for operations that do the same to values of the same shapes."""
        shapes = tuple(
            (self.graph.avals[k].shape, self.graph.avals[k].dtype)
            for k in (*node.inputs, *node.outputs)
        )
        key = (node.primitive, tuple(sorted(node.params.items(), key=lambda item: item[0])), shapes)
        try:
            hash(key)
        except TypeError:
            return id(node)
        return id(node) if node.bodies or node.effect else key

    def kind(self, number: int) -> str:
        """Whether a value is a parameter, trained or not, a constant, or something else."""
        if number in self.trainable:
            floating = jnp.issubdtype(self.graph.avals[number].dtype, jnp.floating)
            return ("frozen", "trained")[self.trainable[number]] if floating else "parameter"
        return "constant" if number in self.graph.constants else "made"

    def equal(self, one: int, two: int) -> bool:
        """Whether two constants are."""
        if one == two:
            return True
        if self.graph.avals[one].size > _COMPARED:
            return False
        first, second = (np.asarray(self.graph.constants[k]) for k in (one, two))
        return np.array_equal(first, second)

    def alike(self, one: int, two: int) -> bool:
        """Whether two values have one shape and dtype."""
        first, second = (self.graph.avals[k] for k in (one, two))
        return (first.shape, first.dtype) == (second.shape, second.dtype)

    def block(self, first: range, here: range) -> _Block | None:
        """The operations at some places as an image of those of a first block."""
        values: dict[int, int] = {}
        entries: dict[int, int] = {}
        for places in zip(first, here, strict=True):
            if len({self.operations[place] for place in places}) > 1:
                return None
            one, two = (self.graph.nodes[place] for place in places)
            for a, b in zip(one.inputs, two.inputs, strict=True):
                kinds = {self.kind(a), self.kind(b)}
                if a in values or a in entries:
                    same = values.get(a, entries.get(a)) == b
                elif kinds == {"constant"}:
                    same = self.equal(a, b)
                elif kinds == {"made"}:
                    same, entries[a] = not entries, b
                else:
                    same, values[a] = len(kinds) == 1 and kinds <= {"frozen", "trained"}, b
                if not same:
                    return None
            values.update(zip(one.outputs, two.outputs, strict=True))
        if len(entries) != 1 or not any(self.kind(k) == "trained" for k in values):
            return None
        return _Block(values, *entries.values())

    def closed(self, block: _Block, places: range, end: int) -> bool:
        """Whether nothing outside of a block reads its parameters or what it makes but ``end``."""
        return all(
            self.readers.get(number, set()) <= set(places)
            for number in block.values.values()
            if number != end
        )

    def node(self, begin: int, period: int, blocks: Sequence[_Block]) -> Node:
        """The operation that stands for a run."""
        nodes = self.graph.nodes[begin : begin + period]
        first = blocks[0]
        leaves = [k for k in first.values if k in self.trainable]
        end = blocks[1].entry
        body = dataclasses.replace(
            self.graph, inputs=(*leaves, first.entry), outputs=(end,), nodes=nodes
        )
        parameters = (block.values[k] for block in blocks for k in leaves)
        return Node(
            RUN,
            (*parameters, first.entry),
            (blocks[-1].values[end],),
            {"trainable": tuple(self.trainable[k] for k in leaves)},
            (body,),
            nodes[0].source,
        )


def _run(reader: _Reader, begin: int, period: int) -> tuple[int, list[_Block]]:
    """The blocks of a run that begins here, of ``period`` operations each."""
    blocks: list[_Block] = []
    end: int | None = None
    first = range(begin, begin + period)
    last = len(reader.graph.nodes) - period
    for start in range(begin, last + 1, period):
        block = reader.block(first, range(start, start + period))
        if block is None:
            break
        if len(blocks) == 1:
            end = block.entry if block.entry in blocks[0].values else None
        if blocks and (end is None or blocks[-1].values.get(end) != block.entry):
            break
        blocks.append(block)
    return begin, _closed(reader, begin, period, blocks, end)


def _closed(
    reader: _Reader, begin: int, period: int, blocks: list[_Block], end: int | None
) -> list[_Block]:
    """The first of the blocks, as long as nothing else reads what is theirs."""
    kept: list[_Block] = []
    for k, block in enumerate(blocks):
        places = range(begin + k * period, begin + (k + 1) * period)
        result = None if end is None else block.values.get(end)
        if result is None or not reader.closed(block, places, result):
            break
        kept.append(block)
        both = range(places.start, places.stop + period)
        if not reader.readers.get(result, set()) <= set(both):
            break
    return kept if end is not None and kept and reader.alike(blocks[0].entry, end) else []
