"""Linear equations between log-scales: signed connected components, then elimination.

A *label* is an unknown log-scale. Label arrays hold label numbers; 0 is the log-scale 0 and
``WILD`` marks an entry that is zero, infinite or NaN and therefore fits every scale.

Almost all equations say that a label is 0 or that two are equal or opposite: their classes are the
connected components of a graph in which each label has a node and so has its inverse. What is left
is eliminated row by row, many independent rows at a time, and the components are looked for again.
"""

import bisect
import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

WILD = -1
_MAX_ROUNDS = 200
# Below this many, repeated equations cost less than finding them.
_MANY_ROWS = 1 << 16
_MAX_ROWS = 1 << 24


class Term(NamedTuple):
    """``coefficient · z[labels]``; the array broadcasts against the value it describes."""

    coefficient: float
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class LabelBlock:
    """Labels created together: for axes of a leaf, or by an operation (``leaf`` is None).

    Those of an operation that is repeated, at ``repeats`` steps of a loop, lie side by side. Where
    each of ``copies`` steps has labels of its own for which the same holds, one block stands for
    all of them.
    """

    start: int
    leaf: int | None
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    repeats: int = 1
    copies: int = 1


class Rows(NamedTuple):
    """Equations of one form: Σ ``coefficients · z[row]`` = 0 for each row of ``labels``."""

    coefficients: np.ndarray
    labels: np.ndarray
    origin: int


class Solved(NamedTuple):
    """The solution space.

    Attributes:
      table: sparse (labels, labels): each log-scale as a combination of free ones.
      free: the free labels, in order of creation.
      reason: per label, the origin of the equation that fixes it at 0, or -1.
      parent: per label, a label whose reason it shares.
      tied: per label, the origin of an equation that ties it to others, or -1.
    """

    table: Any
    free: np.ndarray
    reason: np.ndarray
    parent: np.ndarray
    tied: np.ndarray

    def why(self, label: int) -> int:
        """The origin that fixes ``label``, or -1."""
        for _ in range(_MAX_ROUNDS):
            if self.reason[label] >= 0 or self.parent[label] == label:
                break
            label = int(self.parent[label])
        return int(self.reason[label])


class Equations:
    """A growing list of labels and of equations Σ coefficient · z[label] = 0."""

    def __init__(self) -> None:
        self.blocks: list[LabelBlock] = []
        self.count = 1
        self._starts: list[int] = []
        self._rows: list[Rows] = []

    def new(
        self,
        shape: tuple[int, ...],
        leaf: int | None = None,
        axes: tuple[int, ...] = (),
        repeats: int = 1,
        copies: int = 1,
    ) -> np.ndarray:
        """A new array of labels."""
        size = int(np.prod(shape, dtype=np.int64))
        labels = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self._starts.append(self.count)
        self.blocks.append(LabelBlock(self.count, leaf, axes, tuple(shape), repeats, copies))
        self.count += size
        return labels

    def mark(self) -> tuple[int, int, int]:
        """How much there is, for :meth:`forget`."""
        return len(self.blocks), self.count, len(self._rows)

    def forget(self, mark: tuple[int, int, int]) -> None:
        """Takes back the labels and equations that came after ``mark``."""
        blocks, self.count, rows = mark
        del self.blocks[blocks:], self._starts[blocks:], self._rows[rows:]

    def take(self, mark: tuple[int, int, int]) -> tuple[list[LabelBlock], list[Rows]]:
        """Forgets the labels and equations that came after ``mark``, and returns them."""
        taken = self.blocks[mark[0] :], self._rows[mark[2] :]
        self.forget(mark)
        return taken

    def too_many(self, terms: Iterable[Term]) -> bool:
        """Whether there are more equations Σ terms = 0 than are written down."""
        shape = np.broadcast_shapes(*(term.labels.shape for term in terms))
        return bool(np.prod(shape, dtype=np.float64) > _MAX_ROWS)

    def extend(self, rows: Rows) -> None:
        """Adds equations as they are."""
        self._rows.append(rows)

    def leaf_numbers(self, labels: np.ndarray) -> np.ndarray:
        """Per label, the number of its block if that is a leaf's, or -1."""
        numbers = np.searchsorted(self._starts, labels, side="right") - 1
        is_leaf = np.array([block.leaf is not None for block in self.blocks], bool)
        return np.where((labels > 0) & is_leaf[numbers], numbers, -1)

    def block_numbers(self, labels: np.ndarray) -> list[int]:
        """The distinct blocks that an array's labels belong to."""
        first = (
            bisect.bisect_right(self._starts, labels.min(where=labels > 0, initial=self.count)) - 1
        )
        last = bisect.bisect_right(self._starts, labels.max(initial=0)) - 1
        if last <= first:
            return [last] if last == first else []
        found = np.searchsorted(self._starts[first:], labels[labels > 0], side="right") - 1
        return [int(k) + first for k in np.flatnonzero(np.bincount(found))]

    def require(self, terms: list[Term], origin: int) -> None:
        """Adds Σ terms = 0, elementwise after broadcasting; rows with a wild entry say nothing."""
        if not terms:
            return
        shape = np.broadcast_shapes(*(term.labels.shape for term in terms))
        if len(terms) > 1 and self.too_many(terms):
            # Each term vanishing is a sound, stronger demand.
            for term in terms:
                self.require([term], origin)
            return
        labels = np.stack([np.broadcast_to(t.labels, shape).reshape(-1) for t in terms], axis=1)
        labels = labels[(labels != WILD).all(axis=1)]
        if len(labels) > _MANY_ROWS:
            # NumPy compares numbers much faster than rows of one.
            labels = np.unique(labels, axis=0 if len(terms) > 1 else None).reshape(-1, len(terms))
        self._rows.append(Rows(np.array([t.coefficient for t in terms]), labels, origin))

    def solve(self, without: Collection[int] = ()) -> Solved:
        """All solutions, as a table over free labels; without the equations of some origins."""
        # Leaves are written in terms of what operations create, and later labels by earlier ones;
        # what every step has for itself in terms of what all steps share, never the reverse.
        level = np.zeros(self.count, np.int64)
        for block in self.blocks:
            size = int(np.prod(block.shape, dtype=np.int64))
            level[block.start : block.start + size] = (block.leaf is not None) + 2 * (
                block.copies > 1
            )
        matrix, origins = _matrix(self._rows, self.count)
        kept = np.flatnonzero(~np.isin(origins, list(without))) if without else slice(None)
        return _solve(matrix[kept], origins[kept], np.arange(self.count) + level * self.count)


