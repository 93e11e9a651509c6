"""Packages of Flax networks: jax-resnet, flaxmodels, jax-models, diffusers, JraphX, Mamba."""

import diffusers
import flaxmodels
import jax
import jax.numpy as jnp
import jax_resnet
import jraphx.nn.models
import mamba2_jax
import mamba3_jax
from flax import nnx
from jax_models.models import cait, conv_mixer, mlp_mixer, patchconvnet, poolformer

from real_models.model import Model, linen, model, nnx_module, normal, tokens


@model("jax-resnet/ResNet18", cls=jax_resnet.ResNet18)
@model("jax-resnet/ResNetD50", cls=jax_resnet.ResNetD50)
@model("jax-resnet/ResNeSt50", cls=jax_resnet.ResNeSt50)
def resnet(cls) -> Model:
    return linen(cls(n_classes=10), normal(2, 32, 32, 3))


@model("flaxmodels/ResNet18")
def classifier() -> Model:
    module = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=10)
    return linen(module, jax.nn.sigmoid(normal(1, 32, 32, 3)), train=False)


@model("jax-models/ConvMixer")
def convmixer() -> Model:
    module = conv_mixer.ConvMixer(
        features=12, patch_size=4, num_mixer_layers=2, filter_size=3, num_classes=10
    )
    return linen(module, normal(2, 16, 16, 3), deterministic=True)


@model("jax-models/MLP-Mixer")
def mixer() -> Model:
    module = mlp_mixer.MLPMixer(
        patch_size=4,
        hidden_size=8,
        channels_dim=12,
        tokens_dim=10,
        attach_head=True,
        num_classes=10,
    )
    return linen(module, normal(2, 8, 8, 3), deterministic=True)


@model("jax-models/CaiT")
def class_attention() -> Model:
    module = cait.CaiT(patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=10)
    return linen(module, normal(2, 16, 16, 3), deterministic=True)


@model("jax-models/PoolFormer S12")
def pooling() -> Model:
    module = poolformer.S12(attach_head=True, num_classes=10)
    return linen(module, normal(1, 32, 32, 3), deterministic=True)


@model("jax-models/PatchConvNet")
def patches() -> Model:
    module = patchconvnet.PatchConvNet(depth=2, dim=16, num_classes=10)
    return linen(module, normal(2, 32, 32, 3), deterministic=True)


@model("diffusers/UNet2DConditionModel")
def unet() -> Model:
    module = diffusers.FlaxUNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
        dtype=jnp.zeros(()).dtype,
    )
    inputs = normal(1, 4, 8, 8), jnp.array([3]), normal(1, 5, 8)
    built = linen(module, *inputs)
    return built._replace(apply_fn=lambda *a: built.apply_fn(*a).sample)


@model("diffusers/AutoencoderKL")
def autoencoder() -> Model:
    module = diffusers.FlaxAutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        dtype=jnp.zeros(()).dtype,
    )
    built = linen(module, normal(1, 3, 16, 16))
    return built._replace(apply_fn=lambda *a: built.apply_fn(*a).sample)


@model("jraphx/GCN", cls=jraphx.nn.models.GCN)
@model("jraphx/GraphSAGE", cls=jraphx.nn.models.GraphSAGE)
@model("jraphx/GAT", cls=jraphx.nn.models.GAT)
@model("jraphx/GIN", cls=jraphx.nn.models.GIN)
def graph(cls) -> Model:
    module = cls(in_features=4, hidden_features=8, num_layers=3, out_features=2, rngs=nnx.Rngs(0))
    edges = jnp.array([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
    return nnx_module(module, normal(5, 4), edges)


@model("mamba2-jax/Mamba2", package=mamba2_jax, generation=2)
@model("mamba3-jax/Mamba3", package=mamba3_jax, generation=3)
def mamba(package, generation) -> Model:
    config = getattr(package, f"Mamba{generation}Config")
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8}
    configuration = config(**sizes, head_dim=8, chunk_size=4)
    module = package.create_random_model(configuration)
    return nnx_module(module, tokens(2, 8, vocabulary=20))
