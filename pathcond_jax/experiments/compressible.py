"""The networks that are quantized: plain, residual, depthwise, and attention with outliers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


class Residual(nn.Module):
    """Pairs of 3 × 3 convolutions with batch normalization, each pair around a skip.

    Attributes:
      width: of the stream.
      blocks: the number of pairs.
      stride: of the first convolution.
      convolution: what computes all of them; see :func:`convolve_by_shifts`.
      num_outputs: the size of the output.
    """

    width: int = 16
    blocks: int = 3
    stride: int = 1
    convolution: Callable[..., jax.Array] = lax.conv_general_dilated
    num_outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_outputs)."""
        conv = functools.partial(nn.Conv, use_bias=False, conv_general_dilated=self.convolution)
        x = conv(self.width, (3, 3), strides=(self.stride, self.stride))(x)
        x = nn.relu(_normalized(x, train))
        for _ in range(self.blocks):
            y = conv(self.width, (3, 3))(x)
            y = nn.relu(_normalized(y, train))
            y = conv(self.width, (3, 3))(y)
            x = nn.relu(x + _normalized(y, train))
        return nn.Dense(self.num_outputs)(x.mean(axis=(1, 2)))


class InvertedResidual(nn.Module):
    """The blocks of MobileNetV2: expansion, depthwise convolution, projection, and ReLU.

    Attributes:
      widths: of the stream, stage by stage; all stages but the first halve the images.
      expansion: of the width within a block.
      blocks: their number in each stage.
      stride: of the first convolution.
      convolution: what computes all of them; see :func:`convolve_by_shifts`.
      num_outputs: the size of the output.
    """

    widths: tuple[int, ...] = (12,)
    expansion: int = 4
    blocks: int = 4
    stride: int = 1
    convolution: Callable[..., jax.Array] = lax.conv_general_dilated
    num_outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_outputs)."""
        conv = functools.partial(nn.Conv, use_bias=False, conv_general_dilated=self.convolution)
        x = conv(self.widths[0], (3, 3), strides=(self.stride, self.stride))(x)
        x = nn.relu(_normalized(x, train))
        for block in range(self.blocks * len(self.widths)):
            width = self.widths[block // self.blocks]
            halved = block % self.blocks == 0 < block
            inside, stride = x.shape[-1] * self.expansion, 2 if halved else 1
            y = nn.relu(_normalized(conv(inside, (1, 1))(x), train))
            y = conv(inside, (3, 3), strides=(stride, stride), feature_group_count=inside)(y)
            y = nn.relu(_normalized(y, train))
            y = _normalized(conv(width, (1, 1))(y), train)
            x = y if halved else x + y
        x = nn.relu(_normalized(conv(x.shape[-1] * self.expansion, (1, 1))(x), train))
        return nn.Dense(self.num_outputs)(x.mean(axis=(1, 2)))


class Transformer(nn.Module):
    """Rows of an image as tokens: attention and ReLU layers behind layer normalization.

    Attributes:
      width: of the stream.
      blocks: the number of pairs of attention and two-layer perceptron.
      heads: of attention.
      outliers: channels of each normalization whose scale starts ``magnitude`` times as large.
      magnitude: of the outliers.
      num_outputs: the size of the output.
    """

    width: int = 32
    blocks: int = 2
    heads: int = 4
    outliers: int = 3
    magnitude: float = 16.0
    num_outputs: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_outputs)."""
        del train
        x = nn.Dense(self.width)(x.reshape(*x.shape[:2], -1))
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.blocks):
            x = x + self._attention(self._norm(x))
            y = nn.relu(nn.Dense(4 * self.width)(self._norm(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.num_outputs)(self._norm(x).mean(axis=1))

    def _norm(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(scale_init=self._with_outliers)(x)

    def _with_outliers(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        chosen = jax.random.permutation(key, shape[0])[: self.outliers]
        return jnp.ones(shape, dtype).at[chosen].set(self.magnitude)

    def _attention(self, x: jax.Array) -> jax.Array:
        size = self.width // self.heads
        query, key, value = (nn.DenseGeneral((self.heads, size))(x) for _ in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / size**0.5
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
        return nn.DenseGeneral(self.width, axis=(-2, -1))(mixed)


def _normalized(x: jax.Array, train: bool) -> jax.Array:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


def convolve_by_shifts(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str,
    *,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """``jax.lax.conv_general_dilated`` of one group or depthwise, as products of shifted inputs.

    For training on CPU, where XLA runs depthwise convolutions, and all under ``vmap``, slowly.

    Args:
      inputs: (batch, height, width, channels).
      kernel: (kernel height, kernel width, channels of a group, features).
      strides: of height and width.
      padding: "SAME" or "VALID".
      feature_group_count: 1, or as many as channels.
      **options: the other arguments of ``conv_general_dilated``, at the values Flax gives them
        for a convolution without dilation.

    Returns:
      An array (batch, height, width, features).
    """
    del options
    window = kernel.shape[:2]
    margins = lax.padtype_to_pads(inputs.shape[1:3], window, strides, padding)
    padded = jnp.pad(inputs, [(0, 0), *margins, (0, 0)])
    ends = [padded.shape[1 + a] - window[a] + 1 for a in (0, 1)]
    shifted = [
        padded[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
        for i in range(window[0])
        for j in range(window[1])
    ]
    if feature_group_count == 1:
        product: jax.Array = jnp.concatenate(shifted, -1) @ kernel.reshape(-1, kernel.shape[-1])
        return product
    factors = kernel.reshape(-1, kernel.shape[-1])
    return sum(
        (x * factor[None, None, None] for x, factor in zip(shifted, factors, strict=True)),
        start=jnp.zeros(()),
    )
