"""A program run in numpy, in float64, on values at hand: nothing is compiled.

How to read this file: ``run`` walks through a graph and asks the rule of each operation in
``RULES`` for its results. Floats are float64 whatever the program's dtype, so that casts between
floats round nothing, and random numbers are numpy's. What has no rule is run by JAX in the
program's own dtypes. ``work`` says beforehand what a run will cost.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program import control_flow
from pathcond_jax._program.graph import Constants, Graph, Node
from pathcond_jax._program.primitives import RuleTable, find

Avals = Mapping[int, jax.ShapeDtypeStruct]
NumpyRule = Callable[..., Sequence[Any]]

# What each primitive computes: ``rule(node, avals, *values) -> outputs``.
RULES: RuleTable[NumpyRule] = RuleTable("evaluation")

# Multiplications that take as long as starting one operation, and as computing one entry.
_START, _ENTRY = 10_000, 10
# An operation that calls back, or speaks with other devices, is not run.
_OUTWARD = frozenset({"callback", "mesh", "devices", "axis_name", "axis_index_groups"})


class CannotRunError(Exception):
    """The program has an operation that is not run outside of the user's own calls."""


def run(graph: Graph, arguments: Sequence[Any]) -> list[Any]:
    """The graph's outputs.

    Raises:
      CannotRunError: an operation has no rule here, and JAX does not run it either.
    """
    wanted = set(graph.outputs)
    found = {number: value for number, value in steps(graph, arguments) if number in wanted}
    return [found[number] for number in graph.outputs]


