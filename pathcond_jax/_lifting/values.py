"""What the values of a program are to paths: signals, coefficients and gates."""

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.graph import Node
from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.extended_range import Scaled


class NotPathLiftableError(ValueError):
    """The network computes something that is not a sum over paths."""


class RefusedOperationError(NotPathLiftableError):
    """An operation is not a sum over paths.

    Args:
      node: the operation.
      why: what follows its name.
    """

    def __init__(self, node: Node, why: str) -> None:
        self.node, self.why = node, why
        super().__init__(
            f"{at(node)} {why}, so this network has no path lifting; use a criterion that needs "
            "none, such as condition(..., criterion='enorm')"
        )


@dataclasses.dataclass(eq=False)
class Coefficient:
    """A value that depends on parameters and constants only.

    Attributes:
      raw: the value.
      power: |value|^q; computed when first read.
      trainable: whether trainable parameters enter it.
      made: the operation, if it is more than a product of parameters.
      exact: whether each entry depends on one entry of each leaf at most.
      entries: for each leaf, a function that gives the entry of the leaf, counted from 1, that
        each entry of the value depends on, or 0.
    """

    raw: Any
    power: Scaled | None = None
    trainable: bool = False
    made: Node | None = None
    exact: bool = True
    entries: Mapping[int, Callable[[], np.ndarray]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Signal:
    """A sum over paths.

    Attributes:
      power: its value on powers.
      multiple_of: signals of which it is an elementwise multiple, nearest first.
      met: bit set of the uses of parameters on its paths.
    """

    power: Scaled
    multiple_of: tuple["Signal", ...] = ()
    met: int = 0


@dataclasses.dataclass(eq=False)
class Gate:
    """A value that depends on the input but is no sum over paths.

    Attributes:
      switch: whether it is piecewise constant, as x > 0 is.
      base: the signal whose sign alone decides it. A gate that follows anything else may switch
        other signals on and off, but is no slope of theirs.
      slope: whether it has other values than one number and 0, as 1 and a in where(x > 0, 1, a).
    """

    switch: bool = True
    base: Signal | None = None
    slope: bool = False


Value = Coefficient | Signal | Gate


@dataclasses.dataclass(frozen=True)
class Call:
    """A function with its options: equal ones compile once."""

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *arguments: jax.Array) -> Any:
        """Runs the function."""
        return self.function(*arguments, **dict(self.options))


def call(function: Callable[..., Any], **options: Any) -> Call:
    """``function`` with keyword options."""
    return Call(function, tuple(sorted(options.items())))


class Kind(enum.Enum):
    """How a record's output depends on its inputs."""

    PRODUCT = "linear in each input"
    SUM = "linear in all inputs together"
    MADE = "a function of them; only derivatives are linear"


class Record(NamedTuple):
    """How values were made of others.

    Attributes:
      kind: how ``linear`` is linear.
      inputs: what was read.
      outputs: what was made.
      linear: from mantissas to mantissas.
      extra: further arguments of ``linear``.
      signs: the sign with which each input enters.
      pull: from the derivatives by the outputs to those by the inputs, None where no path passes;
        None: those of ``linear``.
    """

    kind: Kind
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    linear: Call
    extra: tuple[Any, ...] = ()
    signs: tuple[int, ...] = ()
    pull: Callable[..., Sequence[Scaled | None]] | None = None


def at(node: Node) -> str:
    """The operation and the user's line."""
    return f"{node.operation}{f' at {node.source}' if node.source else ''}"


def unliftable(node: Node, why: str = "is not a sum over paths") -> RefusedOperationError:
    """The error that names an operation."""
    return RefusedOperationError(node, why)


def numbered_entries(shape: tuple[int, ...]) -> np.ndarray:
    """The entries of a leaf, counted from 1."""
    return np.arange(1, 1 + np.prod(shape, dtype=np.int64), dtype=np.int32).reshape(shape)


Entries = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Anywhere:
    """Entries of a leaf, on all of which each entry of a value may depend, however it is moved."""

    parts: tuple[Entries, ...]

    def __call__(self) -> np.ndarray:
        """The entries, in no order."""
        return np.concatenate([part().ravel() for part in self.parts])


