"""Equimo: vision networks in Equinox."""

import equimo.vision.models as equimo
import jax

from real_models.model import Model, equinox, model, normal

KEY = jax.random.key(0)
EVALUATED = {"key": KEY, "inference": True}


@model("equimo/MobileNetV3 small", cls=equimo.mobilenetv3_small)
@model("equimo/ConvNeXt atto", cls=equimo.convnext_atto)
@model("equimo/iFormer T", cls=equimo.iformer_t)
@model("equimo/LowFormer B0", cls=equimo.lowformer_backbone_b0, attention_type="softmax")
@model("equimo/ReduceFormer B1", cls=equimo.reduceformer_backbone_b1)
def network(cls, **options) -> Model:
    module = cls(in_channels=3, num_classes=10, key=KEY, **options)
    return equinox(module, normal(1, 3, 64, 64), **EVALUATED)


@model("equimo/ViT", act_layer="gelu")
@model("equimo/ViT of ReLU", act_layer="relu")
def vit(**options) -> Model:
    module = equimo.VisionTransformer(
        16, 3, dim=12, patch_size=8, num_heads=2, depths=[2], num_classes=10, key=KEY, **options
    )
    return equinox(module, normal(2, 3, 16, 16), **EVALUATED)


@model("equimo/MLLA")
def mlla() -> Model:
    module = equimo.Mlla(
        32, 3, dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], num_classes=10, key=KEY
    )
    return equinox(module, normal(1, 3, 32, 32), **EVALUATED)


@model("equimo/VSSD")
def vssd() -> Model:
    module = equimo.Vssd(
        32, 3, dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4], num_classes=10, key=KEY
    )
    return equinox(module, normal(1, 3, 32, 32), **EVALUATED)
