"""Loops whose steps have scales of their own, such as a stack of layers with stacked kernels.

How to read this file: steps are of one *kind* if they read slices of one pattern and begin with
zeros at the same places. The loop is walked through step by step (``_walked``), but only the first
step of each kind is analysed, between labels that stand for the scales of its carry before and
after; what it demands is written down as data and taken back. Then all steps of a kind demand the
same at once (``_repeated``), each of labels of its own: what one step calls a label array of some
shape becomes one array with the steps as its first axis, which is how a stack of layers lies in its
parameters. The carries are one chain of labels, from one step to the next.

Where every step leaves its carry with the scales that it came with, steps share nothing but these,
and one step stands for all (``follow_once``): its labels are those that each of them has.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pathcond_jax._program.control_flow import Scan
from pathcond_jax._program.graph import Node
from pathcond_jax._symmetry.equations import WILD, LabelBlock, Rows, Term, imply_equal
from pathcond_jax._symmetry.structural_rules import stacked_terms
from pathcond_jax._symmetry.terms import Terms, axes_of, connected, mapped, varies
from pathcond_jax._symmetry.values import Scale, Scope, expand

# Bounds on what is written down: operations analysed one by one, labels of all steps together.
_MAX_OPERATIONS = 20_000
_MAX_LABELS = 1 << 25

CARRIED = "carries a value that another step leaves with another scale"

# The axes along which the scale of a carry varies; None: it is the same before every step.
Form = frozenset[int] | None


class Loop(NamedTuple):
    """A scan and the scales of what it reads.

    Attributes:
      scope: the operation.
      scan: its structure.
      fixed: the scales of what is the same at every step.
      carry: those with which it begins.
      stacked: those of what it reads slice by slice.
      signal: whether anything that it reads is a signal.
      copies: for how many steps of the program each of its steps stands.
    """

    scope: Scope
    scan: Scan
    fixed: list[Scale]
    carry: list[Scale]
    stacked: list[Scale]
    signal: bool
    copies: int = 1

    @property
    def order(self) -> Sequence[int]:
        """The positions of the slices, in the order in which the steps run."""
        positions = range(self.scan.length)
        return positions[::-1] if self.scan.reverse else positions

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the carries."""
        return [self.scope.out_shape(k) for k in range(len(self.carry))]


class _Slices(NamedTuple):
    """The labels of slices that vary from step to step.

    Attributes:
      labels: per position, the distinct ones in order of appearance.
      patterns: per position, what else there is to say about its slices.
      apart: whether each label belongs to one step.
    """

    labels: list[np.ndarray]
    patterns: list[bytes]
    apart: bool


class _Kind(NamedTuple):
    """What all steps of one kind demand, in the labels of the first of them.

    Attributes:
      first: the position of that step's slices.
      blocks: the labels created: of the carries before, of operations, of the carries after.
      rows: the equations.
      zeros: per carry, where it is zero after the step.
      made: the scales of the slices that the step puts out.
      rounded: where it rounds values, and their labels.
    """

    first: int
    blocks: list[LabelBlock]
    rows: list[Rows]
    zeros: list[np.ndarray]
    made: list[Scale]
    rounded: list[tuple[Node, Any, np.ndarray]]


class _Walk(NamedTuple):
    """A loop, step by step.

    Attributes:
      kinds: the kinds of steps.
      steps: per position, the number of its kind.
      zeros: per carry, where it is zero after the last step.
      forms: the axes of the carries; wider than before where a step leaves one that varies more.
    """

    kinds: list[_Kind]
    steps: dict[int, int]
    zeros: list[np.ndarray]
    forms: list[Form]


