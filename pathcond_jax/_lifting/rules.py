"""How paths pass through a program: one rule per primitive.

How to read this file: first the arithmetic that rules hand to the interpreter, functions of arrays
with static options, so that equal ones compile once. Then the rules: operations that move entries,
products and sums, joining and writing, contractions, loops. Activations have a file of their own.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pathcond_jax._lifting.activations import gated
from pathcond_jax._lifting.arithmetic import SAME, add_all
from pathcond_jax._lifting.interpreter import RULES, Lifting, side_by_side
from pathcond_jax._lifting.values import (
    Call,
    Coefficient,
    Gate,
    Kind,
    Record,
    Signal,
    Value,
    call,
    coefficients_of,
    evaluate,
    is_zero,
    made_entries,
    moved_entries,
    no_gates,
    signals_of,
    unliftable,
)
from pathcond_jax._program import kinds
from pathcond_jax._program.control_flow import SCAN_PARAMETERS, read_scan
from pathcond_jax._program.graph import Node
from pathcond_jax._program.primitives import SCATTER_PARAMETERS, find, runs_only
from pathcond_jax._spec.extended_range import Scaled

rule = RULES.rule
SUMS = frozenset(map(find, ("reduce_sum", "cumsum", "scatter-add")))

# Functions linear in their arrays; calls of them with equal options compile once.


# XLA compiles each product of a matrix and a vector, and all sums of one shape once.
_FEW_PRODUCTS = 2**14


def _bind(*values: jax.Array, primitive: Any, **params: Any) -> Any:
    return primitive.bind(*values, **params)


def _summed(lhs: jax.Array, rhs: jax.Array, numbers: Any) -> jax.Array:
    """The ``dot_general`` with these dimension numbers, as a sum of products."""
    sides = [
        (value, contracted, batch, [k for k in range(value.ndim) if k not in (*contracted, *batch)])
        for value, contracted, batch in zip((lhs, rhs), *numbers, strict=True)
    ]
    left, right = (
        jnp.transpose(value, (*batch, *free, *contracted))
        for value, contracted, batch, free in sides
    )
    (_, _, batch, first), (_, _, _, second) = sides
    start, middle = len(batch), len(batch) + len(first)
    end = middle + len(second)
    products = jnp.expand_dims(left, range(middle, end)) * jnp.expand_dims(
        right, range(start, middle)
    )
    return products.sum(range(end, products.ndim))


def _part(value: jax.Array, k: int, primitive: Any, **params: Any) -> jax.Array:
    return primitive.bind(value, **params)[k]


def _padded(value: jax.Array, primitive: Any, **params: Any) -> jax.Array:
    return primitive.bind(value, jnp.zeros((), value.dtype), **params)


def _expanded(*values: jax.Array, axis: int) -> jax.Array:
    return jnp.stack(values, axis)


def _concatenated(*values: jax.Array, axis: int) -> jax.Array:
    return jnp.concatenate(values, axis)


def _unstacked(value: jax.Array) -> list[jax.Array]:
    return [value[k] for k in range(value.shape[0])]


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
    if not is_zero(fill):
        raise unliftable(node, "pads with values other than 0")
    return [lifting.moved(value, call(_padded, primitive=node.primitive, **node.params))]


@rule("mul", reads=("out_dtype",))
def _mul(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    one, two = inputs
    signals = signals_of(inputs)
    if len(signals) == 2:
        raise unliftable(node, "multiplies two signals")
    if any(isinstance(value, Gate) for value in inputs):
        return [gated(node, inputs)]
    linear = call(jnp.multiply)
    if signals:
        return [lifting.multiplied(linear, one, two, multiple=True)]
    return [_product_of_weights(lifting, node, linear, *coefficients_of(inputs) or ())]


def _product_of_weights(
    lifting: Lifting, node: Node, linear: Call, one: Coefficient, two: Coefficient
) -> Value:
    if set(one.entries) & set(two.entries):
        return lifting.made(node, [one, two])[0]
    (raw,) = evaluate(node, [one, two])
    power = lifting.product(linear, one, two)
    exact = one.exact and two.exact
    made = Coefficient(raw, power, True, None, exact, made_entries((one, two), raw.shape))
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
    no_gates(node, inputs)
    coefficients = coefficients_of(inputs)
    if coefficients is not None:
        return lifting.made(node, coefficients, elementwise=True)
    minus = -1 if node.primitive is find("sub") else 1
    return [lifting.combined(call(add_all), *inputs, signs=(1, minus))]


@rule("concatenate", reads=("dimension",))
def _concatenate(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    no_gates(node, inputs)
    return [side_by_side(lifting, call(_concatenated, axis=node.params["dimension"]), inputs)]


@rule("stack", reads=("axis",))
def _stack(lifting: Lifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    no_gates(node, inputs)
    return [side_by_side(lifting, call(_expanded, axis=node.params["axis"]), inputs)]


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
    no_gates(node, inputs)
    linear = call(_updated, primitive=node.primitive, **node.params)
    extra = tuple(place.raw for place in known)
    coefficients = coefficients_of(inputs)
    if coefficients is not None and node.primitive in SUMS:
        return lifting.made(node, coefficients)
    return [side_by_side(lifting, linear, [into, value], extra)]


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
    no_gates(node, inputs)
    coefficients = coefficients_of(inputs)
    if coefficients is not None:
        return lifting.made(node, coefficients)
    if len(signals_of(inputs)) == 2:
        raise unliftable(node, "multiplies two signals")
    if node.primitive is find("dot_general") and _products(lifting, node) <= _FEW_PRODUCTS:
        return [
            lifting.multiplied(call(_summed, numbers=node.params["dimension_numbers"]), *inputs)
        ]
    options = dict(node.params, precision=(lax.Precision.HIGHEST,) * 2, preferred_element_type=None)
    return [lifting.multiplied(call(_bind, primitive=node.primitive, **options), *inputs)]


def _products(lifting: Lifting, node: Node) -> int:
    """How many products a ``dot_general`` sums up."""
    lhs, (made,) = lifting.avals[node.inputs[0]], node.outputs
    (contracted, _), _ = node.params["dimension_numbers"]
    return math.prod((lifting.avals[made].size, *(lhs.shape[k] for k in contracted)))


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
    return side_by_side(lifting, call(_expanded, axis=0), values)


_ONE_WEIGHT = {"cos", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "sin", "tanh"}
_WITHOUT = (set(kinds.ELEMENTWISE) - _ONE_WEIGHT) | {"atan2", "clamp", "rem"}

RULES.no_rule("it is not linear", *_WITHOUT)
for _reason, _names in kinds.OPAQUE.items():
    RULES.no_rule(_reason, *_names)
RULES.no_rule("paths have real weights", "complex", "conj", "fft", "imag", "real")
RULES.no_rule(
    "the path that an entry takes depends on the input",
    *("approx_top_k", "cummax", "cummin", "scatter-max", "scatter-min", "sort", "top_k"),
)
RULES.no_rule("the operations that run depend on the input", "cond", "while")
RULES.no_rule("total orders occur in sorting only", "eq_to", "le_to", "lt_to")
RULES.no_rule("write .at[...].add(-x) instead, which has a rule", "scatter-sub")
RULES.no_rule("the group of weights that an entry meets depends on the input", "ragged_dot_general")
