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
      kernel_init: of all kernels.
      convolution: what computes them; see :func:`convolve_by_products`.
    """

    channels: Sequence[int]
    num_outputs: int = 10
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    convolution: Callable[..., jax.Array] = jax.lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_outputs)."""
        for layer, channels in enumerate(self.channels):
            convolution = nn.Conv(
                channels,
                (3, 3),
                kernel_init=self.kernel_init,
                conv_general_dilated=self.convolution,
            )
            x = nn.relu(convolution(x))
            if layer == 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        last = nn.Dense(self.num_outputs, kernel_init=self.kernel_init)
        return last(x.reshape(x.shape[0], -1))


class AuthorsMLP(nn.Module):
    """The authors' MLPs, with PyTorch's default initialization.

    Theirs without BatchNorm have biases in hidden layers only; those with it, in the last only.

    Attributes:
      widths: the sizes of the hidden layers.
      num_outputs: the size of the output.
      hidden_bias: whether the hidden layers have biases.
      output_bias: whether the last layer has one.
      batch_norm: whether BatchNorm stands before each ReLU.
    """

    widths: Sequence[int]
    num_outputs: int = 10
    hidden_bias: bool = True
    output_bias: bool = False
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (batch, ...) to (batch, num_outputs)."""
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            uniform = uniform_below(x.shape[-1] ** -0.5)
            x = nn.Dense(width, self.hidden_bias, kernel_init=uniform, bias_init=uniform)(x)
            x = nn.relu(_normalized(x, train) if self.batch_norm else x)
        uniform = uniform_below(x.shape[-1] ** -0.5)
        last = nn.Dense(self.num_outputs, self.output_bias, kernel_init=uniform, bias_init=uniform)
        return last(x)


class FullyConvolutional(nn.Module):
    """The authors' convolutional network, with PyTorch's default initialization.

    Nine convolutions with biases, each before a ReLU; two max pools, after the third and the sixth;
    an average pool at the end.

    Attributes:
      widths: the channels of convolutions 1 to 3, 4 to 6, and 7 and 8.
      num_outputs: the size of the output.
      batch_norm: whether BatchNorm stands before the ReLUs that a pool follows.
      convolution: what computes the convolutions; see :func:`convolve_by_products`.
    """

    widths: tuple[int, int, int] = (128, 256, 320)
    num_outputs: int = 10
    batch_norm: bool = False
    convolution: Callable[..., jax.Array] = jax.lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to (batch, num_outputs)."""
        first, second, third = self.widths
        channels = (first,) * 3 + (second,) * 3 + (third,) * 2 + (self.num_outputs,)
        for number, size in enumerate(channels, start=1):
            side = 3 if number <= 7 else 1
            uniform = uniform_below((side * side * x.shape[-1]) ** -0.5)
            convolution = nn.Conv(
                size,
                (side, side),
                kernel_init=uniform,
                bias_init=uniform,
                conv_general_dilated=self.convolution,
            )
            x, pooled = convolution(x), number in (3, 6)
            x = nn.relu(_normalized(x, train) if self.batch_norm and pooled else x)
            if pooled:
                x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return x.mean(axis=(1, 2))


def uniform_below(bound: float) -> Callable[..., jax.Array]:
    """An initializer that draws uniformly from ± ``bound``."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


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


def _normalized(x: jax.Array, train: bool) -> jax.Array:
    """BatchNorm with PyTorch's constants; called within a module, it is a part of it."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
