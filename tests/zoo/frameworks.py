"""The same networks in Equinox, Haiku, Flax nnx and plain JAX."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from zoo.network import NETWORKS, Network, draw, image, lenient, network, vector


@network(NETWORKS, "equinox-mlp")
def equinox_mlp() -> Network:
    model = eqx.filter_eval_shape(eqx.nn.MLP, 6, 2, 5, 3, key=jax.random.key(0))
    params, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return Network(apply_fn, draw(params), vector(7, 6), 15)


@network(NETWORKS, "haiku-resnet")
def haiku_resnet() -> Network:
    def forward(x, train):
        def conv(channels, x):
            x = hk.Conv2D(channels, 3, with_bias=False)(x)
            return hk.BatchNorm(True, True, 0.9)(x, is_training=train)

        x = jax.nn.relu(conv(4, x))
        for _ in range(2):
            x = jax.nn.relu(x + conv(4, jax.nn.relu(conv(5, x))))
        return hk.Linear(3)(hk.avg_pool(x, (2, 2, 1), (2, 2, 1), "SAME").mean((1, 2)))

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    x = image(6)
    init = lenient(functools.partial(net.init, train=True))
    params, state = jax.eval_shape(init, jax.random.key(0), x)
    state = jax.tree.map(jnp.abs, draw(state))

    @lenient
    def apply_fn(params, x):
        return net.apply(params, state, x, train=False)[0]

    return Network(apply_fn, draw(params), x, 4 + 2 * 5)


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(4, 5, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(3 * 3 * 5, 6, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    @lenient
    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.dense(x.reshape(x.shape[0], -1)))
        return self.head(x)


@network(NETWORKS, "nnx-cnn")
def nnx_cnn() -> Network:
    shapes = nnx.eval_shape(lambda: NnxCNN(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(shapes, nnx.Param, ...)
    rest = draw(rest)

    def apply_fn(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    return Network(apply_fn, draw(params), image(6), 4 + 5 + 6)


@network(NETWORKS, "plain-jax")
def plain_jax() -> Network:
    def apply_fn(params, x):
        for kernel, bias in params[:-1]:
            x = jnp.maximum(x @ kernel + bias[None], 0.0)
        kernel, bias = params[-1]
        return x @ kernel + bias[None]

    shapes = [((4, 5), (5,)), ((5, 3), (3,)), ((3, 2), (2,))]
    shapes = [tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in pair) for pair in shapes]
    return Network(apply_fn, draw(shapes), vector(7, 4), 8)
