"""How positive scales pass through loops."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from pathcond_jax._program.control_flow import (
    SCAN_PARAMETERS,
    Scan,
    live_part,
    read_scan,
    read_while,
)
from pathcond_jax._program.graph import Graph, part_for
from pathcond_jax._symmetry.equations import Term
from pathcond_jax._symmetry.steps import CARRIED, Loop, follow, follow_once, sliced
from pathcond_jax._symmetry.structural_rules import stacked_terms
from pathcond_jax._symmetry.terms import Terms, axes_of, mapped, varies
from pathcond_jax._symmetry.values import RULES, Scale, Scope, expand, pin

_TOO_LARGE = "has too many steps of different scales to follow each"
# Loops of fewer steps, and of fewer operations in all of them, are followed as if written out.
_FEW_STEPS, _FEW_OPERATIONS = 8, 256

rule = RULES.rule


@rule("scan", reads=SCAN_PARAMETERS)
def _scan(scope: Scope, *scales: Scale) -> list[Terms]:
    """Step by step where steps have scales of their own; else one step that maps to itself.

    A loop of few steps is what it would be if it were written out: a value may leave each of them
    with another scale.

    A step that is the same as every other has a carry whose scales are the same before and after
    it. They are unknown at first: labels of their own, which the first carry must have (zeros have
    any scale) and which the body must return. That is a fixed point however many steps later a
    value comes out again. A stacked operand whose slices have different scales, such as the
    kernels of a stack of layers, makes every step another one: they follow each other, each with
    the scales that the one before has left. As long as all steps may be alike, one slice stands
    for all and one step is followed.
    """
    read = set(scope.graph.outputs).union(*(other.inputs for other in scope.graph.nodes))
    live = {k for k, number in enumerate(scope.node.outputs) if number in read}
    loop = live_part(read_scan(scope.node, scope.graph.avals), live)
    if loop.length == 0:
        return pin(scope, *scales)
    fixed, carry, stacked = loop.inputs(scales)
    for x in stacked:
        scope.index(x, (0,))
    signal = any(scale.signal for scale in scales)
    once = {leaf for x in stacked for term in x.terms for leaf, _ in scope.leaf_blocks(term)}
    if once := once & scope.analysis.once:
        found = follow_once(Loop(scope, loop, fixed, carry, stacked, signal))
        if found is None:
            scope.analysis.unlike |= once
        return [()] * len(scope.node.outputs) if found is None else found
    if any(varies(x.terms, (0,)) for x in stacked):
        found = follow(Loop(scope, loop, fixed, carry, stacked, signal))
        if found is not None:
            return found
        stacked = [Scale(scope.along(x.terms, (0,), _TOO_LARGE), x.signal) for x in stacked]
    if loop.length <= _FEW_STEPS and loop.length * _operations(loop.body) <= _FEW_OPERATIONS:
        return _written_out(scope, loop, [*fixed, *carry, *stacked], live)
    slices = [sliced(x, 0) for x in stacked]

    def step(entered: list[Scale]) -> list[Scale]:
        return scope.analysis.run(loop.body, [*fixed, *entered, *slices])

    results = _fixed_point(scope, step, carry, signal)
    kept, made = loop.outputs(results)
    ndims = [len(scope.out_shape(k)) - 1 for k in range(len(kept), len(results))]
    stacks = [mapped(expand(y, n), lambda x: x[None]) for y, n in zip(made, ndims, strict=True)]
    return [*(x.terms for x in kept), *stacks]


def _operations(graph: Graph) -> int:
    return sum(1 + sum(map(_operations, node.bodies)) for node in graph.nodes)


def _written_out(
    scope: Scope, loop: Scan, scales: Sequence[Scale], live: Collection[int]
) -> list[Terms]:
    """The scales of a loop's results, its steps one after the other, without what nobody reads."""
    fixed, carry, stacked = loop.inputs(scales)
    order = range(loop.length)[:: -1 if loop.reverse else 1]
    made: dict[int, list[Scale]] = {}
    for position, part in zip(order, _parts_of_steps(loop, live), strict=True):
        slices = [sliced(x, position) for x in stacked]
        found = scope.analysis.run(part.program, [*fixed, *carry, *slices])
        results = [Scale()] * len(loop.body.outputs)
        for k, scale in zip(part.results, found, strict=True):
            results[k] = scale
        carry, made[position] = loop.outputs(results)
    each = [[made[position][k] for position in range(loop.length)] for k in range(len(made[0]))]
    ndims = [len(scope.out_shape(k)) for k in range(len(carry), len(scope.node.outputs))]
    return [
        *(x.terms for x in carry),
        *(stacked_terms(scope, scales, n, 0) for scales, n in zip(each, ndims, strict=True)),
    ]


