"""The part that each parameter plays: which ones are biases, and how deep they are."""

import functools

from pathcond_jax._program.control_flow import read_scan
from pathcond_jax._program.graph import Graph
from pathcond_jax._program.primitives import find
from pathcond_jax._spec.spec import ArchSpec

_MOVES = frozenset(
    map(
        find,
        (
            *("broadcast_in_dim", "convert_element_type", "copy", "dynamic_slice", "gather", "neg"),
            *("pad", "reshape", "rev", "slice", "squeeze", "tile", "transpose"),
        ),
    )
)
_ADDITIONS = frozenset(map(find, ("add", "add_any", "sub")))
_SCAN = find("scan")


@functools.lru_cache(maxsize=64)
def biases(spec: ArchSpec) -> frozenset[str]:
    """The trainable leaves that the network only ever adds to activations.

    Without a program, those of one axis that only enter neurons.
    """
    trainable = [leaf.path for leaf in spec.leaves if leaf.trainable]
    if isinstance(spec.program, Graph):
        count = len(spec.leaves)
        names = dict(zip(spec.program.inputs, (leaf.path for leaf in spec.leaves), strict=False))
        added, used = _uses(spec.program, names, set(spec.program.inputs[count:]))
        return frozenset(path for path in trainable if path in added - used)
    leaving = {i.path for group in spec.groups for i in group.outgoing}
    return frozenset(p for p in trainable if len(spec.leaf(p).shape) == 1 and p not in leaving)


@functools.lru_cache(maxsize=64)
def depths(spec: ArchSpec) -> dict[str, int]:
    """The depth of each leaf: 0 before the first group of the spec, 1 after it, and so on.

    It is one more than that of the last group that the leaf leaves, in the forward order of the
    groups, and at least that of the groups it enters.
    """
    found = {leaf.path: 0 for leaf in spec.leaves}
    for number, group in enumerate(spec.groups):
        for after, side in ((0, group.incoming), (1, group.outgoing)):
            for incidence in side:
                found[incidence.path] = max(found[incidence.path], number + after)
    return found


def _uses(graph: Graph, names: dict[int, str], data: set[int]) -> tuple[set[str], set[str]]:
    """The leaves that are added to data, and those that are used in other ways.

    Args:
      graph: a program.
      names: the leaf that a value id is, but for its shape.
      data: the ids that depend on the network's inputs.
    """
    names, data = dict(names), set(data)
    added: set[str] = set()
    used: set[str] = set()
    for node in graph.nodes:
        leaves = {names[i] for i in node.inputs if i in names}
        signals = data.intersection(node.inputs)
        if node.primitive is _SCAN:
            loop = read_scan(node, graph.avals)
            _, carry, _ = loop.inputs(loop.body.inputs)
            inner = dict(zip(loop.body.inputs, node.inputs, strict=True))
            found = _uses(
                loop.body,
                {inside: names[outside] for inside, outside in inner.items() if outside in names},
                {*carry, *(inside for inside, outside in inner.items() if outside in data)},
            )
            added |= found[0]
            used |= found[1]
        elif node.primitive in _MOVES and node.inputs[0] in names:
            names.update(dict.fromkeys(node.outputs, names[node.inputs[0]]))
            used |= leaves - {names[node.inputs[0]]}
        elif node.primitive in _ADDITIONS and signals:
            added |= leaves
        else:
            used |= leaves
        if signals or node.primitive is _SCAN:
            data.update(node.outputs)
    used |= {names[i] for i in graph.outputs if i in names}
    return added, used
