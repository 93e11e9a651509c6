"""A traced program as a flat list of operations: calls inlined, constants apart, no dead code."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.extend.core import primitives as jex_primitives

from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.types import PyTree, SpecError

# Primitives that nobody writes by their own name, and whose function leaves no trace in a jaxpr.
_WRITTEN = {"logistic": "sigmoid"}

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
    """

    primitive: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    bodies: tuple["Graph", ...] = ()
    source: str = ""
    function: str = ""

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
      constants: values known when tracing.
      avals: shape and dtype of each id.
      captured: the constants computed from arrays that the function closes over.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[int, np.ndarray | jax.Array]
    avals: Mapping[int, jax.ShapeDtypeStruct]
    captured: frozenset[int] = frozenset()


class _Deferred(NamedTuple):
    """An operation on constants, run when a result is read."""

    eqn: Any
    inputs: list[int]
    outputs: list[int]


class _Constants(Mapping[int, Any]):
    """The constants ``numbers``, out of ``values`` that may still have to be computed."""

    def __init__(self, values: dict[int, Any], numbers: Iterable[int]) -> None:
        self._values = values
        self._numbers = dict.fromkeys(numbers)

    def __getitem__(self, number: int) -> Any:
        if number not in self._numbers:
            raise KeyError(number)
        return self._read(number)

    def _read(self, number: int) -> Any:
        later = self._values[number]
        if isinstance(later, _Deferred):
            operands = [self._read(i) for i in later.inputs]
            with jax.ensure_compile_time_eval():
                results = later.eqn.primitive.bind(*operands, **later.eqn.params)
            results = results if later.eqn.primitive.multiple_results else [results]
            self._values.update(zip(later.outputs, results, strict=True))
        return self._values[number]

    def __contains__(self, number: object) -> bool:
        return number in self._numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def primitive(name: str) -> Any:
    """The JAX primitive called ``name``, or None if this version of JAX has none."""
    return _by_tracing().get(name, getattr(jex_primitives, name + "_p", None))


def trace(fun: Callable[..., Any], *args: PyTree) -> Graph:
    """Traces ``fun`` on arrays or shapes and flattens the program."""
    return flatten(jax.make_jaxpr(fun)(*args))


def flatten(closed: Any) -> Graph:
    """The flat program of a closed jaxpr."""
    builder = _Builder()
    jaxpr = getattr(closed, "jaxpr", closed)
    inputs = tuple(builder.new(var.aval) for var in jaxpr.invars)
    outputs = tuple(builder.run(jaxpr, builder.closed_over(closed), list(inputs)))
    return builder.graph(inputs, outputs)


