"""How many diagonal rescalings keep the outputs of a program, and which ones a spec lacks."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from scipy import optimize

from fuzzing.subject import relative_change
from pathcond_jax._program import kinds, primitives
from pathcond_jax._symmetry.values import RULES

_STEP = 2e-5
_RANK, _AMBIGUOUS = 1e-6, 1e-9
_MAX_SAMPLES = 6000


class Dimensions(NamedTuple):
    """How many dimensions of diagonal rescalings a program has.

    Attributes:
      found: the neurons of the spec, those of dead parameters aside, whatever powers entries take.
      one_sided: directions in which entries only grow, up to combinations of those found.
      missed: the other directions that the spec lacks.
      local: those that hold for what is drawn only, not for other, small or large parameters.
      operations: those that pin what moves in these, by name.
      supported: whether all operations of the program have a rule, or no scale to pass.
    """

    found: int
    one_sided: int
    missed: int
    local: int = 0
    operations: tuple[str, ...] = ()
    supported: bool = True


def count_dimensions(subject, rng):
    """The dimension of all diagonal rescalings that keep the outputs, or None if in doubt."""
    null, live = _null_space(subject, rng)
    if null is None:
        return None
    found = subject.directions[live]
    rank = np.linalg.matrix_rank(found) if found.size else 0
    counts = {"one_sided": 0, "missed": 0}
    operations = set()
    known = found
    for direction in _reduced_rows(null) if len(null) > rank else ():
        more = np.column_stack([known, direction])
        if np.linalg.matrix_rank(more, tol=1e-6) <= np.linalg.matrix_rank(known, tol=1e-6):
            continue
        if not _keeps_outputs(subject, rng, direction, live):
            continue
        known = more
        if _only_grows(direction, found) or _only_grows(-direction, found):
            counts["one_sided"] += 1
        else:
            counts["missed"] += 1
            operations |= _pinning(subject, live[abs(direction) > 1e-6])
    return Dimensions(
        int(rank),
        **counts,
        local=int(len(null) - np.linalg.matrix_rank(known, tol=1e-6)),
        operations=tuple(sorted(operations)),
        supported=_is_supported(subject),
    )


def _only_grows(direction, found):
    """Whether a direction, with any combination of those found, moves all entries to one side."""
    # The last variable, which costs nothing, is there so that there is one.
    columns = np.column_stack([found, np.zeros(len(direction))])
    solved = optimize.linprog(
        np.zeros(columns.shape[1]), -columns, direction + 1e-6, bounds=(None, None)
    )
    return solved.status == 0


def _is_supported(subject):
    """Whether each operation has a rule, or is one out of which no scale can come.

    What cannot have a rule is left out of the measure: a program of the caller's own outside of
    JAX (a callback), what writes into a reference, what factorizes a matrix, what reads the bits of
    a number. So is what moves a number by its last place, where numbers cannot tell a scale that
    passes from one that does not.
    """
    known = {p.name for p in (*RULES, *primitives.calls())}
    unscaled = {*kinds.ELEMENTWISE, *kinds.BITS, *kinds.RANDOM, "debug_callback", "debug_print"}
    return subject.primitives <= (known | unscaled) - {"bitcast_convert_type", "nextafter"}


def _pinning(subject, entries):
    """The operations that ``spec.pinned`` names for the leaves of these entries."""
    sizes = [leaf.size for leaf in subject.spec.leaves]
    ends = np.cumsum(sizes)
    moving = {subject.spec.leaves[k].path for k in np.searchsorted(ends, entries, side="right")}
    pinned = [row for row in subject.spec.pinned if row.path in moving]
    return {(row.operation or row.reason).split(" in ")[0] for row in pinned} or {"nothing pinned"}


def _null_space(subject, rng):
    """A basis (rows) of what leaves the outputs at first order, over entries that matter."""
    entries = len(subject.directions)
    draw = functools.partial(subject.program.draw, rng)
    width = subject.outputs(*draw(1)).shape[1]
    # Rectifiers that are on in few samples say little about their parameters there.
    samples = 4 * max(3, -(-(entries + 8) // width))
    nothing = None, None
    if samples * 2 * entries > _MAX_SAMPLES:
        return nothing
    params, x, n = draw(samples)
    logs = np.concatenate([_STEP * np.eye(entries), -_STEP * np.eye(entries)])
    logs = np.tile(logs, (samples, 1))
    params, x, n = jax.tree.map(lambda a: np.repeat(a, 2 * entries, 0), (params, x, n))
    outputs = subject.outputs(subject.moved(params, logs), x, n)
    outputs = outputs.reshape(samples, 2, entries, width)
    rows = np.moveaxis(outputs[:, 0] - outputs[:, 1], 1, 2).reshape(-1, entries) / (2 * _STEP)
    size = abs(outputs[:, 0]).max(1).reshape(-1)
    rows = rows[np.isfinite(rows).all(1) & np.isfinite(size)]
    size = abs(rows).max(1, initial=0.0)
    rows = rows[size > 0] / size[size > 0, None]
    live = np.flatnonzero(abs(rows).max(0, initial=0.0) > 1e-7)
    if len(rows) < len(live) + 1 or not len(live):
        return nothing
    _, values, vectors = np.linalg.svd(rows[:, live])
    values = values / values[0]
    if ((values < _RANK) & (values > _AMBIGUOUS)).any():
        return nothing
    rank = int((values >= _RANK).sum())
    return vectors[rank:], live


def _reduced_rows(rows):
    """The reduced row echelon form: the directions one at a time, as far as possible."""
    rows, pivot = rows.copy(), 0
    for column in range(rows.shape[1]):
        if pivot == len(rows):
            break
        best = pivot + np.argmax(abs(rows[pivot:, column]))
        if abs(rows[best, column]) < 1e-6:
            continue
        rows[[pivot, best]] = rows[[best, pivot]]
        rows[pivot] /= rows[pivot, column]
        others = np.arange(len(rows)) != pivot
        rows[others] -= np.outer(rows[others, column], rows[pivot])
        pivot += 1
    return rows[:pivot]


def _keeps_outputs(subject, rng, direction, live):
    """Whether outputs stay at usual values, at small and large ones, at zeros and at missing ones.

    A bound that no usual value meets, a constant that outweighs all else, or one that stands in for
    0 or for what is not a number, would count as a symmetry although it holds for some parameters
    and inputs only.
    """
    sizes = np.repeat([1.0, 0.03, 30.0, 1.0, 1.0], 6)
    params, x, n = subject.program.draw(rng, len(sizes))
    logs = np.zeros((len(sizes), len(subject.directions)))
    logs[:, live] = np.outer(np.tile([-1, -0.3, 0.1, 0.5, 1, 1.7], 5), direction)
    params = {
        name: value * (sizes ** rng.choice([0, 1], len(sizes))).reshape(-1, *[1] * (value.ndim - 1))
        for name, value in params.items()
    }
    x = x * sizes.reshape(-1, *[1] * (x.ndim - 1))
    for place, other in ((slice(18, 24), np.nan), (slice(24, 30), 0.0)):
        x[place] = np.where(rng.random(x[place].shape) < 0.5, other, x[place])
    before = subject.outputs(params, x, n)
    return relative_change(before, subject.outputs(subject.moved(params, logs), x, n)) < 1e-6
