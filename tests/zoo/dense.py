"""Dense networks, pinned activations, recurrence, ensembles, weight tying."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.network import NETWORKS, Network, draw, lenient, linen, network, vector


class MLP(nn.Module):
    widths: Sequence[int]
    activation: Callable = nn.relu
    dropout: float = 0.0
    final: Callable = staticmethod(lambda x: x)

    @nn.compact
    def __call__(self, x, train=False):
        *hidden, out = self.widths
        for width in hidden:
            x = self.activation(nn.Dense(width)(x))
            if self.dropout:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return self.final(nn.Dense(out)(x))


@network(NETWORKS, "mlp")
def mlp() -> Network:
    return linen(MLP((5, 4, 3, 2)), vector(7, 6), 12)


@network(NETWORKS, "mlp-leaky", activation=functools.partial(nn.leaky_relu, negative_slope=0.1))
@network(NETWORKS, "mlp-prelu", activation=lambda x: nn.PReLU()(x))
@network(NETWORKS, "mlp-where", activation=lambda x: jnp.where(x > 0, x, 0.0))
@network(NETWORKS, "mlp-abs", activation=jnp.abs)
@network(NETWORKS, "mlp-dropout", dropout=0.3)
def mlp_variant(**options) -> Network:
    return linen(MLP((5, 4, 3, 2), **options), vector(7, 6), 12)


@network(NETWORKS, "mlp-dropout-on")
def mlp_dropout_on() -> Network:
    rngs = {"dropout": jax.random.key(3)}
    return linen(MLP((5, 4, 3, 2), dropout=0.3), vector(7, 6), 12, train=True, rngs=rngs)


@network(NETWORKS, "mlp-tanh", activation=nn.tanh, pinned_by=("tanh",))
@network(NETWORKS, "mlp-gelu", activation=nn.gelu, pinned_by=("add in gelu",))
@network(NETWORKS, "mlp-sigmoid", activation=nn.sigmoid, pinned_by=("sigmoid",))
@network(NETWORKS, "mlp-relu6", activation=nn.relu6, pinned_by=("min in relu6",))
def mlp_pinned(activation, pinned_by) -> Network:
    return linen(MLP((5, 4, 3, 2), activation), vector(7, 6), 0)._replace(pinned_by=pinned_by)


@network(NETWORKS, "softmax-head")
def softmax_head() -> Network:
    found = linen(MLP((4,), final=nn.softmax), vector(7, 6), 0)
    return found._replace(pinned_by=("exp",))


class SwiGLU(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        gate = nn.silu(nn.Dense(self.width, use_bias=False, name="gate")(x))
        up = nn.Dense(self.width, use_bias=False, name="up")(x)
        return nn.Dense(x.shape[-1], use_bias=False, name="down")(gate * up)


@network(NETWORKS, "swiglu")
def swiglu() -> Network:
    return linen(SwiGLU(5), vector(7, 3), 5)._replace(pinned_by=("sigmoid in silu",))


class Recurrent(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        cell = nn.SimpleCell(self.hidden, activation_fn=nn.relu, param_dtype=x.dtype)
        return nn.Dense(2)(nn.RNN(cell)(x))


@network(NETWORKS, "recurrent-linen")
def recurrent_linen() -> Network:
    return linen(Recurrent(4), vector(2, 6, 3), 4)


@network(NETWORKS, "recurrent-scan", unroll=1)
@network(NETWORKS, "recurrent-scan-unrolled", unroll=3)
def recurrent_scan(unroll) -> Network:
    def apply_fn(params, x):
        def step(h, row):
            h = jax.nn.relu(row @ params["input"] + h @ params["recurrent"] + params["bias"])
            return h, h @ params["output"]

        return jax.lax.scan(step, jnp.zeros(4, x.dtype), x, unroll=unroll)[1]

    shapes = {"input": (3, 4), "recurrent": (4, 4), "bias": (4,), "output": (4, 2)}
    return Network(apply_fn, draw(_structs(shapes)), vector(6, 3), 4)


def _structs(shapes):
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape)


@network(NETWORKS, "ensemble")
def ensemble() -> Network:
    module = MLP((5, 4, 3, 2))
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((7, 6), jnp.float32)
    )
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((3, *s.shape), s.dtype), shapes)
    apply_fn = lenient(jax.vmap(module.apply, in_axes=(0, None)))
    return Network(apply_fn, draw(stacked), vector(7, 6), 36)


@network(NETWORKS, "tied-autoencoder")
def tied_autoencoder() -> Network:
    def apply_fn(params, x):
        hidden = jax.nn.relu(x @ params["kernel"] + params["bias"][None])
        return hidden @ params["kernel"].T + params["out"][None]

    shapes = {"kernel": (4, 3), "bias": (3,), "out": (4,)}
    return Network(apply_fn, draw(_structs(shapes)), vector(5, 4), 0)


@network(NETWORKS, "tied-deep-autoencoder")
def tied_deep_autoencoder() -> Network:
    # The outer matrix is used twice, the inner hidden layer is free.
    def apply_fn(params, x):
        hidden = jax.nn.relu(x @ params["kernel"])
        code = jax.nn.relu(hidden @ params["down"] + params["bias"][None])
        return jax.nn.relu(code @ params["up"]) @ params["kernel"].T

    shapes = {"kernel": (4, 8), "down": (8, 5), "bias": (5,), "up": (5, 8)}
    return Network(apply_fn, draw(_structs(shapes)), vector(5, 4), 8 + 5)


@network(NETWORKS, "layer-applied-twice")
def layer_applied_twice() -> Network:
    # One layer used twice in a row ties its input to its output: only the stream's scale moves.
    def apply_fn(params, x):
        x = jax.nn.relu(x @ params["first"])
        for _ in range(2):
            x = jax.nn.relu(x @ params["twice"] + params["bias"][None])
        return x @ params["last"]

    shapes = {"first": (3, 4), "twice": (4, 4), "bias": (4,), "last": (4, 2)}
    return Network(apply_fn, draw(_structs(shapes)), vector(5, 3), 4)


@network(NETWORKS, "scan-over-layers", remat=False)
@network(NETWORKS, "scan-over-layers-remat", remat=True)
def scan_over_layers(remat) -> Network:
    # Residual blocks with stacked parameters: every block has hidden units, all share a stream.
    def apply_fn(params, x):
        def block(x, layer):
            hidden = jax.nn.relu(x @ layer["up"] + layer["bias"][None])
            return x + hidden @ layer["down"], None

        block = jax.checkpoint(block) if remat else block
        x = jax.lax.scan(block, x @ params["in"], params["layers"])[0]
        return x @ params["out"]

    shapes = {
        "in": (3, 4),
        "layers": {"up": (3, 4, 5), "bias": (3, 5), "down": (3, 5, 4)},
        "out": (4, 2),
    }
    return Network(apply_fn, draw(_structs(shapes)), vector(6, 3), 4 + 3 * 5)


@network(NETWORKS, "low-rank-adapter")
def low_rank_adapter() -> Network:
    # W + AB: the rank of AB has scales of its own.
    def apply_fn(params, x):
        kernel = params["kernel"] + params["a"] @ params["b"]
        return jax.nn.relu(x @ kernel) @ params["out"]

    shapes = {"kernel": (4, 5), "a": (4, 2), "b": (2, 5), "out": (5, 2)}
    return Network(apply_fn, draw(_structs(shapes)), vector(3, 4), 5 + 2)


@network(NETWORKS, "masked-weights")
def masked_weights() -> Network:
    def apply_fn(params, x):
        mask = jnp.tri(4, 5, dtype=x.dtype)
        hidden = jax.nn.relu(x @ (params["in"] * mask) + params["bias"][None])
        return hidden @ params["out"]

    shapes = {"in": (4, 5), "bias": (5,), "out": (5, 2)}
    return Network(apply_fn, draw(_structs(shapes)), vector(3, 4), 5)
