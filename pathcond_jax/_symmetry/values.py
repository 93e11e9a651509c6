"""The log-scales by which the values of a program move, and how an operation combines them.

Every value has a log-scale that is a sum of terms ``c · z[labels]``; label arrays broadcast against
the value, with size 1 on axes along which the scale is constant. A kernel of shape (in, out) begins
with two terms, one label per input and one per output: its scale is a sum over sets of axes, so
that labels stay as few as neurons.

How to read this file: :class:`Analysis` walks through a program and asks the rule of each operation
for the scales of its results. A rule sees the operation as a :class:`Scope`, whose methods demand
what must hold (``pin``, ``equate``, ``along``, ``contract``); they add equations and never solve
them. ``settle`` then names the scale of every signal that parameters have entered: these names are
the neurons.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.failures import failure, warn_of_failure
from pathcond_jax._program.graph import Graph, Node
from pathcond_jax._program.kinds import WITHOUT_RULE
from pathcond_jax._program.primitives import RuleTable
from pathcond_jax._symmetry.equations import WILD, Equations, Term, cancel, fits_every_scale
from pathcond_jax._symmetry.terms import (
    Terms,
    axes_of,
    connected,
    has_wild,
    is_wild,
    is_wild_somewhere,
    mapped,
    powered,
    support,
    varies,
)

# Labels over several axes of a leaf at once; beyond this they would rival the leaf itself.
MAX_JOINT = 1 << 20
_OPAQUE = "does not let a scale pass"
_TOO_MANY = "relates the scales of more entries than are followed one by one"


class Scale(NamedTuple):
    """The log-scale of a value.

    Attributes:
      terms: what it is the sum of.
      signal: whether the value depends on the network's input (else on parameters only).
      cause: the operation that left a signal without a scale; None: the input has none.
    """

    terms: Terms = ()
    signal: bool = False
    cause: Node | None = None


class Reason(NamedTuple):
    """Why a scale is fixed.

    Attributes:
      text: in words.
      node: the operation that fixes it; None: the network's ends.
      summed: the operation sums over the axis that it is fixed along, or slides along it.
      epsilon: the small constant that alone fixes it there, or 0.
    """

    text: str
    node: Node | None
    summed: bool = False
    epsilon: float = 0.0


ScaleRule = Callable[..., Sequence[Terms]]

# How positive scales pass through each primitive.
RULES: RuleTable[ScaleRule] = RuleTable("symmetry")


class Analysis:
    """One pass over a program: the equations so far and where they come from.

    Args:
      leaf_shapes: the shapes of the leaves that have scales, by position.
      factors: per leaf, the sets of axes that have labels of their own.
      once: leaves of which only loops read slices; the labels of one slice stand for all.
    """

    def __init__(
        self,
        leaf_shapes: dict[int, tuple[int, ...]],
        factors: dict[int, set[tuple[int, ...]]],
        once: frozenset[int] = frozenset(),
    ) -> None:
        self.equations = Equations()
        self.reasons: list[Reason] = []
        self.leaf_shapes = leaf_shapes
        self.factors = factors
        self.once = once
        # Those of ``once`` whose slices turn out to be read by steps that differ.
        self.unlike: set[int] = set()
        self.requests: list[tuple[int, tuple[int, ...]]] = []
        self.refused: list[tuple[int, tuple[int, ...]]] = []
        self.moved: set[tuple[int, tuple[int, ...]]] = set()
        self.rounded: list[tuple[Node, Any, np.ndarray]] = []
        self._constants: dict[tuple[Graph, int], Scale] = {}

    def leaf(self, number: int) -> Scale:
        """Unknown log-scales for a parameter, one label array per set of its axes."""
        full = self.leaf_shapes[number]
        shape, copies = ((1, *full[1:]), full[0]) if number in self.once else (full, 1)
        terms = []
        for axes in sorted(self.factors[number]):
            sizes = tuple(shape[a] for a in axes)
            labels = self.equations.new(sizes, number, axes, copies=copies)
            place = [n if a in axes else 1 for a, n in enumerate(shape)]
            terms.append(Term(1.0, labels.reshape(place)))
        return Scale(tuple(terms))

    def mark(self) -> tuple[Any, ...]:
        """How far the analysis is, for :meth:`forget`."""
        lists = (len(self.reasons), len(self.requests), len(self.rounded))
        return (self.equations.mark(), lists, frozenset(self.moved))

    def forget(self, mark: tuple[Any, ...]) -> None:
        """Undoes what happened since ``mark``."""
        equations, (reasons, requests, rounded), moved = mark
        self.equations.forget(equations)
        del self.reasons[reasons:], self.requests[requests:], self.rounded[rounded:]
        self.moved = set(moved)

    def because(self, text: str, node: Node | None, **details: Any) -> int:
        """The number of a reason, by which equations remember it."""
        reason = Reason(text, node, **details)
        if not self.reasons or self.reasons[-1] != reason:
            self.reasons.append(reason)
        return len(self.reasons) - 1

    def vanish(self, terms: Iterable[Term], origin: int) -> None:
        """Demands Σ terms = 0.

        Terms with disjoint axes vanish together where each group is constant along its own axes
        and these constants, new labels, add up to 0: what a vector over channels gains everywhere,
        a kernel over positions may lose.
        """
        groups = connected(cancel(list(terms)))
        constants = []
        for group in groups[1:]:
            scalar = (1,) * group[0].labels.ndim
            constants.append(Term(1.0, self.equations.new(scalar)))
            self.require([*group, constants[-1]], origin)
        if groups:
            self.require([*groups[0], *powered(constants, -1.0)], origin)

    def require(self, terms: Iterable[Term], origin: int) -> None:
        """Demands Σ terms = 0, for the reason numbered ``origin``."""
        terms = cancel(list(terms))
        if len(terms) > 1 and self.equations.too_many(terms):
            origin = self.because(_TOO_MANY, self.reasons[origin].node)
        self.equations.require(terms, origin)

    def run(self, graph: Graph, arguments: Sequence[Scale]) -> list[Scale]:
        """The scales of the graph's outputs."""
        env = dict(zip(graph.inputs, arguments, strict=True))

        def read(number: int) -> Scale:
            return env[number] if number in env else self._constant(graph, number)

        for node in graph.nodes:
            inputs = [read(i) for i in node.inputs]
            scope = Scope(self, graph, node)
            for number, terms in zip(node.outputs, _passed(scope, inputs), strict=True):
                env[number] = scope.settle(inputs, number, terms)
                scope.note_rounding(number, env[number])
        return [read(i) for i in graph.outputs]

    def _constant(self, graph: Graph, number: int) -> Scale:
        """Zeros, infinities and NaN fit every scale, other constants only the scale 1."""
        key = (graph, number)
        if key not in self._constants:
            known = jnp.issubdtype(graph.avals[number].dtype, jnp.inexact)
            free = fits_every_scale(_computed(graph, number)) if known else np.zeros(())
            # Zeros that come from outside, such as the first running means, are there to change.
            zeros = free.any() and not (free.all() and number in graph.captured)
            self._constants[key] = Scale((Term(1.0, np.where(free, WILD, 0)),) if zeros else ())
        return self._constants[key]


