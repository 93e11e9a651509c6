"""Which weights a network does not depend on the scale of, among all its scalings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

_MAX_ROUNDS = 200


def one_sided_slices(effects: Sequence[Any]) -> list[np.ndarray]:
    """Per slice, whether a scaling moves it that divides nothing: all it moves, it multiplies.

    Scalings have many bases: those of a weight before a normalization and of the neuron behind it
    may come as the neuron's and the sum of both. Wherever one scaling is part of another, the rest
    is taken in place of the sum.

    Args:
      effects: per block of slices, a sparse matrix (slices, scalings) of powers.

    Returns:
      A boolean array per block.
    """
    moved = sparse.vstack(effects, "csc")
    for _ in range(_MAX_ROUNDS):
        rest = _without_parts(moved)
        if rest is None:
            break
        moved = rest
    up, down = (np.asarray((moved * sign > 0).sum(0)).ravel() for sign in (1, -1))
    one_sided = np.flatnonzero((up > 0) ^ (down > 0))
    found = np.diff(moved[:, one_sided].tocsr().indptr) > 0
    return np.split(found, np.cumsum([effect.shape[0] for effect in effects])[:-1])


def _without_parts(moved: Any) -> Any | None:
    """Scalings less the smaller ones that are part of them; None if there are none."""
    overlap = sparse.coo_matrix(moved.T @ moved)
    overlap.eliminate_zeros()
    size = overlap.diagonal()
    whole, part, shared = overlap.row, overlap.col, overlap.data
    inside = np.isclose(abs(shared), size[part]) & (size[part] < size[whole])
    smallest = np.zeros(len(size), bool)
    smallest[part[inside]] = True
    smallest[whole[inside]] = False
    # Parts that overlap are taken away one after the other.
    later = smallest[whole] & smallest[part] & (part < whole)
    smallest[whole[later]] = False
    taken = inside & smallest[part]
    if not taken.any():
        return None
    entries = (np.sign(shared[taken]), (part[taken], whole[taken]))
    rest = sparse.csc_matrix(moved - moved @ sparse.csc_matrix(entries, overlap.shape))
    rest.eliminate_zeros()
    return rest
