"""The sizes of a study that the command line can replace; needs none of the extras."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Size(NamedTuple):
    """How an option of the command gives a setting.

    Attributes:
      read: from the option's text to the value.
      metavar: what stands for the value in the help.
      meaning: the rest of that line.
    """

    read: Callable[[str], Any]
    metavar: str
    meaning: str


def listed(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Reads values that are separated by commas."""

    def values(text: str) -> list[Any]:
        return [read(part) for part in text.split(",")]

    return values


SIZES = {
    "subset": Size(int, "N", "the first N images only, of those to train and of those to test on"),
    "num_epochs": Size(int, "N", "passes over the training images"),
    "num_seeds": Size(int, "N", "how many initializations"),
    "learning_rates": Size(listed(float), "RATE,...", "learning rates"),
    "methods": Size(listed(str), "NAME,...", "methods, by their names in the tables"),
    "networks": Size(listed(str), "NAME,...", "networks, by their names in the tables"),
    "width": Size(int, "N", "of the hidden layers"),
    "widths": Size(listed(int), "N,...", "channels of each group of layers"),
    "depths": Size(listed(int), "N,...", "numbers of hidden layers"),
}
# What is measured instead of what a study trains.
OWN = {
    "weights": Size(
        str,
        "FILE:FACTORY",
        "a trained network of yours: a Python file and its function, as `pathcond inspect` takes "
        "them",
    ),
    "checkpoint": Size(str, "DIR", "take its parameters from a folder written by Orbax"),
    "inputs": Size(
        str,
        "FILE",
        "examples for it: an array (.npy), or several (.npz), the inputs of the network in their "
        "order and, if known, integer `labels`; without these, what counts is agreement with the "
        "network itself",
    ),
}
# The sizes that mean something where nothing is trained.
OWN_SIZES = ("subset", "num_seeds", "methods")
# The options of each study that takes any.
_TRAINING = ("subset", "num_epochs", "num_seeds", "learning_rates", "methods")
TAKEN = {
    "figure2": (*_TRAINING, "width", "depths"),
    "figure3": (*_TRAINING, "widths"),
    "figure5": _TRAINING,
    "helps": _TRAINING,
    "prune": tuple(OWN),
    "quantize": ("subset", "num_epochs", "num_seeds", "methods", "networks", *OWN),
}


def flag(name: str) -> str:
    """The option for a setting: ``--epochs`` for ``num_epochs``."""
    return "--" + name.removeprefix("num_").replace("_", "-")
