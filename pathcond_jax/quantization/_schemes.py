"""What an engine rounds, and how: bits, granularity and the grid of each kind of number."""

import dataclasses

import jax
import jax.numpy as jnp

from pathcond_jax._spec.types import SpecError
from pathcond_jax.quantization._units import Bits, Granularity, check_granularity

# Errors of a quantizer, uniform over a step, have this variance in units of its square.
VARIANCE = 1 / 12


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How numbers are rounded.

    Attributes:
      weight_bits: of kernels, all or by path; None: not rounded.
      activation_bits: of what kernels read; None: not rounded.
      granularity: of weights, ``"tensor"``, ``"channel"``, or how many inputs share a step size.
      symmetric_activations: whether the grid of activations is centered at 0; else it spans from
        the smallest to the largest value and contains 0.

    Raises:
      SpecError: the granularity is unknown, or neither weights nor activations are rounded.
    """

    weight_bits: Bits = 8
    activation_bits: Bits = None
    granularity: Granularity = "tensor"
    symmetric_activations: bool = False

    def __post_init__(self) -> None:
        check_granularity(self.granularity)
        if self.weight_bits is None and self.activation_bits is None:
            raise SpecError("neither weight_bits nor activation_bits: nothing is rounded")

    def __str__(self) -> str:
        """Such as ``"W8A8 per channel"``; ``*`` for bits that differ from kernel to kernel."""
        letters = (("W", self.weight_bits), ("A", self.activation_bits))
        bits = [
            f"{letter}{bits if isinstance(bits, int) else '*'}"
            for letter, bits in letters
            if bits is not None
        ]
        shared = self.granularity if isinstance(self.granularity, str) else f"{self.granularity}"
        return f"{''.join(bits)} per {shared}"


SCHEMES: dict[str, Scheme] = {
    # qwix.PtqProvider, weight_qtype="int8", act_qtype="int8": absmax, one scale per output
    # channel; activations by the range of each row of a product, each image of a convolution.
    "qwix_int8": Scheme(8, 8, "channel", symmetric_activations=True),
    "qwix_int8_weights": Scheme(8, None, "channel"),
    # weight_qtype="int4", tile_size=128.
    "qwix_int4_weights": Scheme(4, None, 128),
    # quantize_static, QuantFormat.QDQ, activations QUInt8, weights QInt8.
    "onnxruntime_static": Scheme(8, 8, "tensor"),
    "onnxruntime_static_per_channel": Scheme(8, 8, "channel"),
    # Full integer quantization: weights int8 per channel, activations int8 with a zero point.
    "litert_int8": Scheme(8, 8, "channel"),
    "int8_weights": Scheme(8, None, "channel"),
    "int4_weights": Scheme(4, None, "channel"),
}
"""What engines do, by name. Weights are always on a symmetric grid. Where an engine finds ranges of
activations while it runs, those of the calibration stand for them."""


def scheme_of(name: str) -> Scheme:
    """The scheme of an engine by name, one of ``SCHEMES``.

    Raises:
      SpecError: there is none of this name.
    """
    if name not in SCHEMES:
        raise SpecError(f"no scheme {name!r}; there are {', '.join(map(repr, SCHEMES))}")
    return SCHEMES[name]


def weight_steps(bits: int) -> int:
    """How many steps there are from 0 to the largest weight of a symmetric grid."""
    return 2 ** (int(bits) - 1) - 1


def activation_steps(bits: int, symmetric: bool) -> int:
    """How many steps there are in the width of the grid of activations."""
    return weight_steps(bits) if symmetric else 2 ** int(bits) - 1


def width(minimum: jax.Array, maximum: jax.Array, symmetric: bool) -> jax.Array:
    """The width of the grid of activations: the largest absolute value of a symmetric one."""
    if symmetric:
        return jnp.maximum(jnp.abs(minimum), jnp.abs(maximum))
    return jnp.maximum(maximum, 0) - jnp.minimum(minimum, 0)
