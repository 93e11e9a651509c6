"""Runs of equal blocks, lifted by a loop: a block is compiled once, however many there are.

The sums over paths that enter each block come out of a loop forward. A loop backward runs each
block again from there, and pulls the derivatives by its result back to those by its entry and by
its parameters, which lie side by side.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._lifting.arithmetic import SAME
from pathcond_jax._lifting.interpreter import Lifting
from pathcond_jax._lifting.values import (
    Coefficient,
    Kind,
    NotPathLiftableError,
    Record,
    Signal,
    Value,
    is_trainable,
)
from pathcond_jax._program.graph import Graph, Node
from pathcond_jax._program.rolling import RUN, rolled
from pathcond_jax._spec import extended_range
from pathcond_jax._spec.arrays import SMALL, is_traced, part_of
from pathcond_jax._spec.extended_range import Scaled


class _Block(NamedTuple):
    """What does not change from block to block, as a static argument.

    Attributes:
      body: the program of a block, from its parameters and its entry to the entry of the next.
      trainable: whether each parameter is.
      order: of the powers.
      max_pool: as in the spec.
    """

    body: Graph
    trainable: tuple[bool, ...]
    order: int
    max_pool: str


class RolledLifting(Lifting):
    """A lifting that takes runs of equal blocks for one operation."""

    def __init__(
        self, graph: Graph, values: Sequence[Any], trainable: Sequence[bool], **options: Any
    ) -> None:
        super().__init__(rolled(graph, tuple(trainable)), values, trainable, **options)

    def _apply(self, graph: Graph, node: Node, inputs: list[Value]) -> Sequence[Value]:
        if node.primitive is RUN:
            return _run(self, node, inputs)
        return super()._apply(graph, node, inputs)

    def entries(self, values: jax.Array, numbers: Sequence[int]) -> list[jax.Array]:
        """The derivatives by the leaves ``numbers``, which lie side by side in this order."""
        return _hidden(values) if values[0].size > SMALL else _in_order(values, numbers)


class ApartLifting(RolledLifting):
    """The same for derivatives that nobody puts together again."""

    def entries(self, values: jax.Array, numbers: Sequence[int]) -> list[jax.Array]:
        """The derivatives, each by a kernel that is compiled once for all."""
        del numbers
        return _hidden(values)


def _run(lifting: RolledLifting, node: Node, inputs: list[Value]) -> Sequence[Value]:
    *parameters, entry = inputs
    (body,) = node.bodies
    trainable = node.params["trainable"]
    width = len(trainable)
    blocks = [parameters[k : k + width] for k in range(0, len(parameters), width)]
    block = _Block(body, trainable, lifting.order, lifting.max_pool)
    if isinstance(entry, Signal) and _repeats(lifting, block, entry, parameters):
        return [_looped(lifting, block, entry, blocks)]
    value = entry
    for block_parameters in blocks:
        (value,) = lifting.run(body, [*block_parameters, value])
    return [value]


def _repeats(lifting: Lifting, block: _Block, entry: Signal, parameters: Sequence[Value]) -> bool:
    """Whether a loop is worth compiling, and finds what the blocks one by one do."""
    # Outside of `jit` the products of all networks are compiled one by one, and kept.
    raws = [value.raw for value in parameters if isinstance(value, Coefficient)]
    if not any(map(is_traced, raws)) or lifting.keep_zero:
        return False
    shape = lifting.power(entry).mantissa
    return _is_linear(block, jax.ShapeDtypeStruct(shape.shape, shape.dtype))


@functools.lru_cache(maxsize=64)
def _is_linear(block: _Block, entry: jax.ShapeDtypeStruct) -> bool:
    """Whether a block has paths from its entry to its end, of which none meets a weight twice."""

    def pulled(mantissa: jax.Array, raws: list[jax.Array]) -> jax.Array:
        start = Scaled(mantissa, jnp.zeros((), jnp.int32))
        lifting, end = _lifted(block, Signal(start), raws)
        if lifting.repeated or not isinstance(end, Signal):
            raise NotPathLiftableError("this is for the blocks one by one")
        first, _ = _pulled(block, start, raws, lifting.power(end))
        return first.mantissa

    leaves = block.body.inputs[: len(block.trainable)]
    try:
        jax.eval_shape(pulled, entry, [block.body.avals[k] for k in leaves])
    except NotPathLiftableError:
        return False
    return True


def _looped(
    lifting: RolledLifting, block: _Block, entry: Signal, blocks: Sequence[Sequence[Value]]
) -> Signal:
    raws = [[value.raw for value in block if isinstance(value, Coefficient)] for block in blocks]
    stacked = [jnp.stack(parts) for parts in zip(*raws, strict=True)]
    end, starts = _forward(block, lifting.power(entry), stacked)
    made = Signal(end, (), entry.met)
    trained = [[value for value in parameters if is_trainable(value)] for parameters in blocks]
    inputs = [value for values in zip(*trained, strict=True) for value in values]

    def pull(adjoint: Scaled) -> list[Scaled | None]:
        first, by_parameter = _backward(block, starts, stacked, adjoint)
        return [first, *_of_each(lifting, trained, by_parameter)]

    record = Record(Kind.PRODUCT, (entry, *inputs), (made,), SAME)
    lifting.records.append(record._replace(pull=pull))
    return made


def _of_each(
    lifting: RolledLifting, trained: Sequence[Sequence[Value]], found: Sequence[Scaled | None]
) -> list[Scaled | None]:
    """The derivatives by the parameters of each block, of all blocks for the first, and so on."""
    numbers = {id(leaf): k for k, leaf in enumerate(lifting.leaves)}
    known = [part for part in found if part is not None]
    columns = [
        [numbers[id(values[k])] for values in trained]
        for k, part in enumerate(found)
        if part is not None
    ]
    # As the leaves lie, so that XLA sees arrays and no slices where they are put together again.
    mantissas = (
        mantissa
        for part, column in zip(known, columns, strict=True)
        for mantissa in lifting.entries(part.mantissa, column)
    )
    every = jnp.concatenate([part.exponent for part in known])
    scaled = map(
        Scaled, mantissas, lifting.entries(every, [k for column in columns for k in column])
    )
    return [None if part is None else next(scaled) for part in found for _ in trained]


def _in_order(values: jax.Array, numbers: Sequence[int]) -> list[jax.Array]:
    """The entries of an array, as slices of one that has them in the order of ``numbers``."""
    order, places = np.argsort(numbers), np.argsort(np.argsort(numbers))
    if not np.array_equal(order, np.arange(len(order))):
        values = values.at[order.astype(np.int32)].get(mode="promise_in_bounds")
    return [values[place] for place in places]


def _hidden(values: jax.Array) -> list[jax.Array]:
    """The entries of an array, at positions that XLA does not see: equal kernels read them."""
    hidden = lax.optimization_barrier(np.arange(values.shape[0], dtype=np.int32))
    rows = [part_of(hidden, k, 1).reshape(()) for k in range(values.shape[0])]
    return [lax.dynamic_index_in_dim(values, row, keepdims=False) for row in rows]


@functools.partial(jax.jit, static_argnums=0)
def _forward(block: _Block, start: Scaled, stacked: Sequence[jax.Array]) -> tuple[Scaled, Scaled]:
    """The sums behind the last block, and those before each."""

    def step(start: Scaled, raws: Sequence[jax.Array]) -> tuple[Scaled, Scaled]:
        lifting, end = _lifted(block, Signal(start), raws)
        return _carried(lifting.power(end), start), start

    found: tuple[Scaled, Scaled] = lax.scan(step, _carried(start, start), stacked)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _backward(
    block: _Block, starts: Scaled, stacked: Sequence[jax.Array], adjoint: Scaled
) -> tuple[Scaled, list[Scaled | None]]:
    """The derivatives by the entry of the first block and, stacked, by the parameters."""

    def step(adjoint: Scaled, given: Any) -> Any:
        start, raws = given
        first, by_parameter = _pulled(block, start, raws, adjoint)
        return _carried(first, adjoint), by_parameter

    found: tuple[Scaled, list[Scaled | None]] = lax.scan(
        step, adjoint, (starts, stacked), reverse=True
    )
    return found


def _lifted(block: _Block, entry: Signal, raws: Sequence[jax.Array]) -> tuple[Lifting, Value]:
    """One block lifted from its entry, and what goes into the next."""
    lifting = Lifting(
        block.body,
        raws,
        block.trainable,
        order=block.order,
        max_pool=block.max_pool,
        entry=entry,
    )
    (end,) = lifting.outputs
    return lifting, end


def _pulled(
    block: _Block, start: Scaled, raws: Sequence[jax.Array], adjoint: Scaled
) -> tuple[Scaled, list[Scaled | None]]:
    """The derivatives by the entry and by the trainable parameters of one block."""
    entry = Signal(start)
    lifting, end = _lifted(block, entry, raws)
    adjoints: dict[Value, Scaled] = {end: adjoint}
    lifting.pull_back(adjoints)
    trained = [leaf for leaf in lifting.leaves if leaf.trainable]
    if entry not in adjoints:
        raise NotPathLiftableError("no path leads from block to block")
    return adjoints[entry], [adjoints.get(leaf) for leaf in trained]


def _carried(value: Scaled, like: Scaled) -> Scaled:
    """What goes from block to block: within range, and of one type."""
    made = extended_range.normalized(*value)
    return Scaled(made.mantissa.astype(like.mantissa.dtype), made.exponent.astype(jnp.int32))
