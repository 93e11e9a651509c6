"""What a trace has found, tried on numbers: an error of an analysis must not change a network.

The traced program is run in numpy (see :mod:`pathcond_jax._program.evaluation`), before and after
a random rescaling by powers of two. These are exact in floating point, so that a right spec changes
nothing at all, in a chaotic program either. A change has to come back in several draws, and to be
larger than what rounding could do, before it counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The rules enter themselves into their table when they are imported.
from pathcond_jax._program import evaluation, numpy_rules  # noqa: F401
from pathcond_jax._program.graph import Graph, Node
from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import Leaf, SpecError

# Multiplications, about two a nanosecond: beyond this a trace is returned as it is.
MOST_WORK = 6e9
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
    trial = _Trial(graph, spec, values)
    everything = np.arange(spec.num_neurons)
    try:
        with np.errstate(all="ignore"):
            if not everything.size or not trial.changes(everything) or not trial.fails(everything):
                return
            smallest = _smallest(trial.fails, everything)
            node = trial.culprit(smallest)
            change = trial.change(smallest, 0)
    except Exception:
        # An operation that is not run here, or fails on other values than the user's.
        return
    raise WrongSpecError(_message(spec, smallest, node, change))


def _smallest(fails: Callable[[np.ndarray], bool], neurons: np.ndarray) -> np.ndarray:
    """Neurons that fail together, fewer of which do not."""
    while len(neurons) > 1:
        halves = (neurons[: len(neurons) // 2], neurons[len(neurons) // 2 :])
        failing = next((half for half in halves if fails(half)), None)
        if failing is None:
            break
        neurons = failing
    return neurons


class _Trial:
    """A program on drawn values, before and after rescaling."""

    def __init__(self, graph: Graph, spec: ArchSpec, values: Sequence[Any]) -> None:
        self.graph, self.spec = graph, spec
        avals = [graph.avals[number] for number in graph.inputs]
        self.values = [_fitting(v, aval) for v, aval in zip(values, avals, strict=True)]
        self._before: dict[int, tuple[list[Any], list[Any]]] = {}
        self._noises: dict[int, float] = {}

    def arguments(self, draw: int) -> list[Any]:
        """The values in use: those that were given, with random numbers for zeros and shapes."""
        rng = np.random.default_rng(draw)
        count = len(self.spec.leaves)
        leaves = zip(self.values, self.spec.leaves, strict=False)
        drawn = [_drawn(rng, value, leaf) for value, leaf in leaves]
        drawn += [_drawn(rng, value, None) for value in self.values[count:]]
        return drawn if draw == 0 else [_moved(rng, value, 0.1) for value in drawn]

    def before(self, draw: int) -> tuple[list[Any], list[Any]]:
        """Arguments and outputs."""
        if draw not in self._before:
            arguments = self.arguments(draw)
            self._before[draw] = arguments, evaluation.run(self.graph, arguments)
        return self._before[draw]

    def rescaled(self, arguments: Sequence[Any], neurons: np.ndarray, draw: int) -> list[Any]:
        """The arguments after a rescaling of some neurons by random powers of two."""
        rng = np.random.default_rng([draw, 1])
        drawn = rng.choice([-2, -1, 1, 2], self.spec.num_neurons)
        exponents = np.zeros_like(drawn)
        exponents[neurons] = drawn[neurons]
        by_path = _exponents(self.spec, exponents)
        leaves = [
            _times_power_of_two(value, by_path[leaf.path]) if leaf.path in by_path else value
            for value, leaf in zip(arguments, self.spec.leaves, strict=False)
        ]
        return [*leaves, *arguments[len(leaves) :]]

    def change(self, neurons: np.ndarray, draw: int) -> float:
        """How much the outputs change, relative to the largest entry of each."""
        arguments, before = self.before(draw)
        return _change(before, evaluation.run(self.graph, self.rescaled(arguments, neurons, draw)))

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
            near = evaluation.run(self.graph, [_moved(rng, value, step) for value in arguments])
            self._noises[draw] = _TOLERANCE + _change(before, near) / step * _ROUNDING
        return self._noises[draw]

    def culprit(self, neurons: np.ndarray) -> Node | None:
        """The first operation whose results do not move by powers of the scales."""
        arguments, _ = self.before(0)
        made_by = {number: node for node in self.graph.nodes for number in node.outputs}
        pairs = zip(
            evaluation.steps(self.graph, arguments),
            evaluation.steps(self.graph, self.rescaled(arguments, neurons, 0)),
            strict=True,
        )
        changed = None
        for (number, before), (_, after) in pairs:
            if number in made_by and not _moves_by_powers(before, after):
                return made_by[number]
            if number in self.graph.outputs and not np.array_equal(before, after):
                changed = made_by.get(number)
        return changed


def _fitting(value: Any, aval: jax.ShapeDtypeStruct) -> Any:
    """A value of the whole batch, or its first example for a program on one."""
    if np.shape(value) == aval.shape:
        return value
    return aval if isinstance(value, jax.ShapeDtypeStruct) or is_traced(value) else value[:1]


def _drawn(rng: np.random.Generator, value: Any, leaf: Leaf | None) -> Any:
    """Random numbers in place of what is not known, is 0 or is not a number."""
    known = _known(value)
    dtype = np.dtype(bool) if known is not None else value.dtype
    if known is not None and known.dtype.kind != "f":
        return known
    if known is None and not jnp.issubdtype(dtype, jnp.floating):
        return _drawn_integers(rng, value)
    shape = value.shape if known is None else known.shape
    away = rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape)
    if leaf is not None and not leaf.trainable:
        # Such as a running variance, of which a root is taken.
        away = abs(away)
    if known is None:
        return away / np.sqrt(math.prod(shape[:-1])) if leaf is not None and shape[1:] else away
    if leaf is not None and not leaf.trainable:
        return known
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


def _moves_by_powers(before: Any, after: Any) -> bool:
    """Whether each entry is multiplied by a power of two, or by a simple root of one."""
    if before.dtype.kind != "f":
        return bool(np.array_equal(before, after))
    same = (before == after) | np.isnan(before)
    powers = 12 * np.log2(np.where(same, 1.0, after / before))
    return bool((abs(powers - np.round(powers)) < 1e-4).all())


def _message(spec: ArchSpec, neurons: np.ndarray, node: Node | None, change: float) -> str:
    ends = np.cumsum([group.size for group in spec.groups])
    place = int(np.searchsorted(ends, neurons[0], side="right"))
    group = spec.groups[place]
    number = int(neurons[0] - (ends[place] - group.size))
    together = f", together with {len(neurons) - 1} more," if len(neurons) > 1 else ""
    through = ""
    if node is not None:
        where = f" at {node.source}" if node.source else ""
        through = f"; the first result that it changes is that of {node.operation}{where}"
    return (
        f"the spec that was found is wrong: rescaling neuron {number} of group {group.name!r}"
        f"{together} ({', '.join(map(str, group.incoming))} -> "
        f"{', '.join(map(str, group.outgoing))}) changes the outputs by {change:.1e} of their "
        f"size{through}. This is a mistake of pathcond_jax, or of a rule given to register_rule: "
        "please report it with the line. trace_spec(..., check=False) returns the spec all the "
        "same; with `trainable=` leave out these parameters until it is mended"
    )
