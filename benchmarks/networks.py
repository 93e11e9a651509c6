"""The networks of the benchmarks, with PyTorch's default initialization."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for weights and biases alike.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _dense(features: int, bias: bool = True) -> nn.Dense:
    return nn.Dense(features, bias, kernel_init=_uniform, bias_init=nn.initializers.uniform(0.01))


def _conv(features: int, size: int, stride: int = 1, bias: bool = False) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding=size // 2,
        use_bias=bias,
        kernel_init=_uniform,
        bias_init=nn.initializers.uniform(0.01),
    )


class MLP(nn.Module):
    """Dense layers with ReLU between them; no bias on the last."""

    hidden: Sequence[int]
    outputs: int = 10

    @nn.compact
    def __call__(self, x):
        for features in self.hidden:
            x = nn.relu(_dense(features)(x))
        return _dense(self.outputs, bias=False)(x)


class PlainConv(nn.Module):
    """Nine convolutions, two max pools, one average pool: widths 128, 256 and 320."""

    @nn.compact
    def __call__(self, x):
        for features in (128, 256):
            for _ in range(3):
                x = nn.relu(_conv(features, 3, bias=True)(x))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for features, size in ((320, 3), (320, 1), (10, 1)):
            x = nn.relu(_conv(features, size, bias=True)(x))
        return nn.avg_pool(x, (8, 8), (8, 8)).reshape(x.shape[0], -1)


class Block(nn.Module):
    """A residual block of the given (features, kernel size) layers."""

    layers: Sequence[tuple[int, int]]
    stride: int
    project: bool
    train: bool

    @nn.compact
    def __call__(self, x):
        def normalized(x, features, size, stride):
            x = _conv(features, size, stride)(x)
            return nn.BatchNorm(use_running_average=not self.train)(x)

        y = x
        strided = next(k for k, (_, size) in enumerate(self.layers) if size == 3)
        for k, (features, size) in enumerate(self.layers):
            y = normalized(y, features, size, self.stride if k == strided else 1)
            y = nn.relu(y) if k + 1 < len(self.layers) else y
        if self.project or x.shape != y.shape:
            x = normalized(x, self.layers[-1][0], 1, self.stride)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet with batch normalization; ``project_all``: type C, no identity skip."""

    depths: Sequence[int]
    bottleneck: bool = False
    project_all: bool = False
    outputs: int = 10
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train)(_conv(64, 7, 2)(x))
        x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            w = 64 << stage
            layers = ((w, 1), (w, 3), (4 * w, 1)) if self.bottleneck else ((w, 3), (w, 3))
            for k in range(depth):
                stride = 2 if stage and not k else 1
                x = Block(layers, stride, self.project_all, self.train)(x)
        return _dense(self.outputs)(x.mean((1, 2)))


class Network(NamedTuple):
    """A model and the shape of one input; images of 32 × 32 as in the paper."""

    model: nn.Module
    shape: tuple[int, ...]


NETWORKS: dict[str, Network] = {
    "mlp3": Network(MLP((500,) * 3), (3072,)),
    "mlp8": Network(MLP((500,) * 8), (3072,)),
    "conv": Network(PlainConv(), (32, 32, 3)),
    "resnet18c": Network(ResNet((2, 2, 2, 2), project_all=True), (32, 32, 3)),
    "resnet50": Network(ResNet((3, 4, 6, 3), bottleneck=True), (32, 32, 3)),
}


def prepared(network: Network, seed: int = 0) -> tuple[Callable[..., Any], Any]:
    """``apply(variables, x)`` and variables."""
    x = jnp.ones((1, *network.shape))
    return network.model.apply, jax.jit(network.model.init)(jax.random.key(seed), x)


def train_step(network: Network) -> Callable[..., Any]:
    """One step of gradient descent on cross-entropy, batch statistics in training mode."""
    model = network.model
    if hasattr(model, "train"):
        model = model.copy(train=True)

    def step(variables: Any, x: jax.Array, y: jax.Array) -> Any:
        rest = {key: value for key, value in variables.items() if key != "params"}

        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, updated = (
                model.apply({**rest, "params": params}, x, mutable=list(rest) or False)
                if rest
                else (model.apply({"params": params}, x), {})
            )
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
            return -picked.mean(), updated

        gradient, updated = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], gradient)
        return {**updated, "params": params}

    return step