def _computed(graph: Graph, number: int) -> np.ndarray | None:
    """A constant; None if JAX cannot compute it."""
    try:
        return np.asarray(graph.constants[number])
    except Exception:
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Scope:
    """What a rule sees of the operation it is applied to, and what it may demand."""

    analysis: Analysis
    graph: Graph
    node: Node

    def shape(self, k: int) -> tuple[int, ...]:
        """The shape of input ``k``."""
        return self.graph.avals[self.node.inputs[k]].shape

    def out_shape(self, k: int = 0) -> tuple[int, ...]:
        """The shape of output ``k``."""
        return self.graph.avals[self.node.outputs[k]].shape

    def is_constant(self, k: int) -> bool:
        """Whether input ``k`` is known when tracing."""
        return self.node.inputs[k] in self.graph.constants

    def constant(self, k: int) -> np.ndarray | None:
        """The value of input ``k`` if it is known when tracing."""
        return _computed(self.graph, self.node.inputs[k]) if self.is_constant(k) else None

    @property
    def params(self) -> Any:
        """The primitive's parameters."""
        return self.node.params

    def because(self, text: str, **details: Any) -> int:
        """A reason that names this operation: ``text`` follows its name."""
        return self.analysis.because(f"{self.node.operation} {text}", self.node, **details)

    def note_rounding(self, output: int, scale: Scale) -> None:
        """Notes an output with a scale whose precision is lower than that of the operands."""
        dtypes = [self.graph.avals[k].dtype for k in (output, *self.node.inputs)]
        bits = [jnp.finfo(d).nmant if jnp.issubdtype(d, jnp.inexact) else 0 for d in dtypes]
        if scale.terms and 0 < bits[0] < max(bits):
            labels = np.concatenate([np.unique(term.labels) for term in scale.terms])
            self.analysis.rounded.append((self.node, dtypes[0], labels[labels > 0]))

    def require(self, terms: Iterable[Term], because: int | str) -> None:
        """Demands Σ terms = 0."""
        origin = self.because(because) if isinstance(because, str) else because
        self.analysis.require(terms, origin)

    def new(self, shape: tuple[int, ...]) -> np.ndarray:
        """New labels, unknown log-scales."""
        return self.analysis.equations.new(shape)

    def pin(self, *scales: Scale, because: str = _OPAQUE) -> None:
        """Demands that values keep their scale."""
        for scale in scales:
            self.analysis.vanish(scale.terms, self.because(because))

    def leaf_blocks(self, term: Term) -> list[tuple[int, tuple[int, ...]]]:
        """The leaves, and sets of their axes, whose labels a term has."""
        equations = self.analysis.equations
        blocks = [equations.blocks[k] for k in equations.block_numbers(term.labels)]
        return [(block.leaf, block.axes) for block in blocks if block.leaf is not None]

    def ask_to_join(self, terms: Iterable[Term]) -> None:
        """Separate labels on axes of one leaf meet: the next pass gives it joint ones.

        A leaf begins with labels for each axis alone. Where an operation demands something of a
        combination, such as that a flattened kernel be scaled like a signal whose entries all
        differ, a sum over single axes may be too poor to satisfy it although the leaf has the
        freedom. The pass goes on, soundly, and the next one gives these axes one label array.
        """
        axes: dict[int, list[tuple[int, ...]]] = {}
        for term in terms:
            for leaf, block_axes in self.leaf_blocks(term):
                axes.setdefault(leaf, []).append(block_axes)
        for leaf, sets in axes.items():
            joint = tuple(sorted(set().union(*sets)))
            if len(sets) > 1 and not any(set(joint) <= set(s) for s in sets):
                size = math.prod(self.analysis.leaf_shapes[leaf][a] for a in joint)
                asked = self.analysis.requests if size <= MAX_JOINT else self.analysis.refused
                asked.append((leaf, joint))

    def index(self, scale: Scale, axes: Iterable[int]) -> None:
        """Single slices of a parameter are taken along ``axes``: each has scales of its own."""
        axes = frozenset(axes)
        cut = [term for term in scale.terms if axes & support(term) and not scale.signal]
        for other in scale.terms if cut else ():
            if not axes & support(other):
                for term in [x for x in cut if support(x) <= support(other) | axes] or cut:
                    self.ask_to_join((term, other))

    def fresh(self, group: Sequence[Term]) -> Term:
        """A new label array equal to the sum of ``group``."""
        labels = self.new(np.broadcast_shapes(*(term.labels.shape for term in group)))
        self.require([*group, Term(-1.0, labels)], "joins scales")
        return Term(1.0, np.where(is_wild_somewhere(group), WILD, labels))

    def settle(self, inputs: Sequence[Scale], output: int, terms: Terms) -> Scale:
        """The scale of an output; a signal that parameters have entered gets its own neurons.

        Wherever a parameter meets a signal, the labels of the leaf are replaced by a new name that
        an equation ties to them. Later operations then speak of the signal's own labels: equations
        stay short, and every free label that is left has one place where it was created, which
        becomes the group of the neuron.
        """
        if not jnp.issubdtype(self.graph.avals[output].dtype, jnp.inexact):
            terms = ()
        terms = tuple(cancel(list(terms)))
        signals = [scale for scale in inputs if scale.signal]
        if not signals:
            return Scale(terms)
        met = [term for term in terms if self.leaf_blocks(term)]
        if met:
            self.ask_to_join(term for term in met if support(term))
            named: list[Term] = []
            for group in connected(terms):
                entered = any(term is other for term in group for other in met)
                named += [self.fresh(group)] if entered else group
            terms = tuple(named)
        cause = next((scale.cause for scale in signals if not scale.terms), self.node)
        return Scale(terms, True, None if terms else cause)

    def single(self, scale: Scale, ndim: int) -> np.ndarray:
        """The scale as one label array."""
        if not scale.terms:
            return np.zeros((1,) * ndim, np.int64)
        if len(scale.terms) == 1 and scale.terms[0].coefficient == 1.0:
            return scale.terms[0].labels
        return self.fresh(scale.terms).labels

    def equate(self, scales: Sequence[Scale], ndim: int, because: str) -> Terms:
        """The common scale of values that are added, compared or selected between."""
        first, *rest = (expand(scale, ndim) for scale in scales)
        for second in rest:
            first = self._equate_two(first, second, ndim, because)
        return first

    def _equate_two(self, one: Terms, two: Terms, ndim: int, because: str) -> Terms:
        if is_wild(one) or is_wild(two):
            return two if is_wild(one) else one
        difference = cancel([*one, *powered(two, -1.0)])
        for group in connected(difference):
            self.ask_to_join(group)
        self.analysis.vanish(difference, self.because(because))
        if not has_wild((*one, *two)):
            # Prefer what operations have named over labels of leaves, then what names more axes.
            return min(one, two, key=lambda x: (any(map(self.leaf_blocks, x)), -len(axes_of(x))))
        if not (has_wild(one) and has_wild(two)):
            # Where one side is zero, the other's scale holds. No labels of a mask's size go on.
            return two if has_wild(one) else one
        left, right = self.single(Scale(one), ndim), self.single(Scale(two), ndim)
        return (Term(1.0, np.where(left == WILD, right, left)),)

    def along(
        self,
        terms: Iterable[Term],
        axes: Iterable[int],
        because: int | str = "mixes entries along it",
    ) -> Terms:
        """Demands one scale along ``axes``; the result has size 1 there.

        The terms that vary along these axes must add up to something that does not: to new labels
        over the other axes. Terms that share no axis with them are left alone. Where what is left
        could as well be written on other axes of the same leaf, it is set to 0, since two ways to
        write one scale would count as two neurons.
        """
        axes, kept = tuple(axes), []
        groups = connected(cancel(list(terms)))
        for group in groups:
            if not varies(group, axes):
                kept += group
                continue
            if isinstance(because, str):
                because = self.because(because, summed=True)
            self.ask_to_join(term for term in group if support(term))
            shape = np.broadcast_shapes(*(term.labels.shape for term in group))
            rest = tuple(1 if a in axes else n for a, n in enumerate(shape))
            others = [term for other in groups if other is not group for term in other]
            if self._sits_elsewhere(group, others, {a for a, n in enumerate(rest) if n > 1}):
                self.require(group, because)
                continue
            labels = self.new(rest)
            self.require([*group, Term(-1.0, labels)], because)
            wild = np.broadcast_to(is_wild_somewhere(group), shape).all(axis=axes, keepdims=True)
            kept.append(Term(1.0, np.where(wild, WILD, labels)))
        return tuple(kept)

    def _sits_elsewhere(
        self, group: Iterable[Term], others: Iterable[Term], varying: set[int]
    ) -> bool:
        """Whether a scale that a group leaves over could as well sit on other axes of its leaf.

        Moving it there changes no entry of the leaf, which can be done once per set of axes.
        """
        used = self.analysis.moved
        for leaf, axes in (block for term in group for block in self.leaf_blocks(term)):
            for other in others:
                places = {place for place in self.leaf_blocks(other) if place[0] == leaf}
                if (leaf, axes) not in used and places - used and varying <= support(other):
                    used.add((leaf, axes))
                    return True
        return False

    def contract(
        self, terms: Iterable[Term], summed: tuple[int, ...], inputs: Iterable[Scale]
    ) -> Terms:
        """The scale of a sum of products, ``terms`` laid out over all axes, some summed away."""
        terms = cancel(list(terms))
        if is_wild(terms):
            return (Term(1.0, np.full((1,) * (terms[0].labels.ndim - len(summed)), WILD)),)
        bare = [scale for scale in inputs if scale.signal and not scale.terms]
        because: int | str = "sums over it"
        if bare:
            cause = bare[0].cause
            text = "the network's input is fixed"
            text = (
                f"its input comes out of {cause.operation}, with a fixed scale" if cause else text
            )
            because = self.analysis.because(text, cause)
        return mapped(self.along(terms, summed, because), lambda x: x.squeeze(summed))


