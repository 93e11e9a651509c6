"""Path lifting: path norms and the diagonal of the path-lifting Gram matrix.

A program is run on powers |θ|^q instead of θ. A *signal* is the sum, over the paths that reach
it, of the product of the powers along them; a *coefficient* is a parameter, a constant or a
product of them, and multiplies signals. One reverse sweep over the recorded products gives the
derivative by every power, which for q = 2 is the diagonal of the Gram matrix:

    g_i = Σ_{paths p ∋ i} Π_{j ∈ p, j ≠ i} θ_j² = ∂/∂(θ_i²) Σ_p Φ_p².

Every number is a mantissa array times the exponential of a scalar, so that depth does not
exhaust the range of float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax.graph import Graph, Node, primitive
from pathcond_jax.spec import ArchSpec, PyTree, SpecError, compute_dtype, match_leaves


class NotPathLiftableError(ValueError):
    """The network computes something that is not a sum over paths."""


class ScaledDiagonal(NamedTuple):
    """A nonnegative parameter-shaped tree that may exceed the range of its dtype.

    Attributes:
      mantissa: pytree like the parameters.
      log_scale: the same pytree with one scalar per leaf; the values are
        ``mantissa · exp(log_scale)``.
    """

    mantissa: PyTree
    log_scale: PyTree


class Scaled(NamedTuple):
    """``mantissa · exp(log)``, with a scalar ``log``."""

    mantissa: jax.Array
    log: jax.Array


def path_norm(params: PyTree, spec: ArchSpec, order: int = 2) -> jax.Array:
    """The norm of the path lifting, (Σ_p |Φ_p|^order)^(1/order).

    It does not change under ``rescale``.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.
      order: 1 or 2.

    Returns:
      A scalar, float32 at least.

    Raises:
      NotPathLiftableError: an operation of the network is not a sum over paths.
      SpecError: ``params`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 2.0 * jnp.ones((1, 3))}, "b": {"w": jnp.ones((3, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> float(pathcond.path_norm(params, spec, order=1))
      6.0

    References:
      Gonon, Brisebarre, Riccietti, Gribonval, *A path-norm toolkit for modern networks*, 2024.
    """
    if order not in (1, 2):
        raise SpecError(f"order is 1 or 2, not {order!r}")
    total = _Lifting(spec, params, order).total()
    return jnp.exp((jnp.log(total.mantissa) + total.log) / order)


def gram_diagonal(params: PyTree, spec: ArchSpec) -> PyTree:
    """The diagonal g of the path-lifting Gram matrix ∂Φᵀ∂Φ.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.

    Returns:
      A pytree like ``params``, float32 at least; zeros at leaves that are not trainable. Entries
      beyond the range of the dtype come out as 0 or inf: ``scaled_gram_diagonal`` keeps them.

    Raises:
      NotPathLiftableError: an operation of the network is not a sum over paths.
      SpecError: ``params`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 2.0 * jnp.ones((1, 3))}, "b": {"w": jnp.ones((3, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> pathcond.gram_diagonal(params, spec)["b"]["w"].ravel().tolist()
      [4.0, 4.0, 4.0]

    References:
      Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026, arXiv 2602.19799.
    """
    scaled = scaled_gram_diagonal(params, spec)
    return jax.tree.map(lambda m, s: m * jnp.exp(s), scaled.mantissa, scaled.log_scale)


def scaled_gram_diagonal(params: PyTree, spec: ArchSpec) -> ScaledDiagonal:
    """:func:`gram_diagonal` in a form that holds any magnitude; ``solve`` accepts it.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.

    Returns:
      Mantissas like ``params`` and one log-scale per leaf.

    Raises:
      NotPathLiftableError: an operation of the network is not a sum over paths.
      SpecError: ``params`` does not fit the spec.
    """
    found = _Lifting(spec, params, 2).derivatives()
    return ScaledDiagonal(
        jax.tree.unflatten(spec.treedef, [g.mantissa for g in found]),
        jax.tree.unflatten(spec.treedef, [g.log for g in found]),
    )


def conditioning_score(params: PyTree, spec: ArchSpec) -> jax.Array:
    """How far the Gram diagonal is from constant: log(AM/GM) ≥ 0 over its positive entries.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.

    Returns:
      A scalar; 0 if and only if all positive entries are equal.

    Raises:
      NotPathLiftableError: an operation of the network is not a sum over paths.
      SpecError: ``params`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.ones((1, 3))}, "b": {"w": jnp.ones((3, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> float(pathcond.conditioning_score(params, spec))
      0.0
    """
    gram = scaled_gram_diagonal(params, spec)
    pairs = zip(
        spec.leaves, jax.tree.leaves(gram.mantissa), jax.tree.leaves(gram.log_scale), strict=True
    )
    logs = [
        jnp.where(m > 0, jnp.log(jnp.where(m > 0, m, 1)) + s, -jnp.inf).reshape(-1)
        for leaf, m, s in pairs
        if leaf.trainable
    ]
    dtype = compute_dtype(*(part.dtype for part in logs))
    logs = jnp.concatenate([part.astype(dtype) for part in logs])
    positive = logs > -jnp.inf
    count = jnp.maximum(positive.sum(), 1).astype(dtype)
    centre = jnp.where(positive, logs, 0).sum() / count
    # Relative to the geometric mean, so that equal entries give exactly 0 at any magnitude.
    spread = jnp.where(positive, logs - centre, -jnp.inf)
    return jnp.maximum(jax.nn.logsumexp(spread) - jnp.log(count), 0)


@dataclasses.dataclass(eq=False)
class _Coefficient:
    """A value that depends on parameters and constants only.

    Attributes:
      raw: the value.
      power: |value|^q, as a product of the parameters' powers where ``trainable``.
      trainable: whether trainable parameters enter it.
      opaque: the operation that makes it more than a product of parameters; such a coefficient
        has a path norm but no Gram diagonal.
    """

    raw: Any
    power: Scaled | None = None
    trainable: bool = False
    opaque: Node | None = None


@dataclasses.dataclass(eq=False)
class _Signal:
    """A sum over paths; ``multiple_of`` is the chain of signals it is an elementwise multiple of."""

    power: Scaled
    multiple_of: tuple["_Signal", ...] = ()


class _Gate:
    """A value such as x > 0, which depends on the input but is no sum over paths."""


_Value = _Coefficient | _Signal | _Gate


class _Record(NamedTuple):
    """One product or sum: what it read and made, and how derivatives flow back through it."""

    inputs: tuple[_Value, ...]
    output: _Value
    pull: Callable[[jax.Array], Sequence[jax.Array]]
    logs: tuple[jax.Array, ...]


class _Lifting:
    """One forward run of a spec's program on powers of the parameters."""

    def __init__(self, spec: ArchSpec, params: PyTree, order: int) -> None:
        if spec.program is None:
            raise SpecError("this spec has no program to lift; build it with trace_spec")
        graph: Graph = spec.program
        values = match_leaves(spec, params)
        self.order, self.max_pool = order, spec.max_pool
        self.records: list[_Record] = []
        self.leaves = [
            self._leaf(value, leaf.trainable)
            for value, leaf in zip(values, spec.leaves, strict=True)
        ]
        inputs = [_network_input(graph.avals[k]) for k in graph.inputs[len(values) :]]
        self.outputs = self.run(graph, [*self.leaves, *inputs])

    def _leaf(self, value: jax.Array, trainable: bool) -> _Coefficient:
        raw = jnp.asarray(value)
        return _Coefficient(raw, self._powered(raw) if trainable else None, trainable)

    def _powered(self, value: jax.Array) -> Scaled:
        size = abs(_computing(value))
        top = _unit(size)
        return Scaled((size / top) ** self.order, self.order * jnp.log(top))

    def power(self, value: _Value) -> Scaled:
        """The lifted value; that of a constant is computed when first asked for."""
        if isinstance(value, _Coefficient) and value.power is None:
            value.power = self._powered(jnp.asarray(value.raw))
        return value.power

    def run(self, graph: Graph, arguments: Sequence[_Value]) -> list[_Value]:
        """Interprets a graph; inner graphs of control flow come back here."""
        env: dict[int, _Value] = {k: _Coefficient(v) for k, v in graph.constants.items()}
        env.update(zip(graph.inputs, arguments, strict=True))
        for node in graph.nodes:
            results = _apply(self, node, [env[i] for i in node.inputs])
            env.update(zip(node.outputs, results, strict=True))
        return [env[i] for i in graph.outputs]

    def record(
        self, make: Callable[[Scaled], _Value], fun: Callable[..., jax.Array], *factors: _Value
    ) -> _Value:
        """``make`` of a function linear in each factor's power."""
        powers = [self.power(factor) for factor in factors]
        mantissas = _common_dtype([power.mantissa for power in powers])
        logs = _common_dtype([power.log for power in powers])
        mantissa, pull = jax.vjp(fun, *mantissas)
        log = sum(logs[1:], logs[0])
        if len(factors) > 1:
            top = _unit(mantissa)
            scaled = Scaled(mantissa / top, log + jnp.log(top))
        else:
            scaled = Scaled(mantissa, log)
        made = make(scaled)
        self.records.append(_Record(factors, made, pull, tuple(log - own for own in logs)))
        return made

    def combine(self, fun: Callable[..., jax.Array], *values: _Value) -> _Signal:
        """A function of signals that commutes with a common factor; coefficients start paths."""
        aligned, log = _align([self.power(value) for value in values])
        mantissa, pull = jax.vjp(fun, *aligned)
        made = _Signal(Scaled(mantissa, log))
        self.records.append(_Record(values, made, pull, (jnp.zeros_like(log),) * len(values)))
        return made

    def total(self) -> Scaled:
        """Σ over paths of the power of their product."""
        parts = [value.power for value in self.outputs if isinstance(value, _Signal)]
        if not parts:
            raise NotPathLiftableError("no output of the network is reached from its input by paths")
        aligned, log = _align(parts)
        return Scaled(sum(part.sum() for part in aligned), log)

    def derivatives(self) -> list[Scaled]:
        """∂ total / ∂ power of every leaf; zeros where a leaf is not trainable."""
        self.total()
        adjoints: dict[_Value, Scaled] = {}
        for value in self.outputs:
            if isinstance(value, _Signal):
                ones = jnp.ones_like(value.power.mantissa)
                _accumulate(adjoints, value, Scaled(ones, jnp.zeros((), ones.dtype)))
        for record in reversed(self.records):
            adjoint = adjoints.pop(record.output, None)
            if adjoint is None:
                continue
            parts = record.pull(adjoint.mantissa)
            for value, part, log in zip(record.inputs, parts, record.logs, strict=True):
                if isinstance(value, _Signal) or value.trainable:
                    _accumulate(adjoints, value, Scaled(part, adjoint.log + log))
        return [adjoints.get(leaf, _zeros_like(leaf)) for leaf in self.leaves]


def _computing(value: jax.Array) -> jax.Array:
    return value.astype(compute_dtype(value.dtype))


def _common_dtype(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    dtype = compute_dtype(*(array.dtype for array in arrays))
    return [array.astype(dtype) for array in arrays]


def _unit(value: jax.Array) -> jax.Array:
    """The largest entry of a nonnegative array, or 1 if that is 0."""
    top = jax.lax.stop_gradient(value.max(initial=0))
    return jnp.where(top > 0, top, jnp.ones_like(top))


def _align(parts: Sequence[Scaled]) -> tuple[list[jax.Array], jax.Array]:
    """Mantissas over one common scale, that of the largest part which is not zero."""
    mantissas = _common_dtype([part.mantissa for part in parts])
    if len(parts) == 1:
        return mantissas, parts[0].log
    logs = _common_dtype([part.log for part in parts])
    present = [
        jnp.where(m.max(initial=0) > 0, log, -jnp.inf)
        for m, log in zip(mantissas, logs, strict=True)
    ]
    top = functools.reduce(jnp.maximum, present)
    top = jnp.where(top > -jnp.inf, top, 0)
    return [
        m * jnp.exp(jnp.minimum(log - top, 0)) for m, log in zip(mantissas, logs, strict=True)
    ], top


def _accumulate(adjoints: dict[_Value, Scaled], value: _Value, part: Scaled) -> None:
    if isinstance(value, _Coefficient) and value.opaque is not None:
        raise NotPathLiftableError(
            f"{_at(value.opaque)} makes a weight that is no product of parameters: the network has "
            "a path norm but no Gram diagonal; use a criterion that needs no path lifting"
        )
    if isinstance(value, _Signal):
        top = _unit(part.mantissa)
        part = Scaled(part.mantissa / top, part.log + jnp.log(top))
    known = adjoints.get(value)
    if known is not None:
        aligned, log = _align([known, part])
        part = Scaled(aligned[0] + aligned[1], log)
    adjoints[value] = part


def _zeros_like(leaf: _Coefficient) -> Scaled:
    dtype = compute_dtype(jnp.result_type(leaf.raw))
    return Scaled(jnp.zeros(jnp.shape(leaf.raw), dtype), jnp.zeros((), dtype))


def _network_input(aval: jax.ShapeDtypeStruct) -> _Value:
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return _Gate()
    dtype = compute_dtype(aval.dtype)
    return _Signal(Scaled(jnp.ones(aval.shape, dtype), jnp.zeros((), dtype)))


def _at(node: Node) -> str:
    return f"{node.operation}{f' at {node.source}' if node.source else ''}"


def _unliftable(node: Node, why: str = "is not a sum over paths") -> NotPathLiftableError:
    return NotPathLiftableError(
        f"{_at(node)} {why}, so this network has no path lifting; use a criterion that needs none"
    )


Rule = Callable[[_Lifting, Node, list[_Value]], list[_Value]]


def _apply(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    rule = RULES.get(node.primitive)
    moving = [v for v in inputs if not isinstance(v, _Coefficient) or v.trainable]
    if not moving:
        return [_Coefficient(raw) for raw in _evaluate(node, inputs)]
    if rule is not None:
        return rule(lifting, node, inputs)
    if any(isinstance(value, _Signal) for value in moving):
        raise _unliftable(node)
    if any(isinstance(value, _Gate) for value in moving):
        return [_Gate()] * len(node.outputs)
    return _opaque(node, inputs)


def _evaluate(node: Node, inputs: Sequence[_Coefficient]) -> list[Any]:
    made = node.primitive.bind(*(value.raw for value in inputs), **node.params)
    return list(made) if node.primitive.multiple_results else [made]


def _opaque(node: Node, inputs: Sequence[_Coefficient]) -> list[_Value]:
    return [_Coefficient(raw, None, True, node) for raw in _evaluate(node, inputs)]


def _signals(values: Sequence[_Value]) -> list[_Signal]:
    return [value for value in values if isinstance(value, _Signal)]


def _no_gates(node: Node, values: Sequence[_Value]) -> None:
    if any(isinstance(value, _Gate) for value in values):
        raise _unliftable(node, "mixes paths with values that depend on the input in another way")


def _moved(lifting: _Lifting, node: Node, value: _Value, fun: Callable[..., Any]) -> _Value:
    """A linear function of one value, signal or coefficient alike."""
    if isinstance(value, _Signal):
        return lifting.record(_Signal, fun, value)
    if isinstance(value, _Gate):
        return value
    make = functools.partial(_Coefficient, fun(jnp.asarray(value.raw)), trainable=value.trainable)
    if value.opaque is not None:
        return _Coefficient(fun(jnp.asarray(value.raw)), None, True, value.opaque)
    return lifting.record(lambda power: make(power), fun, value)


def _structural(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    """Operations that move entries, at places that do not depend on the input."""
    value, *static = inputs
    if any(not isinstance(s, _Coefficient) for s in static):
        if not isinstance(value, _Signal) and not isinstance(value, _Gate):
            raise _unliftable(node, "chooses weights by the input")
        raise _unliftable(node, "moves values to places that depend on the input")
    others = [s.raw for s in static]
    return [_moved(lifting, node, value, lambda x: node.primitive.bind(x, *others, **node.params))]


def _split(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    def part(k: int) -> Callable[[jax.Array], jax.Array]:
        return lambda x: node.primitive.bind(x, **node.params)[k]

    return [_moved(lifting, node, inputs[0], part(k)) for k in range(len(node.outputs))]


def _same(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    """Operations that pass every path unchanged: signs and casts do not matter to powers."""
    if all(isinstance(v, _Signal | _Gate) for v in inputs):
        return inputs[: len(node.outputs)]
    made = _evaluate(node, inputs)
    return [
        _Coefficient(raw, value.power, value.trainable, value.opaque) if not value.trainable else
        _moved_raw(lifting, value, raw)
        for value, raw in zip(inputs, made, strict=True)
    ]


def _moved_raw(lifting: _Lifting, value: _Coefficient, raw: Any) -> _Value:
    if value.opaque is not None:
        return _Coefficient(raw, None, True, value.opaque)
    return lifting.record(lambda power: _Coefficient(raw, power, True), lambda x: x, value)


def _convert(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    if isinstance(inputs[0], _Gate) or jnp.issubdtype(node.params["new_dtype"], jnp.floating):
        return _same(lifting, node, inputs)
    raise _unliftable(node)


def _pad(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    value, fill = inputs
    if not _is_zero(fill):
        raise _unliftable(node, "pads with values other than 0")

    def pad(x: jax.Array) -> jax.Array:
        return node.primitive.bind(x, jnp.zeros((), x.dtype), **node.params)

    return [_moved(lifting, node, value, pad)]


def _is_zero(value: _Value) -> bool:
    return (
        isinstance(value, _Coefficient)
        and not value.trainable
        and not isinstance(value.raw, jax.core.Tracer)
        and not np.asarray(value.raw).any()
    )


def _mul(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    one, two = inputs
    signals = _signals(inputs)
    if len(signals) == 2:
        raise _unliftable(node, "multiplies two signals")
    gates = [value for value in inputs if isinstance(value, _Gate)]
    if gates:
        # x · 1[x > 0]: an activation.
        return [signals[0] if signals else gates[0]]
    if not signals:
        opaque = next((v.opaque for v in inputs if v.opaque is not None), None)
        (raw,) = _evaluate(node, inputs)
        if opaque is not None:
            return [_Coefficient(raw, None, True, opaque)]
        return [lifting.record(lambda power: _Coefficient(raw, power, True), jnp.multiply, one, two)]
    (signal,) = signals
    chain = (signal, *signal.multiple_of)
    return [
        lifting.record(lambda power: _Signal(power, chain), jnp.multiply, one, two)
    ]


def _div(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    one, two = inputs
    if not isinstance(two, _Coefficient):
        raise _unliftable(node, "divides by a value that depends on the input")
    inverse = 1 / _computing(jnp.asarray(two.raw))
    if not isinstance(one, _Signal):
        if two.trainable or one.opaque is not None:
            return _opaque(node, inputs)
        (raw,) = _evaluate(node, inputs)
        factor = _Coefficient(inverse)
        return [
            lifting.record(lambda power: _Coefficient(raw, power, True), jnp.multiply, one, factor)
        ]
    factor = _Coefficient(inverse, None, two.trainable, node if two.trainable else None)
    chain = (one, *one.multiple_of)
    return [lifting.record(lambda power: _Signal(power, chain), jnp.multiply, one, factor)]


def _add(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    _no_gates(node, inputs)
    if not _signals(inputs):
        return _opaque(node, inputs)
    return [lifting.combine(jnp.add, *inputs)]


def _max(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    _no_gates(node, inputs)
    signals = _signals(inputs)
    if not signals:
        return _opaque(node, inputs)
    if len(signals) == 1:
        if any(_is_zero(value) for value in inputs):
            return signals
        raise _unliftable(node, "compares a signal with a constant other than 0")
    shared = _common_base(signals)
    if shared is not None:
        return [shared]
    fun = jnp.maximum if lifting.max_pool == "max" else jnp.add
    return [lifting.combine(fun, *signals)]


def _common_base(signals: Sequence[_Signal]) -> _Signal | None:
    """The signal of which all are multiples: the argument of a LeakyReLU or PReLU."""
    chains = [(signal, *signal.multiple_of) for signal in signals]
    shared = [base for base in chains[0] if all(base in chain for chain in chains[1:])]
    return shared[0] if shared else None


def _select(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    which, *cases = inputs
    _no_gates(node, cases)
    if isinstance(which, _Coefficient) and not which.trainable:
        predicate = which.raw
        if not _signals(cases):
            return _opaque(node, inputs)

        def choose(*values: jax.Array) -> jax.Array:
            return jax.lax.select_n(predicate, *values)

        return [lifting.combine(choose, *cases)]
    signals = _signals(cases)
    shared = _common_base(signals) if signals else None
    others = [value for value in cases if not isinstance(value, _Signal)]
    if shared is None or not all(_is_zero(value) for value in others):
        raise _unliftable(node, "chooses by the input between values that are no multiples of it")
    return [shared]


def _compared(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    return [_Gate()] * len(node.outputs)


def _reduce_sum(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    (value,) = inputs
    if not isinstance(value, _Signal):
        return [value] if isinstance(value, _Gate) else _opaque(node, inputs)
    axes = tuple(node.params["axes"])
    return [lifting.combine(lambda x: x.sum(axes), value)]


def _reduce_max(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    (value,) = inputs
    if not isinstance(value, _Signal):
        return [value] if isinstance(value, _Gate) else _opaque(node, inputs)
    axes = tuple(node.params["axes"])
    plain = lifting.max_pool == "max"
    return [lifting.combine(lambda x: x.max(axes) if plain else x.sum(axes), value)]


def _window(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    """Pooling; windows of a maximum have an edge from each entry, or follow the maximum."""
    (value,) = inputs
    if not isinstance(value, _Signal):
        return [value] if isinstance(value, _Gate) else _opaque(node, inputs)
    largest = node.primitive is primitive("reduce_window_max") and lifting.max_pool == "max"
    start, operation = (-jnp.inf, jax.lax.max) if largest else (0.0, jax.lax.add)
    params = {
        key: node.params[key]
        for key in ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    }

    def pool(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(x, np.asarray(start, x.dtype)[()], operation, **params)

    return [lifting.combine(pool, value)]


def _cumsum(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    if not isinstance(inputs[0], _Signal):
        return _opaque(node, inputs)
    return [lifting.combine(lambda x: node.primitive.bind(x, **node.params), inputs[0])]


def _concatenate(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    _no_gates(node, inputs)
    axis = node.params["dimension"]
    if _signals(inputs):
        return [lifting.combine(lambda *x: jnp.concatenate(x, axis), *inputs)]
    return _opaque(node, inputs)


def _contraction(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    _no_gates(node, inputs)
    signals = _signals(inputs)
    if len(signals) == 2:
        raise _unliftable(node, "multiplies two signals")
    if not signals:
        return _opaque(node, inputs)
    params = {
        **node.params,
        "precision": (jax.lax.Precision.HIGHEST,) * 2,
        "preferred_element_type": None,
    }
    return [
        lifting.record(_Signal, lambda x, y: node.primitive.bind(x, y, **params), *inputs)
    ]


def _scan(lifting: _Lifting, node: Node, inputs: list[_Value]) -> list[_Value]:
    """Step by step: stacked parameters differ between steps, and paths go through all of them."""
    num_consts, num_carry = node.params["num_consts"], node.params["num_carry"]
    consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
    stacked, (body,) = inputs[num_consts + num_carry :], node.bodies
    steps = range(node.params["length"])
    made: dict[int, list[_Value]] = {}
    for step in reversed(steps) if node.params["reverse"] else steps:
        slices = [
            _moved(lifting, node, value, functools.partial(_index_first, step)) for value in stacked
        ]
        results = lifting.run(body, [*consts, *carry, *slices])
        carry, made[step] = results[:num_carry], results[num_carry:]
    outputs = [
        _stacked(lifting, node, [made[step][k] for step in steps])
        for k in range(len(node.outputs) - num_carry)
    ]
    return [*carry, *outputs]


def _index_first(step: int, value: jax.Array) -> jax.Array:
    return value[step]


def _stacked(lifting: _Lifting, node: Node, values: list[_Value]) -> _Value:
    if any(isinstance(value, _Gate) for value in values):
        return _Gate()
    if _signals(values):
        return lifting.combine(lambda *x: jnp.stack(x), *values)
    raw = jnp.stack([jnp.asarray(value.raw) for value in values])
    trainable = any(value.trainable for value in values)
    return _Coefficient(raw, None, trainable, node if trainable else None)


_RULES_BY_NAME: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (
        _structural,
        (
            *("reshape", "broadcast_in_dim", "slice", "squeeze", "transpose", "rev"),
            *("dynamic_slice", "gather"),
        ),
    ),
    (_split, ("split",)),
    (_pad, ("pad",)),
    (_concatenate, ("concatenate",)),
    (
        _same,
        (
            *("neg", "abs", "copy", "copy_p", "stop_gradient", "reduce_precision", "name"),
            *("sharding_constraint", "optimization_barrier", "device_put"),
        ),
    ),
    (_convert, ("convert_element_type",)),
    (_mul, ("mul",)),
    (_div, ("div",)),
    (_add, ("add", "sub", "add_jaxvals")),
    (_max, ("max",)),
    (_select, ("select_n",)),
    (_compared, ("eq", "ne", "ge", "gt", "le", "lt", "is_finite", "argmax", "argmin")),
    (_reduce_sum, ("reduce_sum",)),
    (_reduce_max, ("reduce_max",)),
    (_window, ("reduce_window_sum", "reduce_window_max")),
    (_cumsum, ("cumsum",)),
    (_contraction, ("dot_general", "conv_general_dilated")),
    (_scan, ("scan",)),
)

RULES: dict[Any, Rule] = {
    found: rule
    for rule, names in _RULES_BY_NAME
    for found in map(primitive, names)
    if found is not None
}
