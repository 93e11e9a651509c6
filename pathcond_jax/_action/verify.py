"""What a trace has found, tried on numbers: an error of an analysis must not change a network.

The traced program is run in numpy (see :mod:`pathcond_jax._program.evaluation`), before and after
a random rescaling by powers of two. These are exact in floating point, so that a right spec changes
nothing at all, in a chaotic program either. A change has to come back in several draws, and to be
larger than what rounding could do, before it counts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._lifting.gram import path_norm, sums_over_paths

# The rules enter themselves into their table when they are imported.
from pathcond_jax._program import evaluation, numpy_rules  # noqa: F401
from pathcond_jax._program.graph import Graph, Node, trace
from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import Leaf, SpecError

# Multiplications, about two a nanosecond: beyond this a check would take longer than the trace.
MOST_WORK = 3e8
_MOST_ENTRIES = 1 << 26

# Of the outputs, relative to the largest entry; what rounding does is far below, an error above.
_TOLERANCE = 1e-6
# A float32's rounding, which an operation that JAX runs may add.
_ROUNDING = 1e-6
_DRAWS = 3


class WrongSpecError(SpecError):
    """A spec that ``trace_spec`` found does not hold: an error of this library, to be reported."""


def affordable(graph: Graph) -> bool:
    """Whether a program is small enough to be run twice while it is traced."""
    largest = max((math.prod(aval.shape) for aval in graph.avals.values()), default=0)
    return largest <= _MOST_ENTRIES and evaluation.work(graph, evaluation.MOST_STEPS) <= MOST_WORK


def verify(graph: Graph, spec: ArchSpec, values: Sequence[Any]) -> None:
    """Raises if rescaling by the spec changes what the program computes.

    Args:
      graph: the program in which the groups were found.
      spec: what was found.
      values: the parameters' leaves and the inputs', arrays or shapes.

    Raises:
      WrongSpecError: it does, naming the operation.
    """
    fitting = _fitting_all(values, graph)
    trial = Trial(lambda arguments: evaluation.run(graph, arguments), spec, fitting)

    def culprit(neurons: np.ndarray) -> Node | None:
        """The first operation whose results do not move by powers of the scales."""
        made_by = {number: node for node in graph.nodes for number in node.outputs}
        runs = (evaluation.steps(graph, arguments) for arguments in trial.pair(neurons))
        changed = None
        for (number, before), (_, after) in zip(*runs, strict=True):
            if number in made_by and not moves_by_powers(before, after):
                return made_by[number]
            if number in graph.outputs and not np.array_equal(before, after):
                changed = made_by.get(number)
        return changed

    failure = trial.failure(culprit)
    if failure is not None:
        raise WrongSpecError(
            f"the spec that was found is wrong: {_moving(spec, failure.neurons)} changes the "
            f"outputs by {failure.change:.1e} of their size{_through(failure.node)}. {_REPORT}"
        )


def verify_paths(spec: ArchSpec, values: Sequence[Any]) -> None:
    """Raises if rescaling changes the path norm of a network that has one.

    Args:
      spec: what was found, with its program.
      values: the parameters' leaves and the inputs', arrays or shapes.

    Raises:
      WrongSpecError: it does, naming the operation.
    """
    if evaluation.draws_numbers(spec.program):
        return
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in spec.leaves]
    numeric = dataclasses.replace(spec, program=evaluation.with_constants(spec.program))

    def log_norm(leaves: list[Any]) -> Any:
        return path_norm(numeric.treedef.unflatten(leaves), numeric, log=True)

    try:
        graph = trace(log_norm, shapes)
    except Exception:
        # Most networks have no path lifting, and no rule of it may end a trace.
        return
    if not affordable(graph):
        return
    count, program = len(spec.leaves), spec.program
    fitting = _fitting_all(values, program)
    trial = Trial(lambda arguments: evaluation.run(graph, arguments[:count]), spec, fitting)

    def culprit(neurons: np.ndarray) -> Node | None:
        """The first operation whose sums of squares do not move like the squares of its results."""
        made: list[tuple[Node, int]] = []
        sums = trace(functools.partial(sums_over_paths, numeric, made), shapes)
        pair = trial.pair(neurons)
        results = [dict(evaluation.steps(program, arguments)) for arguments in pair]
        lifted = [iter(evaluation.run(sums, arguments[:count])) for arguments in pair]
        for node, number in made:
            before, after = (np.ldexp(next(parts), next(parts)) for parts in lifted)
            one, two = (found.get(number) for found in results)
            if one is not None and one.shape == before.shape:
                alive = (one != 0) & (before != 0)
                factors = (after / before)[alive], np.square(two / one)[alive]
                if not np.allclose(*factors, rtol=1e-4):
                    return node
        return None

    failure = trial.failure(culprit)
    if failure is not None:
        raise WrongSpecError(
            f"the path lifting of this network is wrong: {_moving(spec, failure.neurons)} changes "
            f"the log of its norm by {failure.change:.1e} of its size{_through(failure.node)}. "
            f"{_REPORT}"
        )


class Failure(NamedTuple):
    """What a trial has found.

    Attributes:
      neurons: the smallest set of neurons whose scales change the outputs.
      change: by how much.
      node: the operation that does.
    """

    neurons: np.ndarray
    change: float
    node: Node | None


class Trial:
    """A function of the parameters, on drawn values, before and after rescaling.

    Args:
      compute: from the arguments to arrays that must not change.
      spec: the neurons; the first arguments are its leaves.
      values: the arguments in use, arrays or shapes.
    """

    def __init__(
        self, compute: Callable[[list[Any]], list[Any]], spec: ArchSpec, values: Sequence[Any]
    ) -> None:
        self.compute, self.spec, self.values = compute, spec, values
        self._before: dict[int, tuple[list[Any], list[Any]]] = {}
        self._noises: dict[int, float] = {}

    def failure(self, culprit: Callable[[np.ndarray], Node | None]) -> Failure | None:
        """What is wrong, if anything is; ``culprit`` finds the operation for some neurons."""
        everything = np.arange(self.spec.num_neurons)
        try:
            with np.errstate(all="ignore"):
                if not (everything.size and self.changes(everything) and self.fails(everything)):
                    return None
                smallest = _smallest(self.fails, everything)
                change = self.change(smallest, 0)
        except Exception:
            # An operation that is not run here, or fails on other values than the user's.
            return None
        return Failure(smallest, change, _found(culprit, smallest))

    def arguments(self, draw: int) -> list[Any]:
        """The values in use: those that were given, with random numbers for zeros and shapes."""
        rng = np.random.default_rng(draw)
        leaves = zip(self.values, self.spec.leaves, strict=False)
        drawn = [_drawn(rng, value, leaf) for value, leaf in leaves]
        drawn += [_drawn(rng, value, None) for value in self.values[len(drawn) :]]
        return drawn if draw == 0 else [_moved(rng, value, 0.1) for value in drawn]

    def pair(self, neurons: np.ndarray, draw: int = 0) -> tuple[list[Any], list[Any]]:
        """The arguments before and after a rescaling of some neurons by random powers of two."""
        arguments, _ = self.before(draw)
        rng = np.random.default_rng([draw, 1])
        drawn = rng.choice([-2, -1, 1, 2], self.spec.num_neurons)
        exponents = np.zeros_like(drawn)
        exponents[neurons] = drawn[neurons]
        by_path = _exponents(self.spec, exponents)
        leaves = [
            _times_power_of_two(value, by_path[leaf.path]) if leaf.path in by_path else value
            for value, leaf in zip(arguments, self.spec.leaves, strict=False)
        ]
        return arguments, [*leaves, *arguments[len(leaves) :]]

    def before(self, draw: int) -> tuple[list[Any], list[Any]]:
        """Arguments and outputs."""
        if draw not in self._before:
            arguments = self.arguments(draw)
            self._before[draw] = arguments, self.compute(arguments)
        return self._before[draw]

    def change(self, neurons: np.ndarray, draw: int) -> float:
        """How much the outputs change, relative to the largest entry of each."""
        _, rescaled = self.pair(neurons, draw)
        return _change(self.before(draw)[1], self.compute(rescaled))

    def changes(self, neurons: np.ndarray) -> bool:
        """Whether the outputs change, on the first values on which they say anything."""
        for draw in range(_DRAWS):
            if any(map(_says_something, self.before(draw)[1])):
                return self.change(neurons, draw) > _TOLERANCE
        return False

    def fails(self, neurons: np.ndarray) -> bool:
        """Whether the outputs change in every draw, more than rounding could change them."""
        return all(self.change(neurons, draw) > self._noise(draw) for draw in range(_DRAWS))

    def _noise(self, draw: int) -> float:
        if draw not in self._noises:
            arguments, before = self.before(draw)
            rng, step = np.random.default_rng([draw, 2]), 2.0**-30
            near = self.compute([_moved(rng, value, step) for value in arguments])
            self._noises[draw] = _TOLERANCE + _change(before, near) / step * _ROUNDING
        return self._noises[draw]


def _found(culprit: Callable[[np.ndarray], Node | None], neurons: np.ndarray) -> Node | None:
    try:
        with np.errstate(all="ignore"):
            return culprit(neurons)
    except Exception:
        # Where two runs take different ways, for one.
        return None


def _smallest(fails: Callable[[np.ndarray], bool], neurons: np.ndarray) -> np.ndarray:
    """Neurons that fail together, fewer of which do not."""
    while len(neurons) > 1:
        halves = (neurons[: len(neurons) // 2], neurons[len(neurons) // 2 :])
        failing = next((half for half in halves if fails(half)), None)
        if failing is None:
            break
        neurons = failing
    return neurons


def _fitting_all(values: Sequence[Any], graph: Graph) -> list[Any]:
    avals = [graph.avals[number] for number in graph.inputs]
    return [_fitting(value, aval) for value, aval in zip(values, avals, strict=True)]


def _fitting(value: Any, aval: jax.ShapeDtypeStruct) -> Any:
    """A value of the whole batch, or its first example for a program on one."""
    if np.shape(value) == aval.shape:
        return value
    return aval if isinstance(value, jax.ShapeDtypeStruct) or is_traced(value) else value[:1]


def _drawn(rng: np.random.Generator, value: Any, leaf: Leaf | None) -> Any:
    """Random numbers in place of what is not known, is 0 or is not finite."""
    known = _known(value)
    moving = leaf is None or leaf.trainable or leaf.state
    if known is not None and not (known.dtype.kind == "f" and moving):
        return known
    if known is None and not jnp.issubdtype(value.dtype, jnp.floating):
        return _drawn_integers(rng, value)
    shape = np.shape(value)
    # Away from 0, which a few normal numbers may come close to.
    away = rng.uniform(-1.0, 1.0, shape)
    away = away + np.copysign(0.5, away) if moving else abs(away) + 0.5
    if known is None:
        return away / np.sqrt(math.prod(shape[:-1])) if leaf is not None and shape[1:] else away
    good = np.isfinite(known) & (known != 0)
    size = np.mean(abs(known[good])) if good.any() else (1.0 if leaf is None else 0.1)
    return np.where(good, known, size * away)


def _drawn_integers(rng: np.random.Generator, value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return np.zeros(value.shape, np.uint32)
    return rng.integers(0, 2, value.shape).astype(value.dtype)


def _known(value: Any) -> Any:
    """An array's numbers; None where they are not known here."""
    unknown = isinstance(value, jax.ShapeDtypeStruct) or is_traced(value)
    if unknown or not getattr(value, "is_fully_addressable", True):
        return None
    return evaluation.held(value)


