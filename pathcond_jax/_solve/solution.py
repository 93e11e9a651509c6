"""What a solve returns: log-scales, what is known about them, and how it ended."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pathcond_jax._solve import stacks
from pathcond_jax._solve.flat_objective import Problem, Run
from pathcond_jax._spec.spec import ArchSpec


class Status(enum.IntEnum):
    """How a solve ended: ``Status(int(solution.status)).name``."""

    CONVERGED = 0
    STEP_LIMIT = 1
    NON_FINITE = 2
    UNBOUNDED = 3
    CLIPPED = 4


class Solution(NamedTuple):
    """Log-scales and what is known about them.

    Attributes:
      log_scales: z, one ``(group.size,)`` array per group of the spec.
      objective: F(z); NaN where the input was not finite.
      gradient_norm: Euclidean norm of the gradient of F at z, over the neurons that may move;
        components that push a neuron out of the box ``max_log_scale`` do not count.
      suboptimality: an upper bound of F(z) − min F.
      num_steps: Newton steps, or sweeps.
      num_products: passes over the masses, each at most two matrix-vector products per block.
      status: a :class:`Status` code, int32.
    """

    log_scales: tuple[jax.Array, ...]
    objective: jax.Array
    gradient_norm: jax.Array
    suboptimality: jax.Array
    num_steps: jax.Array
    num_products: jax.Array
    status: jax.Array


def solution_of(task: Problem, spec: ArchSpec, run: Run, if_clipped: jax.Array) -> Solution:
    status = jnp.where(task.bound(run.z).any(), if_clipped, Status.CONVERGED)
    status = jnp.where(run.converged, status, Status.STEP_LIMIT)
    status = jnp.where(task.finite, status, Status.NON_FINITE)
    known = jnp.where(task.finite, 0, jnp.nan).astype(run.z.dtype)
    return Solution(
        log_scales=tuple(jnp.split(run.z, stacks.table(spec).starts[1:-1])),
        objective=run.value + known,
        gradient_norm=run.gradient_norm + known,
        suboptimality=run.suboptimality + known,
        num_steps=run.num_steps,
        num_products=run.num_products,
        status=status.astype(jnp.int32),
    )
