"""A traced program run again in JAX, its operations within reach.

``replay`` walks through a graph and runs one operation after the other, so it works under ``jit``,
``vmap`` and ``grad``. Before each operation a hook sees its operands: it may replace them, and
record what it likes. Inner programs of calls are part of the graph, and the bodies of scans are
walked through as well; what a hook records there is stacked along a first axis, one entry per step.
Other control flow runs as it is.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from pathcond_jax._program.control_flow import read_scan
from pathcond_jax._program.graph import Graph, Node
from pathcond_jax._program.primitives import find

# The position of an operation among its graph's nodes; in the body of a scan, after that of the
# scan.
Place = tuple[int, ...]
Records = dict[Place, Any]

# ``hook(place, node, operands, fed) -> (operands, record)``. Operands keep their shapes and dtypes.
# ``fed`` is what the caller of ``replay`` gave for this place, or None; a record of None is none.
Hook = Callable[[Place, Node, Sequence[Any], Any], tuple[Sequence[Any], Any]]

_SCAN = find("scan")


class Replayed(NamedTuple):
    """What a program returned.

    Attributes:
      outputs: its results.
      records: what the hook recorded, by place.
    """

    outputs: list[Any]
    records: Records


def replay(
    graph: Graph, arguments: Sequence[Any], hook: Hook, fed: Mapping[Place, Any] | None = None
) -> Replayed:
    """Runs a program with a hook before every operation.

    Args:
      graph: the program.
      arguments: one array per input of the graph.
      hook: sees, and may replace, the operands of each operation.
      fed: arrays for the hook by place; in the body of a scan with one entry per step.
    """
    env = dict(zip(graph.inputs, arguments, strict=True))
    records: Records = {}

    def read(number: int) -> Any:
        return env[number] if number in env else graph.constants[number]

    fed = fed or {}
    for k, node in enumerate(graph.nodes):
        operands, record = hook((k,), node, [read(number) for number in node.inputs], fed.get((k,)))
        if record is not None:
            records[k,] = record
        below = {place[1:]: value for place, value in fed.items() if place[0] == k and place[1:]}
        inside = functools.partial(_below, hook, k)
        results, inner = _RUN.get(node.primitive, _bound)(graph, node, operands, inside, below)
        records |= {(k, *place): record for place, record in inner.items()}
        env.update(zip(node.outputs, results, strict=True))
    return Replayed([read(number) for number in graph.outputs], records)


def _below(
    hook: Hook, k: int, place: Place, node: Node, operands: Sequence[Any], fed: Any
) -> tuple[Sequence[Any], Any]:
    """The hook for the body of operation ``k``."""
    return hook((k, *place), node, operands, fed)


def _bound(
    graph: Graph, node: Node, operands: Sequence[Any], hook: Hook, fed: Mapping[Place, Any]
) -> tuple[Sequence[Any], Records]:
    """An operation as it is."""
    del graph, hook, fed
    results = node.primitive.bind(*operands, **node.params)
    return (results if node.primitive.multiple_results else [results]), {}


def _scanned(
    graph: Graph, node: Node, operands: Sequence[Any], hook: Hook, fed: Mapping[Place, Any]
) -> tuple[Sequence[Any], Records]:
    """A scan of its body, walked through."""
    loop = read_scan(node, graph.avals)
    constants, carry, stacked = loop.inputs(operands)

    def step(carry: list[Any], slices: tuple[list[Any], dict[Place, Any]]) -> tuple[Any, Any]:
        rows, fed = slices
        found = replay(loop.body, [*constants, *carry, *rows], hook, fed)
        following, made = loop.outputs(found.outputs)
        return following, (made, found.records)

    end, (made, records) = lax.scan(
        step, carry, (stacked, dict(fed)), length=loop.length, reverse=loop.reverse
    )
    return [*end, *made], records


_RUN: dict[Any, Callable[..., tuple[Sequence[Any], Records]]] = {_SCAN: _scanned}


def places(graph: Graph) -> list[tuple[Place, Graph, Node]]:
    """Every operation that :func:`replay` shows to its hook, with the graph it is in."""
    found: list[tuple[Place, Graph, Node]] = []
    for k, node in enumerate(graph.nodes):
        found.append(((k,), graph, node))
        if node.primitive is _SCAN:
            body = places(node.bodies[0])
            found += [((k, *place), inside, inner) for place, inside, inner in body]
    return found


def untouched(
    place: Place, node: Node, operands: Sequence[Any], fed: Any
) -> tuple[Sequence[Any], None]:
    """A hook that neither replaces nor records anything."""
    del place, node, fed
    return operands, None


def flat_function(graph: Graph) -> Callable[..., list[Any]]:
    """The program as a function of its inputs."""

    def function(*arguments: jax.Array) -> list[Any]:
        return replay(graph, arguments, untouched).outputs

    return function
