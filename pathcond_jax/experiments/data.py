"""Data sets as arrays, split into a training and a test part."""

from typing import NamedTuple

import jax
import numpy as np
from sklearn import datasets

Array = np.ndarray | jax.Array


class Dataset(NamedTuple):
    """A labelled data set.

    Attributes:
      train_inputs: float32, (num_train, ...); images are (num_train, height, width, channels).
      train_labels: int32, (num_train,).
      test_inputs: float32, (num_test, ...).
      test_labels: int32, (num_test,).
    """

    train_inputs: Array
    train_labels: Array
    test_inputs: Array
    test_labels: Array


def load_digits(num_test: int = 450, seed: int = 0) -> Dataset:
    """Scikit-learn's 1797 handwritten digits: 8 × 8 × 1 images in [0, 1], ten classes.

    Args:
      num_test: how many images to hold out.
      seed: of the permutation that chooses them.

    Returns:
      The split data set.
    """
    digits = datasets.load_digits()
    inputs = (digits.images[..., None] / 16.0).astype(np.float32)
    return split(inputs, digits.target.astype(np.int32), num_test, seed)


def split(inputs: np.ndarray, labels: np.ndarray, num_test: int, seed: int) -> Dataset:
    """Holds out ``num_test`` examples, chosen by a permutation.

    Raises:
      ValueError: ``num_test`` leaves nothing to train on or to test on.
    """
    if not 0 < num_test < len(inputs):
        raise ValueError(f"num_test must lie between 1 and {len(inputs) - 1}, not {num_test}")
    order = np.random.default_rng(seed).permutation(len(inputs))
    test, train = order[:num_test], order[num_test:]
    return Dataset(inputs[train], labels[train], inputs[test], labels[test])