def moved_entries(entries: Entries, linear: Call, extra: tuple[Any, ...]) -> Entries:
    """Which entries of a leaf a moved coefficient depends on."""
    if isinstance(entries, Anywhere) or any(map(is_traced, extra)):
        return Anywhere((entries,))

    def moved() -> np.ndarray:
        with jax.ensure_compile_time_eval():
            return np.asarray(linear(jnp.asarray(entries()), *extra))

    return functools.cache(moved)


def made_entries(
    values: Sequence[Coefficient], shape: tuple[int, ...] | None
) -> dict[int, Entries]:
    """Which entries of each leaf a function of coefficients depends on.

    Args:
      values: the coefficients.
      shape: that of the result, if each of its entries is made of one entry of each coefficient,
        which are functions of different leaves.
    """
    if shape is not None:
        return {k: _broadcast(own, shape) for value in values for k, own in value.entries.items()}
    leaves = {leaf for value in values for leaf in value.entries}
    return {
        leaf: Anywhere(tuple(value.entries[leaf] for value in values if leaf in value.entries))
        for leaf in leaves
    }


def _broadcast(entries: Entries, shape: tuple[int, ...]) -> Entries:
    return entries if isinstance(entries, Anywhere) else lambda: np.broadcast_to(entries(), shape)


def joined_entries(
    values: Sequence[Coefficient], leaf: int, linear: Call, extra: tuple[Any, ...]
) -> Entries:
    """Which entries of a leaf a coefficient joined of several depends on."""
    own = tuple(value.entries[leaf] for value in values if leaf in value.entries)
    if any(isinstance(part, Anywhere) for part in own) or any(map(is_traced, extra)):
        return Anywhere(own)

    def joined() -> np.ndarray:
        with jax.ensure_compile_time_eval():
            parts = [
                v.entries[leaf]() if leaf in v.entries else np.zeros(np.shape(v.raw), np.int32)
                for v in values
            ]
            return np.asarray(linear(*map(jnp.asarray, parts), *extra))

    return functools.cache(joined)


def evaluate(node: Node, inputs: Sequence[Coefficient]) -> list[Any]:
    """Runs an operation as it is."""
    made = node.primitive.bind(*(value.raw for value in inputs), **node.params)
    return list(made) if node.primitive.multiple_results else [made]


def signals_of(values: Iterable[Value]) -> list[Signal]:
    """The signals among values."""
    return [value for value in values if isinstance(value, Signal)]


def coefficients_of(values: Sequence[Value]) -> list[Coefficient] | None:
    """The values, if all of them are coefficients."""
    found = [value for value in values if isinstance(value, Coefficient)]
    return found if len(found) == len(values) else None


def is_trainable(value: Value) -> bool:
    """Whether trainable parameters enter a coefficient."""
    return isinstance(value, Coefficient) and value.trainable


def is_fixed_scalar(value: Value) -> bool:
    """Whether a value is one number that is no parameter."""
    return isinstance(value, Coefficient) and not value.trainable and np.size(value.raw) == 1


def is_zero(value: Value) -> bool:
    """Whether a value is known to be 0 everywhere."""
    return is_constant(value, 0)


def is_constant(value: Value, number: float) -> bool:
    """Whether a value is known to be ``number`` everywhere."""
    return (
        isinstance(value, Coefficient)
        and not value.trainable
        and not is_traced(value.raw)
        and bool((np.asarray(value.raw) == number).all())
    )


def no_gates(node: Node, values: Sequence[Value]) -> None:
    """Raises NotPathLiftableError if one of the values is a gate."""
    gates = [value for value in values if isinstance(value, Gate)]
    no_integers(node, gates)
    if gates:
        raise unliftable(node, "mixes paths with values that depend on the input in another way")


def no_integers(node: Node, gates: Sequence[Gate]) -> None:
    """Raises NotPathLiftableError if a gate is an integer of the input's."""
    if not all(gate.switch for gate in gates):
        raise NotPathLiftableError(
            f"{at(node)} needs floats and gets integers from the network's input, where no path "
            "begins; give trace_spec floating inputs (their shapes suffice), or use a criterion "
            "that needs no path lifting, such as condition(..., criterion='enorm')"
        )
