"""A traced program as a flat list of operations: calls inlined, constants folded, dead code gone."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.extend.core import primitives as jex_primitives

from pathcond_jax.spec import PyTree, SpecError

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
      scope: names of the jitted functions around the operation, outermost first.
    """

    primitive: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    bodies: tuple["Graph", ...] = ()
    source: str = ""
    scope: tuple[str, ...] = ()

    @property
    def operation(self) -> str:
        """The operation's name, with the function it is part of: ``"min in relu6"``."""
        name = self.primitive.name
        return f"{name} in {self.scope[-1]}" if self.scope and self.scope[-1] != name else name


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A program over integer value ids.

    Attributes:
      inputs: the ids of the arguments.
      outputs: the ids of the results.
      nodes: the operations, in an order in which they can run.
      constants: values known when tracing.
      avals: shape and dtype of each id.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[int, np.ndarray | jax.Array]
    avals: Mapping[int, jax.ShapeDtypeStruct]


def primitive(name: str) -> Any:
    """The JAX primitive called ``name``, or None if this version of JAX has none."""
    return _by_tracing().get(name, getattr(jex_primitives, name + "_p", None))


def trace(fun: Callable[..., Any], *args: PyTree) -> Graph:
    """Traces ``fun`` on arrays or shapes and flattens the program."""
    return flatten(jax.make_jaxpr(fun)(*args))


def flatten(closed: Any, scope: tuple[str, ...] = ()) -> Graph:
    """The flat program of a closed jaxpr."""
    builder = _Builder()
    jaxpr = getattr(closed, "jaxpr", closed)
    inputs = tuple(builder.new(var.aval) for var in jaxpr.invars)
    constants = [builder.constant(value) for value in getattr(closed, "consts", ())]
    outputs = tuple(builder.run(jaxpr, constants, list(inputs), scope))
    return _without_dead_code(
        Graph(inputs, outputs, tuple(builder.nodes), builder.constants, builder.avals)
    )


class _Builder:
    """Collects the nodes of one flat program."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[int, Any] = {}
        self.avals: dict[int, jax.ShapeDtypeStruct] = {}

    def new(self, aval: Any) -> int:
        number = len(self.avals)
        self.avals[number] = jax.ShapeDtypeStruct(
            getattr(aval, "shape", ()), getattr(aval, "dtype", np.dtype(bool))
        )
        return number

    def constant(self, value: Any) -> int:
        if isinstance(value, jax.core.Tracer):
            raise SpecError(
                "apply_fn closes over values that are being traced; call trace_spec outside of "
                "jit, grad and vmap, or pass the values as arguments"
            )
        number = self.new(jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value)))
        self.constants[number] = value
        return number

    def run(
        self,
        jaxpr: Any,
        constants: list[int],
        inputs: list[int],
        scope: tuple[str, ...],
        caller: str | None = None,
    ) -> list[int]:
        # A fresh environment per call: inner jaxprs are shared between calls, variables and all.
        env = dict(zip(jaxpr.constvars, constants, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            return self.constant(atom.val) if isinstance(atom, jex_core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            ids = [read(atom) for atom in eqn.invars]
            source = user_line(eqn.source_info, within_call=caller is not None) or caller or ""
            inner = _inner_call(eqn)
            if inner is not None:
                name = eqn.params.get("name")
                inner_scope = (*scope, str(name)) if name else scope
                consts = [self.constant(value) for value in getattr(inner, "consts", ())]
                results = self.run(getattr(inner, "jaxpr", inner), consts, ids, inner_scope, source)
            else:
                results = self.operation(eqn, ids, scope, source)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def operation(
        self, eqn: Any, inputs: list[int], scope: tuple[str, ...], source: str
    ) -> list[int]:
        outputs = [self.new(var.aval) for var in eqn.outvars]
        size = sum(int(np.prod(self.avals[i].shape, dtype=np.int64)) for i in outputs)
        if all(i in self.constants for i in inputs) and size <= _FOLD_LIMIT and _foldable(eqn):
            with jax.ensure_compile_time_eval():
                values = eqn.primitive.bind(
                    *(self.constants[i] for i in inputs), **eqn.params
                )
            values = values if eqn.primitive.multiple_results else [values]
            self.constants.update(zip(outputs, values, strict=True))
            return outputs
        bodies = tuple(
            flatten(body, scope)
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
                source,
                scope,
            )
        )
        return outputs


@functools.cache
def _by_tracing() -> dict[str, Any]:
    """Primitives that ``jax.extend`` does not export, taken from programs that use them."""
    x = jnp.zeros(2)
    programs = (
        lambda x: jax.lax.split(x, (1, 1)),
        jax.jit(lambda x: x + 1),
        lambda x: jax.lax.optimization_barrier(x),
        lambda x: jax.lax.clamp(0.0, x, 1.0),
        lambda x: jax.lax.square(x),
        jax.lax.stop_gradient,
    )
    found = {}
    for program in programs:
        for eqn in jax.make_jaxpr(program)(x).jaxpr.eqns:
            found[eqn.primitive.name] = eqn.primitive
    return found


_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "remat", "closed_call", "core_call")


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
    return not eqn.effects and not any(True for _ in jex_core.jaxprs_in_params(eqn.params))


def _without_dead_code(graph: Graph) -> Graph:
    alive = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if alive.intersection(node.outputs):
            kept.append(node)
            alive.update(node.inputs)
    constants = {number: value for number, value in graph.constants.items() if number in alive}
    return dataclasses.replace(graph, nodes=tuple(reversed(kept)), constants=constants)


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
    "source_info_util.py",
    "core.py",
    "partial_eval.py",
    "pjit.py",
    "api.py",
    "api_util.py",
    "custom_derivatives.py",
    "traceback_util.py",
    "linear_util.py",
    "profiler.py",
    "util.py",
)
_CALL_BOUNDARY = ("pjit.py", "custom_derivatives.py", "ad_checkpoint.py")


def user_line(source_info: Any, within_call: bool = False) -> str:
    """The innermost line of an equation's traceback that is not a library's.

    Args:
      source_info: of the equation.
      within_call: the equation is inside a jitted function. Such functions are traced once and
        shared, so that lines outside of the function may be those of an earlier call.
    """
    traceback = getattr(source_info, "traceback", None)
    frames = [(f.file_name, f.line_num, f.function_name) for f in traceback.frames] if traceback else []
    bound = next(
        (k for k, frame in enumerate(frames) if os.path.basename(frame[0]) not in _MACHINERY), 0
    )
    for name, line, function in frames[bound:]:
        base = os.path.basename(name)
        if within_call and base in _CALL_BOUNDARY:
            return ""
        if name.startswith(_library_folders()) or base in ("contextlib.py", "functools.py"):
            continue
        if not name.startswith("<frozen"):
            return f"{base}:{line} ({function})"
    return ""
