"""Haiku's own networks."""

import haiku as hk
import jax

from real_models.model import Model, in_default_precision, model, normal, tokens


def haiku(forward, *inputs) -> Model:
    """``forward(x, is_training)`` in inference mode, in the precision of the tests."""
    net = hk.transform_with_state(forward)
    params, state = jax.jit(net.init, static_argnums=2)(jax.random.key(0), *inputs, True)
    params, state = jax.tree.map(in_default_precision, (params, state))

    def apply_fn(params, *inputs):
        return net.apply(params, state, None, *inputs, False)[0]

    return Model(apply_fn, params, inputs)


@model("haiku/MLP")
def mlp() -> Model:
    return haiku(lambda x, _: hk.nets.MLP([16, 16, 3])(x), normal(5, 4))


@model("haiku/ResNet18", cls=hk.nets.ResNet18)
@model("haiku/ResNet50", cls=hk.nets.ResNet50)
@model("haiku/ResNet18 V2", cls=hk.nets.ResNet18, resnet_v2=True)
def resnet(cls, **options) -> Model:
    return haiku(lambda x, is_training: cls(10, **options)(x, is_training), normal(2, 32, 32, 3))


@model("haiku/MobileNetV1")
def mobilenet() -> Model:
    def forward(x, is_training):
        return hk.nets.MobileNetV1(num_classes=10)(x, is_training)

    return haiku(forward, normal(1, 32, 32, 3))


@model("haiku/LSTM and GRU")
def recurrent() -> Model:
    def forward(x, _):
        core = hk.DeepRNN([hk.LSTM(5), jax.nn.relu, hk.GRU(4), hk.Linear(2)])
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    return haiku(forward, normal(6, 3, 4))


@model("haiku/transformer block")
def transformer() -> Model:
    def forward(ids, _):
        x = hk.Embed(20, 8)(ids)
        initializer = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(2, 4, w_init=initializer, model_size=8)
        y = hk.LayerNorm(-1, True, True)(x)
        x = x + attention(y, y, y)
        y = hk.LayerNorm(-1, True, True)(x)
        return hk.Linear(20)(x + hk.nets.MLP([16, 8], activation=jax.nn.relu)(y))

    return haiku(forward, tokens(2, 5, vocabulary=20))