class _Part(NamedTuple):
    """What one step has to compute: some of its results, by number."""

    program: Graph
    results: tuple[int, ...]


def _parts_of_steps(loop: Scan, live: Collection[int]) -> list[_Part]:
    """What each step has to compute for those that follow, in the order in which they run."""
    entering = loop.body.inputs[loop.num_consts : loop.num_consts + loop.num_carry]
    stacked = {k for k in live if k >= loop.num_carry}
    wanted, parts = set(live), []
    for _ in range(loop.length):
        results = tuple(sorted(wanted))
        program, read = part_for(loop.body, [loop.body.outputs[k] for k in results])
        parts.append(_Part(program, results))
        wanted = stacked | {k for k, number in enumerate(entering) if number in read}
    return parts[::-1]


@rule("while", reads=("cond_jaxpr", "cond_nconsts", "body_jaxpr", "body_nconsts"))
def _while(scope: Scope, *scales: Scale) -> list[Terms]:
    """One step that maps to itself, whatever the number of steps; also none."""
    loop = read_while(scope.node)
    for_condition, for_body, carry = loop.inputs(scales)
    signal = any(scale.signal for scale in scales)

    def step(entered: list[Scale]) -> list[Scale]:
        scope.analysis.run(loop.condition, [*for_condition, *entered])
        return scope.analysis.run(loop.body, [*for_body, *entered])

    return [x.terms for x in _fixed_point(scope, step, carry, signal)]


def _fixed_point(
    scope: Scope,
    step: Callable[[list[Scale]], list[Scale]],
    carry: Sequence[Scale],
    signal: bool,
) -> list[Scale]:
    """The scales of a loop's results: those of a step that leaves the scales of its carry alone.

    The scales of the carry are labels of their own along the axes on which anything that enters
    or leaves it varies. These axes are found by trying: a step with labels on too few of them
    would demand more than the loop does, so what it demanded is forgotten and the step repeated.

    Args:
      scope: the loop.
      step: from the scales of the carry to those of the step's results, the carry first.
      carry: the scales with which the loop begins.
      signal: whether anything that the loop reads is a signal.

    Returns:
      What ``step`` returns at the fixed point.
    """
    analysis = scope.analysis
    shapes = [scope.out_shape(k) for k in range(len(carry))]
    inexact = [
        jnp.issubdtype(scope.graph.avals[number].dtype, jnp.inexact)
        for number in scope.node.outputs[: len(carry)]
    ]
    axes = [
        axes_of(x.terms) if has_scale else None for x, has_scale in zip(carry, inexact, strict=True)
    ]
    while True:
        before = analysis.mark()
        entered = [
            Scale(_labels(scope, shape, varying), x.signal or signal)
            for x, varying, shape in zip(carry, axes, shapes, strict=True)
        ]
        results = step(entered)
        found = [
            None if varying is None else varying | axes_of(x.terms)
            for x, varying in zip(results, axes, strict=False)
        ]
        if found == axes:
            break
        analysis.forget(before)
        axes = found
    for first, held, last, shape in zip(carry, entered, results, shapes, strict=False):
        scope.equate((first, held), len(shape), CARRIED)
        scope.equate((last, held), len(shape), CARRIED)
    return [*(Scale(x.terms, True) if signal else x for x in entered), *results[len(carry) :]]


def _labels(scope: Scope, shape: tuple[int, ...], varying: frozenset[int] | None) -> Terms:
    """New labels along some axes of a value; None: the value has no scale."""
    if varying is None:
        return ()
    return (Term(1.0, scope.new(tuple(n if a in varying else 1 for a, n in enumerate(shape)))),)
