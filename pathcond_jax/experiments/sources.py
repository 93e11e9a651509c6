"""Data sets by name: two that always work; CIFAR-10, MNIST and Fashion-MNIST from official files.

Files are verified by their published MD5 sums; nothing is ever downloaded or replaced here.
"""

import functools
import gzip
import hashlib
import io
import pickle
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets

from pathcond_jax.experiments.data import Dataset, load_digits, split

CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
# Of the files without .gz, so that it does not matter how they were compressed.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
DOWNLOAD = {
    "cifar10": (
        "mkdir -p {folder} && "
        "curl -L https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz | tar xz -C {folder}"
    ),
    "mnist": (
        "mkdir -p {folder} && for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 "
        "t10k-labels-idx1; do curl -L -o {folder}/$f-ubyte.gz "
        "https://ossci-datasets.s3.amazonaws.com/mnist/$f-ubyte.gz; done"
    ),
    "fashion_mnist": (
        "mkdir -p {folder} && for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 "
        "t10k-labels-idx1; do curl -L -o {folder}/$f-ubyte.gz "
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/$f-ubyte.gz; done"
    ),
}
DEFAULT_FOLDER = Path("data")
# Where the Debian package dataset-fashion-mnist puts its files.
INSTALLED = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}
# What a batch of CIFAR-10 is pickled from, under its name in old and in new versions of numpy.
_PICKLED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class DataError(Exception):
    """A file of a data set is missing or damaged; the message says what to do."""


def load(name: str, data_dir: Path | None = None, *, subset: int | None = None) -> Dataset:
    """A data set by name, one of ``LOADERS``.

    Args:
      name: ``"digits"``, ``"moons"``, ``"cifar10"``, ``"mnist"`` or ``"fashion_mnist"``.
      data_dir: where the files of the last three lie; None: where a package installs them, else
        the folder ``data``.
      subset: keep only so many of the first training images, and of the first test images; None:
        all.

    Returns:
      The data set; images from files are normalized per channel, before a subset is taken.

    Raises:
      DataError: a file is missing or damaged.
      ValueError: there is no such data set, or ``subset`` is not positive.
    """
    if subset is not None and subset < 1:
        raise ValueError(f"subset must be positive, not {subset}")
    if name not in LOADERS:
        raise ValueError(f"no data set {name!r}; there are {', '.join(LOADERS)}")
    installed = INSTALLED.get(name, DEFAULT_FOLDER)
    default = installed if installed.is_dir() else DEFAULT_FOLDER
    data = _load(name, default if data_dir is None else data_dir)
    return Dataset(*(part[:subset] for part in data))


@functools.lru_cache(maxsize=2)
def _load(name: str, data_dir: Path) -> Dataset:
    return LOADERS[name](data_dir)


def load_moons(seed: int = 0, noise: float = 0.1) -> Dataset:
    """Scikit-learn's two moons: 1000 points in the plane, 300 of them held out."""
    inputs, labels = datasets.make_moons(1000, noise=noise, random_state=seed)
    return split(inputs.astype(np.float32), labels.astype(np.int32), 300, seed)


def load_cifar10(data_dir: Path, md5: Mapping[str, str] = CIFAR10_MD5) -> Dataset:
    """CIFAR-10 from its "python version": images (n, 32, 32, 3), normalized per channel.

    Args:
      data_dir: the folder with the six batches, or the one above it.
      md5: the expected MD5 sum of each file; the last file is the test set.

    Returns:
      The data set.

    Raises:
      DataError: a file is missing, has another MD5 sum or another content.
    """
    nested = data_dir / CIFAR10_FOLDER
    folder = nested if nested.is_dir() else data_dir
    paths = _existing(folder, md5, "cifar10", data_dir)
    parts = [_cifar10_batch(paths[name], md5[name]) for name in md5]
    *train, test = parts
    inputs, labels = (np.concatenate(column) for column in zip(*train, strict=True))
    return Dataset(*_normalized(inputs, test[0], labels, test[1]))


