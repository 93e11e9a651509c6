"""Equinox's own networks."""

import equinox as eqx
import jax
import jax.numpy as jnp

from real_models.model import Model, equinox, model, normal

KEY = jax.random.key(0)


@model("equinox/MLP")
def mlp() -> Model:
    return equinox(eqx.nn.MLP(4, 2, 16, 3, key=KEY), normal(5, 4))


@model("equinox/MLP of GELU", activation=jax.nn.gelu)
@model("equinox/MLP of PReLU", activation=None)
def other_mlp(activation) -> Model:
    activation = activation or eqx.nn.PReLU(0.1)
    return equinox(eqx.nn.MLP(4, 2, 16, 3, activation=activation, key=KEY), normal(5, 4))


@model("equinox/MultiheadAttention")
def attention() -> Model:
    layer = eqx.nn.MultiheadAttention(2, 6, use_query_bias=True, use_value_bias=True, key=KEY)
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply_fn(params, x):
        return jax.vmap(lambda x: eqx.combine(params, static)(x, x, x))(x)

    return Model(apply_fn, params, (normal(3, 5, 6),))


@model("equinox/GRUCell", cell=eqx.nn.GRUCell)
@model("equinox/LSTMCell", cell=eqx.nn.LSTMCell)
def recurrent(cell) -> Model:
    one, two = jax.random.split(KEY)
    modules = cell(3, 6, key=one), eqx.nn.Linear(6, 2, key=two)
    params, static = eqx.partition(modules, eqx.is_inexact_array)

    def apply_fn(params, x):
        cell, head = eqx.combine(params, static)
        zeros = jnp.zeros(6, x.dtype)
        start = (zeros, zeros) if isinstance(cell, eqx.nn.LSTMCell) else zeros

        def one(sequence):
            last, _ = jax.lax.scan(lambda h, x: (cell(x, h), None), start, sequence)
            return head(last[0] if isinstance(last, tuple) else last)

        return jax.vmap(one)(x)

    return Model(apply_fn, params, (normal(3, 5, 3),))


@model("equinox/convolutions and pooling")
def convolutions() -> Model:
    keys = jax.random.split(KEY, 4)
    nn = eqx.nn
    module = nn.Sequential(
        [
            nn.Conv2d(3, 6, 3, padding=1, key=keys[0]),
            nn.GroupNorm(2, 6),
            nn.Lambda(jax.nn.relu),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(6, 6, 3, groups=3, padding=1, key=keys[1]),
            nn.Lambda(nn.PReLU(0.2)),
            nn.AvgPool2d(2, 2),
            nn.ConvTranspose2d(6, 4, 2, 2, key=keys[2]),
            nn.Lambda(jax.nn.leaky_relu),
            nn.AdaptiveAvgPool2d(1),
            nn.Lambda(jnp.ravel),
            nn.Linear(4, 2, key=keys[3]),
        ]
    )
    return equinox(module, normal(2, 3, 8, 8))
