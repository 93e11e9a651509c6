"""The loaders of CIFAR-10, MNIST and Fashion-MNIST, on small files in the official formats."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest

from pathcond_jax.experiments import sources
from pathcond_jax.experiments.sources import DataError


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


@pytest.fixture
def mnist(tmp_path):
    """A folder in the format of MNIST, its arrays and its table of sums."""
    rng = np.random.default_rng(0)
    shapes = ((7, 28, 28), (7,), (3, 28, 28), (3,))
    arrays = [rng.integers(0, 10, shape).astype(np.uint8) for shape in shapes]
    table = {}
    for name, array in zip(sources.MNIST_MD5, arrays, strict=True):
        (tmp_path / name).write_bytes(idx(array))
        table[name] = md5(idx(array))
    return tmp_path, arrays, table


@pytest.fixture
def cifar10(tmp_path):
    """The same for CIFAR-10, in the folder that its archive unpacks to."""
    rng = np.random.default_rng(0)
    folder = tmp_path / sources.CIFAR10_FOLDER
    folder.mkdir()
    batches, table = [], {}
    for name in sources.CIFAR10_MD5:
        rows, labels = rng.integers(0, 256, (4, 3072)).astype(np.uint8), [3, 1, 4, 1]
        content = pickle.dumps({b"batch_label": b"x", b"labels": labels, b"data": rows}, protocol=2)
        (folder / name).write_bytes(content)
        batches.append(rows)
        table[name] = md5(content)
    return tmp_path, batches, table


def test_mnist(mnist):
    folder, (images, labels, test_images, test_labels), table = mnist
    data = sources.load_mnist(folder, table)
    assert data.train_inputs.shape == (7, 28, 28, 1)
    assert data.train_inputs.dtype == np.float32
    assert abs(data.train_inputs.mean()) < 1e-6
    assert data.train_inputs.std() == pytest.approx(1, abs=1e-6)
    restored = data.test_inputs[..., 0] * images.std() + images.mean()
    np.testing.assert_allclose(restored, test_images, atol=1e-5)
    np.testing.assert_array_equal(data.train_labels, labels)
    np.testing.assert_array_equal(data.test_labels, test_labels)


def test_mnist_compressed(mnist):
    folder, _, table = mnist
    plain = sources.load_mnist(folder, table)
    for name in table:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    for one, other in zip(plain, sources.load_mnist(folder, table), strict=True):
        np.testing.assert_array_equal(one, other)


def test_cifar10(cifar10):
    folder, batches, table = cifar10
    data = sources.load_cifar10(folder, table)
    assert data.train_inputs.shape == (20, 32, 32, 3)
    assert data.test_inputs.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(data.train_labels, [3, 1, 4, 1] * 5)
    pixels = np.stack(batches[:5]).reshape(20, 3, 1024)
    mean, deviation = pixels.mean((0, 2)), pixels.std((0, 2))
    # Row 5 of the picture, column 9, green.
    expected = (pixels[:, 1, 5 * 32 + 9] - mean[1]) / deviation[1]
    np.testing.assert_allclose(data.train_inputs[:, 5, 9, 1], expected, atol=1e-5)
    inside = sources.load_cifar10(folder / sources.CIFAR10_FOLDER, table)
    np.testing.assert_array_equal(inside.train_inputs, data.train_inputs)


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion_mnist"])
def test_a_missing_file_says_what_to_fetch(tmp_path, name):
    with pytest.raises(DataError) as error:
        sources.load(name, tmp_path)
    for part in ("not found", "curl", str(tmp_path), "--data-dir", "--dataset"):
        assert part in str(error.value)


def test_one_missing_file_is_named(mnist):
    folder, _, table = mnist
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"^mnist: t10k-labels-idx1-ubyte not found"):
        sources.load_mnist(folder, table)


def test_the_official_sums_are_checked(mnist, cifar10):
    for name, sum_of_images in (
        ("mnist", "6bbc9ace898e44ae57da46a324031adb"),
        ("fashion_mnist", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    ):
        with pytest.raises(DataError, match=sum_of_images):
            sources.load(name, mnist[0])
    with pytest.raises(DataError, match="c99cafc152244af753f735de768cd75f"):
        sources.load_cifar10(cifar10[0])


def test_truncated_files(mnist):
    folder, _, table = mnist
    path = folder / "train-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(DataError, match="truncated or corrupt"):
        sources.load_mnist(folder, table)
    path.unlink()
    (folder / f"{path.name}.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is truncated or corrupt"):
        sources.load_mnist(folder, table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file"),
        (b"\x1f\x8b\x00\x00", "no IDX file"),
        (b"\x00\x00\x08\x03\x00\x00", "truncated"),
        (b"\x00\x00\x08\x01" + struct.pack(">I", 5) + b"abc", "truncated"),
        (idx(np.zeros((6, 28, 28), np.uint8)), r"images \(6, 28, 28\) with labels \(7,\)"),
    ],
)
def test_other_content_in_an_idx_file(mnist, content, message):
    folder, _, table = mnist
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        sources.load_mnist(folder, table | {"train-images-idx3-ubyte": md5(content)})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps({b"labels": [1]}, protocol=2),
        pickle.dumps({b"labels": [1], b"data": np.zeros((1, 7), np.uint8)}, protocol=2),
        pickle.dumps({b"labels": [1], b"data": print}, protocol=2),
    ],
)
def test_other_content_in_a_batch(cifar10, content):
    folder, _, table = cifar10
    (folder / sources.CIFAR10_FOLDER / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_2 is no batch of CIFAR-10"):
        sources.load_cifar10(folder, table | {"data_batch_2": md5(content)})


def test_what_always_works():
    assert sources.load("digits").train_inputs.shape == (1347, 8, 8, 1)
    moons = sources.load("moons")
    assert moons.train_inputs.shape == (700, 2)
    assert set(moons.test_labels) == {0, 1}
    with pytest.raises(ValueError, match="no data set 'cifar'; there are digits"):
        sources.load("cifar")


def test_a_subset_is_the_first_part():
    whole, part = sources.load("digits"), sources.load("digits", subset=500)
    assert [len(x) for x in part] == [500, 500, 450, 450]
    for one, other in zip(whole, part, strict=True):
        np.testing.assert_array_equal(one[:500], other)
    with pytest.raises(ValueError, match="subset must be positive, not 0"):
        sources.load("digits", subset=0)
