"""Graph -> neuron groups: solve the scales' equations, read the neurons, explain the rest.

How to read this file: ``infer`` runs the analysis until no rule asks for joint labels any more.
What the equations leave free is then read in four steps (``_Reading.result``): combinations that
change no entry of any leaf are dropped, then scales that only enter or only leave; the rest are
neurons, grouped by the operation that created their labels, and each one's scale is written such
that leaves take simple powers of it. Whatever slices stay without a neuron are explained, axis by
axis.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from pathcond_jax._program.control_flow import read_by_slices, stacked_axes
from pathcond_jax._program.graph import Graph
from pathcond_jax._program.guards import without_guards
from pathcond_jax._spec.trees import layer_path
from pathcond_jax._spec.types import Incidence, Leaf, NeuronGroup, Pinned, Rounded

# The rules enter themselves into their table when they are imported.
from pathcond_jax._symmetry import loops, position_rules, rules, structural_rules  # noqa: F401
from pathcond_jax._symmetry.equations import Equations, LabelBlock, Solved, clean, null_space
from pathcond_jax._symmetry.invariance import one_sided_slices
from pathcond_jax._symmetry.values import MAX_JOINT, Analysis, Reason, Scale

_MAX_PASSES = 8
# Powers of a scale are simple if the quotients of any two have denominators up to this.
_MOST_PARTS = 12

# Why a log-scale that the equations leave free is not used.
_ONE_SIDED, _TRIVIAL = 1, 2
_UNUSED = {
    _ONE_SIDED: "the output does not depend on its scale, which no other parameter could take up",
    _TRIVIAL: "its scale can as well sit on the parameter's other axes",
}


class Inferred(NamedTuple):
    """What a program lets be rescaled.

    Attributes:
      groups: the neuron groups.
      explain: says what else may not be rescaled, and why.
      rounded: where what neurons scale is rounded to a lower precision.
    """

    groups: tuple[NeuronGroup, ...]
    explain: Callable[[], tuple[Pinned, ...]]
    rounded: tuple[Rounded, ...]


def infer(graph: Graph, leaves: Sequence[Leaf]) -> Inferred:
    """What may be rescaled in a program.

    Args:
      graph: the program; its first inputs are the leaves.
      leaves: the leaves of the parameter tree.
    """
    graph = without_guards(graph)
    shapes = {k: leaf.shape for k, leaf in enumerate(leaves) if leaf.trainable or leaf.state}
    stacked = stacked_axes(graph)
    factors = {k: _separate_axes(s, stacked[graph.inputs[k]]) for k, s in shapes.items()}
    sliced = read_by_slices(graph)
    once = {k for k in shapes if graph.inputs[k] in sliced and stacked[graph.inputs[k]] == 1}
    once = {k for k in once if shapes[k][0] > 1 and all(axes[0] == 0 for axes in factors[k])}
    reading = _Reading(_analysed(graph, len(leaves), shapes, factors, frozenset(once)), leaves)
    groups = reading.groups()
    return Inferred(groups, lambda: tuple(reading.pinned()), tuple(reading.rounded()))


def _analysed(
    graph: Graph,
    num_leaves: int,
    shapes: dict[int, tuple[int, ...]],
    factors: dict[int, set[tuple[int, ...]]],
    once: frozenset[int],
) -> Analysis:
    """The equations of a program, with ``factors`` joined where rules ask for it.

    Args:
      graph: the program; its first inputs are the leaves.
      num_leaves: how many these are.
      shapes: of the leaves that have scales, by position.
      factors: per leaf, the sets of axes that have labels of their own; changed in place.
      once: leaves of which the labels of one slice may stand for all.
    """
    for _ in range(_MAX_PASSES):
        analysis = Analysis(shapes, factors, once)
        arguments = [analysis.leaf(k) if k in shapes else Scale() for k in range(num_leaves)]
        arguments += [Scale(signal=True)] * (len(graph.inputs) - num_leaves)
        for scale in analysis.run(graph, arguments):
            origin = analysis.because("the network's output must not change", None)
            analysis.vanish(scale.terms, origin)
        if analysis.unlike:
            return _analysed(graph, num_leaves, shapes, factors, once - analysis.unlike)
        if not analysis.requests:
            break
        for leaf, axes in analysis.requests:
            sets = factors[leaf] | {axes}
            factors[leaf] = {s for s in sets if not any(set(s) < set(other) for other in sets)}
    return analysis


def _separate_axes(shape: tuple[int, ...], stacked: int) -> set[tuple[int, ...]]:
    """Each axis of a leaf alone, but with the first ones where loops run over these."""
    wide = [a for a, n in enumerate(shape) if n > 1]
    steps = tuple(a for a in wide if a < stacked)
    joint = [(*steps, a) for a in wide if a >= stacked] or [steps]
    if math.prod(shape[a] for a in steps) * max(shape[stacked:], default=1) > MAX_JOINT:
        joint = [(a,) for a in wide]
    return {axes for axes in joint if axes} or {(len(shape) - 1,) if shape else ()}


class _Reading:
    """Neurons from the solution space.

    Attributes:
      blocks: the label blocks of leaves.
      effects: per block, a sparse matrix (slices of the leaf, labels): the power with which each
        free log-scale multiplies each slice.
      moved: ``effects`` with those log-scales that move entries to one side only.
      unused: per label, why it is not used although it is free, or 0.
    """

    def __init__(
        self, analysis: Analysis, leaves: Sequence[Leaf], without: Collection[int] = ()
    ) -> None:
        equations = analysis.equations
        self.analysis, self.leaves = analysis, leaves
        self.solved: Solved = equations.solve(without)
        self.blocks = [block for block in equations.blocks if block.leaf is not None]
        self.effects = [
            self.solved.table[b.start : b.start + math.prod(b.shape)] for b in self.blocks
        ]
        self.blocks_of: dict[int, list[int]] = {}
        for k, block in enumerate(self.blocks):
            self.blocks_of.setdefault(_leaf_of(block), []).append(k)
        self.unused = np.zeros(equations.count, np.int8)
        self.creator = _creators(equations)
        self.copies = np.array([block.copies for block in equations.blocks])
        self.neurons = self._neurons()

    def _neurons(self) -> np.ndarray:
        """The free log-scales that are neurons; the others are marked as unused."""
        self._drop(self._trivial(), _TRIVIAL)
        for numbers in self.blocks_of.values():
            _merge_whole_leaf_effects(self.effects, numbers)
        shared = np.ones(len(self.unused), bool)
        shared[1:] = self.copies[self.creator[1:]] == 1
        self.effects = _with_simple_powers(_exchanged(self.effects, shared))
        self.moved = list(self.effects)
        sides = np.zeros((2, len(self.unused)), bool)
        for effect in self.effects:
            sides[0, effect.indices[effect.data > 0]] = True
            sides[1, effect.indices[effect.data < 0]] = True
        self._drop(np.flatnonzero(sides[0] ^ sides[1]), _ONE_SIDED)
        self.unused[~sides.any(axis=0) & (self.unused == 0)] = _TRIVIAL
        return np.flatnonzero(sides.all(axis=0))

    def _drop(self, labels: np.ndarray, why: int) -> None:
        self.unused[labels] = why
        for k, effect in enumerate(self.effects):
            gone = self.unused[effect.indices] != 0
            if gone.any():
                effect = effect.copy()
                effect.data[gone] = 0.0
                effect.eliminate_zeros()
                self.effects[k] = effect

    def _trivial(self) -> np.ndarray:
        """Free labels to fix because they, with others, change no entry of any leaf.

        A function of an entry that is a sum over sets of axes vanishes iff it vanishes at the
        entries where the axes outside of one of these sets are at 0.
        """
        rows = []
        for numbers in self.blocks_of.values():
            for k in numbers:
                total = self.effects[k]
                for other in numbers:
                    if other != k:
                        at = _reference(self.blocks[k], self.blocks[other])
                        total = total + self.effects[other][at]
                rows.append(total)
        sizes = np.array(
            [math.prod(block.shape) // block.repeats for block in self.analysis.equations.blocks]
        )
        made = np.array([block.leaf is None for block in self.analysis.equations.blocks])
        # What all steps of a loop share is fixed rather than what each of them has for itself.
        keys = (sizes, made, self.copies > 1)
        order = np.lexsort([key[self.creator] for key in keys])
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return null_space(sparse.vstack(rows, "csr"), self.solved.free, rank)

    def groups(self) -> tuple[NeuronGroup, ...]:
        """The neurons by the operation that created their labels."""
        neurons = self.neurons
        _, group = np.unique(self.creator[neurons], return_inverse=True)
        sizes = np.bincount(group) if len(neurons) else np.zeros(0, np.int64)
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
        copies = np.ones(len(sizes), np.int64)
        copies[group] = self.copies[self.creator[neurons]]
        group_of = np.zeros(len(self.unused), np.int64)
        index_of = np.zeros(len(self.unused), np.int64)
        group_of[neurons], index_of[neurons] = group, np.arange(len(neurons)) - first[group]
        sides: dict[tuple[int, bool], list[Incidence]] = {}
        for block, effect in zip(self.blocks, self.effects, strict=True):
            path = self.leaves[_leaf_of(block)].path
            for (group_number, entry), found in _incidences(effect, group_of, index_of).items():
                count, size = int(copies[group_number]), int(sizes[group_number])
                sides.setdefault((group_number, entry > 0), []).extend(
                    _incidence(path, block.axes, _of_copies(index, block, count, size), abs(entry))
                    for index in found
                )
        names = _unique_names([sides[k, True][0] for k in range(len(sizes))])
        return tuple(
            NeuronGroup(name, int(size), tuple(sides[k, True]), tuple(sides[k, False]))
            for k, (name, size) in enumerate(zip(names, sizes * copies, strict=True))
        )

    def rounded(self) -> Iterable[Rounded]:
        """Where values that neurons scale lose precision."""
        moving = np.zeros(len(self.unused), bool)
        moving[self.neurons] = True
        found = {
            Rounded(str(dtype), node.operation, node.source)
            for node, dtype, labels in self.analysis.rounded
            if moving[self.solved.table[labels].indices].any()
        }
        return sorted(found, key=dataclasses.astuple)

    def pinned(self) -> Iterable[Pinned]:
        """Why the remaining slices of each trainable leaf keep their scale, axis by axis."""
        for number, numbers in self.blocks_of.items():
            leaf = self.leaves[number]
            if not leaf.trainable:
                continue
            wide: list[int | None] = [a for a, n in enumerate(leaf.shape) if n > 1]
            for axis in wide or [None]:
                along = [k for k in numbers if axis is None or axis in self.blocks[k].axes]
                still = {k: np.flatnonzero(np.diff(self.effects[k].indptr) == 0) for k in along}
                if any(not slices.size for slices in still.values()):
                    continue
                k = min(along, key=lambda k: len(still[k]))
                yield self._pin(leaf, axis, k, still[k])

    def _pin(self, leaf: Leaf, axis: int | None, number: int, still: np.ndarray) -> Pinned:
        block = self.blocks[number]
        reasons = Counter(self._why(block.start + int(slice_)) for slice_ in still[:64])
        reason = reasons.most_common(1)[0][0]
        count = math.prod(block.shape)
        part = f" ({len(still) * block.copies} of {count * block.copies} slices)"
        part = part if len(still) < count else ""
        refused = [axes for k, axes in self.analysis.refused if k == block.leaf and axis in axes]
        if refused:
            part += f"; its entries along axes {refused[0]} are too many to be followed one by one"
        node = reason.node
        operation, source = (node.operation, node.source) if node is not None else ("", "")
        return Pinned(leaf.path, axis, operation, source, reason.text + part, reason.summed)

    def _why(self, label: int) -> Reason:
        origin = self.solved.why(label)
        if origin >= 0:
            return self._but_for_epsilon(label, self.analysis.reasons[origin])
        start, stop = self.solved.table.indptr[label : label + 2]
        unused = self.unused[self.solved.table.indices[start:stop]]
        why = int(unused[unused > 0].min(initial=_TRIVIAL))
        tied = int(self.solved.tied[label])
        if why == _TRIVIAL and tied >= 0:
            return self._but_for_epsilon(label, self.analysis.reasons[tied])
        return Reason(_UNUSED[why], None)

    def _but_for_epsilon(self, label: int, reason: Reason) -> Reason:
        """What the program with 0 in place of each ε says about a log-scale that an ε fixes."""
        if not reason.epsilon:
            return reason
        free, one_sided = self._without_epsilon
        start, stop = free.solved.table.indptr[label : label + 2]
        unused = free.unused[free.solved.table.indices[start:stop]]
        if not (unused != _TRIVIAL).any():
            return reason
        assert reason.node is not None
        what = "scale-invariant" if one_sided[label] else "rescalable"
        of = reason.node.function or reason.node.operation
        return reason._replace(text=f"{what} but for ε = {reason.epsilon:.3g} of {of}")

    @functools.cached_property
    def _without_epsilon(self) -> tuple["_Reading", np.ndarray]:
        """The same without any ε, and per label whether it is of a scaling that divides nothing."""
        reasons = enumerate(self.analysis.reasons)
        free = _Reading(self.analysis, self.leaves, {k for k, r in reasons if r.epsilon})
        one_sided = np.zeros(len(self.unused), bool)
        for block, found in zip(free.blocks, one_sided_slices(free.moved), strict=True):
            one_sided[block.start : block.start + len(found)] = found
        return free, one_sided


def _leaf_of(block: LabelBlock) -> int:
    assert block.leaf is not None
    return block.leaf


def _creators(equations: Equations) -> np.ndarray:
    """Per label, the number of the block it was created in."""
    creator = np.zeros(equations.count, np.int64)
    for number, block in enumerate(equations.blocks):
        creator[block.start : block.start + math.prod(block.shape)] = number
    return creator


def _reference(block: LabelBlock, other: LabelBlock) -> np.ndarray:
    """Per slice of ``block``, the slice of ``other`` at 0 on the axes that they do not share."""
    positions = np.arange(math.prod(other.shape)).reshape(other.shape)
    shared = [a for a in other.axes if a in block.axes]
    at = positions[tuple(slice(None) if a in shared else 0 for a in other.axes)]
    shape = [n if a in shared else 1 for a, n in zip(block.axes, block.shape, strict=True)]
    return np.broadcast_to(at.reshape(shape), block.shape).reshape(-1)


def _merge_whole_leaf_effects(effects: list[Any], numbers: Sequence[int]) -> None:
    """A scale that meets all of a leaf through several sets of axes meets it once."""
    whole: dict[int, list[tuple[int, float]]] = {}
    for k in numbers if len(numbers) > 1 else ():
        effect = effects[k]
        for column in effect.indices[: effect.indptr[1]]:
            values = effect.data[effect.indices == column]
            if len(values) == effect.shape[0] and (values == values[0]).all():
                whole.setdefault(int(column), []).append((k, float(values[0])))
    for column, met in whole.items():
        total = sum(value for _, value in met)
        for k, _ in met if len(met) > 1 else ():
            effects[k] = effects[k].copy()
            effects[k].data[effects[k].indices == column] = total if k == met[-1][0] else 0.0
            effects[k] = clean(effects[k])


def _exchanged(effects: list[Any], shared: np.ndarray) -> list[Any]:
    """The effects, a log-scale on one side only taken together with another where that helps.

    In ``x @ w / s @ v`` scales of w may be taken up by s, and one of s by v: both move entries to
    one side, and are no neurons. Their difference, which moves w and v, is one. So where two such
    columns share a slice, a multiple of one, that which moves few slices and was created late, is
    subtracted from the other if this then moves entries to both sides. What all steps of a loop
    share, a mask over the columns, is not subtracted from what one step has for itself.
    """
    stacked = sparse.vstack(effects, "csc") if effects else sparse.csc_matrix((0, 0))
    column = np.repeat(np.arange(stacked.shape[1]), np.diff(stacked.indptr))
    up, down = (
        np.bincount(column[side], minlength=stacked.shape[1]) > 0
        for side in (stacked.data > 0, stacked.data < 0)
    )
    lone = np.flatnonzero(up ^ down)
    rows = stacked[:, lone].tocsr()
    unpaired = set(lone.tolist())
    exchange: list[tuple[int, int, float]] = []
    for row in np.flatnonzero(np.diff(rows.indptr) > 1):
        inside = slice(rows.indptr[row], rows.indptr[row + 1])
        met = dict(zip(lone[rows.indices[inside]].tolist(), rows.data[inside], strict=True))
        met = {label: value for label, value in met.items() if label in unpaired}
        giver = min(
            met,
            key=lambda k: (shared[k], stacked.indptr[k + 1] - stacked.indptr[k], -k),
            default=-1,
        )
        for label in met.keys() - {giver}:
            ratio = met[label] / met[giver]
            left = (stacked[:, [label]] - ratio * stacked[:, [giver]]).data
            if (left > 1e-9).any() and (left < -1e-9).any():
                unpaired.remove(label)
                exchange.append((giver, label, -ratio))
    if not exchange:
        return effects
    givers, labels, ratios = map(np.array, zip(*exchange, strict=True))
    taken = sparse.csr_matrix((ratios, (givers, labels)), (stacked.shape[1],) * 2)
    return [clean(effect + effect @ taken) for effect in effects]


def _with_simple_powers(effects: list[Any]) -> list[Any]:
    """The effects, each column divided by a number: integers without a common divisor if it can be.

    A scale that is a power of two then multiplies every entry by one.
    """
    size = effects[0].shape[1] if effects else 0
    odd = np.zeros(size, bool)
    for effect in effects:
        odd[effect.indices[abs(effect.data) != 1]] = True
    if not odd.any():
        return effects
    met = [odd[effect.indices] for effect in effects]
    found = {
        (label, round(power, 9))
        for effect, here in zip(effects, met, strict=True)
        for label, power in set(
            zip(effect.indices[here].tolist(), abs(effect.data[here]).tolist(), strict=True)
        )
    }
    powers: dict[int, list[float]] = {}
    for label, power in sorted(found):
        powers.setdefault(label, []).append(power)
    units, whole = np.ones(size), np.zeros(size, bool)
    for label, taken in powers.items():
        units[label], whole[label] = _unit(tuple(taken))
    simple = []
    for effect, here in zip(effects, met, strict=True):
        effect = effect.copy()
        labels, exact = effect.indices[here], effect.data[here] / units[effect.indices[here]]
        effect.data[here] = np.where(whole[labels], np.round(exact), np.round(exact, 9))
        simple.append(effect)
    return simple


@functools.cache
def _unit(powers: tuple[float, ...]) -> tuple[float, bool]:
    """What powers are multiples of, and whether they are multiples by integers.

    Powers without a simple common measure are multiples of the least one.
    """
    least = min(powers)
    ratios = [Fraction(power / least).limit_denominator(_MOST_PARTS) for power in powers]
    near = [
        abs(ratio - power / least) <= 1e-7 * ratio
        for ratio, power in zip(ratios, powers, strict=True)
    ]
    if not all(near):
        return least, False
    parts = math.lcm(*(ratio.denominator for ratio in ratios))
    divisor = math.gcd(*(int(ratio * parts) for ratio in ratios))
    return least * divisor / parts, True


def _incidences(
    effect: Any, group_of: np.ndarray, index_of: np.ndarray
) -> dict[tuple[int, float], list[np.ndarray]]:
    """Per (group, effect): the neuron of each slice; more arrays where one meets more neurons."""
    found: dict[tuple[int, float], list[np.ndarray]] = {}
    entries = sparse.coo_matrix(effect)
    groups = group_of[entries.col]
    for key in sorted(set(zip(groups.tolist(), entries.data.tolist(), strict=True))):
        here = np.flatnonzero((groups == key[0]) & (entries.data == key[1]))
        while here.size:
            rows, first = np.unique(entries.row[here], return_index=True)
            index = np.full(effect.shape[0], -1)
            index[rows] = index_of[entries.col[here[first]]]
            found.setdefault(key, []).append(index)
            here = np.delete(here, first)
    return found


def _of_copies(index: np.ndarray, block: LabelBlock, count: int, size: int) -> np.ndarray:
    """The neuron of each slice of all copies of a block, of a group of ``count`` times ``size``.

    A group that all copies share, of which there is one, has the same neurons in each of them.
    """
    index = index.reshape(block.shape)
    if block.copies == 1:
        return index
    steps = (size if count > 1 else 0) * np.arange(block.copies)
    return np.where(index < 0, -1, index + steps.reshape((-1,) + (1,) * (index.ndim - 1)))


def _incidence(path: str, axes: tuple[int, ...], index: np.ndarray, power: Any) -> Incidence:
    """Where neurons meet a leaf, without the axes along which they are the same."""
    for k in reversed(range(index.ndim)):
        if index.ndim > 1 and (index == index.take([0], k)).all():
            index, axes = index.take(0, k), axes[:k] + axes[k + 1 :]
    return Incidence(path, axes, index, power)


def _unique_names(firsts: Sequence[Incidence]) -> list[str]:
    """The layer of each group's first parameter, and its number in a stack of layers.

    Where a layer holds the first parameters of several groups, these parameters.
    """
    names, seen = [], Counter[str]()
    shared = Counter(map(_layer_name, dict.fromkeys(first.path for first in firsts)))
    layers = [_layer_name(first.path) for first in firsts]
    layers = [
        layer if shared[layer] == 1 else first.path.removeprefix("params/")
        for layer, first in zip(layers, firsts, strict=True)
    ]
    count = Counter(layers)
    for layer, first in zip(layers, firsts, strict=True):
        slices = np.unique(np.nonzero(np.atleast_1d(first.index) >= 0)[0])
        one = count[layer] > 1 and first.index.ndim > 1 and len(slices) == 1
        name = f"{layer}[{slices[0]}]" if one else layer
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names


def _layer_name(path: str) -> str:
    return "/".join(part for part in layer_path(path).split("/") if part != "params") or path
