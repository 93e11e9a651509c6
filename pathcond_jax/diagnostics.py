"""Measurements: representatives of one function side by side, and pieces of functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._action.condition import condition
from pathcond_jax._lifting.gram import conditioning_score
from pathcond_jax._lifting.values import NotPathLiftableError
from pathcond_jax._solve.solution import Status
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree
from pathcond_jax.conservation import conserved_quantities
from pathcond_jax.criteria._base import Criterion
from pathcond_jax.criteria._catalogue import CRITERIA

_FIRST_CELLS = 1024
_MOST_HALVINGS = 30
_MOST_BENT = 0.01


class Representative(NamedTuple):
    """What one representative of a function looks like, as plain numbers.

    Attributes:
      name: the criterion that chose it; "as is" for the parameters as they are.
      status: how the solver ended; "" where none ran.
      largest_log_scale: the largest |log λ|; 0 as is.
      conditioning_score: log(AM/GM) of the Gram diagonal; None if the network has none.
      norm: Euclidean norm of all trainable parameters.
      conserved: smallest and largest ``‖out‖² − ‖in‖²`` of each group.
      norms: Euclidean norm of each trainable leaf.
      ranges: largest absolute entry of each trainable leaf.
    """

    name: str
    status: str
    largest_log_scale: float
    conditioning_score: float | None
    norm: float
    conserved: Mapping[str, tuple[float, float]]
    norms: Mapping[str, float]
    ranges: Mapping[str, float]


class Report(NamedTuple):
    """Representatives side by side; ``str(report)`` is a table.

    Attributes:
      columns: the parameters as they are, then one for each criterion.
    """

    columns: tuple[Representative, ...]

    def __str__(self) -> str:
        return _table(self.columns)


def report(
    params: PyTree, spec: ArchSpec, criteria: Sequence[Criterion | str] = tuple(CRITERIA)
) -> Report:
    """Compares the representatives that criteria choose: scores, norms, ranges, conserved numbers.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.
      criteria: names or criteria. The path criterion is left out where a network has no path
        lifting.

    Returns:
      The report; print it.

    Raises:
      SpecError: ``params`` does not fit the spec, or it has no neuron to rescale.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> print(pathcond.report(params, spec, ["enorm"]))
                              as is      enorm
      status                             CONVERGED
      largest |log λ|         0          0.693
      conditioning score      0.754      0
      norm                    11.7       8
      ‖out‖² − ‖in‖²
        a                     -60 … -60  0 … 0
      norm, largest entry
        a/w                   11.3, 8    5.66, 4
        b/w                   2.83, 2    5.66, 4
    """
    columns = [_represent("as is", "", 0.0, params, spec)]
    for criterion in criteria:
        try:
            moved, solution = condition(params, spec, criterion)
        except NotPathLiftableError:
            continue
        largest = max(float(jnp.abs(z).max(initial=0)) for z in solution.log_scales)
        status = Status(int(solution.status)).name
        columns.append(_represent(str(criterion), status, largest, moved, spec))
    return Report(tuple(columns))


def count_linear_pieces_1d(
    fun: Callable[[jax.Array], jax.Array], low: float, high: float, *, tol: float | None = None
) -> int:
    """Counts the linear pieces of a continuous, piecewise linear function on an interval.

    A cell of the interval is done when the tangents at its ends are one line, or when they meet
    within it on the graph of the function and are its tangents on both sides of that point: then
    it holds exactly one kink. Others are halved. Only a bump within one of the first 1024 cells
    that returns to the same line can be missed.

    Args:
      fun: from a scalar to a scalar, such as ``lambda x: apply_fn(params, x[None, None])[0, 0]``.
      low: left end.
      high: right end.
      tol: error relative to the largest value, or slope, below which two count as equal; None:
        1000 times the machine precision. Float64 tells many more pieces apart than float32.

    Returns:
      The number of pieces.

    Raises:
      ValueError: the function is not piecewise linear, or its kinks are too close to tell apart.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> pathcond.count_linear_pieces_1d(lambda x: jnp.maximum(x, 0.0) - jnp.abs(x - 0.3), -1, 1)
      3
    """
    dtype = jnp.zeros(()).dtype
    eps = float(jnp.finfo(dtype).eps)
    tol = 1000 * eps if tol is None else tol
    # An irrational offset, because kinks like round numbers; and the ends, a little inside.
    inner = low + (high - low) * (np.arange(_FIRST_CELLS) + 0.3819660113) / _FIRST_CELLS
    edge = 4 * eps * max(abs(low), abs(high))
    points = _tangents(fun, np.concatenate([[low + edge], inner, [high - edge]]), dtype)
    scale = tol * np.abs(points).max(axis=1)
    left, right = points[:, :-1], points[:, 1:]
    count, bent = 1, 0.0
    for _ in range(_MOST_HALVINGS):
        straight, kinked = _resolve(fun, left, right, scale, dtype)
        count += int(kinked.sum())
        bent += np.abs(right[2] - left[2])[straight].sum()
        rest = ~(straight | kinked)
        if not rest.any() and bent <= _MOST_BENT * np.abs(points[2]).max():
            return count
        if not rest.any():
            raise ValueError("the function is not piecewise linear: its slope changes gradually")
        left, right = left[:, rest], right[:, rest]
        middle = _tangents(fun, 0.5 * (left[0] + right[0]), dtype)
        left, right = np.hstack([left, middle]), np.hstack([middle, right])
    raise ValueError(
        f"the function is not piecewise linear near {left[0, 0]:g}, or its kinks are too close for "
        f"{dtype}"
    )


def _tangents(fun: Callable[[jax.Array], jax.Array], x: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """Places, values and slopes: array (3, n)."""
    # A few sizes only, each of which compiles once.
    padded = np.resize(x, 1 << (max(len(x), 64) - 1).bit_length())
    places = jnp.asarray(padded, dtype)
    values, slopes = jax.vmap(jax.value_and_grad(fun))(places)
    return np.stack([np.asarray(a, np.float64)[: len(x)] for a in (places, values, slopes)])


def _resolve(
    fun: Callable[[jax.Array], jax.Array],
    left: np.ndarray,
    right: np.ndarray,
    scale: np.ndarray,
    dtype: jnp.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Which cells hold no kink, and which hold exactly one."""
    (x0, f0, s0), (x1, f1, s1) = left, right
    same = np.abs(s1 - s0) <= scale[2]
    straight = same & (np.abs(f0 + s0 * (x1 - x0) - f1) <= scale[1])
    meeting = (f1 - f0 + s0 * x0 - s1 * x1) / np.where(same, 1, s0 - s1)
    inside = ~same & (x0 - scale[0] <= meeting) & (meeting <= x1 + scale[0])
    meeting = np.where(inside, meeting, 0.5 * (x0 + x1))
    places = np.concatenate([meeting, 0.5 * (x0 + meeting), 0.5 * (meeting + x1)])
    tangents = _tangents(fun, places, dtype)
    (at, value, _), (_, _, before), (_, _, after) = np.split(tangents, 3, axis=1)
    kinked = inside & (np.abs(f0 + s0 * (at - x0) - value) <= scale[1])
    kinked &= (np.abs(before - s0) <= scale[2]) & (np.abs(after - s1) <= scale[2])
    return straight, kinked


