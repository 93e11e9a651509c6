"""Convolutional networks in Flax linen."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.network import FULL_SIZE, NETWORKS, Network, image, linen, network

_shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


class LeNet(nn.Module):
    pool: str = "max"

    @nn.compact
    def __call__(self, x):
        pool = nn.max_pool if self.pool == "max" else nn.avg_pool
        x = pool(nn.relu(nn.Conv(6, (5, 5))(x)), (2, 2), (2, 2))
        x = pool(nn.relu(nn.Conv(8, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(12)(x))
        x = nn.relu(nn.Dense(10)(x))
        return nn.Dense(4)(x)


@network(NETWORKS, "lenet", pool="max")
@network(NETWORKS, "lenet-average", pool="avg")
def lenet(pool) -> Network:
    return linen(LeNet(pool), image(16, 1), 6 + 8 + 12 + 10)


class ConvBN(nn.Module):
    """Convolution, batch normalization, activation."""

    features: int
    kernel: int = 3
    strides: int = 1
    groups: int = 1
    activation: str = "relu"
    train: bool = False

    @nn.compact
    def __call__(self, x):
        window = (self.kernel, self.kernel)
        x = nn.Conv(
            self.features, window, self.strides, use_bias=False, feature_group_count=self.groups
        )(x)
        x = nn.BatchNorm(use_running_average=not self.train)(x)
        return x if self.activation == "linear" else getattr(nn, self.activation)(x)


class VGG16(nn.Module):
    width: int = 64
    dense: int = 4096
    classes: int = 10
    train: bool = False

    @nn.compact
    def __call__(self, x):
        for stage, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(convolutions):
                x = ConvBN(self.width * stage, train=self.train)(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.dense)(x))
        return nn.Dense(self.classes)(x)


@network(NETWORKS, "vgg16")
def vgg16(width=2, dense=8) -> Network:
    return linen(VGG16(width, dense), image(32), 66 * width + 2 * dense)


@network(FULL_SIZE, "vgg16")
def vgg16_full() -> Network:
    return linen(VGG16(classes=1000), _shape((1, 224, 224, 3)), 4224 + 2 * 4096, shapes_only=True)


@network(NETWORKS, "vgg16-training")
def vgg16_training(width=2, dense=8) -> Network:
    found = linen(VGG16(width, dense), image(32), 66 * width + 2 * dense)
    return _training(VGG16(width, dense, train=True), found)


def _training(module, found) -> Network:
    """The same parameters in training mode, the new statistics among the outputs."""
    other = linen(module, found.x, found.neurons, mutable=["batch_stats"])
    return other._replace(params=found.params)


class ResNet(nn.Module):
    depths: Sequence[int]
    width: int = 64
    bottleneck: bool = False
    classes: int = 10
    train: bool = False

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(ConvBN, train=self.train)
        x = nn.max_pool(conv(self.width, 7, 2)(x), (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate(self.depths):
            inner = self.width * 2**stage
            outer = inner * (4 if self.bottleneck else 1)
            for number in range(depth):
                strides = 2 if stage and not number else 1
                if self.bottleneck:
                    y = conv(inner, 3, strides)(conv(inner, 1)(x))
                    y = conv(outer, 1, activation="linear")(y)
                else:
                    y = conv(outer, 3, activation="linear")(conv(inner, 3, strides)(x))
                if x.shape != y.shape:
                    x = conv(outer, 1, strides, activation="linear")(x)
                x = nn.relu(x + y)
        return nn.Dense(self.classes)(x.mean((1, 2)))


@network(NETWORKS, "resnet18")
def resnet18(width=2) -> Network:
    return linen(ResNet((2, 2, 2, 2), width), image(32, batch=8), 45 * width)


@network(NETWORKS, "resnet18-training")
def resnet18_training(width=2) -> Network:
    return _training(ResNet((2, 2, 2, 2), width, train=True), resnet18(width))


@network(NETWORKS, "resnet-bottleneck")
def resnet_bottleneck(width=2) -> Network:
    channels = 1 + 2 * (1 + 2 * 2 + 4 + 8) + 4 * (1 + 2 + 4 + 8)
    return linen(ResNet((1, 2, 1, 1), width, bottleneck=True), image(32), channels * width)


@network(FULL_SIZE, "resnet18")
def resnet18_full() -> Network:
    module = ResNet((2, 2, 2, 2), classes=1000)
    return linen(module, _shape((1, 224, 224, 3)), 2880, shapes_only=True)


@network(FULL_SIZE, "resnet50")
def resnet50_full() -> Network:
    module = ResNet((3, 4, 6, 3), bottleneck=True, classes=1000)
    return linen(module, _shape((1, 224, 224, 3)), 11456, shapes_only=True)


class UNet(nn.Module):
    """Three levels; ``up`` is "transpose", "nearest" or "bilinear"."""

    width: int
    up: str
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=self.padding)
        skips = []
        for level in range(2):
            x = nn.relu(conv(self.width * 2**level)(x))
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(conv(self.width * 4)(x))
        for level in reversed(range(2)):
            if self.up == "transpose":
                x = nn.ConvTranspose(self.width * 2**level, (2, 2), (2, 2))(x)
            else:
                shape = (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3])
                x = jax.image.resize(x, shape, self.up)
            x = jnp.concatenate([x, skips[level]], -1)
            x = nn.relu(conv(self.width * 2**level)(x))
        return nn.Conv(2, (1, 1))(x)


@network(NETWORKS, "unet-transpose", up="transpose")
@network(NETWORKS, "unet-nearest", up="nearest")
@network(NETWORKS, "unet-bilinear", up="bilinear")
@network(NETWORKS, "unet-circular", up="bilinear", padding="CIRCULAR")
def unet(up, width=3, **options) -> Network:
    channels = (1 + 2 + 4 + 2 + 1) * width + (3 * width if up == "transpose" else 0)
    return linen(UNet(width, up, **options), image(8, 2), channels)


class DenseNet(nn.Module):
    growth: int
    layers: int
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2 * self.growth, (3, 3), use_bias=False)(x)
        for _ in range(self.layers):
            y = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
            x = jnp.concatenate([x, nn.Conv(self.growth, (3, 3), use_bias=False)(y)], -1)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
        return nn.Dense(3)(x.mean((1, 2)))


@network(NETWORKS, "densenet")
def densenet(growth=2, layers=3) -> Network:
    channels = sum((2 + k) * growth for k in range(layers + 1))
    return linen(DenseNet(growth, layers), image(6), channels)


@network(NETWORKS, "densenet-training")
def densenet_training(growth=2, layers=3) -> Network:
    return _training(DenseNet(growth, layers, train=True), densenet(growth, layers))


class MobileNetV2(nn.Module):
    """Inverted residuals: (expansion, channels, repeats, strides)."""

    activation: str
    settings: Sequence[tuple[int, int, int, int]] = ((1, 3, 1, 1), (3, 4, 2, 2), (3, 5, 2, 1))
    stem: int = 4
    last: int = 8

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(ConvBN, activation=self.activation)
        x = conv(self.stem, 3, 2)(x)
        for expansion, channels, repeats, strides in self.settings:
            for number in range(repeats):
                y = conv(x.shape[-1] * expansion, 1)(x) if expansion > 1 else x
                y = conv(y.shape[-1], 3, strides if not number else 1, y.shape[-1])(y)
                y = ConvBN(channels, 1, activation="linear")(y)
                x = x + y if x.shape == y.shape else y
        return nn.Dense(3)(conv(self.last, 1)(x).mean((1, 2)))


@network(NETWORKS, "mobilenetv2", activation="relu")
@network(NETWORKS, "mobilenetv2-relu6", activation="relu6")
def mobilenetv2(activation) -> Network:
    streams = 3 + 4 + 5
    hidden = 4 + 4 + 2 * (9 + 12) + 2 * (12 + 15) + 8
    found = linen(
        MobileNetV2(activation), image(8), streams + (hidden if activation == "relu" else 0)
    )
    return found._replace(pinned_by=("min in relu6",) if activation == "relu6" else ())


class SqueezeExcitation(nn.Module):
    channels: int
    squeezed: int

    @nn.compact
    def __call__(self, x):
        x = ConvBN(self.channels)(x)
        gate = nn.relu(nn.Dense(self.squeezed)(x.mean((1, 2))))
        gate = nn.sigmoid(nn.Dense(self.channels)(gate))
        return nn.Conv(2, (1, 1))(x * gate[:, None, None, :])


@network(NETWORKS, "squeeze-excitation")
def squeeze_excitation() -> Network:
    return linen(SqueezeExcitation(6, 3), image(6), 9)


class GroupNormNet(nn.Module):
    """Weight-normalized and grouped convolutions between group normalizations."""

    @nn.compact
    def __call__(self, x):
        conv = nn.WeightNorm(nn.Conv(6, (3, 3)), variable_filter={"kernel"})
        x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x)))
        x = nn.relu(nn.GroupNorm(3)(conv(x)))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=3, strides=2)(x))
        return nn.Dense(2)(x.mean((1, 2)))


@network(NETWORKS, "groupnorm")
def groupnorm() -> Network:
    # Weight normalization fixes each slice of its kernel; its gain takes one scale for all inputs.
    return linen(GroupNormNet(), image(6), 1 + 6 + 6)
