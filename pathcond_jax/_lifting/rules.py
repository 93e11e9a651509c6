"""How paths pass through a program: one rule per primitive.

How to read this file: first the arithmetic that rules hand to the interpreter, functions of arrays
with static options, so that equal ones compile once. Then the rules: operations that move entries,
products and sums, activations and gates, maxima, joining and writing, contractions, loops.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._lifting.interpreter import RULES, SAME, Lifting, add_all
from pathcond_jax._lifting.values import (
    Call,
    Coefficient,
    Gate,
    Kind,
    NotPathLiftableError,
    Record,
    Signal,
    Value,
    at,
    call,
    coefficients_of,
    evaluate,
    moved_entries,
    signals_of,
    unliftable,
)
from pathcond_jax._program import kinds
from pathcond_jax._program.control_flow import SCAN_PARAMETERS, read_scan
from pathcond_jax._program.graph import Node
from pathcond_jax._program.primitives import SCATTER_PARAMETERS, find, runs_only
from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.extended_range import Scaled

rule = RULES.rule
SUMS = frozenset(map(find, ("reduce_sum", "cumsum", "scatter-add")))

# Functions linear in their arrays; calls of them with equal options compile once.


def _max_all(*parts: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, parts)


def _bind(*values: jax.Array, primitive: Any, **params: Any) -> Any:
    return primitive.bind(*values, **params)


def _part(value: jax.Array, k: int, primitive: Any, **params: Any) -> jax.Array:
    return primitive.bind(value, **params)[k]


def _padded(value: jax.Array, primitive: Any, **params: Any) -> jax.Array:
    return primitive.bind(value, jnp.zeros((), value.dtype), **params)


def _reduced(value: jax.Array, axes: tuple[int, ...], largest: bool) -> jax.Array:
    return value.max(axes) if largest else value.sum(axes)


def _windowed(value: jax.Array, largest: bool, **params: Any) -> jax.Array:
    start, operation = (-jnp.inf, lax.max) if largest else (0.0, lax.add)
    return lax.reduce_window(value, np.asarray(start, value.dtype)[()], operation, **params)


def _expanded(*values: jax.Array, axis: int) -> jax.Array:
    return jnp.stack(values, axis)


def _concatenated(*values: jax.Array, axis: int) -> jax.Array:
    return jnp.concatenate(values, axis)


def _chosen(*values: jax.Array) -> jax.Array:
    *cases, which = values
    return lax.select_n(which, *cases)


def _unstacked(value: jax.Array) -> list[jax.Array]:
    return [value[k] for k in range(value.shape[0])]


def _is_zero(value: Value) -> bool:
    return _is_constant(value, 0)


def _is_constant(value: Value, number: float) -> bool:
    return (
        isinstance(value, Coefficient)
        and not value.trainable
        and not is_traced(value.raw)
        and bool((np.asarray(value.raw) == number).all())
    )


def _no_gates(node: Node, values: Sequence[Value]) -> None:
    gates = [value for value in values if isinstance(value, Gate)]
    _no_integers(node, gates)
    if gates:
        raise unliftable(node, "mixes paths with values that depend on the input in another way")


def _no_integers(node: Node, gates: Sequence[Gate]) -> None:
    if not all(gate.switch for gate in gates):
        raise NotPathLiftableError(
            f"{at(node)} needs floats and gets integers from the network's input, where no path "
            "begins; give trace_spec floating inputs (their shapes suffice)"
        )


def _common_base(signals: Sequence[Signal]) -> Signal | None:
    """The signal of which all are multiples: the argument of a LeakyReLU or PReLU."""
    chains = [(signal, *signal.multiple_of) for signal in signals]
    return next((b for b in chains[0] if all(b in chain for chain in chains[1:])), None)


@rule("reshape", reads=("new_sizes", "dimensions"))
@rule("broadcast_in_dim", reads=("shape", "broadcast_dimensions"))
@rule("slice", reads=("start_indices", "limit_indices", "strides"))
@rule("squeeze", "rev", reads=("dimensions",))
@rule("transpose", reads=("permutation",))
@rule("tile", reads=("reps",))
@rule("dynamic_slice", reads=("slice_sizes",))
@rule("reduce_sum", reads=("axes",))
@rule("cumsum", reads=("axis", "reverse"))
@rule(
    "gather",
    reads=(
        *("dimension_numbers", "slice_sizes", "indices_are_sorted", "mode", "unique_indices"),
        "fill_value",
    ),
)
def _linear(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    """Operations that move or sum entries of one value, at places known without the input."""
    value, *places = inputs
    if any(not isinstance(place, Coefficient) for place in places):
        what = "weights" if isinstance(value, Coefficient) else "values"
        raise unliftable(node, f"chooses {what} at places that depend on the input")
    extra = tuple(place.raw for place in places if isinstance(place, Coefficient))
    if isinstance(value, Coefficient) and node.primitive in SUMS:
        return lifting.made(node, [value])
    return [lifting.moved(value, call(_bind, primitive=node.primitive, **node.params), extra)]


@rule("split", reads=("axis", "sizes"))
@rule("unstack", reads=("axis",))
def _split(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    parts = range(len(node.outputs))
    calls = [call(_part, k=k, primitive=node.primitive, **node.params) for k in parts]
    return [lifting.moved(inputs[0], linear) for linear in calls]


@rule("stop_gradient", "optimization_barrier", "copy")
@rule("reduce_precision", reads=("exponent_bits", "mantissa_bits"))
@rule("device_put", reads=("devices", "srcs", "copy_semantics"))
@rule("sharding_constraint", reads=("layout", "context_mesh", "unconstrained_dims"))
@rule("name", reads=("name",))
def _passed(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    """Operations that pass every path: casts, and activations such as |x|."""
    coefficients = coefficients_of(inputs)
    if coefficients is None:
        return inputs[: len(node.outputs)]
    made = [lifting.moved(value, SAME) for value in coefficients]
    for value, raw in zip(made, evaluate(node, coefficients), strict=True):
        if isinstance(value, Coefficient):
            value.raw = raw
    return made


@rule("neg")
def _neg(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    return [lifting.moved(inputs[0], SAME, sign=-1)]


@rule("abs")
def _abs(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    if isinstance(inputs[0], Coefficient):
        return lifting.made(node, [inputs[0]], elementwise=True)
    return inputs


@rule("pow", "square", "sqrt", "rsqrt", "cbrt", "exp", "exp2", "expm1", "log", "log1p", "tanh")
@rule("logistic", "sin", "cos", "erf")
@rule("integer_pow", reads=("y",))
def _function(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    """A function that is not linear makes weights of parameters, entry by entry."""
    coefficients = coefficients_of(inputs)
    if coefficients is None:
        raise unliftable(node)
    return lifting.made(node, coefficients, elementwise=True)


@rule("convert_element_type", reads=("new_dtype", "weak_type"))
def _convert(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    if isinstance(inputs[0], Gate) or jnp.issubdtype(node.params["new_dtype"], jnp.floating):
        return _passed(lifting, node, inputs)
    raise unliftable(node)


@rule("pad", reads=("padding_config",))
def _pad(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    value, fill = inputs
    if not _is_zero(fill):
        raise unliftable(node, "pads with values other than 0")
    return [lifting.moved(value, call(_padded, primitive=node.primitive, **node.params))]


@rule("mul", reads=("out_dtype",))
def _mul(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    one, two = inputs
    signals = signals_of(inputs)
    if len(signals) == 2:
        raise unliftable(node, "multiplies two signals")
    if any(isinstance(value, Gate) for value in inputs):
        return [_gated(node, inputs)]
    linear = call(jnp.multiply)
    if signals:
        return [lifting.multiplied(linear, one, two, multiple=True)]
    return [_product_of_weights(lifting, node, linear, *coefficients_of(inputs) or ())]


def _gated(node: Node, inputs: list[Value]) -> Value:
    """x · 1[x > 0]: an activation."""
    gates = [value for value in inputs if isinstance(value, Gate)]
    _no_integers(node, gates)
    signals = signals_of(inputs)
    if not signals:
        raise unliftable(node, "multiplies values that depend on the input in different ways")
    if any(gate.slope and not _decides(gate, signals) for gate in gates):
        raise unliftable(node, "gives a signal slopes that another signal chooses")
    return signals[0]


def _product_of_weights(
    lifting: Lifting, node: Node, linear: Call, one: Coefficient, two: Coefficient
) -> Value:
    if set(one.entries) & set(two.entries):
        return lifting.made(node, [one, two])[0]
    (raw,) = evaluate(node, [one, two])
    power = lifting.product(linear, one, two)
    exact = one.exact and two.exact
    made = Coefficient(raw, power, True, None, exact, {**one.entries, **two.entries})
    lifting.record(made, linear, [one, two])
    return made


@rule("div")
def _div(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    one, two = inputs
    if not isinstance(two, Coefficient):
        raise unliftable(node, "divides by a value that depends on the input")
    if isinstance(one, Coefficient) and two.trainable:
        return lifting.made(node, [one, two], elementwise=True)
    inverse: Value = Coefficient(1 / jnp.asarray(two.raw).astype(lifting.dtype))
    if two.trainable:
        (inverse,) = lifting.made(_as(node, "integer_pow", y=-1), [two], elementwise=True)
    return _mul(lifting, _as(node, "mul"), [one, inverse])


def _as(node: Node, name: str, **params: Any) -> Node:
    """Another operation at the same line of the program."""
    return dataclasses.replace(node, primitive=find(name), params=params)


@rule("add", "sub", "add_any")
def _add(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    _no_gates(node, inputs)
    coefficients = coefficients_of(inputs)
    if coefficients is not None:
        return lifting.made(node, coefficients, elementwise=True)
    minus = -1 if node.primitive is find("sub") else 1
    return [lifting.combined(call(add_all), *inputs, signs=(1, minus))]


@rule("max", "min")
def _extremum(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    """ReLU, LeakyReLU as a maximum of multiples, and the maximum or minimum of signals."""
    _no_gates(node, inputs)
    coefficients = coefficients_of(inputs)
    if coefficients is not None:
        return lifting.made(node, coefficients, elementwise=True)
    signals = signals_of(inputs)
    if len(signals) == 1:
        neutral = -np.inf if node.primitive is find("max") else np.inf
        if any(_is_zero(value) or _is_constant(value, neutral) for value in inputs):
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
        _no_gates(node, cases)
        return [_joined(lifting, call(_chosen), cases, (which.raw,))]
    base = which.base if isinstance(which, Gate) else None
    if coefficients is not None:
        # A slope, as in x · where(x > 0, 1, a).
        return [Gate(True, base, not _is_on_or_off(coefficients))]
    if not signals_of(cases):
        return [Gate(all(v.switch for v in inputs if isinstance(v, Gate)), None, True)]
    _no_gates(node, cases)
    signals = signals_of(cases)
    shared = _common_base(signals)
    others = [value for value in cases if not isinstance(value, Signal)]
    if shared is None or not all(_is_zero(value) for value in others):
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


def _joined(
    lifting: Lifting, linear: Call, values: Sequence[Value], extra: tuple[Any, ...] = ()
) -> Value:
    """One value out of the entries of several."""
    coefficients = coefficients_of(values)
    if coefficients is not None:
        return lifting.joined(linear, *coefficients, extra=extra)
    return lifting.combined(linear, *values, extra=extra)


@rule("eq", "ne", "ge", "gt", "le", "lt", "is_finite", "sign")
@rule("argmax", "argmin", reads=("axes", "index_dtype"))
def _compared(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    coefficients = coefficients_of(inputs)
    if coefficients is not None:
        return [Coefficient(raw) for raw in evaluate(node, coefficients)]
    roots = {_root(signal) for signal in signals_of(inputs)}
    others = [value for value in inputs if not isinstance(value, Signal)]
    known = len(roots) == 1 and all(map(_is_zero, others))
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


@rule("concatenate", reads=("dimension",))
def _concatenate(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    _no_gates(node, inputs)
    return [_joined(lifting, call(_concatenated, axis=node.params["dimension"]), inputs)]


@rule("stack", reads=("axis",))
def _stack(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    _no_gates(node, inputs)
    return [_joined(lifting, call(_expanded, axis=node.params["axis"]), inputs)]


@rule("dynamic_update_slice")
@rule("scatter", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": None})
@rule("scatter-add", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("add")})
def _update(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    """Writes or adds one value into another, at places known without the input."""
    into, *rest = inputs
    if node.primitive is find("dynamic_update_slice"):
        value, *places = rest
    else:
        *places, value = rest
    known = coefficients_of(places)
    if known is None:
        raise unliftable(node, "writes values at places that depend on the input")
    _no_gates(node, inputs)
    linear = call(_updated, primitive=node.primitive, **node.params)
    extra = tuple(place.raw for place in known)
    coefficients = coefficients_of(inputs)
    if coefficients is not None and node.primitive in SUMS:
        return lifting.made(node, coefficients)
    return [_joined(lifting, linear, [into, value], extra)]


def _updated(into: jax.Array, value: jax.Array, *places: Any, primitive: Any, **params: Any) -> Any:
    if "update_jaxpr" in params:
        return primitive.bind(into, *places, value, **params)
    return primitive.bind(into, value, *places, **params)


@rule("dot_general", reads=("dimension_numbers", "preferred_element_type"))
@rule(
    "conv_general_dilated",
    reads=(
        *("dimension_numbers", "feature_group_count", "batch_group_count", "window_strides"),
        *("padding", "lhs_dilation", "rhs_dilation", "preferred_element_type"),
    ),
)
def _contraction(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    _no_gates(node, inputs)
    coefficients = coefficients_of(inputs)
    if coefficients is not None:
        return lifting.made(node, coefficients)
    if len(signals_of(inputs)) == 2:
        raise unliftable(node, "multiplies two signals")
    options = dict(node.params, precision=(lax.Precision.HIGHEST,) * 2, preferred_element_type=None)
    return [lifting.multiplied(call(_bind, primitive=node.primitive, **options), *inputs)]


@rule("scan", reads=SCAN_PARAMETERS)
def _scan(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    """Step by step: stacked parameters differ between steps, and paths go through all of them.

    The body runs once for each step, on values of the interpreter, so that a scan over layers has
    the same records as the layers written one after the other. Stacked operands are cut into slices
    whose derivatives one record stacks again.
    """
    loop = read_scan(node, lifting.avals)
    steps = range(loop.length)
    consts, carry, stacked = loop.inputs(inputs)
    slices = [_slices(lifting, value, len(steps)) for value in stacked]
    made: dict[int, list[Value]] = {}
    for step in reversed(steps) if loop.reverse else steps:
        results = lifting.run(loop.body, [*consts, *carry, *(each[step] for each in slices)])
        carry, made[step] = loop.outputs(results)
    outputs = range(len(node.outputs) - len(carry))
    return [*carry, *(_along_steps(lifting, [made[s][k] for s in steps]) for k in outputs)]


def _slices(lifting: Lifting, value: Value, length: int) -> list[Value]:
    """The entries of a value along its first axis; the reverse sweep stacks their derivatives."""
    if isinstance(value, Gate):
        return [value] * length
    raws = _unstacked(jnp.asarray(value.raw)) if isinstance(value, Coefficient) else []
    if isinstance(value, Coefficient) and not value.trainable:
        return [Coefficient(raw) for raw in raws]
    power = lifting.power(value)
    parts = [Scaled(mantissa, power.exponent) for mantissa in _unstacked(power.mantissa)]
    made: list[Value] = []
    for k, part in enumerate(parts):
        if isinstance(value, Signal):
            made.append(Signal(part, (), value.met))
        else:
            entry = call(_entry, k=k)
            entries = {leaf: moved_entries(own, entry, ()) for leaf, own in value.entries.items()}
            made.append(Coefficient(raws[k], part, True, None, value.exact, entries))
    record = Record(Kind.PRODUCT, (value,), tuple(made), call(_unstacked), (), (1,))
    lifting.records.append(record)
    return made


def _entry(value: jax.Array, k: int) -> jax.Array:
    return value[k]


def _along_steps(lifting: Lifting, values: Sequence[Value]) -> Value:
    gates = [value for value in values if isinstance(value, Gate)]
    if gates:
        return Gate(all(gate.switch for gate in gates), None, any(gate.slope for gate in gates))
    coefficients = coefficients_of(values)
    if coefficients is not None and not any(value.trainable for value in coefficients):
        return Coefficient(jnp.stack([jnp.asarray(value.raw) for value in coefficients]))
    return _joined(lifting, call(_expanded, axis=0), values)


_ONE_WEIGHT = {"cos", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "sin", "tanh"}
_WITHOUT = (set(kinds.ELEMENTWISE) - _ONE_WEIGHT) | {"atan2", "clamp", "rem"}

RULES.no_rule("it is not linear", *_WITHOUT)
RULES.no_rule("a factorization mixes all entries", *kinds.FACTORIZATIONS)
RULES.no_rule("integers and bits are on no path", *kinds.BITS)
RULES.no_rule("what is drawn is on no path", *kinds.RANDOM)
RULES.no_rule("other devices take part", *kinds.COLLECTIVES)
RULES.no_rule("it is there for its effects", *kinds.EFFECTS)
RULES.no_rule("it multiplies entries of one value with each other", *kinds.PRODUCTS)
RULES.no_rule("it runs a program that its caller gives", *kinds.INNER_PROGRAMS)
RULES.no_rule("it occurs in derivatives only", *kinds.DERIVATIVES)
RULES.no_rule("paths have real weights", "complex", "conj", "fft", "imag", "real")
RULES.no_rule(
    "the path that an entry takes depends on the input",
    *("approx_top_k", "cummax", "cummin", "scatter-max", "scatter-min", "sort", "top_k"),
)
RULES.no_rule("the operations that run depend on the input", "cond", "while")
RULES.no_rule("total orders occur in sorting only", "eq_to", "le_to", "lt_to")
RULES.no_rule("JAX writes it as an addition of the negative", "scatter-sub")
