"""A traced program as a flat list of operations: calls inlined, constants apart, no dead code."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.origin import Origin, calling_line, name_of_call, origin_of
from pathcond_jax._program.primitives import (
    Literal,
    has_effect,
    holds_program,
    inner_program,
    reference_program,
)
from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.types import PyTree, SpecError

# Primitives that nobody writes by their own name, and whose function leaves no trace in a jaxpr.
_WRITTEN = {"logistic": "sigmoid"}

# Programs of one operation that a constant operation runs at each entry, as adding at positions.
_FOLDED = frozenset({"update_jaxpr"})

# Larger results of constant operations stay operations: masks and indices are below this.
_FOLD_LIMIT = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Attributes:
      primitive: the JAX primitive.
      inputs: value ids.
      outputs: value ids.
      params: the primitive's parameters.
      bodies: the flattened inner programs of a control-flow primitive.
      source: the user's line, ``"file.py:12 (function)"``, or "".
      function: the library function that runs the operation on the user's behalf, or "".
      effect: whether it does more than return its outputs, such as writing into a reference.
    """

    primitive: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    bodies: tuple["Graph", ...] = ()
    source: str = ""
    function: str = ""
    effect: bool = False

    @property
    def operation(self) -> str:
        """The operation's name, with the function it is part of: ``"min in relu6"``."""
        name = _WRITTEN.get(self.primitive.name, self.primitive.name)
        return f"{name} in {self.function}" if self.function not in ("", name) else name


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A program over integer value ids.

    Attributes:
      inputs: the ids of the arguments.
      outputs: the ids of the results.
      nodes: the operations, in an order in which they can run.
      constants: values known when tracing, computed by JAX when they are read.
      avals: shape and dtype of each id.
      captured: the constants computed from arrays that the function closes over.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    nodes: tuple[Node, ...]
    constants: "Constants"
    avals: Mapping[int, jax.ShapeDtypeStruct]
    captured: frozenset[int] = frozenset()


class Constants(Mapping[int, Any]):
    """The constants ``numbers``, out of ``values`` some of which are operations yet to be run."""

    def __init__(self, values: dict[int, Any], numbers: Iterable[int]) -> None:
        self._values = values
        self._numbers = dict.fromkeys(numbers)

    def __getitem__(self, number: int) -> Any:
        if number not in self._numbers:
            raise KeyError(number)
        return self._read(number)

    def stored(self, number: int) -> Any:
        """A constant, needed or not; or the operation on constants that makes it, yet to be run."""
        return self._values[number]

    def extended(self, values: Mapping[int, Any]) -> "Constants":
        """These constants and others."""
        return Constants({**self._values, **values}, [*self._numbers, *values])

    def _read(self, number: int) -> Any:
        later = self._values[number]
        if isinstance(later, Node):
            operands = [self._read(i) for i in later.inputs]
            with jax.ensure_compile_time_eval():
                results = later.primitive.bind(*operands, **later.params)
            results = results if later.primitive.multiple_results else [results]
            self._values.update(zip(later.outputs, results, strict=True))
        return self._values[number]

    def __contains__(self, number: object) -> bool:
        return number in self._numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def trace(fun: Callable[..., Any], *args: PyTree) -> Graph:
    """Traces ``fun`` on arrays or shapes and flattens the program."""
    closed = jax.make_jaxpr(fun)(*args)
    # What libraries run without any line of the user's was called here.
    return _flattened(closed, _Builder(calling_line()))


def _size(shape: tuple[Any, ...]) -> float:
    """How many entries an array has; infinitely many if the program is for any size."""
    return math.prod(shape) if all(isinstance(n, int) for n in shape) else math.inf


def _flattened(closed: Any, builder: "_Builder", call: Origin | None = None) -> Graph:
    """The flat program of a closed jaxpr, of an inner one that runs at ``call``."""
    jaxpr = getattr(closed, "jaxpr", closed)
    inputs = tuple(builder.new(var.aval) for var in jaxpr.invars)
    outputs = tuple(builder.run(jaxpr, builder.closed_over(closed), list(inputs), call))
    return builder.graph(inputs, outputs)