def steps(graph: Graph, arguments: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """The id and value of every argument, constant and result, in the order of the program."""
    yield from zip(graph.inputs, arguments, strict=True)
    env: dict[int, Any] = dict(zip(graph.inputs, arguments, strict=True))
    last = {number: k for k, node in enumerate(graph.nodes) for number in node.inputs}

    def read(number: int) -> Any:
        return env[number] if number in env else _constant(graph, number)

    for k, node in enumerate(graph.nodes):
        made = _results(node, graph.avals, [read(number) for number in node.inputs])
        for number, value in zip(node.outputs, made, strict=True):
            env[number] = value
            yield number, value
        for number in {n for n in node.inputs if last[n] == k and n in env}:
            del env[number]
    for number in graph.outputs:
        if number in graph.constants:
            yield number, _constant(graph, number)


def _constant(graph: Graph, number: int) -> Any:
    """A constant of the graph; one that is not known yet is computed here, not by JAX."""
    node = graph.constants.stored(number)
    if not isinstance(node, Node):
        return held(node)
    operands = [_constant(graph, operand) for operand in node.inputs]
    return dict(zip(node.outputs, _results(node, graph.avals, operands), strict=True))[number]


def held(value: Any) -> Any:
    """An array as :func:`run` computes with it: floats in float64; a key as zeros of its shape."""
    if jnp.issubdtype(getattr(value, "dtype", bool), jax.dtypes.extended):
        return np.zeros(np.shape(value), np.uint32)
    array = np.asarray(value)
    return array.astype(_wide(array.dtype), copy=False)


def draws_numbers(graph: Graph) -> bool:
    """Whether a constant is random and not drawn yet: :func:`run` would draw another one."""
    pending = [graph.constants.stored(number) for number in graph.constants]
    while pending:
        node = pending.pop()
        if isinstance(node, Node):
            if node.primitive in _RANDOM:
                return True
            pending += [graph.constants.stored(number) for number in node.inputs]
    return False


def with_constants(graph: Graph) -> Graph:
    """The graph with all its constants known, those computed here that JAX has not."""
    with np.errstate(all="ignore"):
        known = {number: _in_own_dtype(graph, number) for number in graph.constants}
    return dataclasses.replace(graph, constants=Constants(known, known))


def _in_own_dtype(graph: Graph, number: int) -> Any:
    value = graph.constants.stored(number)
    if isinstance(value, Node):
        return np.asarray(_constant(graph, number), graph.avals[number].dtype)
    return value


def work(graph: Graph, loops: int = 1) -> float:
    """The number of multiplications, or of what takes as long, in one run.

    Args:
      graph: the program.
      loops: how often a loop runs whose length the program computes.
    """
    return sum(_work(node, graph.avals, loops) for node in graph.nodes)


def _work(node: Node, avals: Avals, loops: int) -> float:
    inside = sum(work(body, loops) for body in node.bodies)
    if node.primitive is _SCAN:
        inside *= int(node.params["length"])
    elif node.primitive is _WHILE:
        inside *= loops
    size = sum(math.prod(avals[k].shape) for k in (*node.inputs, *node.outputs))
    out = math.prod(avals[node.outputs[0]].shape) if node.outputs else 0
    if node.primitive is _DOT:
        (contracted, _), _ = node.params["dimension_numbers"]
        inside += out * math.prod(avals[node.inputs[0]].shape[a] for a in contracted)
    elif node.primitive is _CONVOLUTION:
        features = node.params["dimension_numbers"].rhs_spec[0]
        kernel = avals[node.inputs[1]].shape
        terms = math.prod(kernel) // max(kernel[features], 1)
        # Windows are copied out before they are multiplied.
        inside += out * terms + _ENTRY * out * terms / max(kernel[features], 1)
    elif node.primitive in _WINDOWS:
        inside += out * math.prod(node.params["window_dimensions"])
    return _START + _ENTRY * size + inside


_SCAN, _WHILE = find("scan"), find("while")
_DOT, _CONVOLUTION = find("dot_general"), find("conv_general_dilated")
_RANDOM = frozenset(map(find, ("random_bits", "random_seed", "random_unwrap", "threefry2x32")))
_WINDOWS = frozenset(map(find, ("reduce_window_max", "reduce_window_min", "reduce_window_sum")))


@functools.cache
def _wide(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.float64
    return np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else dtype


def _results(node: Node, avals: Avals, values: list[Any]) -> list[Any]:
    rule = RULES.get(node.primitive)
    if rule is None or rule.objection(node.params):
        return _by_jax(node, avals, values)
    made = rule.function(node, avals, *values)
    wanted = [avals[number] for number in node.outputs]
    return [np.asarray(m, _host_dtype(a.dtype)) for m, a in zip(made, wanted, strict=True)]


@functools.cache
def _host_dtype(dtype: Any) -> Any:
    return np.uint32 if jnp.issubdtype(dtype, jax.dtypes.extended) else _wide(dtype)


def _by_jax(node: Node, avals: Avals, values: list[Any]) -> list[Any]:
    """The results that JAX computes, one operation compiled by itself."""
    dtypes = [avals[number].dtype for number in (*node.inputs, *node.outputs)]
    keys = any(jnp.issubdtype(dtype, jax.dtypes.extended) for dtype in dtypes)
    if node.effect or keys or _OUTWARD.intersection(node.params):
        raise CannotRunError(node.operation)
    operands = [jnp.asarray(v, avals[k].dtype) for v, k in zip(values, node.inputs, strict=True)]
    made = node.primitive.bind(*operands, **node.params)
    return [held(m) for m in (made if node.primitive.multiple_results else [made])]


@RULES.rule("scan", reads=control_flow.SCAN_PARAMETERS)
def _scan(node: Node, avals: Avals, *values: Any) -> list[Any]:
    loop = control_flow.read_scan(node, avals)
    constants, carry, stacked = loop.inputs(values)
    order = range(loop.length)[:: -1 if loop.reverse else 1]
    rows: dict[int, list[Any]] = {}
    for k in order:
        carry, rows[k] = loop.outputs(
            run(loop.body, [*constants, *carry, *(s[k] for s in stacked)])
        )
    _, empty = loop.outputs(node.outputs)
    columns = zip(*(rows[k] for k in sorted(rows)), strict=True) if rows else ()
    made = [np.stack(column) for column in columns]
    return [*carry, *(made or [np.zeros(avals[k].shape) for k in empty])]


@RULES.rule("while", reads=("cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"))
def _while(node: Node, avals: Avals, *values: Any) -> list[Any]:
    loop = control_flow.read_while(node)
    asked, constants, carry = loop.inputs(values)
    for _ in range(MOST_STEPS):
        (more,) = run(loop.condition, [*asked, *carry])
        if np.ndim(more) or not more:
            break
        carry = run(loop.body, [*constants, *carry])
    else:
        raise CannotRunError(f"{node.operation} takes more than {MOST_STEPS} steps")
    if np.ndim(more):
        raise CannotRunError(f"{node.operation} with a condition for each entry")
    return list(carry)


# A loop whose length the program computes may be endless for values that are not the user's.
MOST_STEPS = 100


@RULES.rule("cond", reads=("branches", "branches_platforms", "jaxpr", "ft_in", "ft_out", "linear"))
def _cond(node: Node, avals: Avals, which: Any, *values: Any) -> list[Any]:
    return run(node.bodies[min(max(int(which), 0), len(node.bodies) - 1)], values)