def load_mnist(data_dir: Path, md5: Mapping[str, str] = MNIST_MD5, name: str = "mnist") -> Dataset:
    """MNIST from its IDX files, compressed or not: images (n, 28, 28, 1), normalized.

    Args:
      data_dir: the folder with the four files, with or without ``.gz``.
      md5: the expected MD5 sum of each file when decompressed, in the order of ``MNIST_MD5``.
      name: of the data set, whose files have the same names and format.

    Returns:
      The data set.

    Raises:
      DataError: a file is missing, truncated, has another MD5 sum or another content.
    """
    paths = _existing(data_dir, md5, name, data_dir)
    read = [_idx_array(paths[name], digest) for name, digest in md5.items()]
    for (images, labels), path in zip((read[:2], read[2:]), list(paths.values())[::2], strict=True):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(f"{path}: images {images.shape} with labels {labels.shape}")
    train_images, train_labels, test_images, test_labels = read
    return Dataset(
        *_normalized(train_images[..., None], test_images[..., None], train_labels, test_labels)
    )


LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": lambda _: load_digits(),
    "moons": lambda _: load_moons(),
    "cifar10": load_cifar10,
    "mnist": load_mnist,
    "fashion_mnist": functools.partial(load_mnist, md5=FASHION_MNIST_MD5, name="fashion_mnist"),
}


def _existing(
    folder: Path, names: Mapping[str, str], dataset: str, data_dir: Path
) -> dict[str, Path]:
    """The path of each file, with or without ``.gz``."""
    found = {
        name: path
        for name in names
        for path in (folder / f"{name}.gz", folder / name)
        if path.is_file()
    }
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"{dataset}: {', '.join(missing)} not found in {folder}. Fetch the official files:\n"
            f"  {DOWNLOAD[dataset].format(folder=data_dir)}\n"
            f"and pass --data-dir {data_dir}; or choose another data set with --dataset"
        )
    return {name: found[name] for name in names}


def _verified(path: Path, expected: str) -> bytes:
    """The content of a file, decompressed, if its MD5 sum is right."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is truncated or corrupt ({error}); fetch it again") from error
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != expected:
        raise DataError(
            f"{path} is truncated or corrupt: its {len(content)} bytes have the MD5 sum {actual}, "
            f"the official file {expected}; fetch it again"
        )
    return content


def _idx_array(path: Path, expected: str) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, type, rank, big-endian shape, content."""
    content = _verified(path, expected)
    header = np.frombuffer(content[:4], np.uint8)
    if len(header) < 4 or header[0] or header[1] or header[2] != 8:
        raise DataError(f"{path} is no IDX file of unsigned bytes")
    start = 4 + 4 * int(header[3])
    if len(content) < start:
        raise DataError(f"{path} is truncated: {len(content)} bytes")
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) - start != shape.prod():
        raise DataError(
            f"{path} is truncated or corrupt: {len(content) - start} bytes of shape {tuple(shape)}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


class _Unpickler(pickle.Unpickler):
    """Unpickles arrays, bytes and containers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"unexpected {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _cifar10_batch(path: Path, expected: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and labels (n,) of one batch."""
    content = _verified(path, expected)
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        rows, labels = batch[b"data"], np.asarray(batch[b"labels"])
        # A row is the red, the green and the blue plane.
        images = rows.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no batch of CIFAR-10: {error!r}") from error
    return images, labels


def _normalized(
    train: np.ndarray, test: np.ndarray, train_labels: np.ndarray, test_labels: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Bytes to float32 with mean 0 and deviation 1 per channel of the training set."""
    axes = tuple(range(train.ndim - 1))
    mean, deviation = (
        f(train, axis=axes, dtype=np.float64).astype(np.float32) for f in (np.mean, np.std)
    )
    inputs, test_inputs = ((part.astype(np.float32) - mean) / deviation for part in (train, test))
    return inputs, train_labels.astype(np.int32), test_inputs, test_labels.astype(np.int32)
