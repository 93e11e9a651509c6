"""Quantizers as units of entries: which weights, and which activations, share one step size."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._spec.types import SpecError
from pathcond_jax.quantization._sites import Meeting, Site, kernel_entries

Granularity = str | int
"""``"tensor"``, ``"channel"``, or how many inputs of an output channel share a step size."""

Bits = int | Mapping[str, int | None] | None
"""Bits for all kernels, or by path; None: not quantized."""


def check_granularity(granularity: Granularity) -> None:
    """Raises SpecError for anything else."""
    whole = isinstance(granularity, int) and not isinstance(granularity, bool) and granularity > 0
    if granularity not in ("tensor", "channel") and not whole:
        raise SpecError(
            f"granularity is {granularity!r}; there are 'tensor', 'channel' (one step size per "
            "output channel) and a number of inputs that share one"
        )


def bits_of(bits: Bits, sites: Sequence[Site], what: str) -> list[int | None]:
    """The bits of each site; None where nothing is quantized.

    Raises:
      SpecError: bits are below 2 or no integers, or a path has no site.
    """
    paths = [site.path for site in sites]
    unknown = set(bits) - set(paths) if isinstance(bits, Mapping) else ()
    if unknown:
        raise SpecError(
            f"{what}: no kernel {min(unknown)!r}; kernels that read activations are "
            f"{', '.join(map(repr, dict.fromkeys(paths)))}"
        )
    found = [bits.get(path) if isinstance(bits, Mapping) else bits for path in paths]
    for path, number in zip(paths, found, strict=True):
        if number is not None and (not isinstance(number, (int, np.integer)) or number < 2):
            raise SpecError(
                f"{what} of {path!r} is {number!r}; quantizers need 2 bits at least, or None for "
                "no rounding"
            )
    return found


def kernels(sites: Sequence[Site]) -> list[int]:
    """The positions of sites such that each leaf comes once."""
    first: dict[str, int] = {}
    for k, site in enumerate(sites):
        first.setdefault(site.path, k)
    return list(first.values())


def laid_out(site: Site, leaf: jax.Array, granularity: Granularity) -> jax.Array:
    """A leaf as (batch, rows, cols, window), zeros where a group of inputs ends early.

    Rows are inputs, columns outputs. All entries of a column of a batch entry share a step size.
    """
    kernel = kernel_entries(site, leaf)
    steps, groups, inputs, outputs, window = kernel.shape
    if isinstance(granularity, str):
        return kernel.reshape(steps * groups, inputs, outputs, window)
    parts = math.ceil(inputs / granularity)
    rest = parts * granularity - inputs
    padded = jnp.pad(kernel, ((0, 0), (0, 0), (0, rest), (0, 0), (0, 0)))
    return padded.reshape(steps * groups * parts, granularity, outputs, window)


def units_of(site: Site, granularity: Granularity) -> np.ndarray:
    """Integer (batch, cols), which step size each column of :func:`laid_out` has."""
    steps, groups, inputs, outputs = site.entries.shape[:4]
    if granularity == "tensor":
        return np.repeat(np.arange(steps), groups * outputs).reshape(-1, outputs)
    parts = math.ceil(inputs / granularity) if isinstance(granularity, int) else 1
    return np.arange(steps * groups * parts * outputs).reshape(-1, outputs)


def rows_of(site: Site, meeting: Meeting, granularity: Granularity) -> np.ndarray:
    """The neurons along the rows of :func:`laid_out`, (batch, rows)."""
    steps, groups, inputs = site.entries.shape[:3]
    laid = meeting.neurons.reshape(steps * groups, inputs)
    if isinstance(granularity, str):
        return laid
    parts = math.ceil(inputs / granularity)
    padded = np.pad(laid, ((0, 0), (0, parts * granularity - inputs)), constant_values=-1)
    return padded.reshape(-1, granularity)


def cols_of(site: Site, meeting: Meeting, granularity: Granularity) -> np.ndarray:
    """The neurons along the columns of :func:`laid_out`, (batch, cols)."""
    steps, groups, inputs, outputs = site.entries.shape[:4]
    laid = meeting.neurons.reshape(steps * groups, outputs)
    if isinstance(granularity, str):
        return laid
    return laid.repeat(math.ceil(inputs / granularity), 0)


def max_by_unit(values: jax.Array, units: np.ndarray) -> jax.Array:
    """(units,), the largest of nonnegative entries that are laid out."""
    columns = values.max((1, 3)).reshape(-1)
    return jax.ops.segment_max(columns, units.reshape(-1), int(units.max()) + 1)


def sum_by_unit(values: jax.Array, units: np.ndarray) -> jax.Array:
    """(units,), the sum of entries that are laid out."""
    columns = values.sum((1, 3)).reshape(-1)
    return jax.ops.segment_sum(columns, units.reshape(-1), int(units.max()) + 1)
