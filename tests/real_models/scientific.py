"""Penzai, ESM-2 in Equinox, normalizing flows, operator networks and networks with memory."""

import equinox as eqx
import esm2quinox
import flowjax.bijections
import flowjax.distributions
import flowjax.flows
import jax
import jax.numpy as jnp
from foundax.architectures.deeponet import DeepONet
from memax.equinox.train_utils import get_residual_memory_model
from penzai import pz
from penzai.models.simple_mlp import MLP
from penzai.models.transformer.variants import llamalike_common

from real_models.model import Model, equinox, model, normal, tokens

KEY = jax.random.key(0)


def penzai(module, inputs: tuple[str, ...], outputs: tuple[str, ...], x) -> Model:
    """A module with its parameters taken out; the axes of its input and output have names."""
    unbound, variables = pz.unbind_params(module, freeze=True)

    def apply_fn(params, x):
        values = [pz.ParameterValue(label=label, value=v) for label, v in params.items()]
        return pz.bind_variables(unbound, values)(pz.nx.wrap(x, *inputs)).unwrap(*outputs)

    return Model(apply_fn, {variable.label: variable.value for variable in variables}, (x,))


@model("penzai/MLP")
def mlp() -> Model:
    module = MLP.from_config(init_base_rng=KEY, feature_sizes=[4, 16, 16, 2])
    axes = "batch", "features"
    return penzai(module, axes, axes, normal(5, 4))


@model("penzai/LLaMA")
def llama() -> Model:
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2, query_head_multiplier=1, embedding_dim=12, projection_dim=6,
        mlp_hidden_dim=16, num_decoder_blocks=2, vocab_size=24, mlp_variant="swiglu",
        tie_embedder_and_logits=False, parameter_dtype=jnp.zeros(()).dtype,
        activation_dtype=jnp.zeros(()).dtype,
    )  # fmt: skip
    module = llamalike_common.build_llamalike_transformer(config, init_base_rng=KEY)
    inputs = tokens(2, 6, vocabulary=24)
    return penzai(module, ("batch", "seq"), ("batch", "seq", "vocabulary"), inputs)


@model("esm2quinox/ESM-2")
def esm2() -> Model:
    module = esm2quinox.ESM2(num_layers=2, embed_size=12, num_heads=2, token_dropout=False, key=KEY)
    built = equinox(module, tokens(2, 6, vocabulary=24))
    return built._replace(apply_fn=lambda *a: built.apply_fn(*a).logits)


@model("flowjax/masked autoregressive flow", flow="masked_autoregressive_flow")
def flow(flow) -> Model:
    base = flowjax.distributions.Normal(jnp.zeros(3))
    sizes = {"flow_layers": 2, "nn_width": 8, "nn_depth": 1}
    module = getattr(flowjax.flows, flow)(KEY, base_dist=base, **sizes)
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return Model(lambda params, x: eqx.combine(params, static).log_prob(x), params, (normal(5, 3),))


@model("foundax/DeepONet")
def deeponet() -> Model:
    module = DeepONet(
        n_sensors=5, basis_functions=6, branch_hidden_dims=(8, 8), trunk_hidden_dims=(8, 8),
        activation=jax.nn.relu, key=KEY,
    )  # fmt: skip
    return equinox(module, normal(4, 5), normal(4, 3, 1))


@model("memax/GRU", kind="GRU")
@model("memax/S6", kind="S6")
def memory(kind) -> Model:
    module = get_residual_memory_model(kind, input=3, hidden=9, output=2, num_layers=2, key=KEY)
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def apply_fn(params, x):
        module = eqx.combine(params, static)
        start = jnp.zeros(x.shape[1], bool)

        def one(x):
            state = module.initialize_carry()
            return module(state, (x, start))[1]

        return jax.vmap(one)(x)

    return Model(apply_fn, params, (normal(2, 5, 3),))
