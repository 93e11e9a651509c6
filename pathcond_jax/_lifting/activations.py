"""How paths pass through activations: gates, slopes, choices and maxima.

A gate depends on the input but is no sum over paths. It may switch any signal on and off. Other
slopes, as those of a LeakyReLU, are no weights of paths only where the sign of the signal itself
chooses them.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._lifting.arithmetic import add_all
from pathcond_jax._lifting.interpreter import RULES, Lifting, side_by_side
from pathcond_jax._lifting.values import (
    Coefficient,
    Gate,
    Signal,
    Value,
    call,
    coefficients_of,
    evaluate,
    is_constant,
    is_zero,
    no_gates,
    no_integers,
    signals_of,
    unliftable,
)
from pathcond_jax._program.graph import Node
from pathcond_jax._program.primitives import find
from pathcond_jax._spec.arrays import is_traced

rule = RULES.rule


def _max_all(*parts: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, parts)


def _reduced(value: jax.Array, axes: tuple[int, ...], largest: bool) -> jax.Array:
    return value.max(axes) if largest else value.sum(axes)


def _windowed(value: jax.Array, largest: bool, **params: Any) -> jax.Array:
    start, operation = (-jnp.inf, lax.max) if largest else (0.0, lax.add)
    return lax.reduce_window(value, np.asarray(start, value.dtype)[()], operation, **params)


def _chosen(*values: jax.Array) -> jax.Array:
    *cases, which = values
    return lax.select_n(which, *cases)


def gated(node: Node, inputs: list[Value]) -> Value:
    """x · 1[x > 0]: an activation."""
    gates = [value for value in inputs if isinstance(value, Gate)]
    no_integers(node, gates)
    signals = signals_of(inputs)
    if not signals:
        raise unliftable(node, "multiplies values that depend on the input in different ways")
    if any(gate.slope and not _decides(gate, signals) for gate in gates):
        raise unliftable(node, "gives a signal slopes that another signal chooses")
    return signals[0]


def _common_base(signals: Sequence[Signal]) -> Signal | None:
    """The signal of which all are multiples: the argument of a LeakyReLU or PReLU.

    One of them must be the signal itself, up to a constant. Where a parameter multiplies each, as
    in ``where(x > 0, a * x, b * x)``, these are weights of paths and no slopes.
    """
    chains = [(signal, *signal.multiple_of) for signal in signals]
    base = next((b for b in chains[0] if all(b in chain for chain in chains[1:])), None)
    itself = base is not None and any(signal.met == base.met for signal in signals)
    return base if itself else None


@rule("abs")
def _abs(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    if isinstance(inputs[0], Coefficient):
        return lifting.made(node, [inputs[0]], elementwise=True)
    return inputs


@rule("max", "min")
def _extremum(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    """ReLU, LeakyReLU as a maximum of multiples, and the maximum or minimum of signals."""
    no_gates(node, inputs)
    coefficients = coefficients_of(inputs)
    if coefficients is not None:
        return lifting.made(node, coefficients, elementwise=True)
    signals = signals_of(inputs)
    if len(signals) == 1:
        neutral = -np.inf if node.primitive is find("max") else np.inf
        if any(is_zero(value) or is_constant(value, neutral) for value in inputs):
            return [signals[0]]
        raise unliftable(node, "compares a signal with a constant other than 0")
    shared = _common_base(signals)
    if shared is not None:
        return [shared]
    return [lifting.combined(call(_max_all if lifting.max_pool == "max" else add_all), *signals)]


@rule("select_n")
def _select(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    which, *cases = inputs
    coefficients = coefficients_of(cases)
    if isinstance(which, Coefficient):
        no_gates(node, cases)
        return [side_by_side(lifting, call(_chosen), cases, (which.raw,))]
    base = which.base if isinstance(which, Gate) else None
    if coefficients is not None:
        # A slope, as in x · where(x > 0, 1, a). Parameters on both sides are weights of paths.
        if all(case.trainable or is_zero(case) for case in coefficients):
            raise unliftable(node, "chooses by the input between parameters alone")
        return [Gate(True, base, not _is_on_or_off(coefficients))]
    if not signals_of(cases):
        return [Gate(all(v.switch for v in inputs if isinstance(v, Gate)), None, True)]
    no_gates(node, cases)
    signals = signals_of(cases)
    shared = _common_base(signals)
    others = [value for value in cases if not isinstance(value, Signal)]
    if shared is None or not all(is_zero(value) for value in others):
        raise unliftable(node, "chooses by the input between values that are no multiples of it")
    if len(set(signals)) > 1 and not _decides(Gate(True, base), signals):
        raise unliftable(node, "chooses between multiples of a signal by another signal")
    return [shared]


def _decides(gate: Gate, signals: Sequence[Signal]) -> bool:
    """Whether a gate follows the sign of what the signals are multiples of."""
    return gate.base is not None and all(_root(signal) is gate.base for signal in signals)


def _root(signal: Signal) -> Signal:
    """What a signal is a multiple of in the end."""
    return signal.multiple_of[-1] if signal.multiple_of else signal


def _is_on_or_off(cases: Sequence[Coefficient]) -> bool:
    """Whether coefficients are known, and each is 0 or one number."""
    if any(case.trainable or is_traced(case.raw) for case in cases):
        return False
    values = np.concatenate([np.ravel(np.asarray(case.raw)) for case in cases])
    return len(np.unique(values[values != 0])) <= 1


@rule("eq", "ne", "ge", "gt", "le", "lt", "is_finite", "sign")
@rule("argmax", "argmin", reads=("axes", "index_dtype"))
def _compared(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    coefficients = coefficients_of(inputs)
    if coefficients is not None:
        return [Coefficient(raw) for raw in evaluate(node, coefficients)]
    roots = {_root(signal) for signal in signals_of(inputs)}
    others = [value for value in inputs if not isinstance(value, Signal)]
    known = len(roots) == 1 and all(map(is_zero, others))
    return [Gate(True, roots.pop() if known else None)] * len(node.outputs)


@rule("reduce_max", "reduce_min", reads=("axes",))
def _reduce_max(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    (value,) = inputs
    if isinstance(value, Coefficient):
        return lifting.made(node, [value])
    largest = lifting.max_pool == "max"
    return [lifting.moved(value, call(_reduced, axes=tuple(node.params["axes"]), largest=largest))]


@rule(
    *("reduce_window_sum", "reduce_window_max", "reduce_window_min"),
    reads=("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"),
)
def _window(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    """Pooling; a maximum has an edge from each entry of its window, or follows the maximum."""
    (value,) = inputs
    if isinstance(value, Coefficient):
        return lifting.made(node, [value])
    largest = node.primitive is not find("reduce_window_sum") and lifting.max_pool == "max"
    keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    options = {key: node.params[key] for key in keys}
    return [lifting.moved(value, call(_windowed, largest=largest, **options))]
