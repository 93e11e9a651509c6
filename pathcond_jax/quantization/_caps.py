"""The bounds of clipped activations as parameters, one for each channel."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.graph import Graph, Node
from pathcond_jax._program.primitives import find
from pathcond_jax._program.replay import Place, replay
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.quantization._affine import channel_axes, known_values
from pathcond_jax.quantization._retrace import once_per_shape, shapes_of, traced


class CappingWarning(UserWarning):
    """The bound of some activation stays a constant."""


def caps_as_parameters(
    apply_fn: Callable[..., Any], params: PyTree, *inputs: PyTree
) -> tuple[Callable[..., Any], PyTree]:
    """The same network with the bounds of ReLU6 and other clipped activations as parameters.

    ``min(max(x, 0), 6)`` keeps a neuron from being rescaled, as its bound does not move with it.
    With one bound for each channel it does: ``min(max(λx, 0), 6λ) = λ min(max(x, 0), 6)``. The
    network computes the same as before and, with ``trace_spec(..., rescale_state=True)``, its
    clipped neurons are rescaled together with their bounds, which are not trained. (To replace
    ReLU6 by ReLU would change the function.) Bounds of 0 need no parameter.

    Args:
      apply_fn: ``apply_fn(params, *inputs)``, batch normalization folded.
      params: its parameters.
      *inputs: example inputs, arrays or ``jax.ShapeDtypeStruct``; their shapes may differ later.

    Returns:
      The apply function, and its parameters, which are ``params`` with a further key ``"caps"``
      where they have ``"params"``, else ``{"params": params, "caps": {...}}``. Each cap is
      (channels,).

    Warns:
      CappingWarning: some bound applies to no channels of a layer; it is named and stays.

    Raises:
      SpecError: the parameters have a key ``"caps"`` already.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> def apply_fn(params, x):
      ...     return jax.nn.relu6(x @ params["w"]) @ params["v"]
      >>> params = {"w": 8.0 * jnp.ones((2, 3)), "v": jnp.ones((3, 1))}
      >>> x = jnp.ones((1, 2))
      >>> capped, variables = pathcond.quantization.caps_as_parameters(apply_fn, params, x)
      >>> spec = pathcond.trace_spec(capped, variables, x, rescale_state=True)
      >>> moved, _ = pathcond.condition(variables, spec, "equalize")
      >>> jnp.round(moved["caps"]["000"], 3).tolist()
      [2.121, 2.121, 2.121]
      >>> [round(float(f), 4) for f in (apply_fn(params, x)[0, 0], capped(moved, x)[0, 0])]
      [18.0, 18.0]

    References:
      Nagel, van Baalen, Blankevoort, Welling, *Data-free quantization through weight equalization
      and bias correction*, ICCV 2019, replaces ReLU6 by ReLU instead.
    """
    nested = isinstance(params, Mapping) and "params" in params
    if isinstance(params, Mapping) and "caps" in params:
        raise SpecError('the parameters have a key "caps" already')
    shapes = shapes_of(params)
    plan_for = once_per_shape(lambda inputs: _plan(apply_fn, shapes, inputs))
    plan = plan_for(inputs)
    _warn_of_rest(plan)
    dtypes = [plan.graph.avals[plan.graph.nodes[cap.node].outputs[0]].dtype for cap in plan.caps]
    caps = {
        f"{number:03}": jnp.full((cap.channels,), cap.value, dtype)
        for number, (cap, dtype) in enumerate(zip(plan.caps, dtypes, strict=True))
    }

    def capped(variables: PyTree, *inputs: PyTree) -> Any:
        rest = {key: value for key, value in variables.items() if key != "caps"}
        leaves = jax.tree.leaves(rest if nested else rest["params"])
        return _run(plan_for(inputs), leaves, inputs, jax.tree.leaves(variables["caps"]))

    return capped, {**(params if nested else {"params": params}), "caps": caps}


class Cap(NamedTuple):
    """A constant bound of a signal.

    Attributes:
      node: position among the graph's nodes.
      operand: which of its operands the bound is.
      axis: of the channels.
      channels: how many there are.
      value: of the bound.
    """

    node: int
    operand: int
    axis: int
    channels: int
    value: float


class Plan(NamedTuple):
    """A program, its bounds, those that stay constants, and the structure of its outputs."""

    graph: Graph
    caps: tuple[Cap, ...]
    rest: tuple[Node, ...]
    out_tree: Any


# The operands that may bound the others.
_BOUNDS = {find("max"): (0, 1), find("min"): (0, 1), find("clamp"): (0, 2)}


def _plan(apply_fn: Callable[..., Any], params: PyTree, inputs: Sequence[PyTree]) -> Plan:
    graph, out_tree = traced(apply_fn, params, inputs)
    known = known_values(graph, graph.inputs[: len(jax.tree.leaves(params))])
    axes = channel_axes(graph, known)
    caps, rest = [], []
    for position, node in enumerate(graph.nodes):
        signals = [number for number in node.inputs if number not in known.reads]
        for operand in _BOUNDS.get(node.primitive, ()):
            value = _constant(graph, node.inputs[operand])
            if len(signals) != 1 or value is None or value == 0 or not np.isfinite(value):
                continue
            axis = axes.get(signals[0])
            if axis is None:
                rest.append(node)
                continue
            channels = graph.avals[signals[0]].shape[axis]
            caps.append(Cap(position, operand, axis, channels, value))
    return Plan(graph, tuple(caps), tuple(rest), out_tree)


def _constant(graph: Graph, number: int) -> float | None:
    """The one value of a constant bound."""
    if number not in graph.constants:
        return None
    values = np.asarray(graph.constants[number])
    equal = values.size and (values == values.flat[0]).all()
    return float(values.flat[0]) if equal else None


def _run(
    plan: Plan, leaves: Sequence[Any], inputs: Sequence[PyTree], caps: Sequence[jax.Array]
) -> Any:
    """The program with these bounds in place of the constants."""
    bounds: dict[tuple[Place, int], tuple[Cap, jax.Array]] = {
        ((cap.node,), cap.operand): (cap, value) for cap, value in zip(plan.caps, caps, strict=True)
    }
    graph = plan.graph

    def hook(
        place: Place, node: Node, operands: Sequence[Any], fed: Any
    ) -> tuple[Sequence[Any], None]:
        del fed
        shape = graph.avals[node.outputs[0]].shape if len(place) == 1 and node.outputs else ()
        return [
            _broadcast(*bounds[place, k], shape) if (place, k) in bounds else operand
            for k, operand in enumerate(operands)
        ], None

    values = [*leaves, *jax.tree.leaves(tuple(inputs))]
    return jax.tree.unflatten(plan.out_tree, replay(graph, values, hook).outputs)


def _broadcast(cap: Cap, value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    ones = [1] * len(shape)
    ones[cap.axis] = cap.channels
    return jnp.broadcast_to(jnp.asarray(value).reshape(ones), shape)


def _warn_of_rest(plan: Plan) -> None:
    if plan.rest:
        places = [f"{n.operation}{f' at {n.source}' if n.source else ''}" for n in plan.rest]
        warnings.warn(
            f"{'; '.join(places)}: a bound of no channels of a layer, which stays a constant",
            CappingWarning,
            stacklevel=3,
        )
