"""Measurements: representatives of one function side by side, and pieces of functions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._action.condition import condition
from pathcond_jax._lifting.gram import conditioning_score
from pathcond_jax._lifting.values import NotPathLiftableError
from pathcond_jax._solve.solution import Status
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.log_scales import LogScales
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree
from pathcond_jax.criteria._base import Criterion
from pathcond_jax.criteria._catalogue import CRITERIA
from pathcond_jax.theory.conservation import conserved_quantities


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
      figures: what the compared criteria say about it, such as the predicted quantization noise.
    """

    name: str
    status: str
    largest_log_scale: float
    conditioning_score: float | None
    norm: float
    conserved: Mapping[str, tuple[float, float]]
    norms: Mapping[str, float]
    ranges: Mapping[str, float]
    figures: Mapping[str, float]


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
        lifting. Beside the rows that all have, ``quantization_noise`` has one for the predicted
        signal-to-noise ratio of every column.

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
    match_leaves(spec, params)
    asked = [criterion for criterion in criteria if isinstance(criterion, Criterion)]

    def said(log_scales: LogScales) -> dict[str, float]:
        found = [criterion.figures(params, spec, log_scales) for criterion in asked]
        return {name: value for figures in found for name, value in figures.items()}

    still = tuple(jnp.zeros(group.size) for group in spec.groups)
    columns = [_represent("as is", "", 0.0, params, spec, said(still))]
    for criterion in criteria:
        try:
            moved, solution = condition(params, spec, criterion)
        except NotPathLiftableError:
            continue
        largest = max(float(jnp.abs(z).max(initial=0)) for z in solution.log_scales)
        status = Status(int(solution.status)).name
        figures = said(solution.log_scales)
        columns.append(_represent(str(criterion), status, largest, moved, spec, figures))
    return Report(tuple(columns))


def _represent(
    name: str,
    status: str,
    largest: float,
    params: PyTree,
    spec: ArchSpec,
    figures: Mapping[str, float],
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
        figures=figures,
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
        *([name, *(_short(c.figures[name]) for c in columns)] for name in first.figures),
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