class _Builder:
    """Collects the nodes of one flat program."""

    def __init__(self) -> None:
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
        caller: tuple[str, str] | None = None,
    ) -> list[int]:
        # A fresh environment per call: inner jaxprs are shared between calls, variables and all.
        env = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            return self.constant(atom.val) if isinstance(atom, jex_core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            ids = [read(atom) for atom in eqn.invars]
            inner = _inner_call(eqn)
            if inner is not None:
                line, _ = _origin(eqn, caller)
                name = _public_name(str(eqn.params.get("name", "")))
                called = (line, name or (caller[1] if caller else ""))
                consts = self.closed_over(inner)
                results = self.run(getattr(inner, "jaxpr", inner), consts, ids, called)
            else:
                results = self.operation(eqn, ids, caller)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def operation(self, eqn: Any, inputs: list[int], caller: tuple[str, str] | None) -> list[int]:
        outputs = [self.new(var.aval) for var in eqn.outvars]
        size = sum(int(np.prod(self.avals[i].shape, dtype=np.int64)) for i in outputs)
        if all(i in self.constants for i in inputs) and size <= _FOLD_LIMIT and _foldable(eqn):
            self.constants.update(dict.fromkeys(outputs, _Deferred(eqn, inputs, outputs)))
            if self.captured.intersection(inputs):
                self.captured.update(outputs)
            return outputs
        bodies = tuple(
            flatten(body)
            for key in ("jaxpr", "cond_jaxpr", "body_jaxpr", "branches")
            if key in eqn.params
            for body in (eqn.params[key] if key == "branches" else (eqn.params[key],))
        )
        self.nodes.append(
            Node(
                eqn.primitive,
                tuple(inputs),
                tuple(outputs),
                eqn.params,
                bodies,
                *_origin(eqn, caller),
            )
        )
        return outputs

    def graph(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Graph:
        """The program, without what its outputs do not need."""
        alive = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if alive.intersection(node.outputs):
                kept.append(node)
                alive.update(node.inputs)
        constants = _Constants(self.constants, [k for k in self.constants if k in alive])
        captured = frozenset(self.captured)
        return Graph(inputs, outputs, tuple(reversed(kept)), constants, self.avals, captured)


@functools.cache
def _by_tracing() -> dict[str, Any]:
    """Primitives that ``jax.extend`` does not export, taken from programs that use them."""
    # An array would start the backend at import, before jax.distributed.initialize.
    x = jax.ShapeDtypeStruct((2,), np.float32)
    programs = (
        lambda x: jax.lax.split(x, (1, 1)),
        jax.jit(lambda x: x + 1),
        lambda x: jax.lax.optimization_barrier(x),
        lambda x: jax.lax.clamp(x, x, x),
        lambda x: jax.lax.square(x),
        jax.lax.stop_gradient,
        jax.checkpoint(lambda x: x + 1),
    )
    found = {}
    for program in programs:
        for eqn in jax.make_jaxpr(program)(x).jaxpr.eqns:
            found[eqn.primitive.name] = eqn.primitive
    return found


_CALLS = (
    *("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call", "core_call"),
    *("remat", "remat2", "checkpoint"),
)


@functools.cache
def _call_primitives() -> frozenset[Any]:
    return frozenset(p for p in map(primitive, _CALLS) if p is not None)


def _inner_call(eqn: Any) -> Any:
    if eqn.primitive not in _call_primitives():
        return None
    return next(
        eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params
    )


def _foldable(eqn: Any) -> bool:
    return not eqn.effects and not any(map(_holds_program, eqn.params.values()))


def _holds_program(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_program, value))
    return isinstance(value, (jex_core.Jaxpr, jex_core.ClosedJaxpr))


_LIBRARIES = ("jax", "jaxlib", "flax", "haiku", "equinox", "optax", "chex", "numpy", "pathcond_jax")


def _library_folders() -> tuple[str, ...]:
    """Folders whose frames are not the user's: this package and the network libraries."""
    # Which of them are imported changes while a program runs.
    return _folders_of(tuple(name for name in _LIBRARIES if name in sys.modules))


@functools.cache
def _folders_of(modules: tuple[str, ...]) -> tuple[str, ...]:
    files = [getattr(sys.modules[name], "__file__", None) for name in modules]
    return tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in files if file)


# Files in which JAX binds primitives and enters jitted functions.
_MACHINERY = (
    *("source_info_util.py", "core.py", "partial_eval.py", "pjit.py", "api.py", "api_util.py"),
    *("custom_derivatives.py", "traceback_util.py", "linear_util.py", "profiler.py", "util.py"),
)
# Files whose functions are the operations themselves.
_PLUMBING = (*_MACHINERY, "lax.py", "ufuncs.py", "array_methods.py", "ufunc_api.py", "slicing.py")
_CALL_BOUNDARY = ("pjit.py", "custom_derivatives.py", "ad_checkpoint.py")


def _origin(eqn: Any, caller: tuple[str, str] | None) -> tuple[str, str]:
    """The user's line and the library function of an operation, or those of its call."""
    line, function = user_line(eqn.source_info, within_call=caller is not None)
    return (line, function) if line or caller is None else (caller[0], function or caller[1])


def user_line(source_info: Any, within_call: bool = False) -> tuple[str, str]:
    """Where an operation comes from.

    Args:
      source_info: of the equation.
      within_call: the equation is inside a jitted function. Such functions are traced once and
        shared, so that lines outside of the function may be those of an earlier call.

    Returns:
      The innermost line of the equation's traceback that is not a library's, and the innermost
      public library function that this line runs; "" where there is none.
    """
    traceback = getattr(source_info, "traceback", None)
    frames = traceback.frames if traceback else []
    files = [os.path.basename(frame.file_name) for frame in frames]
    bound = next((k for k, name in enumerate(files) if name not in _MACHINERY), 0)
    libraries, function = _library_folders(), ""
    for frame, name in zip(frames[bound:], files[bound:], strict=True):
        if within_call and name in _CALL_BOUNDARY:
            return "", function
        if frame.file_name.startswith(libraries) or name in ("contextlib.py", "functools.py"):
            if not function and name not in _PLUMBING:
                function = _public_name(frame.function_name)
        elif not frame.file_name.startswith("<frozen"):
            return f"{name}:{frame.line_num} ({frame.function_name})", function
    return "", ""


def _public_name(function: str) -> str:
    """What a user calls a library function, such as a layer by its class; "" if nothing."""
    *outer, name = function.split(".")
    if name == "__call__" and outer:
        name = outer[-1]
    return "" if name.startswith(("_", "<")) or "<locals>" in outer else name
