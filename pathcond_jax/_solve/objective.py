"""Objectives over the log-scales, reduced from all entries to neuron × neuron matrices.

An objective is a sum ``Σ_k w_k log Σ_i a_i^(k) exp(s_k (Bz)_i) − ⟨b, z⟩`` over the trainable
entries i. Entries that share their row of B are summed once, before any solver runs.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._solve.layout import Block, Source, layout
from pathcond_jax._spec.arrays import Part, compute_dtype, each, entries_of, widened
from pathcond_jax._spec.extended_range import ScaledDiagonal, computed_once
from pathcond_jax._spec.sharding import segment_max, segment_sum
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree


class LogSum(NamedTuple):
    """``weight · log Σ_i a_i exp(exponent · (Bz)_i)``.

    Attributes:
      weight: w.
      exponent: s.
      masses: the reduced a, one array per block of the layout.
      log_scales: one scalar per block; the true masses are ``masses · exp(log_scales)``.
    """

    weight: float | jax.Array
    exponent: float
    masses: tuple[jax.Array, ...]
    log_scales: tuple[jax.Array, ...]


class Model(NamedTuple):
    """A smooth function at some log-scales.

    Attributes:
      value: of the function.
      gradient: (H,).
      diagonal: (H,), that of its Hessian, nearly.
      product: from a vector (H,) to the Hessian times it.
    """

    value: jax.Array
    gradient: jax.Array
    diagonal: jax.Array
    product: Callable[[jax.Array], jax.Array]


class Smooth(NamedTuple):
    """``weight · function(log_scales)``, any smooth convex function.

    Attributes:
      weight: w.
      function: from one array per group to a scalar; a pytree, so that it can be an argument of
        a compiled function.
      model: from the same to its value and derivatives; None: JAX differentiates the function.
    """

    weight: float | jax.Array
    function: jax.tree_util.Partial
    model: jax.tree_util.Partial | None = None


class Objective(NamedTuple):
    """What a solver minimizes, ``Σ terms + Σ smooth − Σ concave − ⟨linear, z⟩``.

    Attributes:
      terms: logarithms of sums, convex.
      linear: b, (H,); None: there is none, which the solvers need not ask for.
      smooth: other convex functions.
      concave: logarithms of sums that are to grow.
      limit: the box |z| ≤ limit outside of which the objective means nothing; None: no box.
      finite: whether what it was made from was: solvers report where it was not.
    """

    terms: tuple[LogSum, ...]
    linear: np.ndarray | jax.Array | None = None
    smooth: tuple[Smooth, ...] = ()
    concave: tuple[LogSum, ...] = ()
    limit: float | None = None
    finite: bool | jax.Array = True

    def unless(self, finite: bool | jax.Array) -> "Objective":
        """The objective, marked unless what it was made from was finite."""
        return self._replace(finite=self.finite & finite)


class Ranges(NamedTuple):
    """What a fixed point equates, ``(1 − α) log out = α log in`` for every neuron.

    Attributes:
      term: its masses are the largest absolute weights of each reduced entry.
      given: logarithms of the incoming ranges at z = 0, one array per group, −inf for neurons to
        leave alone; None: the incoming weights'.
      alpha: α, 1/2 for equal ranges.
      limit: the box |z| ≤ limit; None: no box.
    """

    term: LogSum
    given: tuple[jax.Array, ...] | None = None
    alpha: float = 0.5
    limit: float | None = None

    def unless(self, finite: bool | jax.Array) -> "Ranges":
        """The ranges, NaN unless what they were made from was finite: solvers report that."""
        masses = tuple(jnp.where(finite, mass, jnp.nan) for mass in self.term.masses)
        return self._replace(term=self.term._replace(masses=masses))


Goal = Objective | Ranges


class Reduction(NamedTuple):
    """How entries that share their row of B become one: over axes, over segments, pairwise.

    Attributes:
      axes: over axes of an array.
      segments: over segments of the first axis.
      pair: of two arrays.
      entry: what is reduced, a function of the entries.
    """

    axes: Callable[..., jax.Array]
    segments: Callable[..., jax.Array]
    pair: Callable[[jax.Array, jax.Array], jax.Array]
    entry: Callable[[jax.Array], jax.Array]


def _itself(value: jax.Array) -> jax.Array:
    return value


def _present(value: jax.Array) -> jax.Array:
    # What is NaN or negative is counted: the masses tell the solver.
    return jnp.where(value == 0, 0, jnp.ones_like(value))


SUM = Reduction(jnp.sum, segment_sum, jnp.add, _itself)
MAX = Reduction(jnp.max, segment_max, jnp.maximum, _itself)
COUNT = Reduction(jnp.sum, segment_sum, jnp.add, _present)
SQUARES = Reduction(jnp.sum, segment_sum, jnp.add, jnp.square)


def reduce_masses(
    spec: ArchSpec, tree: PyTree | ScaledDiagonal, reduction: Reduction = SUM
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Reduces the trainable entries of a parameter-shaped tree to the blocks of the layout."""
    # Leaf by leaf: outside of `jit`, leaves of one shape and role share what is compiled.
    values = tree.mantissa if isinstance(tree, ScaledDiagonal) else tree
    values, blocks = match_leaves(spec, values, "gram"), layout(spec.symmetry).blocks
    found = [[widened(values[source.leaf]) for source in block.sources] for block in blocks]
    dtypes = [compute_dtype(*(value.dtype for value in leaves)) for leaves in found]
    if isinstance(tree, ScaledDiagonal):
        order = [source.leaf for block in blocks for source in block.sources]
        sizes = tuple(len(block.sources) for block in blocks)
        logs = tree.logs(compute_dtype(*dtypes))[np.array(order, np.int32)]
        factors, tops = _over_the_largest(logs, sizes)
    else:
        factors, tops = None, jnp.zeros((len(blocks),), compute_dtype(*dtypes))

    numbers = itertools.count()
    arguments = [
        (value, None if factors is None else Part(factors, next(numbers), 1))
        for leaves in found
        for value in leaves
    ]
    options = [
        (_role(block, source), reduction, dtype)
        for block, dtype in zip(blocks, dtypes, strict=True)
        for source in block.sources
    ]
    parts = iter(each(_part, arguments, options))
    masses = _paired([[next(parts) for _ in leaves] for leaves in found], reduction.pair)
    typed = zip(entries_of(tops), dtypes, strict=True)
    return tuple(masses), tuple(top.astype(dtype) for top, dtype in typed)