def pin(scope: Scope, *scales: Scale, because: str = _OPAQUE) -> list[Terms]:
    """What is always sound: what an operation reads keeps its scale."""
    scope.pin(*scales, because=because)
    return [()] * len(scope.node.outputs)


def _passed(scope: Scope, scales: Sequence[Scale]) -> Sequence[Terms]:
    """The scales of an operation's results, by its rule if that holds; no error leaves it."""
    node, rule = scope.node, RULES.get(scope.node.primitive)
    if rule is None:
        return pin(scope, *scales, because=WITHOUT_RULE.get(node.primitive.name, _OPAQUE))
    if node.effect:
        return pin(scope, *scales, because="has effects that are not followed")
    objection = rule.objection(node.params)
    if objection:
        return pin(scope, *scales, because=objection)
    try:
        found = rule.function(scope, *scales)
        for k, terms in enumerate(found):
            _check_shapes(terms, scope.out_shape(k))
    except Exception as error:
        because = failure(error)
        warn_of_failure(node.operation, node.source, because)
        return pin(scope, *scales, because=because)
    return found


def _check_shapes(terms: Terms, shape: tuple[int, ...]) -> None:
    allowed = {(n, m) for m in shape for n in (1, m)}
    for sizes in (term.labels.shape for term in terms):
        if len(sizes) != len(shape) or not set(zip(sizes, shape, strict=True)) <= allowed:
            raise ValueError(f"labels of shape {sizes} for a value of shape {shape}")


def expand(scale: Scale, ndim: int) -> Terms:
    """The terms at rank ``ndim``: scalars take part in elementwise operations of any rank."""
    return mapped(scale.terms, lambda x: x if x.ndim == ndim else x.reshape((1,) * ndim))
