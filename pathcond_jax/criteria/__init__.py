"""What to balance: criteria that choose one of the parameters computing the same function."""

from pathcond_jax.criteria._base import Criterion
from pathcond_jax.criteria._catalogue import (
    CRITERIA,
    activation,
    as_criterion,
    convex,
    equalize,
    fisher,
    norm,
    path,
    steepest,
    weighted,
)

__all__ = [
    "CRITERIA",
    "Criterion",
    "activation",
    "as_criterion",
    "convex",
    "equalize",
    "fisher",
    "norm",
    "path",
    "steepest",
    "weighted",
]
