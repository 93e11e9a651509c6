"""The noise that a scheme is expected to add to the outputs, here and at other log-scales."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pathcond_jax._action.rescale import rescale
from pathcond_jax._solve.solution import Solution
from pathcond_jax._spec.arrays import widened
from pathcond_jax._spec.log_scales import LogScales
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree
from pathcond_jax.quantization._rounding import rounding_of, scheme_from
from pathcond_jax.quantization._schemes import (
    VARIANCE,
    Scheme,
    activation_steps,
    weight_steps,
    width,
)
from pathcond_jax.quantization._statistics import Statistics
from pathcond_jax.quantization._units import (
    Bits,
    Granularity,
    laid_out,
    max_by_unit,
    sum_by_unit,
    units_of,
)


class PredictedNoise(NamedTuple):
    """How much rounding is expected to change the outputs.

    Attributes:
      weights: the expected squared error of the outputs, summed over outputs, averaged over
        examples, from weights.
      activations: the same from activations.
      decibel: the signal-to-noise ratio, ``10 log10`` of the power of the outputs over the noise.
    """

    weights: jax.Array
    activations: jax.Array
    decibel: jax.Array


def predicted_noise(
    params: PyTree,
    spec: ArchSpec,
    statistics: Statistics,
    scheme: Scheme | str | None = None,
    *,
    weight_bits: Bits = 8,
    activation_bits: Bits = None,
    granularity: Granularity = "tensor",
    log_scales: LogScales | Solution | None = None,
) -> PredictedNoise:
    """The quantization noise that is expected at the outputs, to first order.

    With the solution of ``condition`` as ``log_scales`` it is the noise after, before nothing is
    to be calibrated again.

    Args:
      params: the parameters.
      spec: their spec.
      statistics: of :func:`calibrate`, for these parameters.
      scheme: as in :func:`quantization_noise`, and so are the other options.
      weight_bits: of weights.
      activation_bits: of activations.
      granularity: of weights.
      log_scales: of another representative, as seen from ``params``, or a solution; None: that of
        ``params``.

    Returns:
      The noise of weights, of activations, and the ratio to the power of the outputs in dB.

    Raises:
      SpecError: as :func:`quantization_noise`, or ``params`` do not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from pathcond_jax.quantization import calibrate, predicted_noise
      >>> params = {"a": {"w": jnp.array([[1.0, -1.0]])}, "b": {"w": jnp.array([[2.0], [3.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> statistics = calibrate(spec.apply_fn, params, spec, [jnp.array([[1.0], [-2.0]])])
      >>> eight = predicted_noise(params, spec, statistics, weight_bits=8)
      >>> six = predicted_noise(params, spec, statistics, weight_bits=6)
      >>> round(float(eight.decibel - six.decibel), 1)
      12.2
      >>> _, solution = pathcond.condition(params, spec, "enorm")
      >>> after = predicted_noise(params, spec, statistics, log_scales=solution)
      >>> bool(after.decibel > eight.decibel)
      True
    """
    if log_scales is not None:
        statistics = statistics.rescaled(spec, log_scales)
        params = rescale(params, spec, log_scales)
    chosen = scheme_from(scheme, weight_bits, activation_bits, granularity)
    rounding = rounding_of(statistics, chosen)
    values = match_leaves(spec, params)
    sensitivities = match_leaves(spec, statistics.sensitivity, "statistics.sensitivity")
    zero = jnp.zeros(())
    of_weights, of_activations = zero, zero
    for k, bits in rounding.kernels:
        site = statistics.sites[k]
        units = units_of(site, rounding.granularity)
        weights, sensitivity = (
            laid_out(site, widened(tree[site.leaf]), rounding.granularity)
            for tree in (values, sensitivities)
        )
        steps = max_by_unit(jnp.abs(weights), units) / weight_steps(bits)
        of_weights += VARIANCE * jnp.dot(jnp.square(steps), sum_by_unit(sensitivity, units))
    for k, bits in rounding.activations:
        site, read = statistics.sites[k], statistics.channels[k]
        by_step = [
            x.reshape(site.entries.shape[0], -1)
            for x in (read.minimum, read.maximum, read.sensitivity)
        ]
        low, high, total = by_step[0].min(1), by_step[1].max(1), by_step[2].sum(1)
        symmetric = rounding.symmetric
        steps = width(low, high, symmetric) / activation_steps(bits, symmetric)
        of_activations += VARIANCE * jnp.dot(jnp.square(steps), total)
    noise = of_weights + of_activations
    decibel = 10 * jnp.log10(statistics.output_power / noise)
    return PredictedNoise(of_weights, of_activations, decibel)