class _Copies(NamedTuple):
    """What the labels of the first step of a kind are at each of its steps.

    Attributes:
      positions: those of the steps.
      source: the labels of the first one, sorted.
      targets: (positions, labels), the labels in their place.
    """

    positions: np.ndarray
    source: np.ndarray
    targets: np.ndarray

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Labels of the first step at every step, a new first axis; of size 1 if all are alike."""
        at = np.searchsorted(self.source, labels).clip(max=len(self.source) - 1)
        known = self.source[at] == labels if self.source.size else np.zeros(())
        return np.where(known, self.targets[:, at], labels) if known.any() else labels[None]


def sliced(scale: Scale, position: int) -> Scale:
    """The scale of a slice along the first axis."""
    terms = mapped(scale.terms, lambda x: x[0 if len(x) == 1 else position])
    return Scale(terms, scale.signal, scale.cause)


def follow(loop: Loop) -> list[Terms] | None:
    """The scales of a loop's results, each step with scales of its own.

    Returns:
      None if the loop is too large to be written down; then nothing is demanded.
    """
    analysis, slices = loop.scope.analysis, _slices(loop)
    if len(set(slices.patterns)) * len(loop.scan.body.nodes) > _MAX_OPERATIONS:
        return None
    before = analysis.mark()
    walk = _walked_to_the_end(loop, slices)
    sizes = [sum(math.prod(block.shape) for block in kind.blocks) for kind in walk.kinds]
    complete = len(walk.steps) == loop.scan.length
    if not complete or sum(sizes[kind] for kind in walk.steps.values()) > _MAX_LABELS:
        analysis.forget(before)
        return None
    return _repeated(loop, slices, walk)


def follow_once(loop: Loop) -> list[Terms] | None:
    """The scales of a loop's results where one step stands for all.

    Returns:
      None if steps may differ or share parameters, or if something that each step has for itself
      leaves the loop; then nothing is demanded.
    """
    analysis, copies = loop.scope.analysis, loop.scan.length
    loop = loop._replace(scan=loop.scan._replace(length=1), copies=copies)
    labels = [term.labels[term.labels > 0] for x in loop.stacked for term in x.terms]
    slices = _Slices([np.unique(np.concatenate(labels))], [b""], apart=True)
    if any(varies(x.terms, (0,)) for x in loop.stacked) or _held(loop, slices):
        return None
    before = analysis.mark()
    walk = _walked_to_the_end(loop, slices)
    if _leaves_its_carry(loop, walk):
        found = _repeated(loop, slices, walk)
        if not any(_stand_for_many(loop.scope, terms) for terms in found):
            return found
    analysis.forget(before)
    return None


def _leaves_its_carry(loop: Loop, walk: _Walk) -> bool:
    """Whether a step leaves its carry with the scales that it came with, whatever they are."""
    entering = _zeros_before(loop, walk.forms)
    if not all(map(np.array_equal, entering, walk.zeros)):
        return False
    (kind,) = walk.kinds
    carried = sum(form is not None for form in walk.forms)
    before, after = (
        np.concatenate([[0], *(b.start + np.arange(math.prod(b.shape)) for b in blocks)])
        for blocks in (kind.blocks[:carried], kind.blocks[len(kind.blocks) - carried :])
    )
    reasons = loop.scope.analysis.reasons
    exact = [rows for rows in kind.rows if not reasons[rows.origin].epsilon]
    return imply_equal(exact, before, after)


def _stand_for_many(scope: Scope, terms: Terms) -> bool:
    equations = scope.analysis.equations
    numbers = {k for term in terms for k in equations.block_numbers(term.labels)}
    return any(equations.blocks[k].copies > 1 for k in numbers)


def _walked_to_the_end(loop: Loop, slices: _Slices) -> _Walk:
    """The steps of a loop, with carries that vary along all axes along which they do at any."""
    analysis = loop.scope.analysis
    before = analysis.mark()
    held = _held(loop, slices) - analysis.moved
    forms: list[Form] = [
        None if loop.scan.passes(k) or not x.terms else axes_of(x.terms)
        for k, x in enumerate(loop.carry)
    ]
    while True:
        analysis.moved |= held
        walk = _walked(loop, slices, forms)
        if walk.forms == forms:
            break
        analysis.forget(before)
        forms = walk.forms
    analysis.moved -= held
    return walk


def _slices(loop: Loop) -> _Slices:
    equations, length = loop.scope.analysis.equations, loop.scan.length
    arrays = [term.labels for x in loop.stacked for term in x.terms]
    wide = np.concatenate([x.reshape(length, -1) for x in arrays if len(x) > 1], axis=1)
    leaf_numbers = equations.leaf_numbers(wide)
    labels, patterns = [], []
    for row, leaves in zip(wide, leaf_numbers, strict=True):
        found, first, inverse = np.unique(row, return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.where(found > 0, np.argsort(order), found.clip(max=0) - 1)
        labels.append(found[order][found[order] > 0])
        patterns.append(place[inverse.reshape(-1)].tobytes() + leaves.tobytes())
    every = np.concatenate(labels)
    others = [term.labels for x in (*loop.fixed, *loop.carry) for term in x.terms]
    others += [x for x in arrays if len(x) == 1]
    if any(np.isin(x, every).any() for x in others):
        # A label that belongs to a slice and to another value is followed step by step.
        patterns = [b"%d" % position + pattern for position, pattern in enumerate(patterns)]
    apart = bool(np.diff(np.sort(every)).all())
    return _Slices(labels, patterns, apart)


def _held(loop: Loop, slices: _Slices) -> set[tuple[int, tuple[int, ...]]]:
    """Sets of axes of leaves that are the same at several steps.

    They can take up a scale that one step leaves over, but not those of all steps.
    """
    same = [*loop.fixed, *(x for k, x in enumerate(loop.carry) if loop.scan.passes(k))]
    terms = [term for x in same for term in x.terms]
    terms += [
        term for x in loop.stacked for term in x.terms if len(term.labels) == 1 or not slices.apart
    ]
    blocks = {block for term in terms for block in loop.scope.leaf_blocks(term)}
    return {(leaf, axes) for leaf, axes in blocks if leaf not in loop.scope.analysis.once}


def _walked(loop: Loop, slices: _Slices, forms: list[Form]) -> _Walk:
    """Walks through the steps until a carry varies along other axes than ``forms``."""
    zeros = _zeros_before(loop, forms)
    numbers: dict[tuple[object, ...], int] = {}
    kinds: list[_Kind] = []
    steps: dict[int, int] = {}
    for position in loop.order:
        key = (slices.patterns[position], *((x.shape, x.tobytes()) for x in zeros))
        if key not in numbers:
            if len(kinds) * len(loop.scan.body.nodes) > _MAX_OPERATIONS:
                break
            kind, wider = _analysed(loop, position, forms, zeros)
            if wider != forms:
                return _Walk(kinds, steps, zeros, wider)
            numbers[key] = len(kinds)
            kinds.append(kind)
        steps[position] = numbers[key]
        zeros = kinds[steps[position]].zeros
    return _Walk(kinds, steps, zeros, forms)


def _analysed(
    loop: Loop, position: int, forms: list[Form], zeros: list[np.ndarray]
) -> tuple[_Kind, list[Form]]:
    """What one step demands, taken back, and along which axes the carries vary after it."""
    scope, equations = loop.scope, loop.scope.analysis.equations
    before, rounded = equations.mark(), len(scope.analysis.rounded)
    carries = list(zip(forms, loop.shapes, strict=True))
    entered = [
        Scale(x.terms, x.signal or (loop.signal and not x.terms), x.cause)
        if form is None
        else Scale(_unless_zero(scope.new(_sizes(shape, form)), zero), x.signal or loop.signal)
        for x, zero, (form, shape) in zip(loop.carry, zeros, carries, strict=True)
    ]
    arguments = [*loop.fixed, *entered, *(sliced(x, position) for x in loop.stacked)]
    left, made = loop.scan.outputs(scope.analysis.run(loop.scan.body, arguments))
    wider = [
        None
        if form is None and (loop.scan.passes(k) or not x.terms)
        else (form or frozenset()) | axes_of(expand(x, len(shape)))
        for k, (x, (form, shape)) in enumerate(zip(left, carries, strict=True))
    ]
    for x, (form, shape) in zip(left, carries, strict=True):
        if form is not None:
            _tie(scope, x, scope.new(_sizes(shape, form)))
    after = [
        _zero_places(() if form is None else x.terms, len(shape))
        for x, (form, shape) in zip(left, carries, strict=True)
    ]
    places = scope.analysis.rounded[rounded:]
    del scope.analysis.rounded[rounded:]
    return _Kind(position, *equations.take(before), after, made, places), wider


def _zeros_before(loop: Loop, forms: Sequence[Form]) -> list[np.ndarray]:
    """Per carry, where it is zero when the loop begins."""
    return [
        _zero_places(() if form is None else x.terms, len(shape))
        for x, shape, form in zip(loop.carry, loop.shapes, forms, strict=True)
    ]


def _zero_places(terms: Iterable[Term], ndim: int) -> np.ndarray:
    """Where a value of rank ``ndim`` is known to be zero, with size 1 where that is everywhere."""
    zero = np.zeros((1,) * ndim, bool)
    for labels in (term.labels for term in terms):
        zero = zero | (labels == WILD).reshape(labels.shape or (1,) * ndim)
    alike = zero.all() or not zero.any()
    return np.full((1,) * ndim, zero.any()) if alike else zero


def _sizes(shape: tuple[int, ...], form: frozenset[int]) -> tuple[int, ...]:
    return tuple(n if a in form else 1 for a, n in enumerate(shape))


def _unless_zero(labels: np.ndarray, zero: np.ndarray) -> Terms:
    return (Term(1.0, np.where(zero, WILD, labels)),)


def _tie(scope: Scope, scale: Scale, labels: np.ndarray) -> None:
    """Demands that a carry has the scale ``labels``."""
    terms = [*expand(scale, labels.ndim), Term(-1.0, labels)]
    for group in connected(terms):
        scope.ask_to_join(group)
    scope.analysis.vanish(terms, scope.because(CARRIED))


def _repeated(loop: Loop, slices: _Slices, walk: _Walk) -> list[Terms]:
    """Demands of every step what its kind demands."""
    scope, length = loop.scope, loop.scan.length
    equations = scope.analysis.equations
    chains = [
        None
        if form is None
        else equations.new((length + 1, *_sizes(shape, form)), repeats=length + 1)
        for shape, form in zip(loop.shapes, walk.forms, strict=True)
    ]
    for x, chain in zip(loop.carry, chains, strict=True):
        if chain is not None:
            _tie(scope, x, chain[0])
    copies = _copies(loop, slices, walk, [chain for chain in chains if chain is not None])
    for kind, copy in zip(walk.kinds, copies, strict=True):
        for rows in kind.rows:
            equations.extend(rows._replace(labels=np.concatenate(copy.of(rows.labels))))
        scope.analysis.rounded += [
            (node, dtype, copy.of(labels).reshape(-1)) for node, dtype, labels in kind.rounded
        ]
    last = loop.order[-1] + 1
    return [
        *(
            x.terms if chain is None else _unless_zero(chain[last], zero)
            for x, chain, zero in zip(loop.carry, chains, walk.zeros, strict=True)
        ),
        *_put_out(loop, walk, copies),
    ]


def _copies(
    loop: Loop, slices: _Slices, walk: _Walk, chains: Sequence[np.ndarray]
) -> list[_Copies]:
    """The labels of all steps, kind by kind."""
    length = loop.scan.length
    inner = [kind.blocks[len(chains) : len(kind.blocks) - len(chains)] for kind in walk.kinds]
    places = [np.array([p for p in range(length) if walk.steps[p] == k]) for k in range(len(inner))]
    shapes = [[block.shape for block in blocks] for blocks in inner]
    if all(each == shapes[0] for each in shapes):
        arrays = [_made(loop, inner[0], length)] * len(inner)
        rows = places
    else:
        arrays = [_made(loop, blocks, len(at)) for blocks, at in zip(inner, places, strict=True)]
        rows = [np.arange(len(at)) for at in places]
    found = []
    for kind, at, row, made in zip(walk.kinds, places, rows, arrays, strict=True):
        before = (at + 2) % (length + 1) if loop.scan.reverse else at
        count = sum(math.prod(block.shape) for block in kind.blocks)
        start = kind.blocks[0].start if kind.blocks else 0
        own = slices.labels[kind.first]
        source = np.concatenate([own, np.arange(start, start + count)])
        parts = [
            np.stack([slices.labels[position] for position in at]),
            *(chain.reshape(length + 1, -1)[before] for chain in chains),
            *(array.reshape(len(array), -1)[row] for array in made),
            *(chain.reshape(length + 1, -1)[at + 1] for chain in chains),
        ]
        order = np.argsort(source)
        found.append(_Copies(at, source[order], np.concatenate(parts, axis=1)[:, order]))
    return found


def _made(loop: Loop, blocks: Sequence[LabelBlock], count: int) -> list[np.ndarray]:
    """Labels of ``count`` steps for what operations create, repeated already or not."""
    new = loop.scope.analysis.equations.new
    return [
        new((count, *block.shape), repeats=count * block.repeats, copies=loop.copies)
        for block in blocks
    ]


def _put_out(loop: Loop, walk: _Walk, copies: Sequence[_Copies]) -> list[Terms]:
    """The scales of stacked outputs."""
    shapes = [loop.scope.out_shape(k) for k in range(len(loop.carry), len(loop.scope.node.outputs))]
    # Per output and kind, its scale at all steps of that kind.
    made = [
        [
            mapped(expand(kind.made[k], len(shape) - 1), copy.of)
            for kind, copy in zip(walk.kinds, copies, strict=True)
        ]
        for k, shape in enumerate(shapes)
    ]
    if len(copies) == 1:
        return [terms for (terms,) in made]
    found = []
    for per_kind, shape in zip(made, shapes, strict=True):
        at_step = {
            position: sliced(Scale(terms), j)
            for terms, copy in zip(per_kind, copies, strict=True)
            for j, position in enumerate(copy.positions.tolist())
        }
        scales = [at_step[position] for position in range(loop.scan.length)]
        found.append(stacked_terms(loop.scope, scales, len(shape), 0))
    return found
