"""Hugging Face's Flax models, each with a small configuration."""

import jax
import jax.numpy as jnp
import transformers

from real_models.model import Model, in_default_precision, model, normal, tokens

VOCABULARY = 40
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
    "forced_eos_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


def hugging_face(cls: str, config: str, inputs: tuple, **options) -> Model:
    """The model, called for evaluation."""
    configuration = getattr(transformers, config)(**options)
    module = getattr(transformers, cls)(configuration, dtype=jnp.zeros(()).dtype)
    params = jax.tree.map(in_default_precision, module.params)

    def apply_fn(params, *inputs):
        return module(*inputs, params=params, train=False)[0]

    return Model(apply_fn, params, inputs)


@model("transformers/BERT", family="Bert")
@model("transformers/BERT of ReLU", family="Bert", hidden_act="relu")
@model("transformers/RoBERTa", family="Roberta")
@model("transformers/RoFormer", family="RoFormer", hidden_act="relu")
@model("transformers/ELECTRA", family="Electra", embedding_size=16)
@model("transformers/ALBERT", family="Albert", embedding_size=8, hidden_act="relu")
def encoder(family, **options) -> Model:
    ids = tokens(2, 6, vocabulary=VOCABULARY)
    cls = f"Flax{family}{'ForMaskedLM' if family != 'Electra' else 'ForPreTraining'}"
    return hugging_face(cls, f"{family}Config", (ids,), **TEXT, **options)


@model("transformers/LLaMA", family="Llama", hidden_act="silu")
@model("transformers/Mistral", family="Mistral", num_key_value_heads=1)
@model("transformers/Gemma", family="Gemma", num_key_value_heads=1, head_dim=8)
def decoder(family, **options) -> Model:
    ids = tokens(2, 6, vocabulary=VOCABULARY)
    return hugging_face(f"Flax{family}ForCausalLM", f"{family}Config", (ids,), **TEXT, **options)


@model("transformers/GPT-2", family="GPT2", n_inner=24, activation_function="relu")
@model("transformers/GPT-J", family="GPTJ", rotary_dim=4, activation_function="relu")
def gpt(family, **options) -> Model:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    ids = tokens(2, 6, vocabulary=VOCABULARY)
    return hugging_face(
        f"Flax{family}LMHeadModel" if family == "GPT2" else f"Flax{family}ForCausalLM",
        f"{family}Config",
        (ids,),
        **sizes,
        **options,
    )


@model("transformers/BART")
def bart() -> Model:
    configuration = transformers.BartConfig(**DECODER, activation_function="relu")
    module = transformers.FlaxBartForConditionalGeneration(configuration, dtype=jnp.zeros(()).dtype)
    params = jax.tree.map(in_default_precision, module.params)

    def apply_fn(params, ids, target):
        return module(ids, decoder_input_ids=target, params=params, train=False).logits

    inputs = tokens(2, 6, vocabulary=VOCABULARY), tokens(2, 5, vocabulary=VOCABULARY)
    return Model(apply_fn, params, inputs)


@model("transformers/ViT", family="ViT")
@model("transformers/ViT of ReLU", family="ViT", hidden_act="relu")
@model("transformers/BEiT", family="Beit", hidden_act="relu")
@model("transformers/DINOv2", family="Dinov2", hidden_act="relu", mlp_ratio=2)
def vision(family, **options) -> Model:
    return hugging_face(
        f"Flax{family}ForImageClassification",
        f"{family}Config",
        (normal(2, 3, 8, 8),),
        **VISION,
        **options,
    )


@model("transformers/ResNet", family="ResNet", layer_type="basic", embedding_size=4)
@model("transformers/RegNet", family="RegNet", embedding_size=4, groups_width=4)
def convolutional(family, **options) -> Model:
    return hugging_face(
        f"Flax{family}ForImageClassification",
        f"{family}Config",
        (normal(2, 3, 16, 16),),
        hidden_sizes=[4, 8],
        depths=[1, 2],
        **options,
    )


@model("transformers/CLIP")
def clip() -> Model:
    text = transformers.CLIPTextConfig(**TEXT, hidden_act="relu", eos_token_id=39)
    vision = transformers.CLIPVisionConfig(**VISION, hidden_act="relu")
    configuration = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    module = transformers.FlaxCLIPModel(configuration, dtype=jnp.zeros(()).dtype)
    params = jax.tree.map(in_default_precision, module.params)

    def apply_fn(params, ids, pixels):
        return module(ids, pixels, params=params, train=False).logits_per_image

    return Model(apply_fn, params, (tokens(2, 6, vocabulary=VOCABULARY), normal(2, 3, 8, 8)))


@model("transformers/Wav2Vec2")
def wav2vec2() -> Model:
    configuration = transformers.Wav2Vec2Config(
        **TEXT,
        hidden_act="relu",
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    module = transformers.FlaxWav2Vec2ForCTC(
        configuration, input_shape=(1, 128), dtype=jnp.zeros(()).dtype
    )
    params = jax.tree.map(in_default_precision, module.params)

    def apply_fn(params, x):
        return module(x, params=params, train=False).logits

    return Model(apply_fn, params, (normal(2, 128),))