def _paired(parts: list[list[jax.Array]], pair: Callable[..., jax.Array]) -> list[jax.Array]:
    """The parts of each block in one."""
    made = [first for first, *_ in parts]
    for further in range(1, max(map(len, parts))):
        chosen = [k for k, own in enumerate(parts) if len(own) > further]
        pairs = [(made[k], parts[k][further]) for k in chosen]
        for k, both in zip(chosen, each(pair, pairs, [()] * len(pairs)), strict=True):
            made[k] = both
    return made


@functools.partial(jax.jit, static_argnums=1)
def _over_the_largest(logs: jax.Array, sizes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """What the leaves of each block are multiplied by, and the largest logarithm of each block.

    Smaller parts may vanish, none overflows.
    """
    owners = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    tops = segment_max(logs, owners, len(sizes))
    tops = computed_once(jnp.where(jnp.isfinite(tops), tops, 0))
    return computed_once(jnp.exp(logs - tops[owners])), tops


class Role(NamedTuple):
    """How one leaf is summed into a block, as a static argument.

    Attributes:
      axes: those of the batch, of the rows and of the columns.
      shape: of the block.
      segments: the bytes of the segments of rows and of columns.
    """

    axes: tuple[tuple[int, ...], ...]
    shape: tuple[int, int, int]
    segments: tuple[bytes | None, ...]


def _role(block: Block, source: Source) -> Role:
    segments = (source.row_segments, source.col_segments)
    return Role(
        (source.batch, source.rows, source.cols),
        block.shape,
        tuple(None if part is None else part.tobytes() for part in segments),
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _part(
    value: jax.Array,
    factor: jax.Array | None,
    role: Role,
    reduction: Reduction,
    dtype: Any,
) -> jax.Array:
    """A leaf reduced to its block, times its factor."""
    batch, rows, cols = role.axes
    value = reduction.entry(value)
    kept = batch + rows + cols
    rest = tuple(a for a in range(value.ndim) if a not in kept)
    value = jnp.transpose(reduction.axes(value, axis=rest, keepdims=True), kept + rest)
    height = int(np.prod(value.shape[len(batch) : len(batch + rows)], dtype=np.int64))
    value = value.reshape(role.shape[0], height, -1)
    for axis, segments in enumerate(role.segments, 1):
        if segments is not None:
            array = np.frombuffer(segments, np.int32)
            value = _reduce_segments(value, array, role.shape[axis], axis, reduction)
    value = value.astype(dtype)
    return value if factor is None else value * factor.reshape(()).astype(dtype)


def _reduce_segments(
    value: jax.Array, segments: np.ndarray, count: int, axis: int, reduction: Reduction
) -> jax.Array:
    shape, length = value.shape, segments.size
    repeats = length // count
    if repeats * count == length:
        # Flattened images repeat their channels regularly: a reshape is faster than a scatter.
        for order, split, over in (
            (np.tile(np.arange(count), repeats), (repeats, count), axis),
            (np.repeat(np.arange(count), repeats), (count, repeats), axis + 1),
        ):
            if np.array_equal(segments, order):
                apart = value.reshape(*shape[:axis], *split, *shape[axis + 1 :])
                return reduction.axes(apart, axis=over)
    moved = jnp.moveaxis(value, axis, 0)
    return jnp.moveaxis(reduction.segments(moved, segments, count), 0, axis)
