"""A program run on powers of its parameters, and the derivatives of the sum over its paths.

A program is run on powers |θ|^q instead of θ. A *signal* is the sum, over the paths that reach
it, of the product of the powers along them. A *coefficient* is a parameter, a constant or a
function of them: it multiplies signals, and starts paths of its own where it is added to one. A
*gate* depends on the input in another way, such as x > 0; it may only switch signals on and off.
Every sum and product is recorded, so that one reverse sweep gives all derivatives.

How to read this file: ``Lifting.run`` interprets the program, one rule of ``RULES`` per operation.
A rule makes values through ``multiplied``, ``moved``, ``joined``, ``combined`` and ``made``, each
of which enters a record. ``total`` adds up what reaches the outputs, and ``derivatives`` pulls
adjoints back through the records. All values are mantissas with one exponent, in which any depth
fits.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._lifting.arithmetic import (
    SAME,
    add_all,
    forward,
    powered,
    pulled,
    sum_all,
    summed,
    weighted_sum,
)
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
    is_fixed_scalar,
    is_trainable,
    joined_entries,
    made_entries,
    moved_entries,
    numbered_entries,
    signals_of,
    unliftable,
)
from pathcond_jax._program.failures import failure, warn_of_failure
from pathcond_jax._program.graph import Graph, Node
from pathcond_jax._program.primitives import RuleTable, find
from pathcond_jax._spec import extended_range
from pathcond_jax._spec.extended_range import Scaled
from pathcond_jax._spec.types import SpecError

# What a rule sees: the run, the operation and its inputs; it returns the operation's outputs.
PathRule = Callable[["Lifting", Node, list[Value]], Sequence[Value]]

# How paths pass through each primitive.
RULES: RuleTable[PathRule] = RuleTable("lifting")

_MULTIPLES_IN_A_ROW = 3

# What makes slopes of gates that are on or off.
_CHOICE, _ADDITION = find("select_n"), find("add")


class Lifting:
    """One forward run of a program on powers of its parameters.

    Attributes:
      leaves: the coefficient of each leaf.
      weights: the trainable coefficients that are no products of others, leaves first.
      records: the sums and products in the order of the program.
      outputs: the values of the program's outputs.
      repeated: leaf number -> its entries, counted from 1, that a path may meet twice.
      avals: shapes and dtypes of the values of the program, or inner program, that is running.
    """

    def __init__(
        self,
        graph: Graph,
        values: Sequence[Any],
        trainable: Sequence[bool],
        *,
        order: int,
        max_pool: str,
        keep_zero: bool = False,
        mantissas: Sequence[jax.Array] | None = None,
        entry: Signal | None = None,
    ) -> None:
        self.order, self.max_pool, self.keep_zero = order, max_pool, keep_zero
        self.mantissas = mantissas
        self.records: list[Record] = []
        self.weights: list[Coefficient] = []
        self.repeated: dict[int, set[int]] = {}
        self._uses: dict[int, list[tuple[int, Callable[[], np.ndarray]]]] = {}
        self._count = 0
        self.avals: Mapping[int, jax.ShapeDtypeStruct] = graph.avals
        arrays = [jnp.asarray(value) for value in values]
        known = arrays if entry is None else [*arrays, entry.power.mantissa]
        floating = [x.dtype for x in known if jnp.issubdtype(x.dtype, jnp.floating)]
        self.dtype = max([jnp.dtype(jnp.float32), *floating], key=lambda d: jnp.finfo(d).bits)
        self.leaves = [
            self._leaf(k, array) if flag else Coefficient(array)
            for k, (array, flag) in enumerate(zip(arrays, trainable, strict=True))
        ]
        made = [self._input(graph.avals[k]) for k in graph.inputs[len(values) :]]
        inputs = made if entry is None else [entry]
        self.outputs = self.run(graph, [*self.leaves, *inputs])

    def _leaf(self, number: int, array: jax.Array) -> Coefficient:
        entries = {number: functools.partial(numbered_entries, array.shape)}
        return self.weight(Coefficient(array, trainable=True, entries=entries))

    def _input(self, aval: jax.ShapeDtypeStruct) -> Value:
        if not jnp.issubdtype(aval.dtype, jnp.floating):
            return Gate(switch=aval.dtype == np.bool_)
        return Signal(Scaled(jnp.ones(aval.shape, self.dtype), jnp.zeros((), jnp.int32)))

    def weight(self, value: Coefficient) -> Coefficient:
        """Enters a trainable coefficient that is no product of others."""
        if self.mantissas is not None:
            power = self.power(value)
            value.power = power._replace(mantissa=self.mantissas[len(self.weights)])
        self.weights.append(value)
        return value

    def power(self, value: Value) -> Scaled:
        """The lifted value."""
        assert not isinstance(value, Gate)
        if value.power is None:
            value.power = powered(value.raw, self.order, self.dtype, self.keep_zero)
        return value.power

    def run(self, graph: Graph, arguments: Sequence[Value]) -> list[Value]:
        """Interprets a graph; inner graphs of control flow come back here."""
        env: dict[int, Value] = dict(zip(graph.inputs, arguments, strict=True))
        for number in graph.constants:
            env.setdefault(number, Coefficient(graph.constants[number]))
        outer = self.avals
        for node in graph.nodes:
            self.avals = graph.avals
            results = self._apply(graph, node, [env[i] for i in node.inputs])
            env.update(zip(node.outputs, results, strict=True))
        self.avals = outer
        return [env[i] for i in graph.outputs]

    def _apply(self, graph: Graph, node: Node, inputs: list[Value]) -> Sequence[Value]:
        known = coefficients_of(inputs)
        if known is not None and not any(value.trainable for value in known):
            return [Coefficient(raw) for raw in evaluate(node, known)]
        on_no_path = not signals_of(inputs) and not any(map(is_trainable, inputs))
        if known is None and on_no_path and node.primitive is not _CHOICE:
            gates = [value for value in inputs if isinstance(value, Gate)]
            bases = {gate.base for gate in gates}
            made = Gate(
                all(gate.switch for gate in gates),
                bases.pop() if len(bases) == 1 else None,
                any(gate.slope for gate in gates) or node.primitive is _ADDITION,
            )
            dtypes = [graph.avals[number].dtype for number in node.outputs]
            return [
                dataclasses.replace(made, switch=made.switch or dtype == np.bool_)
                for dtype in dtypes
            ]
        rule = RULES.get(node.primitive)
        if rule is not None and not node.effect and not rule.objection(node.params):
            try:
                return rule.function(self, node, inputs)
            except (NotPathLiftableError, SpecError):
                raise
            except Exception as error:
                because = failure(error)
                warn_of_failure(node.operation, node.source, because)
                raise unliftable(node, because) from error
        if known is None or node.effect:
            raise unliftable(node, _objection(node, rule))
        return self.made(node, known)

    def product(
        self,
        linear: Call,
        *factors: Value,
        extra: tuple[Any, ...] = (),
        multiple_of: tuple[Signal, ...] = (),
    ) -> Scaled:
        """A function linear in each factor; ``record`` enters what it makes."""
        powers = [self.power(factor) for factor in factors]
        normalize = _changes_magnitude(factors, multiple_of)
        return forward(linear, normalize, self.keep_zero, powers, extra)

    def multiplied(self, linear: Call, *factors: Value, multiple: bool = False) -> Signal:
        """A product of coefficients and one signal."""
        (signal,) = signals_of(factors)
        met = signal.met
        for factor in factors:
            if isinstance(factor, Coefficient) and factor.trainable:
                met |= self._use(factor.entries, signal.met)
        chain = (signal, *signal.multiple_of) if multiple else ()
        made = Signal(self.product(linear, *factors, multiple_of=chain), chain, met)
        self.record(made, linear, factors)
        return made

    def moved(
        self, value: Value, linear: Call, extra: tuple[Any, ...] = (), sign: int = 1
    ) -> Value:
        """A linear function of one value, signal or coefficient alike."""
        if isinstance(value, Gate):
            return value
        if isinstance(value, Signal):
            chain = (value, *value.multiple_of) if linear == SAME else ()
            made: Value = Signal(self.product(linear, value, extra=extra), chain, value.met)
        else:
            raw = linear(jnp.asarray(value.raw), *extra)
            raw = -raw if sign < 0 else raw
            if not value.trainable:
                return Coefficient(raw)
            entries = {k: moved_entries(v, linear, extra) for k, v in value.entries.items()}
            power = self.product(linear, value, extra=extra)
            made = Coefficient(raw, power, True, None, value.exact, entries)
        self.record(made, linear, (value,), extra, (sign,))
        return made

    def joined(
        self, linear: Call, *values: Coefficient, extra: tuple[Any, ...] = ()
    ) -> Coefficient:
        """A coefficient each of whose entries is an entry of one of several."""
        raw = linear(*(jnp.asarray(value.raw) for value in values), *extra)
        leaves = {leaf for value in values for leaf in value.entries}
        entries = {leaf: joined_entries(values, leaf, linear, extra) for leaf in leaves}
        power = summed(linear, [self.power(value) for value in values], extra)
        exact = all(value.exact for value in values)
        made = Coefficient(raw, power, True, None, exact, entries)
        ones = (1,) * len(values)
        self.records.append(Record(Kind.SUM, values, (made,), linear, extra, ones))
        return made

    def record(
        self,
        made: Value,
        linear: Call,
        factors: Sequence[Value],
        extra: tuple[Any, ...] = (),
        signs: tuple[int, ...] = (),
    ) -> None:
        """Enters a product."""
        signs = signs or (1,) * len(factors)
        self.records.append(Record(Kind.PRODUCT, tuple(factors), (made,), linear, extra, signs))

    def combined(
        self, linear: Call, *values: Value, extra: tuple[Any, ...] = (), signs: tuple[int, ...] = ()
    ) -> Signal:
        """A sum of signals; the coefficients among its terms start paths of their own."""
        met = 0
        for value in values:
            if isinstance(value, Signal):
                met |= value.met
            elif isinstance(value, Coefficient) and value.trainable:
                met |= self._use(value.entries, 0)
        made = Signal(summed(linear, [self.power(v) for v in values], extra), (), met)
        signs = signs or (1,) * len(values)
        self.records.append(Record(Kind.SUM, values, (made,), linear, extra, signs))
        return made

    def made(
        self, node: Node, inputs: Sequence[Coefficient], elementwise: bool = False
    ) -> list[Value]:
        """Weights that are more than products: functions of parameters."""
        inside = [v for v in inputs if v.trainable]
        leaves = [k for v in inside for k in v.entries]
        exact = (
            elementwise
            and len(set(leaves)) == len(leaves)
            and all(v.exact for v in inside)
            and len(node.outputs) == 1
        )
        shape = np.broadcast_shapes(*(np.shape(v.raw) for v in inputs)) if exact else None
        entries = made_entries(inside, shape)
        found: list[Value] = []
        for raw in evaluate(node, inputs):
            if not jnp.issubdtype(raw.dtype, jnp.floating):
                # Comparisons and integers do not change with the parameters nearby.
                found.append(Coefficient(raw))
                continue
            value = self.weight(Coefficient(raw, None, True, node, exact, entries))
            if exact:
                slopes = _slopes(node, inputs, self.dtype)
                # Each path meets one entry, so (∂w/∂θ)² carries the derivative by w² to that by θ².
                record = Record(Kind.MADE, tuple(inside), (value,), call(weighted_sum))
                self.records.append(record._replace(extra=tuple(slopes)))
            found.append(value)
        return found

    def _use(self, entries: Mapping[int, Callable[[], np.ndarray]], met: int) -> int:
        """Numbers a use of parameters, and notes the entries that paths have met before."""
        number, self._count = self._count, self._count + 1
        for leaf, found in entries.items():
            for earlier, before in self._uses.get(leaf, ()):
                if met >> earlier & 1:
                    again = np.intersect1d(before(), found())
                    self.repeated.setdefault(leaf, set()).update(again[again > 0].tolist())
            self._uses.setdefault(leaf, []).append((number, found))
        self.repeated = {leaf: again for leaf, again in self.repeated.items() if again}
        return 1 << number

    def total(self) -> Scaled:
        """Σ over paths of the power of their product."""
        parts = [self.power(value) for value in signals_of(self.outputs)]
        if not parts:
            raise NotPathLiftableError(
                "no output of the network is reached from its input by paths"
            )
        return summed(call(sum_all), parts, ())

    def derivatives(self, weights: bool = False) -> list[Scaled | None]:
        """∂ total / ∂ power of every leaf, or of every weight; None where no path passes."""
        self.total()
        adjoints: dict[Value, Scaled] = {}
        for value in signals_of(self.outputs):
            ones = jnp.ones_like(value.power.mantissa)
            self._accumulate(adjoints, value, Scaled(ones, jnp.zeros((), jnp.int32)))
        self.pull_back(adjoints, weights)
        return [adjoints.get(value) for value in (self.weights if weights else self.leaves)]

    def pull_back(self, adjoints: dict[Value, Scaled], weights: bool = False) -> None:
        """Adds to the derivatives by some values those by all that they are made of."""
        for record in reversed(self.records):
            found = [adjoints.get(value) for value in record.outputs]
            if all(adjoint is None for adjoint in found):
                continue
            if weights and record.kind is Kind.MADE:
                continue
            if record.pull is None:
                self._pull(adjoints, record, found)
                continue
            for value, part in zip(record.inputs, record.pull(*found), strict=True):
                if part is not None:
                    self._accumulate(adjoints, value, part)
        if not weights:
            self._refuse_inexact(adjoints)

    def _pull(
        self, adjoints: dict[Value, Scaled], record: Record, found: Sequence[Scaled | None]
    ) -> None:
        wanted = tuple(isinstance(v, Signal) or is_trainable(v) for v in record.inputs)
        if not any(wanted):
            return
        powers = [self.power(value) for value in record.inputs]
        known = [
            self._nothing(value) if adjoint is None else adjoint
            for adjoint, value in zip(found, record.outputs, strict=True)
        ]
        # Derivatives by parameters are as large as these and stay as they are.
        changed = record.kind is Kind.PRODUCT and _changes_magnitude(
            record.inputs, getattr(record.outputs[0], "multiple_of", ())
        )
        normalize = tuple(changed and isinstance(value, Signal) for value in record.inputs)
        parts = pulled(
            record.linear,
            record.kind,
            wanted,
            normalize,
            self.keep_zero,
            powers,
            record.extra,
            known,
        )
        chosen = [value for value, flag in zip(record.inputs, wanted, strict=True) if flag]
        for value, part in zip(chosen, parts, strict=True):
            self._accumulate(adjoints, value, part)

    def _nothing(self, value: Value) -> Scaled:
        return Scaled(
            jnp.zeros_like(self.power(value).mantissa), jnp.full((), extended_range.ZERO, jnp.int32)
        )

    def _accumulate(self, adjoints: dict[Value, Scaled], value: Value, part: Scaled) -> None:
        known = adjoints.get(value)
        adjoints[value] = part if known is None else summed(call(add_all), [known, part], ())

    def _refuse_inexact(self, adjoints: Mapping[Value, Scaled]) -> None:
        for weight in self.weights:
            if weight.made is not None and not weight.exact and weight in adjoints:
                raise NotPathLiftableError(
                    f"{at(weight.made)} makes a weight whose entries share parameters: the network "
                    "has a path norm, and a gram_matrix, but its Gram diagonal is no sum over the "
                    "weight's entries; use a criterion that needs no path lifting"
                )


def side_by_side(
    lifting: Lifting, linear: Call, values: Sequence[Value], extra: tuple[Any, ...] = ()
) -> Value:
    """One value out of the entries of several."""
    coefficients = coefficients_of(values)
    if coefficients is not None:
        return lifting.joined(linear, *coefficients, extra=extra)
    return lifting.combined(linear, *values, extra=extra)


def _objection(node: Node, rule: Any) -> str:
    if node.effect:
        return "has effects that are not followed"
    return (rule and rule.objection(node.params)) or "is not a sum over paths"


def _changes_magnitude(factors: Sequence[Value], multiple_of: Sequence[Signal]) -> bool:
    """Whether a product may be so much smaller or larger than its factors that it is normalized.

    The largest entries of weights are near 1: a few elementwise multiples leave the range of no
    dtype. Each maximum that is not taken is a pass over the signal and a kernel to compile less.
    """
    several = len(factors) > 1 and not all(map(is_fixed_scalar, factors[1:]))
    return several and not 0 < len(multiple_of) <= _MULTIPLES_IN_A_ROW


def _slopes(node: Node, inputs: Sequence[Coefficient], dtype: Any) -> list[jax.Array]:
    """(∂ output / ∂ input)² of an elementwise operation, for each trainable input."""
    raws = [jnp.asarray(value.raw) for value in inputs]
    slopes = []
    for k, value in enumerate(inputs):
        if value.trainable:
            tangent = jnp.ones_like(raws[k])
            _, slope = jax.jvp(
                lambda x, k=k: node.primitive.bind(*raws[:k], x, *raws[k + 1 :], **node.params),
                (raws[k],),
                (tangent,),
            )
            slopes.append(jnp.square(slope.astype(dtype)))
    return slopes
