"""Where a network multiplies activations with trainable kernels: what quantization rounds.

A *site* is a matrix product or convolution of something that depends on the inputs with a kernel,
a trainable leaf but for its shape. ``sites`` finds them by following leaves through the program:
instead of a leaf, the positions of its entries run through reshapes, transposes and the like. What
reaches a product in another way, computed from leaves, is no site.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.control_flow import read_scan
from pathcond_jax._program.graph import Graph, Node
from pathcond_jax._program.primitives import find
from pathcond_jax._program.replay import Place
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import Incidence

_DOT, _CONVOLUTION, _SCAN = map(find, ("dot_general", "conv_general_dilated", "scan"))
_SAME_PLACES = frozenset(map(find, ("convert_element_type", "copy", "neg", "reduce_precision")))
_MOVES = frozenset(
    map(find, ("broadcast_in_dim", "reshape", "rev", "slice", "squeeze", "transpose"))
)
# Of more axes, not all orders are tried.
_MOST_AXES = 5
_PRODUCTS = frozenset(map(find, ("mul", "div")))


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A product of activations with a kernel.

    Attributes:
      place: of the operation in the program.
      kernel: which operand the kernel is, 0 or 1.
      leaf: the position of the kernel in ``spec.leaves``.
      path: of the kernel.
      entries: integer (steps, groups, inputs, outputs, window): which entry of the flat leaf each
        entry of the kernel is. Steps are those of loops around the operation, groups those of a
        grouped convolution or the batch axes of a product; the window is summed over with the
        inputs. A channel of the activations is (step, group, input).
      axes: the axes of the activation operand that are channels, in the order (groups, inputs).
    """

    place: Place
    kernel: int
    leaf: int
    path: str
    entries: np.ndarray
    axes: tuple[int, ...]

    @property
    def num_channels(self) -> int:
        """The number of channels of the activations, over all steps."""
        return math.prod(self.entries.shape[:3])


def sites(graph: Graph, spec: ArchSpec) -> tuple[Site, ...]:
    """The sites of a program whose first inputs are the leaves of the spec."""
    count = len(spec.leaves)
    leaves = {
        number: (k, np.arange(leaf.size, dtype=np.int32).reshape(leaf.shape))
        for k, (number, leaf) in enumerate(zip(graph.inputs, spec.leaves, strict=False))
        if leaf.trainable and leaf.size
    }
    found = _found(graph, leaves, set(graph.inputs[count:]), 0)
    return tuple(dataclasses.replace(s, path=spec.leaves[s.leaf].path) for s in found)


# A leaf of which a value holds entries, and their positions in it; the axes of loops come first.
_Followed = tuple[int, np.ndarray]


def _found(
    graph: Graph, followed: Mapping[int, _Followed], data: set[int], loops: int
) -> Iterator[Site]:
    known, data = dict(followed), set(data)
    for k, node in enumerate(graph.nodes):
        if node.primitive is _SCAN:
            yield from _found_in_loop(graph, k, node, known, data, loops)
        if data.intersection(node.inputs):
            data.update(node.outputs)
            site = _site(graph, k, node, known, data, loops)
            if site is not None:
                yield site
        elif any(number in known for number in node.inputs):
            moved = _moved(graph, node, known, loops)
            if moved is not None:
                known[node.outputs[0]] = moved


def _found_in_loop(
    graph: Graph,
    k: int,
    node: Node,
    known: Mapping[int, _Followed],
    data: set[int],
    loops: int,
) -> Iterator[Site]:
    """The sites in the body of a scan: its kernels are the same at every step, or one per step."""
    loop = read_scan(node, graph.avals)
    constants, _, stacked = loop.inputs(node.inputs)
    inside, carried, rows = loop.inputs(loop.body.inputs)
    entering = {}
    for outer, inner in (*zip(constants, inside, strict=True), *zip(stacked, rows, strict=True)):
        if outer in known:
            leaf, entries = known[outer]
            if inner in inside:
                entries = np.expand_dims(entries, loops).repeat(loop.length, loops)
            entering[inner] = (leaf, entries)
    pairs = zip(node.inputs, loop.body.inputs, strict=True)
    signals = {inner for outer, inner in pairs if outer in data} | set(carried)
    for site in _found(loop.body, entering, signals, loops + 1):
        yield dataclasses.replace(site, place=(k, *site.place))


