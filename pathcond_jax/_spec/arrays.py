"""Questions about arrays that every analysis asks."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def is_traced(value: Any) -> bool:
    """Whether a transformation of JAX is tracing the value, so that it is not known yet."""
    return isinstance(value, jax.core.Tracer)


def compute_dtype(*dtypes: Any) -> Any:
    """The dtype to compute on values of these dtypes in: the widest float, at least float32."""
    # jnp.promote_types refuses mixed floats where the user has asked for strict promotion.
    floats = [jnp.dtype(d) for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return max([jnp.dtype(jnp.float32), *floats], key=lambda d: jnp.finfo(d).bits)


def widened(value: Any) -> jax.Array:
    """A floating array in the dtype that is computed in: float32 at least."""
    value = jnp.asarray(value)
    return value.astype(compute_dtype(value.dtype))


def part_of(array: jax.Array, start: int, size: int) -> jax.Array:
    """``array[start : start + size]`` of a vector.

    Outside of ``jit``, parts of one size share what is compiled. So they do within: XLA compiles
    equal kernels once, and a start that it knows would make each part, and what reads it, a kernel
    of its own. Hence positions in an array, which stays outside of the kernels, and a product with
    1, which is neither an array of one number nor joined with what reads it.
    """
    if not is_traced(array):
        return lax.dynamic_slice_in_dim(array, np.int32(start), size)
    here = np.arange(start, start + size, dtype=np.int32)
    return _products(array, np.stack([here, np.full_like(here, array.shape[0])], 1))


def entries_of(array: jax.Array) -> list[jax.Array]:
    """The entries of a vector, as scalars.

    Outside of ``jit`` they share what is compiled, whatever their number.
    """
    if is_traced(array):
        return list(array)
    return [lax.dynamic_index_in_dim(array, np.int32(k), keepdims=False) for k in range(array.size)]


def looked_up(array: jax.Array, start: int, size: int) -> jax.Array:
    """:func:`part_of` for arrays so small that what reads it may look each number up."""
    if not is_traced(array):
        return part_of(array, start, size)
    positions = np.arange(start, start + size, dtype=np.int32)
    return array.at[positions].get(mode="promise_in_bounds")


@jax.jit
def _products(array: jax.Array, positions: jax.Array) -> jax.Array:
    """For each row of positions the product of what is there; 1 is behind the end."""
    extended = jnp.append(array, jnp.ones((1,), array.dtype))
    return extended.at[positions].get(mode="promise_in_bounds").prod(1)


def side_by_side(parts: Sequence[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Entries of ``shape`` of several arrays, along a first axis.

    Where these are slices of one array XLA sees that they are this array again: it would not
    through any other reshape.
    """
    alike = [list(group) for _, group in itertools.groupby(parts, lambda part: part.shape)]
    rows = [jnp.stack(group).reshape(-1, *shape) for group in alike]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows)


class Part(NamedTuple):
    """``array[start : start + size]`` of a vector, as an argument of :func:`each`."""

    array: jax.Array
    start: int
    size: int


# Arrays of more entries than this are not copied to lie beside others.
SMALL = 1 << 12


def each(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    options: Sequence[tuple[Hashable, ...]],
) -> list[Any]:
    """``function(*arrays, *option)`` for each of many arrays.

    Under ``jit``, small arrays of equal shapes and options lie side by side and are one operation,
    because XLA takes long for each kernel. What comes out are slices of one array, and XLA does
    nothing for those that are put together again. Outside of ``jit`` each is computed by itself, by
    one program for all that are equal.

    Args:
      function: of arrays, and of options that are static.
      arguments: for each call its arrays; a :class:`Part` stands for the array that it is; or None.
      options: for each call its options.

    Returns:
      What each call returns.
    """
    found: list[Any] = [None] * len(arguments)
    for members, made in _groups(function, arguments, options):
        for place, k in enumerate(members):
            found[k] = _entry(made, place) if len(members) > 1 else made
    return found


def each_in_one(
    function: Callable[..., jax.Array],
    arguments: Sequence[tuple[Any, ...]],
    options: Sequence[tuple[Hashable, ...]],
) -> jax.Array:
    """What :func:`each` returns, arrays of one shape, along a first axis."""
    groups = list(_groups(function, arguments, options))
    made = jnp.concatenate([part if len(own) > 1 else part[None] for own, part in groups])
    order = np.argsort([k for members, _ in groups for k in members]).astype(np.int32)
    if np.array_equal(order, np.arange(len(order))):
        return made
    return made.at[order].get(mode="promise_in_bounds")


def _groups(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    options: Sequence[tuple[Hashable, ...]],
) -> Iterator[tuple[list[int], Any]]:
    """Calls that are one, and what they return: along a first axis where they are several."""
    groups: dict[Hashable, list[int]] = {}
    for k, (arrays, option) in enumerate(zip(arguments, options, strict=True)):
        groups.setdefault((_shape_of(arrays), option) if _joins(arrays) else k, []).append(k)
    for members in groups.values():
        option = options[members[0]]
        if len(members) == 1:
            yield members, function(*map(_alone, arguments[members[0]]), *option)
        else:
            parts = zip(*(arguments[k] for k in members), strict=True)
            stacked = [_side_by_side(arrays) for arrays in parts]
            yield members, jax.vmap(lambda *x, option=option: function(*x, *option))(*stacked)


def _entry(tree: Any, place: int) -> Any:
    return jax.tree.map(lambda array: array[place], tree)


def _shape_of(arrays: tuple[Any, ...]) -> Hashable:
    return tuple(
        (array.size, array.array.dtype)
        if isinstance(array, Part)
        else None
        if array is None
        else (array.shape, array.dtype)
        for array in arrays
    )


def _joins(arrays: tuple[Any, ...]) -> bool:
    whole = [array.array if isinstance(array, Part) else array for array in arrays]
    small = all(array is None or array.size <= SMALL for array in arrays)
    return small and any(map(is_traced, whole))


def _alone(array: Any) -> Any:
    return part_of(*array) if isinstance(array, Part) else array


def _side_by_side(arrays: tuple[Any, ...]) -> jax.Array | None:
    """Arrays of one shape along a first axis."""
    first = arrays[0]
    if first is None:
        return None
    if not isinstance(first, Part):
        return jnp.stack(arrays)
    if any(part.array is not first.array for part in arrays):
        return jnp.stack([part_of(*part) for part in arrays])
    starts = np.array([part.start for part in arrays], np.int32)
    if np.array_equal(starts, starts[0] + first.size * np.arange(len(arrays))):
        return first.array[starts[0] : starts[-1] + first.size].reshape(len(arrays), first.size)
    positions = starts[:, None] + np.arange(first.size, dtype=np.int32)
    return first.array.at[positions].get(mode="promise_in_bounds")