def _represent(
    name: str, status: str, largest: float, params: PyTree, spec: ArchSpec
) -> Representative:
    try:
        score = float(conditioning_score(params, spec))
    except NotPathLiftableError:
        score = None
    trained = {
        leaf.path: value
        for leaf, value in zip(spec.leaves, match_leaves(spec, params), strict=True)
        if leaf.trainable
    }
    norms, ranges = (
        dict(zip(trained, map(float, found), strict=True))
        for found in _sizes(list(trained.values()))
    )
    quantities = map(np.asarray, conserved_quantities(params, spec))
    return Representative(
        name=name,
        status=status,
        largest_log_scale=largest,
        conditioning_score=score,
        norm=float(np.linalg.norm(list(norms.values()))),
        conserved={
            group.name: (float(c.min()), float(c.max()))
            for group, c in zip(spec.groups, quantities, strict=True)
        },
        norms=norms,
        ranges=ranges,
    )


@jax.jit
def _sizes(values: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """The Euclidean norm of each array, and its largest magnitude."""
    flat = [jnp.abs(v.astype(compute_dtype(v.dtype))).reshape(-1) for v in values]
    return [jnp.linalg.norm(size) for size in flat], [size.max(initial=0) for size in flat]


def _table(columns: Sequence[Representative]) -> str:
    first = columns[0]
    rows = [
        ["", *(c.name for c in columns)],
        ["status", *(c.status for c in columns)],
        ["largest |log λ|", *(_short(c.largest_log_scale) for c in columns)],
        ["conditioning score", *(_short(c.conditioning_score) for c in columns)],
        ["norm", *(_short(c.norm) for c in columns)],
        ["‖out‖² − ‖in‖²"],
        *(
            [f"  {group}", *(" … ".join(map(_short, c.conserved[group])) for c in columns)]
            for group in first.conserved
        ),
        ["norm, largest entry"],
        *(
            [f"  {leaf}", *(f"{_short(c.norms[leaf])}, {_short(c.ranges[leaf])}" for c in columns)]
            for leaf in first.norms
        ),
    ]
    count = 1 + len(columns)
    rows = [row + [""] * (count - len(row)) for row in rows]
    widths = [max(len(row[k]) for row in rows) for k in range(count)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _short(value: float | None) -> str:
    if value is None:
        return "none"
    # What is left of a zero after rounding is not worth five digits.
    return f"{0.0 if abs(value) < 5e-6 else value:.3g}"