def _moved(
    graph: Graph, node: Node, known: Mapping[int, _Followed], loops: int
) -> _Followed | None:
    """Where entries of a leaf are after an operation on parameters alone; None if it mixes them."""
    (first, *others) = (number for number in node.inputs if number in known)
    leaf, entries = known[first]
    if others or len(node.outputs) != 1:
        return None
    shape = graph.avals[node.outputs[0]].shape
    if node.primitive in _SAME_PLACES:
        return leaf, entries
    if node.primitive in _PRODUCTS and shape == graph.avals[first].shape:
        constant = all(n in graph.constants for n in node.inputs if n != first)
        return (leaf, entries) if constant else None
    if node.primitive not in _MOVES or len(node.inputs) != 1:
        return None
    move = functools.partial(node.primitive.bind, **node.params)
    for _ in range(loops):
        move = jax.vmap(move)
    with jax.ensure_compile_time_eval():
        return leaf, np.asarray(move(jnp.asarray(entries)))


def _site(
    graph: Graph, k: int, node: Node, known: Mapping[int, _Followed], data: set[int], loops: int
) -> Site | None:
    """The site that an operation is, if it is one."""
    laid_out = {_DOT: _of_product, _CONVOLUTION: _of_convolution}.get(node.primitive)
    if laid_out is None:
        return None
    kernels = [j for j in (0, 1) if node.inputs[j] in known and node.inputs[1 - j] in data]
    if len(kernels) != 1:
        return None
    (kernel,) = kernels
    if not jnp.issubdtype(graph.avals[node.inputs[1 - kernel]].dtype, jnp.floating):
        return None
    leaf, entries = known[node.inputs[kernel]]
    found = laid_out(node, kernel, entries.reshape(-1, *entries.shape[loops:]))
    return None if found is None else Site((k,), kernel, leaf, "", *found)


def _of_product(
    node: Node, kernel: int, entries: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...]] | None:
    contracted, batch = node.params["dimension_numbers"]
    rank = entries.ndim - 1
    inputs, groups = contracted[kernel], batch[kernel]
    outputs = [a for a in range(rank) if a not in (*inputs, *groups)]
    order = [0, *(1 + a for a in (*groups, *inputs, *outputs))]
    sizes = [math.prod(entries.shape[1 + a] for a in part) for part in (groups, inputs, outputs)]
    laid = entries.transpose(order).reshape(len(entries), *sizes, 1)
    return laid, (*batch[1 - kernel], *contracted[1 - kernel])


