"""The objective of the path criterion, from the Gram diagonal."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._solve.layout import layout
from pathcond_jax._solve.objective import COUNT, LogSum, Objective, reduce_masses
from pathcond_jax._spec.arrays import compute_dtype, each, side_by_side
from pathcond_jax._spec.extended_range import ScaledDiagonal, computed_once
from pathcond_jax._spec.sharding import segment_sum
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import PyTree


def path_objective(spec: ArchSpec, gram: PyTree | ScaledDiagonal) -> Objective:
    """The log-det Bregman criterion ``p log Σ g e^{2Bz} − Σ 2(Bz)``.

    Both sums, and the count p, are over the trainable entries with g_i > 0. An entry without any
    path, such as a kernel position that only ever sees padding, has g_i = 0 at every
    representative: no scale brings it nearer to the others, and ``conditioning_score`` leaves it
    out too, so that p times the change of the score is the change of F. Where all g_i > 0 this is
    the criterion of the paper.

    Args:
      spec: the architecture.
      gram: the Gram diagonal g, like the parameters; or its scaled form.

    Returns:
      The objective, reduced.

    References:
      Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026, arXiv 2602.19799.
    """
    masses, log_scales = reduce_masses(spec, gram)
    count, linear = _positive(gram, spec.symmetry)
    return Objective((LogSum(count, 2.0, masses, log_scales),), linear)


@functools.partial(jax.jit, static_argnums=1)
def _positive(gram: PyTree | ScaledDiagonal, spec: ArchSpec) -> tuple[jax.Array, jax.Array]:
    """How many trainable entries are positive, and Σ 2(Bz) over them as a function of z."""
    tree = gram.mantissa if isinstance(gram, ScaledDiagonal) else gram
    counts, _ = reduce_masses(spec, tree, COUNT)
    dtype, order = compute_dtype(*(count.dtype for count in counts)), _order(spec)
    sums = each(_side_sums, [(count,) for count in counts], [(dtype,)] * len(counts))
    rows, cols = (side_by_side([sums[k][side] for k in order], ()) for side in (0, 1))
    met = _met(spec)
    values = jnp.concatenate([rows, cols])[met.places] * met.entries.astype(dtype)
    return rows.sum(), 2 * segment_sum(values, met.neurons, spec.num_neurons)


def _side_sums(count: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    # What is present is written to memory for its sums over rows and over columns; the whole is
    # that of rows, or it would be written once more.
    count = count.astype(dtype)
    return computed_once(count.sum(2)), count.sum(1)


class _Met(NamedTuple):
    """The neurons of the slices of all blocks, whose rows come first and then their columns.

    Attributes:
      places: which slices meet a neuron.
      neurons: which neuron it is, among all.
      entries: of B.
    """

    places: np.ndarray
    neurons: np.ndarray
    entries: np.ndarray


def _order(spec: ArchSpec) -> list[int]:
    """Blocks, those of one shape together."""
    blocks = layout(spec).blocks
    return sorted(range(len(blocks)), key=lambda k: blocks[k].shape)


@functools.lru_cache(maxsize=64)
def _met(spec: ArchSpec) -> _Met:
    blocks = [layout(spec).blocks[k] for k in _order(spec)]
    starts = np.cumsum([0, *layout(spec).sizes])
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    first = 0
    for block, axis in [*((b, b.rows) for b in blocks), *((b, b.cols) for b in blocks)]:
        shape = (block.batch, axis.size)
        places = first + np.arange(block.batch * axis.size).reshape(shape)
        for link in axis.links:
            index = np.arange(axis.size) if link.neurons is None else link.neurons
            index = np.broadcast_to(index, shape)
            here = index >= 0
            entries = np.full(np.count_nonzero(here), link.entry)
            parts.append((places[here], starts[link.group] + index[here], entries))
        first += places.size
    places, neurons, entries = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _Met(places.astype(np.int32), neurons.astype(np.int32), entries)
