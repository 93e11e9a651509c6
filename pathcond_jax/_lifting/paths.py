"""The paths of a tiny network, one by one."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._lifting.interpreter import Lifting
from pathcond_jax._lifting.values import Call, Coefficient, Gate, Kind, Record, Signal, Value
from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.types import SpecError

_MAX_PATHS = 100_000
_MAX_TABLE = 1 << 26

# A path: a constant factor and the positions of its weights among the atoms.
_Path = tuple[float, tuple[int, ...]]
# The paths that reach each entry of a value.
_Paths = list[list[_Path]]


def list_paths(lifting: Lifting) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Every path of a lifted program.

    Returns:
      The weights and constants in one vector, after a 1; for each path the positions of its
      factors in it, filled up with 0; and the factor by which their product is multiplied.

    Raises:
      SpecError: there are too many paths.
    """
    found: dict[Value, _Paths] = {}
    atoms: list[jax.Array] = [jnp.ones(1, lifting.dtype)]

    def paths_of(value: Value) -> _Paths:
        if value not in found:
            found[value] = _started(value, sum(part.size for part in atoms))
            if isinstance(value, Coefficient):
                atoms.append(jnp.asarray(value.raw).astype(lifting.dtype).reshape(-1))
        return found[value]

    for record in lifting.records:
        if record.kind is Kind.MADE:
            continue
        reached = _joined(record, [paths_of(value) for value in record.inputs])
        found.update(zip(record.outputs, reached, strict=True))
    ends = [v for v in lifting.outputs if isinstance(v, Signal)]
    every = [path for value in ends for entry in paths_of(value) for path in entry]
    longest = max((len(path) for _, path in every), default=0)
    table = np.zeros((len(every), longest), np.int64)
    for row, (_, path) in zip(table, every, strict=True):
        row[: len(path)] = path
    return jnp.concatenate(atoms), table, np.array([factor for factor, _ in every])


def _size(value: Value) -> int:
    assert not isinstance(value, Gate)
    assert value.power is not None
    return value.power.mantissa.size


def _started(value: Value, offset: int) -> _Paths:
    """An input's entries are where paths start; a weight's or constant's are factors of them."""
    if isinstance(value, Signal):
        return [[(1.0, ())] for _ in range(_size(value))]
    assert isinstance(value, Coefficient)
    raw = jnp.asarray(value.raw)
    if value.trainable or is_traced(raw):
        present = np.ones(raw.size, bool)
    else:
        present = np.asarray(raw).reshape(-1) != 0
    return [[(1.0, (offset + k,))] if here else [] for k, here in enumerate(present)]


def _joined(record: Record, inputs: Sequence[_Paths]) -> list[_Paths]:
    """The paths that reach what one product or sum makes."""
    made = []
    for number, output in enumerate(record.outputs):
        size = _size(output)
        if size * math.prod(map(len, inputs)) > _MAX_TABLE:
            raise SpecError("lifted is for tiny networks: this one has too many paths")
        if record.kind is Kind.SUM:
            tables = [_coefficients(record, number, (k,)) for k in range(len(inputs))]
            reached = _summed(tables, record.signs, inputs, size)
        else:
            table = _coefficients(record, number, tuple(range(len(inputs))))
            reached = _multiplied(table, record.signs, inputs, size)
        made.append(reached)
        if sum(map(len, reached)) > _MAX_PATHS:
            raise SpecError(f"lifted is for tiny networks: this one has over {_MAX_PATHS} paths")
    return made


def _summed(
    tables: Sequence[np.ndarray], signs: Sequence[int], inputs: Sequence[_Paths], size: int
) -> _Paths:
    reached: _Paths = [[] for _ in range(size)]
    for table, sign, paths in zip(tables, signs, inputs, strict=True):
        for out, k in np.argwhere(table):
            reached[out] += [(f * sign * table[out, k], path) for f, path in paths[k]]
    return reached


def _multiplied(
    table: np.ndarray, signs: Sequence[int], inputs: Sequence[_Paths], size: int
) -> _Paths:
    reached: _Paths = [[] for _ in range(size)]
    for out, *where in np.argwhere(table):
        joined: list[_Path] = [(float(table[(out, *where)]) * math.prod(signs), ())]
        for paths, k in zip(inputs, where, strict=True):
            joined = [(f * g, path + more) for f, path in joined for g, more in paths[k]]
        reached[out] += joined
    return reached


def _coefficients(record: Record, number: int, by: tuple[int, ...]) -> np.ndarray:
    """The table of a linear function: output entry × entries of the inputs ``by``."""
    powers = [value.power for value in record.inputs]  # type: ignore[union-attr]
    ones = [np.ones(p.mantissa.shape, p.mantissa.dtype) for p in powers if p is not None]
    with jax.ensure_compile_time_eval():
        table = np.asarray(_jacobian(record.linear, number, by, ones, record.extra))
    return table.reshape(len(table), *(ones[k].size for k in by))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _jacobian(
    linear: Call, number: int, by: tuple[int, ...], values: Sequence[Any], extra: Any
) -> jax.Array:
    def output(*values: jax.Array) -> jax.Array:
        made = linear(*values, *extra)
        return (made[number] if isinstance(made, list) else made).reshape(-1)

    for k in by:
        output = jax.jacfwd(output, argnums=k)
    return output(*values)