class _Builder:
    """Collects the nodes of one flat program.

    Args:
      called_at: the user's line that runs what has no line of its own.
    """

    def __init__(self, called_at: str) -> None:
        self.called_at = called_at
        self.nodes: list[Node] = []
        self.constants: dict[int, Any] = {}
        self.captured: set[int] = set()
        self.avals: dict[int, jax.ShapeDtypeStruct] = {}

    def new(self, aval: Any) -> int:
        number = len(self.avals)
        self.avals[number] = jax.ShapeDtypeStruct(
            getattr(aval, "shape", ()), getattr(aval, "dtype", np.dtype(bool))
        )
        return number

    def constant(self, value: Any) -> int:
        if is_traced(value):
            raise SpecError(
                "apply_fn closes over values that are being traced; call trace_spec outside of "
                "jit, grad and vmap, or pass the values as arguments"
            )
        number = self.new(jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value)))
        self.constants[number] = value
        return number

    def closed_over(self, closed: Any) -> list[int]:
        numbers = [self.constant(value) for value in getattr(closed, "consts", ())]
        self.captured.update(k for k in numbers if self.avals[k].shape)
        return numbers

    def run(
        self,
        jaxpr: Any,
        constants: list[int],
        inputs: list[int],
        call: Origin | None = None,
    ) -> list[int]:
        # A fresh environment per call: inner jaxprs are shared between calls, variables and all.
        env = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            return self.constant(atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            ids = [read(atom) for atom in eqn.invars]
            inner = inner_program(eqn) or reference_program(eqn)
            if inner is not None:
                here = origin_of(eqn.source_info, call)
                name = name_of_call(str(eqn.params.get("name", "")))
                called = here._replace(activation=here.activation or name)
                consts = self.closed_over(inner)
                results = self.run(getattr(inner, "jaxpr", inner), consts, ids, called)
            else:
                results = self.operation(eqn, ids, call)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def operation(self, eqn: Any, inputs: list[int], call: Origin | None) -> list[int]:
        outputs = [self.new(var.aval) for var in eqn.outvars]
        size = sum(_size(self.avals[i].shape) for i in outputs)
        known = all(i in self.constants for i in inputs) and size <= _FOLD_LIMIT
        programs = {key for key, value in eqn.params.items() if holds_program(value)}
        if known and not eqn.effects and programs <= _FOLDED:
            made = Node(eqn.primitive, tuple(inputs), tuple(outputs), eqn.params)
            self.constants.update(dict.fromkeys(outputs, made))
            if self.captured.intersection(inputs):
                self.captured.update(outputs)
            return outputs
        origin = origin_of(eqn.source_info, call)
        bodies = tuple(
            _flattened(body, _Builder(self.called_at), origin)
            for key in ("jaxpr", "cond_jaxpr", "body_jaxpr", "branches", "update_jaxpr")
            if eqn.params.get(key) is not None
            for body in (eqn.params[key] if key == "branches" else (eqn.params[key],))
        )
        self.nodes.append(
            Node(
                eqn.primitive,
                tuple(inputs),
                tuple(outputs),
                eqn.params,
                bodies,
                origin.line or self.called_at,
                origin.name,
                has_effect(eqn),
            )
        )
        return outputs

    def graph(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Graph:
        """The program, without what neither its outputs nor its effects need."""
        kept, alive = _needed(self.nodes, outputs)
        constants = Constants(self.constants, [k for k in self.constants if k in alive])
        captured = frozenset(self.captured)
        return Graph(inputs, outputs, kept, constants, self.avals, captured)


def _needed(
    nodes: Sequence[Node], outputs: Iterable[int]
) -> tuple[tuple[Node, ...], frozenset[int]]:
    """The operations that values, or effects, need; and all values that are read."""
    read = set(outputs)
    kept = []
    for node in reversed(nodes):
        if node.effect or read.intersection(node.outputs):
            kept.append(node)
            read.update(node.inputs)
    return tuple(reversed(kept)), frozenset(read)


def part_for(graph: Graph, outputs: Iterable[int]) -> tuple[Graph, frozenset[int]]:
    """The part of a program that makes some of its values; and all values that it reads."""
    outputs = tuple(outputs)
    nodes, read = _needed(graph.nodes, outputs)
    return dataclasses.replace(graph, outputs=outputs, nodes=nodes), read


def zeros_for(graph: Graph, numbers: Iterable[int]) -> tuple[Graph, dict[int, int]]:
    """A program with constants, zeros like some of its values; and which stands for which."""
    found = {number: max(graph.avals) + k for k, number in enumerate(set(numbers), start=1)}
    like = {found[number]: graph.avals[number] for number in found}
    zeros = {k: np.broadcast_to(np.zeros((), aval.dtype), aval.shape) for k, aval in like.items()}
    constants = graph.constants.extended(zeros)
    return dataclasses.replace(graph, avals={**graph.avals, **like}, constants=constants), found
