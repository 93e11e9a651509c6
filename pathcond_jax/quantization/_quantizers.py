"""Simulated quantization: parameters rounded to their grids, and networks whose activations are.

What is simulated is the rounding alone: numbers stay floats. It is for measuring what a scheme
costs, not for running it.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.graph import Node
from pathcond_jax._program.replay import Place, replay
from pathcond_jax._spec.arrays import widened
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.quantization._program import Program, program
from pathcond_jax.quantization._rounding import Rounding, rounding_of, scheme_from
from pathcond_jax.quantization._schemes import Scheme, activation_steps, weight_steps, width
from pathcond_jax.quantization._sites import Site, with_kernel_entries
from pathcond_jax.quantization._statistics import Statistics
from pathcond_jax.quantization._units import Bits, Granularity, laid_out, max_by_unit, units_of


def quantize_weights(
    params: PyTree,
    spec: ArchSpec,
    statistics: Statistics,
    scheme: Scheme | str | None = None,
    *,
    weight_bits: Bits = 8,
    granularity: Granularity = "tensor",
    stretch: float | jax.Array = 1.0,
) -> PyTree:
    """The parameters with kernels rounded to a symmetric grid of the given bits.

    Args:
      params: the parameters.
      spec: their spec.
      statistics: of :func:`calibrate`, which tell the kernels that are rounded.
      scheme: an engine, as in :func:`quantization_noise`; None: the following arguments.
      weight_bits: for all kernels, or by path.
      granularity: which weights share a step size.
      stretch: a factor of all step sizes, a little above 1: where an entry falls between two grid
        points is chance, and the mean over several stretches is less so.

    Returns:
      A tree like ``params``, dtypes kept.

    Raises:
      SpecError: as :func:`quantization_noise`.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from pathcond_jax.quantization import calibrate, quantize_weights
      >>> params = {"a": {"w": jnp.array([[0.7, 0.2]])}, "b": {"w": jnp.array([[1.0], [0.6]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> statistics = calibrate(spec.apply_fn, params, spec, [jnp.array([[1.0]])])
      >>> rounded = quantize_weights(params, spec, statistics, weight_bits=2)
      >>> [[round(float(w), 2) for w in rounded[name]["w"].reshape(-1)] for name in "ab"]
      [[0.7, 0.0], [1.0, 1.0]]
    """
    chosen = scheme_from(scheme, weight_bits, None, granularity)
    rounding = rounding_of(statistics, chosen)
    values = match_leaves(spec, params)
    for k, bits in rounding.kernels:
        site = statistics.sites[k]
        levels = np.float32(weight_steps(bits))
        values[site.leaf] = _rounded_kernel(
            values[site.leaf], levels, jnp.asarray(stretch), site, rounding.granularity
        )
    return jax.tree.unflatten(spec.treedef, values)


def simulate(
    apply_fn: Callable[..., Any],
    spec: ArchSpec,
    statistics: Statistics,
    scheme: Scheme | str | None = None,
    *,
    weight_bits: Bits = 8,
    activation_bits: Bits = None,
    granularity: Granularity = "tensor",
    stretch: float | jax.Array = 1.0,
) -> Callable[..., Any]:
    """The network with weights and activations rounded, by static ranges from the calibration.

    Args:
      apply_fn: the network, ``apply_fn(params, *inputs)``.
      spec: its spec.
      statistics: of :func:`calibrate`, for the parameters that the result is called with.
      scheme: as in :func:`quantization_noise`, and so are the other options.
      weight_bits: of weights.
      activation_bits: of the activations that kernels read.
      granularity: of weights.
      stretch: a factor of all step sizes, as in :func:`quantize_weights`.

    Returns:
      A function ``(params, *inputs) -> outputs`` like ``apply_fn``, which may be compiled.

    Raises:
      SpecError: as :func:`quantization_noise`; or, when it is called, the network multiplies other
        kernels than the statistics tell.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from pathcond_jax.quantization import calibrate, simulate
      >>> params = {"a": {"w": jnp.array([[1.0, -1.0]])}, "b": {"w": jnp.array([[2.0], [3.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> x = jnp.array([[1.0], [-2.0]])
      >>> statistics = calibrate(spec.apply_fn, params, spec, [x])
      >>> rounded = simulate(spec.apply_fn, spec, statistics, weight_bits=8, activation_bits=8)
      >>> jnp.round(rounded(params, x), 1).reshape(-1).tolist()
      [2.0, 6.0]
    """
    chosen = scheme_from(scheme, weight_bits, activation_bits, granularity)
    rounding = rounding_of(statistics, chosen)

    def simulated(params: PyTree, *inputs: PyTree) -> Any:
        traced = program(apply_fn, spec, inputs)
        places = _same_places(traced, statistics)
        rounded = (
            quantize_weights(params, spec, statistics, chosen, stretch=stretch)
            if rounding.kernels
            else params
        )
        steps = {
            traced.sites[k].place: _grid(statistics, k, bits, rounding, stretch)
            for k, bits in rounding.activations
        }
        hook = functools.partial(_rounding_hook, places)
        arguments = [*match_leaves(spec, rounded), *jax.tree.leaves(inputs)]
        outputs = replay(traced.graph, arguments, hook, steps).outputs
        if traced.treedef is None:
            return outputs[0] if len(outputs) == 1 else outputs
        return jax.tree.unflatten(traced.treedef, outputs)

    return simulated


@functools.partial(jax.jit, static_argnums=(3, 4))
def _rounded_kernel(
    leaf: jax.Array, levels: jax.Array, stretch: jax.Array, site: Site, granularity: Granularity
) -> jax.Array:
    weights, units = laid_out(site, widened(leaf), granularity), units_of(site, granularity)
    levels, stretch = levels.astype(weights.dtype), stretch.astype(weights.dtype)
    steps = max_by_unit(jnp.abs(weights), units) / levels
    steps = (steps * stretch)[units][:, None, :, None]
    whole = jnp.clip(jnp.round(weights / jnp.where(steps > 0, steps, 1)), -levels, levels)
    return with_kernel_entries(site, leaf, _undone(site, whole * steps, granularity))


def _undone(site: Site, laid: jax.Array, granularity: Granularity) -> jax.Array:
    """The inverse of :func:`laid_out`, to the shape of the site's entries."""
    shape = site.entries.shape
    if isinstance(granularity, str):
        return laid.reshape(shape)
    steps, groups, inputs, outputs, window = shape
    parts = math.ceil(inputs / granularity)
    whole = laid.reshape(steps, groups, parts * granularity, outputs, window)
    return whole[:, :, :inputs]


def _same_places(traced: Program, statistics: Statistics) -> Mapping[Place, Site]:
    here, there = ([site.path for site in sites] for sites in (traced.sites, statistics.sites))
    if here != there:
        raise SpecError(
            f"the network multiplies activations with {here}, and the statistics are of {there}"
        )
    return {site.place: site for site in traced.sites}


def _grid(
    statistics: Statistics, k: int, bits: int, rounding: Rounding, stretch: float | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Step, lowest and highest whole number of the grid of a site, one of each per loop step."""
    site, read = statistics.sites[k], statistics.channels[k]
    loops = site.entries.shape[0]
    low = read.minimum.reshape(loops, -1).min(1)
    high = read.maximum.reshape(loops, -1).max(1)
    symmetric = rounding.symmetric
    count = activation_steps(bits, symmetric)
    step = width(low, high, symmetric) / count * jnp.asarray(stretch).astype(low.dtype)
    step = jnp.where(step > 0, step, 1)
    first = jnp.full_like(step, -count) if symmetric else jnp.round(jnp.minimum(low, 0) / step)
    last = jnp.full_like(step, count) if symmetric else first + count
    # In the body of a loop, one of each step.
    shape = (-1,) if len(site.place) > 1 else ()
    return step.reshape(shape), first.reshape(shape), last.reshape(shape)


def _rounding_hook(
    places: Mapping[Place, Site], place: Place, node: Node, operands: Sequence[Any], grid: Any
) -> tuple[Sequence[Any], None]:
    """Rounds the activations that a site reads to its grid."""
    del node
    if grid is None:
        return operands, None
    kernel = places[place].kernel
    value = operands[1 - kernel]
    step, first, last = (part.astype(value.dtype) for part in grid)
    rounded = list(operands)
    rounded[1 - kernel] = jnp.clip(jnp.round(value / step), first, last) * step
    return rounded, None
