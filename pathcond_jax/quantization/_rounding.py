"""A scheme for one network: what of it is rounded, and to how many bits."""

from typing import NamedTuple

from pathcond_jax._spec.types import SpecError
from pathcond_jax.quantization._schemes import Scheme, scheme_of
from pathcond_jax.quantization._statistics import Statistics
from pathcond_jax.quantization._units import Bits, Granularity, bits_of, kernels


class Rounding(NamedTuple):
    """A scheme for the sites of some statistics, as a static argument.

    Attributes:
      kernels: the sites whose kernels are rounded, each kernel once, with their bits.
      activations: the sites whose activations are rounded, with their bits.
      granularity: of weights.
      symmetric: whether the grid of activations is centered at 0.
    """

    kernels: tuple[tuple[int, int], ...]
    activations: tuple[tuple[int, int], ...]
    granularity: Granularity
    symmetric: bool


def rounding_of(statistics: Statistics, scheme: Scheme) -> Rounding:
    """What a scheme rounds at the sites of some statistics.

    Raises:
      SpecError: bits or paths do not fit, or nothing is rounded.
    """
    if not isinstance(statistics, Statistics):
        raise SpecError(
            f"statistics are those that calibrate returns, not of type {type(statistics).__name__}"
        )
    of_weights = bits_of(scheme.weight_bits, statistics.sites, "weight_bits")
    of_activations = bits_of(scheme.activation_bits, statistics.sites, "activation_bits")
    found = Rounding(
        tuple((k, n) for k in kernels(statistics.sites) if (n := of_weights[k]) is not None),
        tuple((k, n) for k, n in enumerate(of_activations) if n is not None),
        scheme.granularity,
        scheme.symmetric_activations,
    )
    if not found.kernels and not found.activations:
        raise SpecError("nothing is rounded: all bits are None")
    return found


def scheme_from(
    scheme: Scheme | str | None, weight_bits: Bits, activation_bits: Bits, granularity: Granularity
) -> Scheme:
    """The scheme that the arguments of a public function say.

    Raises:
      SpecError: there is no engine of this name, or a granularity or bits cannot be used.
    """
    if scheme is None:
        return Scheme(weight_bits, activation_bits, granularity)
    return scheme_of(scheme) if isinstance(scheme, str) else scheme