def _moved(rng: np.random.Generator, value: Any, step: float) -> Any:
    if value.dtype.kind != "f":
        return value
    return value * (1 + step * rng.normal(size=value.shape))


def _exponents(spec: ArchSpec, exponents: np.ndarray) -> dict[str, Any]:
    """Per leaf, the power of two that each entry takes, laid out to broadcast against it."""
    found: dict[str, Any] = {}
    start = 0
    for group in spec.groups:
        own = np.append(exponents[start : start + group.size], 0)
        start += group.size
        for sign, side in ((1, group.incoming), (-1, group.outgoing)):
            for incidence in side:
                shape = [1] * len(spec.leaf(incidence.path).shape)
                for axis, size in zip(incidence.axes, incidence.index.shape, strict=True):
                    shape[axis] = size
                # The last one, 0, belongs to no neuron.
                taken = own[incidence.index].transpose(np.argsort(incidence.axes)).reshape(shape)
                found[incidence.path] = (
                    found.get(incidence.path, 0) + sign * incidence.power * taken
                )
    return found


def _times_power_of_two(value: Any, exponents: Any) -> Any:
    """``value · 2^exponents``, exact where these are integers."""
    whole = np.floor(exponents)
    return np.ldexp(value * np.exp2(exponents - whole).astype(value.dtype), whole.astype(np.int64))


