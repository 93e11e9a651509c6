"""The networks that the experiments train."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class MLP(nn.Module):
    """A ReLU multilayer perceptron with biases; it flattens its input.

    Attributes:
      widths: the sizes of the hidden layers.
      num_outputs: the size of the output.
    """

    widths: Sequence[int]
    num_outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, ...) to logits (batch, num_outputs)."""
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_outputs)(x)


class CNN(nn.Module):
    """3 × 3 convolutions with ReLU, 2 × 2 max pooling after the first, one dense layer.

    Attributes:
      channels: the channels of the convolutions.
      num_outputs: the size of the output.
      convolution: what computes them; see :func:`convolve_by_products`.
    """

    channels: Sequence[int]
    num_outputs: int = 10
    convolution: Callable[..., jax.Array] = jax.lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_outputs)."""
        for layer, channels in enumerate(self.channels):
            x = nn.relu(nn.Conv(channels, (3, 3), conv_general_dilated=self.convolution)(x))
            if layer == 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(self.num_outputs)(x.reshape(x.shape[0], -1))


def convolve_by_products(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """``jax.lax.conv_general_dilated`` for stride 1 and padding "SAME", as one matrix product.

    Many small networks under ``vmap`` become grouped convolutions, which XLA runs slowly on CPU;
    batched matrix products it runs fast.

    Args:
      inputs: (batch, height, width, channels).
      kernel: (kernel height, kernel width, channels, features).
      strides: must be ones.
      padding: must be "SAME".
      **options: the other arguments of ``conv_general_dilated``, at the values Flax gives them
        for a convolution without dilation or groups.

    Returns:
      An array (batch, height, width, features).

    Raises:
      NotImplementedError: other strides, padding, dilation or groups.
    """
    dilated = any(max(options.get(k) or (1,)) > 1 for k in ("lhs_dilation", "rhs_dilation"))
    if max(strides) > 1 or padding != "SAME" or dilated or options["feature_group_count"] > 1:
        raise NotImplementedError("only stride 1, padding 'SAME', no dilation and no groups")
    height, width = inputs.shape[1:3]
    rows, columns, _, features = kernel.shape
    margins = [(0, 0), *(((size - 1) // 2, size // 2) for size in (rows, columns)), (0, 0)]
    padded = jnp.pad(inputs, margins)
    shifted = [
        padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, features)