def imply_equal(rows: Sequence[Rows], left: np.ndarray, right: np.ndarray) -> bool:
    """Whether all solutions of some equations are the same at two arrays of labels."""
    used = np.concatenate([[0], left, right, *(labels.reshape(-1) for _, labels, _ in rows)])
    known = np.unique(used.clip(min=0))
    own = [r._replace(labels=np.searchsorted(known, r.labels.clip(min=0))) for r in rows]
    table = _solve(*_matrix(own, len(known)), np.arange(len(known))).table
    one, two = (table[np.searchsorted(known, labels)] for labels in (left, right))
    return not clean(one - two).nnz


def _matrix(equations: Sequence[Rows], count: int) -> tuple[Any, np.ndarray]:
    counts = [len(labels) for _, labels, _ in equations]
    if not sum(counts):
        return sparse.csr_matrix((0, count)), np.zeros(0, np.int64)
    first = np.cumsum([0, *counts[:-1]])
    rows = np.concatenate(
        [
            np.repeat(np.arange(start, start + n), len(coefficients))
            for start, n, (coefficients, _, _) in zip(first, counts, equations, strict=True)
        ]
    )
    cols = np.concatenate([labels.reshape(-1) for _, labels, _ in equations])
    data = np.concatenate([np.tile(c, len(labels)) for c, labels, _ in equations])
    origins = np.repeat([origin for _, _, origin in equations], counts)
    keep = cols > 0
    shape = (sum(counts), count)
    return sparse.csr_matrix((data[keep], (rows[keep], cols[keep])), shape), origins


def fits_every_scale(constant: np.ndarray | None) -> np.ndarray:
    """Where a constant fits every scale, with size 1 along axes on which that is the same."""
    array = np.ones(()) if constant is None else constant
    free = (array == 0) | ~np.isfinite(array)
    for axis in range(array.ndim):
        head = np.take(free, [0], axis) if array.shape[axis] else free
        if (free == head).all():
            free = head
    return free


def cancel(terms: list[Term]) -> list[Term]:
    """Adds up terms over the same labels and drops what is zero."""
    merged: list[Term] = []
    for term in terms:
        if not term.labels.any():
            continue
        for k, other in enumerate(merged):
            if other.labels is term.labels or (
                other.labels.shape == term.labels.shape
                and np.array_equal(other.labels, term.labels)
            ):
                merged[k] = Term(other.coefficient + term.coefficient, other.labels)
                break
        else:
            merged.append(term)
    return [term for term in merged if abs(term.coefficient) > 1e-9 or (term.labels == WILD).any()]


