"""The noise criterion: the expected squared error of the outputs, as a function of log-scales.

A uniform quantizer of step Δ adds errors of variance Δ²/12. With F and S the squared derivatives
of the outputs, a unit of weights that share a step adds ``Δ_u²/12 Σ_{i ∈ u} F_i e^{2(Bz)_i}`` to
the error of the outputs, and so do activations with ``S_c e^{−2 z_c}``. The step is the range over
the number of steps, and the range a p-norm: both factors are sums of exponentials, so that the
logarithm of the whole is smooth and convex.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from pathcond_jax._solve.objective import SQUARES, Goal, LogSum, Objective, reduce_masses
from pathcond_jax._solve.products import Products, smooth
from pathcond_jax._spec.arrays import widened
from pathcond_jax._spec.log_scales import LogScales
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.criteria._base import Criterion
from pathcond_jax.quantization._prediction import predicted_noise
from pathcond_jax.quantization._rounding import Rounding, rounding_of, scheme_from
from pathcond_jax.quantization._schemes import (
    VARIANCE,
    Scheme,
    activation_steps,
    weight_steps,
    width,
)
from pathcond_jax.quantization._sites import Meeting, Site, channel_scales, meetings
from pathcond_jax.quantization._stacking import Part, p_norm, products_of
from pathcond_jax.quantization._statistics import Statistics
from pathcond_jax.quantization._units import (
    Bits,
    Granularity,
    cols_of,
    laid_out,
    rows_of,
    units_of,
)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizationNoise(Criterion):
    """The predicted quantization noise of the outputs; see :func:`quantization_noise`.

    Attributes:
      name: for people.
      statistics: of the parameters that are conditioned.
      scheme: how numbers are rounded.
      norm_weight: of the logarithm of the squared norm of the parameters.
    """

    name: str
    statistics: Statistics
    scheme: Scheme
    norm_weight: float

    def goal(self, params: PyTree, spec: ArchSpec) -> Goal:
        """The logarithm of the noise; see :class:`Criterion`."""
        rounding = rounding_of(self.statistics, self.scheme)
        products = _reduced(params, self.statistics, spec, rounding)
        norm = LogSum(self.norm_weight, -2.0, *reduce_masses(spec, params, SQUARES))
        return Objective((norm,), smooth=(smooth(products),))

    def finite(self, params: PyTree, spec: ArchSpec) -> bool:
        """What is not finite is in the norm, where the solver sees it; see :class:`Criterion`."""
        return True

    def figures(self, params: PyTree, spec: ArchSpec, log_scales: LogScales) -> Mapping[str, float]:
        """The predicted signal-to-noise ratio of the outputs; see :class:`Criterion`."""
        noise = predicted_noise(params, spec, self.statistics, self.scheme, log_scales=log_scales)
        return {f"predicted dB, {self.scheme}": float(noise.decibel)}


def quantization_noise(
    statistics: Statistics,
    scheme: Scheme | str | None = None,
    *,
    weight_bits: Bits = 8,
    activation_bits: Bits = None,
    granularity: Granularity = "tensor",
    norm_weight: float = 0.1,
) -> Criterion:
    """The representative with the smallest predicted quantization noise at the outputs.

    It minimizes ``log Σ_u Δ_u²/12 Σ_{i ∈ u} F_i e^{2(Bz)_i}`` over units u of weights, and of
    activations if these are rounded, with steps Δ_u that follow the ranges. To this it adds
    ``norm_weight · log ‖θ‖²``: rounding does not notice when all neurons of a layer take one scale,
    nor a neuron that is never active, and the norm decides there. The result is the same from
    every representative, given statistics of that representative.

    Args:
      statistics: of :func:`calibrate`, for the parameters that are conditioned.
      scheme: an engine, a name of ``SCHEMES``, or a scheme; None: the following three arguments,
        which mean nothing otherwise.
      weight_bits: at least 2, for all kernels or by path (kernels left out are not rounded); None:
        weights are not rounded.
      activation_bits: the same for the activations that kernels read.
      granularity: which weights share a step: ``"tensor"``, ``"channel"`` for those of an output
        channel, or how many inputs of an output channel.
      norm_weight: positive.

    Returns:
      The criterion, for :func:`pathcond_jax.condition`.

    Raises:
      SpecError: bits below 2, an unknown engine, granularity or kernel, or nothing to round.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from pathcond_jax.quantization import calibrate, quantization_noise
      >>> params = {"a": {"w": jnp.array([[8.0, 0.1]])}, "b": {"w": jnp.array([[0.5], [4.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> statistics = calibrate(spec.apply_fn, params, spec, [jnp.array([[1.0], [2.0]])])
      >>> noise = quantization_noise(statistics, weight_bits=4)
      >>> better, solution = pathcond.condition(params, spec, noise)
      >>> pathcond.Status(int(solution.status)).name
      'CONVERGED'

    References:
      Nagel, van Baalen, Blankevoort, Welling, *Data-free quantization through weight equalization
      and bias correction*, ICCV 2019, for what it replaces.
    """
    if not norm_weight > 0:
        raise SpecError(f"norm_weight is {norm_weight}; it must be positive")
    chosen = scheme_from(scheme, weight_bits, activation_bits, granularity)
    rounding_of(statistics, chosen)
    return QuantizationNoise("quantization_noise", statistics, chosen, float(norm_weight))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _reduced(
    params: PyTree, statistics: Statistics, spec: ArchSpec, rounding: Rounding
) -> Products:
    """The noise as sums over units of weights and of activations."""
    return products_of(list(_parts(params, spec, statistics, rounding)), spec.num_neurons)


def _parts(
    params: PyTree, spec: ArchSpec, statistics: Statistics, rounding: Rounding
) -> Iterator[Part]:
    values = match_leaves(spec, params)
    sensitivities = match_leaves(spec, statistics.sensitivity, "statistics.sensitivity")
    for k, bits in rounding.kernels:
        site = statistics.sites[k]
        met = meetings(site, spec)
        # Neurons that meet a kernel in another way than along its inputs or outputs: their part
        # of the noise is left out, and the function is kept all the same.
        if met is not None:
            pair = (values[site.leaf], sensitivities[site.leaf])
            yield _kernel_part(site, met, pair, rounding.granularity, bits)
    for k, bits in rounding.activations:
        yield _activation_part(statistics, k, spec, rounding.symmetric, bits)


def _kernel_part(
    site: Site,
    met: tuple[list[Meeting], list[Meeting]],
    pair: tuple[Any, Any],
    granularity: Granularity,
    bits: int,
) -> Part:
    rows, cols = met
    weights, sensitivity = (laid_out(site, widened(x), granularity) for x in pair)
    return Part(
        [rows_of(site, m, granularity) for m in rows],
        [cols_of(site, m, granularity) for m in cols],
        [m.entry for m in rows],
        [m.entry for m in cols],
        p_norm(weights),
        sensitivity.sum(3),
        units_of(site, granularity),
        _offset(weight_steps(bits)),
    )


def _activation_part(
    statistics: Statistics, k: int, spec: ArchSpec, symmetric: bool, bits: int
) -> Part:
    """Channels as columns: their ranges grow with λ and their sensitivities shrink."""
    site, read = statistics.sites[k], statistics.channels[k]
    scales = channel_scales(site, spec)
    steps = site.entries.shape[0]
    return Part(
        [],
        [m.neurons.reshape(1, -1) for m in scales],
        [],
        [-m.entry for m in scales],
        width(read.minimum, read.maximum, symmetric)[None, None],
        read.sensitivity[None, None],
        np.repeat(np.arange(steps), site.num_channels // steps)[None],
        _offset(activation_steps(bits, symmetric)),
    )


def _offset(steps: int) -> float:
    return math.log(VARIANCE) - 2 * math.log(steps)
