"""Differences of convex functions: minimizing some terms while others are to grow."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._solve import flat_objective, stacks
from pathcond_jax._solve.objective import Objective
from pathcond_jax._solve.solution import Solution, Status
from pathcond_jax._solve.solve import solve
from pathcond_jax._spec.spec import ArchSpec, no_neuron
from pathcond_jax._spec.types import SpecError

_MOST_ROUNDS = 50


def solve_difference(
    objective: Objective,
    spec: ArchSpec,
    *,
    max_log_scale: float | None = None,
    initial: tuple[jax.Array, ...] | None = None,
    **options: Any,
) -> Solution:
    """Minimizes an objective with concave terms inside its box: a local minimum.

    Each round replaces the concave terms by their tangents, which lie above them, and minimizes
    what is then convex, so the objective decreases in every round. Without convex terms that
    minimum is a vertex of the box.

    Args:
      objective: with concave terms and a box.
      spec: the architecture.
      max_log_scale: a smaller box.
      initial: log-scales to start from.
      **options: of ``solve``, for each round.

    Returns:
      The solution; ``num_steps`` counts rounds, and there is no bound of the suboptimality.

    References:
      Yuille, Rangarajan, *The concave-convex procedure*, Neural Computation, 2003.
    """
    if not spec.num_neurons:
        raise SpecError(no_neuron(spec))
    limits = [bound for bound in (objective.limit, max_log_scale) if bound is not None]
    if not limits:
        raise SpecError("an objective with concave terms needs a box")
    chosen = tuple(sorted(options.items()))
    limit, unboxed = float(min(limits)), objective._replace(limit=None)
    return _descend(unboxed, initial, spec=spec.symmetry, limit=limit, options=chosen)


@functools.partial(jax.jit, static_argnames=("spec", "limit", "options"))
def _descend(
    objective: Objective,
    initial: tuple[jax.Array, ...] | None,
    *,
    spec: ArchSpec,
    limit: float,
    options: tuple[tuple[str, Any], ...],
) -> Solution:
    table = stacks.table(spec)
    zeros = tuple(np.zeros(group.size) for group in spec.groups)
    convex = objective._replace(concave=())
    falling = flat_objective.make(convex, spec, limit)
    rising = flat_objective.make(Objective(objective.concave, zeros), spec, limit)
    dtype = rising.linear.dtype
    curved = bool(convex.terms or convex.smooth)

    def lowest(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The minimum with the tangent at z, its slope's norm and whether input was finite."""
        slope = (
            falling.linear.astype(dtype) + flat_objective.value_and_gradient(rising, table, z)[1]
        )
        if not curved:
            vertex = limit * jnp.sign(slope)
            return vertex, jnp.zeros((), dtype), rising.finite & falling.finite
        tilted = convex._replace(linear=tuple(jnp.split(slope, table.starts[1:-1])))
        parts = tuple(jnp.split(z, table.starts[1:-1]))
        solution = solve(tilted, spec, max_log_scale=limit, initial=parts, **dict(options))
        finite = rising.finite & (solution.status != Status.NON_FINITE)
        moved = jnp.concatenate(solution.log_scales).astype(dtype)
        return moved, solution.gradient_norm.astype(dtype), finite

    def body(state: tuple) -> tuple:
        before, _, _, step, _ = state
        z, gradient, finite = lowest(before)
        z = jnp.where(finite, z, 0)
        return z, jnp.abs(z - before).max(), gradient, step + 1, finite

    z = jnp.zeros((table.size,), dtype)
    if initial is not None:
        z = jnp.clip(jnp.concatenate([part.astype(dtype) for part in initial]), -limit, limit)
    infinity, zero = jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32)
    tol = 1e2 * float(jnp.finfo(dtype).eps) ** 0.5
    z, moved, gradient, steps, finite = lax.while_loop(
        lambda state: (state[1] > tol * limit) & (state[3] < _MOST_ROUNDS),
        body,
        (z, infinity, infinity, zero, jnp.ones((), bool)),
    )
    status = jnp.where((jnp.abs(z) >= limit).any(), Status.CLIPPED, Status.CONVERGED)
    status = jnp.where(moved <= tol * limit, status, Status.STEP_LIMIT)
    status = jnp.where(finite, status, Status.NON_FINITE)
    known = jnp.where(finite, 0, jnp.nan).astype(dtype)
    lower, upper = (
        flat_objective.value_and_gradient(part, table, z)[0] for part in (rising, falling)
    )
    value = upper.astype(dtype) - lower
    return Solution(
        log_scales=tuple(jnp.split(z, table.starts[1:-1])),
        objective=known + value,
        gradient_norm=known + gradient,
        suboptimality=known + jnp.inf,
        num_steps=steps,
        num_products=steps,
        status=status.astype(jnp.int32),
    )