def _of_convolution(
    node: Node, kernel: int, entries: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...]] | None:
    numbers, groups = node.params["dimension_numbers"], node.params["feature_group_count"]
    if kernel != 1 or node.params["batch_group_count"] != 1:
        return None
    outputs, inputs, *window = numbers.rhs_spec
    order = [0, *(1 + a for a in (outputs, inputs, *window))]
    laid = entries.transpose(order)
    steps, outputs, inputs, *window = laid.shape
    laid = laid.reshape(steps, groups, outputs // groups, inputs, math.prod(window))
    return laid.transpose(0, 1, 3, 2, 4), (numbers.lhs_spec[1],)


def kernel_entries(site: Site, leaf: jax.Array) -> jax.Array:
    """A leaf laid out as ``site.entries``."""
    shape, order = site.entries.shape, _order(site, jnp.shape(leaf))
    if order is None:
        return leaf.reshape(-1)[site.entries]
    return jnp.transpose(leaf, order).reshape(shape)


def with_kernel_entries(site: Site, leaf: jax.Array, entries: jax.Array) -> jax.Array:
    """A leaf with other entries in its kernel: the inverse of :func:`kernel_entries`."""
    order = _order(site, jnp.shape(leaf))
    if order is None:
        flat = leaf.reshape(-1).at[site.entries].set(entries.astype(leaf.dtype))
        return flat.reshape(leaf.shape)
    moved = entries.reshape([leaf.shape[a] for a in order])
    return jnp.transpose(moved, tuple(map(order.index, range(len(order))))).astype(leaf.dtype)


@functools.lru_cache(maxsize=4096)
def _order(site: Site, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order of axes in which the entries of a leaf come; None if there is none."""
    # A gather of all entries would take longer, and its indices a constant as large as the leaf.
    entries = site.entries.reshape(-1)
    if len(shape) > _MOST_AXES or entries.size != math.prod(shape):
        return None
    places = np.arange(entries.size, dtype=entries.dtype).reshape(shape)
    orders = itertools.permutations(range(len(shape)))
    fitting = (o for o in orders if np.array_equal(places.transpose(o).reshape(-1), entries))
    return next(fitting, None)


@dataclasses.dataclass(frozen=True, eq=False)
class Meeting:
    """Neurons along one side of a site.

    Attributes:
      entry: of B: what a log-scale is multiplied by.
      neurons: integer array over the positions of the side, flat: positions among all neurons, -1
        for none.
    """

    entry: float
    neurons: np.ndarray


def meetings(site: Site, spec: ArchSpec) -> tuple[list[Meeting], list[Meeting]] | None:
    """The neurons along (step, group, input) and along (step, group, output) of a kernel.

    None where a leaf meets neurons in another way.
    """
    starts = np.cumsum([0, *(group.size for group in spec.groups)])
    met = [
        (sign * incidence.power, _neurons(site, incidence, int(start), spec))
        for start, group in zip(starts, spec.groups, strict=False)
        for sign, side in ((-1.0, group.incoming), (1.0, group.outgoing))
        for incidence in side
        if incidence.path == site.path
    ]
    rows: list[Meeting] = []
    cols: list[Meeting] = []
    for entry, neurons in met:
        along_inputs, along_outputs = neurons[:, :, :, :1, :1], neurons[:, :, :1, :, :1]
        fits_inputs = (neurons == along_inputs).all()
        fits_outputs = (neurons == along_outputs).all()
        if not fits_inputs and not fits_outputs:
            return None
        # In a depthwise convolution both fit: what it reads leaves the neurons, and it enters some.
        if fits_inputs and (entry > 0 or not fits_outputs):
            rows.append(Meeting(entry, along_inputs.reshape(-1)))
        else:
            cols.append(Meeting(entry, along_outputs.reshape(-1)))
    return rows, cols


def channel_scales(site: Site, spec: ArchSpec) -> list[Meeting]:
    """The neurons whose scales the channels of a site's activations take, and their powers.

    A scale that the kernel is divided by is one that what it reads was multiplied by.
    """
    found = meetings(site, spec)
    return [] if found is None else [m for m in found[0] if m.entry > 0]


def _neurons(site: Site, incidence: Incidence, start: int, spec: ArchSpec) -> np.ndarray:
    """The neuron, among all, that each entry of a kernel belongs to; -1 for none."""
    index = np.where(incidence.index < 0, -1, incidence.index + start)
    shape = spec.leaves[site.leaf].shape
    inside = [1] * len(shape)
    for axis in incidence.axes:
        inside[axis] = shape[axis]
    laid = index.transpose(np.argsort(incidence.axes)).reshape(inside)
    return np.broadcast_to(laid, shape).reshape(-1)[site.entries]


def along_channels(site: Site, values: jax.Array) -> jax.Array:
    """An activation operand as (channels of one step, everything else)."""
    rest = tuple(a for a in range(values.ndim) if a not in site.axes)
    moved = jnp.transpose(values, (*site.axes, *rest))
    return moved.reshape(math.prod(values.shape[a] for a in site.axes), -1)
