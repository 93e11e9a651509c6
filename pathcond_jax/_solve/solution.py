"""What a solve returns: log-scales, what is known about them, and how it ended."""

import enum
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._solve.flat_objective import Box, Run
from pathcond_jax._spec.arrays import is_traced
from pathcond_jax._spec.log_scales import LogScales, by_group

# Groups in the table of a solution.
_MOST_ROWS = 10


class Status(enum.IntEnum):
    """How a solve ended: ``Status(int(solution.status))``.

    Attributes:
      CONVERGED: the tolerance of the method is met.
      STEP_LIMIT: ``max_steps`` came before the tolerance. The log-scales are where the method
        stopped; they may be used, and handed on as ``initial``.
      NON_FINITE: the input has a NaN, an infinity or a negative mass. Log-scales are 0.
      UNBOUNDED: without ``max_log_scale``, some log-scales went as far as the dtype of the
        parameters allows; the minimum is further out, or at infinity.
      CLIPPED: some log-scales are held by a bound, ``max_log_scale`` or that of the criterion; or
        all were shortened to what an update can represent (``recondition``).

    Example:
      >>> import pathcond_jax as pathcond
      >>> pathcond.Status(1).sentence
      'stopped at max_steps before the tolerance was met'
    """

    CONVERGED = 0
    STEP_LIMIT = 1
    NON_FINITE = 2
    UNBOUNDED = 3
    CLIPPED = 4

    @property
    def sentence(self) -> str:
        """What it means, for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "the tolerance is met",
    Status.STEP_LIMIT: "stopped at max_steps before the tolerance was met",
    Status.NON_FINITE: "the input is not finite, or has a negative mass; all log-scales are 0",
    Status.UNBOUNDED: "some log-scales reach the range of the dtype; set max_log_scale or "
    "norm_weight to bound them",
    Status.CLIPPED: "some log-scales are held by a bound, such as max_log_scale",
}


class Solution(NamedTuple):
    """Log-scales and what is known about them; ``print`` shows a table.

    A pytree of arrays: all of it has one more axis under ``vmap``, and is traced under ``jit``.

    Attributes:
      log_scales: z, one ``(group.size,)`` array per group of the spec.
      objective: F(z); NaN where the input was not finite.
      gradient_norm: Euclidean norm of the gradient of F at z, over the neurons that may move;
        components that push a neuron out of the box ``max_log_scale`` do not count.
      suboptimality: an upper bound of F(z) − min F.
      num_steps: Newton steps, or sweeps.
      num_products: passes over the masses, each at most two matrix-vector products per block.
      status: a :class:`Status` code, int32.
      objective_before: F(0), of the parameters as they are. For the path criterion,
        (F(z) − F(0)) / p, p the number of entries with g > 0, is the change of the conditioning
        score.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> print(pathcond.condition(params, spec)[1])
      CONVERGED: the tolerance is met (1 step)
      objective 19.651 → 16.636, at most 4.8e-07 above the minimum
      group  size  largest |log-scale|
      0      2     0.693
    """

    log_scales: LogScales
    objective: jax.Array
    gradient_norm: jax.Array
    suboptimality: jax.Array
    num_steps: jax.Array
    num_products: jax.Array
    status: jax.Array
    objective_before: jax.Array

    def __str__(self) -> str:
        known = all(map(_is_known, jax.tree.leaves(self, is_leaf=lambda leaf: leaf is None)))
        return _table(self) if known else repr(jax.tree.map(_shown, self))


def solution_of(
    run: Run, box: Box, sizes: tuple[int, ...], if_clipped: jax.Array, before: jax.Array
) -> Solution:
    """What every solver returns, from where it stopped.

    Args:
      run: where the method stopped.
      box: what its log-scales are bound to.
      sizes: the size of each group.
      if_clipped: the status of a run that converged with log-scales at the faces of the box.
      before: F(0).

    Returns:
      The solution, with log-scales 0 and NaN where the input was not finite.
    """
    # A method that lost itself must not spoil parameters either.
    finite = box.finite & jnp.isfinite(run.z).all()
    status = jnp.where(box.bound(run.z).any(), if_clipped, Status.CONVERGED)
    status = jnp.where(run.converged, status, Status.STEP_LIMIT)
    status = jnp.where(finite, status, Status.NON_FINITE)
    known = jnp.where(finite, 0, jnp.nan).astype(run.z.dtype)
    return Solution(
        log_scales=by_group(jnp.where(finite, run.z, 0), sizes),
        objective=run.value + known,
        gradient_norm=run.gradient_norm + known,
        suboptimality=run.suboptimality + known,
        num_steps=run.num_steps,
        num_products=run.num_products,
        status=status.astype(jnp.int32),
        objective_before=before + known,
    )


def log_scales_of(given: Any) -> Any:
    """The log-scales of a solution; anything else as it is."""
    return given.log_scales if isinstance(given, Solution) else given


def _is_known(leaf: Any) -> bool:
    """Whether the numbers of an array are at hand."""
    if isinstance(leaf, jax.Array) and not is_traced(leaf):
        return leaf.is_fully_addressable and not leaf.is_deleted()
    return isinstance(leaf, (np.ndarray, np.generic))


class _Deleted:
    """What stands for an array that was donated; JAX raises where one is shown."""

    def __repr__(self) -> str:
        return "deleted"


def _shown(leaf: Any) -> Any:
    concrete = isinstance(leaf, jax.Array) and not is_traced(leaf)
    return _Deleted() if concrete and leaf.is_deleted() else leaf


def _table(solution: Solution) -> str:
    found: Solution = jax.tree.map(np.asarray, solution)
    largest = [float(np.abs(z).max(initial=0)) for z in found.log_scales]
    shown = sorted(sorted(range(len(largest)), key=lambda k: -largest[k])[:_MOST_ROWS])
    rows = [
        ("group", "size", "largest |log-scale|"),
        *((str(k), str(found.log_scales[k].shape[-1]), f"{largest[k]:.3g}") for k in shown),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    left = len(largest) - len(shown)
    more = [f"and {left} more group{'s' * (left > 1)} of smaller ones"] if left else []
    return "\n".join([*_ending(found), *lines, *more])


def _ending(found: Solution) -> list[str]:
    """How one solution ended and what is known; how many of several ended how."""
    if np.ndim(found.status):
        ended = sorted(Counter(map(int, np.ravel(found.status))).items())
        counted = [f"{count} {_name(code)}" for code, count in ended]
        return [f"{np.size(found.status)} solutions: {', '.join(counted)}"]
    steps = int(found.num_steps)
    bound = float(found.suboptimality)
    above = f", at most {bound:.2g} above the minimum" if np.isfinite(bound) else ""
    return [
        f"{_name(int(found.status), sentence=True)} ({steps} step{'s' * (steps != 1)})",
        f"objective {float(found.objective_before):.5g} → {float(found.objective):.5g}{above}",
    ]


def _name(code: int, *, sentence: bool = False) -> str:
    if code not in _SENTENCES:
        return f"status {code}"
    status = Status(code)
    return f"{status.name}: {status.sentence}" if sentence else status.name