def null_space(matrix: Any, labels: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Labels to fix at 0 so that no combination of the others is mapped to 0.

    Args:
      matrix: sparse (equations, labels).
      labels: those to consider; the others are 0.
      rank: which ones to fix rather: the lower ones.
    """
    unsure = np.zeros(matrix.shape[1])
    unsure[labels] = 1.0
    present = sparse.csr_matrix(
        (np.ones_like(matrix.data), matrix.indices, matrix.indptr), matrix.shape
    )
    positions = np.arange(len(unsure), dtype=float)
    while True:
        # A label that is alone in an equation is 0.
        alone = present @ unsure == 1.0
        if not alone.any():
            break
        unsure[(present @ (unsure * positions))[alone].astype(np.int64)] = 0.0
    left = np.flatnonzero(unsure)
    if not left.size:
        return left
    rows = matrix[:, left]
    solved = _solve(rows, np.zeros(rows.shape[0], np.int64), np.argsort(np.argsort(rank[left])), 0)
    return left[solved.free]


def _solve(equations: Any, origins: np.ndarray, rank: np.ndarray, first: int = 1) -> Solved:
    """Labels of higher rank are written in terms of lower ones; those before ``first`` are 0."""
    count = len(rank)
    diagonal = np.ones(count)
    diagonal[:first] = 0.0
    table = sparse.diags(diagonal, format="csr")
    reason = np.full(count, -1, np.int64)
    parent, tied = np.arange(count), np.full(count, -1, np.int64)
    for step in range(_MAX_ROUNDS + 1):
        current = clean(equations @ table)
        nonzero = np.diff(current.indptr)
        alive = nonzero > 0
        if not alive.any():
            break
        equations, current = equations[alive], current[alive]
        origins, nonzero = origins[alive], nonzero[alive]
        one, two = current.indptr[:-1], np.minimum(current.indptr[:-1] + 1, current.nnz - 1)
        single = (nonzero == 1) | (step == _MAX_ROUNDS)
        pair = (nonzero == 2) & np.isclose(abs(current.data[one]), abs(current.data[two]))
        if single.any() or pair.any():
            zeros = current.indices[np.repeat(single, nonzero)]
            because = _inherited(equations, origins, reason[_roots(parent)])
            zero_origins = np.repeat(because[single], nonzero[single])
            left, right = current.indices[one[pair]], current.indices[two[pair]]
            opposite = current.data[one[pair]] * current.data[two[pair]] > 0
            representative, sign, dead, why, ties = _classes(
                count,
                rank,
                (zeros, zero_origins),
                (left, right, opposite, origins[pair], because[pair]),
            )
            reason[dead] = why[dead]
            merged = ~dead & (representative != np.arange(count))
            parent[merged] = representative[merged]
            tied[tied < 0] = ties[tied < 0]
            substitution = sparse.csr_matrix(
                (np.where(dead, 0.0, sign), (np.arange(count), representative)), (count, count)
            )
        else:
            substitution, pivots, givers, used = _eliminate(current, rank)
            parent[pivots] = givers
            tied[pivots] = np.where(tied[pivots] < 0, origins[used], tied[pivots])
        table = clean(table @ substitution)
    return Solved(table, np.unique(table.indices), reason, parent, tied)


def _inherited(equations: Any, origins: np.ndarray, reason: np.ndarray) -> np.ndarray:
    """An equation that fixes a label because its other labels are fixed has their reason."""
    never = np.iinfo(np.int64).max
    theirs = reason[equations.indices]
    earliest = np.minimum.reduceat(np.where(theirs >= 0, theirs, never), equations.indptr[:-1])
    return np.where(earliest < never, earliest, origins)


def _roots(parent: np.ndarray) -> np.ndarray:
    """Per label, where following its parents ends."""
    while not np.array_equal(above := parent[parent], parent):
        parent = above
    return parent


def clean(matrix: Any) -> Any:
    """A sparse matrix by rows, without what is 0 but for rounding."""
    matrix = matrix.tocsr()
    matrix.sum_duplicates()
    matrix.data[abs(matrix.data) < 1e-9] = 0.0
    matrix.eliminate_zeros()
    return matrix


def _classes(
    count: int,
    rank: np.ndarray,
    zeros: tuple[np.ndarray, np.ndarray],
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``_components`` of the labels that equations speak of; the others are alone."""
    (dead_at_once, zero_origins), (left, right, opposite, *origins) = zeros, pairs
    involved = np.zeros(count, bool)
    for labels in (dead_at_once, left, right):
        involved[labels] = True
    labels, place = np.flatnonzero(involved), np.cumsum(involved) - 1
    found = _components(
        len(labels),
        rank[labels],
        (place[dead_at_once], zero_origins),
        (place[left], place[right], opposite, origins[0], origins[1]),
    )
    alone = (np.arange(count), np.ones(count), np.zeros(count, bool), *np.full((2, count), -1))
    for whole, part in zip(alone, (labels[found[0]], *found[1:]), strict=True):
        whole[labels] = part
    return alone


def _components(
    count: int,
    rank: np.ndarray,
    zeros: tuple[np.ndarray, np.ndarray],
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Classes of labels equal up to sign; node j + count stands for the inverse of label j."""
    left, right, opposite, pair_origins, tie_origins = pairs
    to = np.where(opposite, right + count, right)
    mirrored = np.where(opposite, right, right + count)
    ones = np.ones(2 * len(left), bool)
    edges = (np.concatenate([left, left + count]), np.concatenate([to, mirrored]))
    number, classes = csgraph.connected_components(
        sparse.csr_matrix((ones, edges), (2 * count, 2 * count)), directed=False
    )
    both = np.concatenate([rank, rank])
    lowest = np.full(number, np.iinfo(np.int64).max)
    np.minimum.at(lowest, classes, both)
    node_of = np.zeros(number, np.int64)
    best = np.flatnonzero(both == lowest[classes])
    node_of[classes[best]] = best
    chosen = node_of[classes[:count]]
    representative, sign = chosen % count, np.where(chosen < count, 1.0, -1.0)

    # A class is fixed at 0 by an equation, or because it holds a label and its inverse.
    never = np.iinfo(np.int64).max
    why = np.full(number, never)
    np.minimum.at(why, classes[zeros[0]], zeros[1])
    np.minimum.at(why, classes[zeros[0] + count], zeros[1])
    broken, first = _contradictions(classes, edges, np.concatenate([pair_origins, pair_origins]))
    np.minimum.at(why, broken, first)
    why_label = np.minimum(why[classes[:count]], why[classes[count:]])
    dead = why_label < never
    ties = np.full(number, never)
    np.minimum.at(ties, classes[left], tie_origins)
    tie = np.minimum(ties[classes[:count]], ties[classes[count:]])
    return (
        representative,
        sign,
        dead,
        np.where(dead, why_label, -1),
        np.where(tie < never, tie, -1),
    )


def _contradictions(
    classes: np.ndarray, edges: tuple[np.ndarray, np.ndarray], origins: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The classes that hold a label and its inverse, and the first origin that makes them do so.

    It is looked for by bisection, in all classes at once.
    """
    count = len(classes) // 2
    broken = np.unique(classes[:count][classes[:count] == classes[count:]])
    if not broken.size:
        return broken, broken
    inside = np.isin(classes[edges[0]], broken)
    nodes, ends = np.unique(np.stack(edges)[:, inside], return_inverse=True)
    ends = ends.reshape(2, -1)
    inverse = np.searchsorted(nodes, (nodes + count) % (2 * count))
    levels, level = np.unique(origins[inside], return_inverse=True)
    class_of = np.searchsorted(broken, classes[nodes])
    low, high = np.zeros(len(broken), np.int64), np.full(len(broken), len(levels) - 1)
    while (low < high).any():
        middle = (low + high) // 2
        one, two = ends[:, level <= middle[class_of[ends[0]]]]
        graph = sparse.csr_matrix((np.ones(len(one), bool), (one, two)), (len(nodes),) * 2)
        _, found = csgraph.connected_components(graph, directed=False)
        already = np.isin(np.arange(len(broken)), class_of[found == found[inverse]])
        low, high = np.where(already, low, middle + 1), np.where(already, middle, high)
    return broken, levels[high]


def _eliminate(current: Any, rank: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Solves equations of three and more labels, or of unequal weights, for one label each."""
    count = current.shape[1]
    starts = current.indptr[:-1]
    ranks = rank[current.indices]
    top = np.maximum.reduceat(ranks, starts)
    rows = np.repeat(np.arange(current.shape[0]), np.diff(current.indptr))
    at = np.flatnonzero(ranks == top[rows])
    pivot = current.indices[at]
    _, first = np.unique(pivot, return_index=True)
    chosen = np.zeros(current.shape[0], bool)
    chosen[first] = True
    is_pivot = np.zeros(count, bool)
    is_pivot[pivot[first]] = True
    clashes = np.bincount(rows, is_pivot[current.indices], current.shape[0])
    independent = chosen & (clashes == 1)
    if not independent.any():
        independent = np.zeros_like(chosen)
        independent[first[0]] = True
    picked = np.flatnonzero(independent)
    sub = current[picked]
    sub_rows = np.repeat(np.arange(len(picked)), np.diff(sub.indptr))
    target, weight = pivot[picked][sub_rows], current.data[at[picked]][sub_rows]
    others = sub.indices != target
    kept = np.ones(count, bool)
    kept[pivot[picked]] = False
    diagonal = np.flatnonzero(kept)
    data = np.concatenate([np.ones(len(diagonal)), (-sub.data / weight)[others]])
    where = (
        np.concatenate([diagonal, target[others]]),
        np.concatenate([diagonal, sub.indices[others]]),
    )
    givers = np.zeros(count, np.int64)
    givers[target[others]] = sub.indices[others]
    pivots = pivot[picked]
    return sparse.csr_matrix((data, where), (count, count)), pivots, givers[pivots], picked
