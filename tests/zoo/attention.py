"""Transformers and embeddings."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.network import FULL_SIZE, NETWORKS, Network, linen, network, vector


class Block(nn.Module):
    heads: int
    hidden: int
    norm: str = "LayerNorm"
    activation: str = "relu"

    @nn.compact
    def __call__(self, x):
        norm = getattr(nn, self.norm)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(norm()(x))
        y = nn.Dense(self.hidden)(norm()(x))
        return x + nn.Dense(x.shape[-1])(getattr(nn, self.activation)(y))


@network(NETWORKS, "transformer-block", norm="LayerNorm")
@network(NETWORKS, "transformer-block-rms", norm="RMSNorm")
def transformer_block(norm) -> Network:
    return linen(Block(2, 16, norm), vector(3, 5, 8), 48)


class LanguageModel(nn.Module):
    """Token and position embeddings, blocks, a head tied to the embedding."""

    vocabulary: int
    width: int
    heads: int
    depth: int
    scan: bool = False
    tied: bool = True

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.width)
        x = embed(tokens)
        x = x + self.param("positions", nn.initializers.normal(), (tokens.shape[-1], self.width))
        if self.scan:

            def body(block, x, _):
                return block(x), None

            layers = nn.scan(
                nn.remat(body),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = layers(Block(self.heads, 4 * self.width), x, None)
        else:
            for _ in range(self.depth):
                x = Block(self.heads, 4 * self.width)(x)
        x = nn.LayerNorm()(x)
        return embed.attend(x) if self.tied else nn.Dense(self.vocabulary)(x)


def _language_neurons(width, depth):
    # Per block: two LayerNorms, query-key, value-output, feed-forward.
    return depth * 8 * width


@network(NETWORKS, "language-model", scan=False)
@network(NETWORKS, "language-model-scan", scan=True)
def language_model(scan) -> Network:
    tokens = jnp.arange(8).reshape(2, 4) % 7
    return linen(LanguageModel(7, 8, 2, 3, scan, tied=True), tokens, _language_neurons(8, 3))


@network(NETWORKS, "language-model-untied")
def language_model_untied() -> Network:
    # The last LayerNorm's γ and β now enter neurons that the head leaves.
    tokens = jnp.arange(8).reshape(2, 4) % 7
    return linen(LanguageModel(7, 8, 2, 2, tied=False), tokens, _language_neurons(8, 2) + 8)


@network(FULL_SIZE, "transformer-1.5b")
def transformer_1_5b(depth=48, width=1600) -> Network:
    module = LanguageModel(50257, width, 25, depth)
    tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    return linen(module, tokens, _language_neurons(width, depth), shapes_only=True)


@network(NETWORKS, "attention-rotary")
def attention_rotary() -> Network:
    # Rotations mix two query-key dimensions, which then share a scale.
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            project = functools.partial(nn.DenseGeneral, (2, 4), use_bias=False)
            q, k, v = project()(x), project()(x), project()(x)
            angle = jnp.arange(x.shape[1])[:, None, None] / (1.0 + jnp.arange(2))
            cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)

            def rotate(y):
                a, b = jnp.split(y, 2, -1)
                return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

            y = nn.dot_product_attention(rotate(q), rotate(k), v)
            return nn.DenseGeneral(8, (-2, -1), use_bias=False)(y)

    return linen(Attention(), vector(2, 5, 8), 4 + 8)