def _floating(before: Sequence[Any], after: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """The pairs of outputs that can be compared."""
    for one, two in zip(before, after, strict=True):
        if one.dtype.kind in "fc" and one.size and np.isfinite(one).all():
            yield one, two


def _says_something(output: Any) -> bool:
    return any(np.any(one) for one, _ in _floating([output], [output]))


def _change(before: Sequence[Any], after: Sequence[Any]) -> float:
    """Where all of an output is 0 it says nothing; NaN counts as a change."""
    worst = 0.0
    for one, two in _floating(before, after):
        largest = np.max(abs(one))
        change = np.max(abs(two - one)) / largest if largest else 0.0
        worst = max(worst, change if np.isfinite(change) else np.inf)
    return float(worst)


def moves_by_powers(before: Any, after: Any) -> bool:
    """Whether each entry is multiplied by a power of two, or by a simple root of one."""
    if before.dtype.kind != "f":
        return bool(np.array_equal(before, after))
    same = (before == after) | np.isnan(before)
    powers = 12 * np.log2(np.where(same, 1.0, after / before))
    return bool((abs(powers - np.round(powers)) < 1e-4).all())


_REPORT = (
    "This is a mistake of pathcond_jax, or of a rule given to register_rule: please report it "
    "with the line. trace_spec(..., check=False) returns the spec all the same; with `trainable=` "
    "leave out these parameters until it is mended"
)


def _moving(spec: ArchSpec, neurons: np.ndarray) -> str:
    ends = np.cumsum([group.size for group in spec.groups])
    place = int(np.searchsorted(ends, neurons[0], side="right"))
    group = spec.groups[place]
    number = int(neurons[0] - (ends[place] - group.size))
    together = f", together with {len(neurons) - 1} more," if len(neurons) > 1 else ""
    sides = (", ".join(map(str, side)) for side in (group.incoming, group.outgoing))
    return f"rescaling neuron {number} of group {group.name!r}{together} ({' -> '.join(sides)})"


def _through(node: Node | None) -> str:
    if node is None:
        return ""
    where = f" at {node.source}" if node.source else ""
    return f"; the first result that it changes is that of {node.operation}{where}"
