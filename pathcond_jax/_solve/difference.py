"""Differences of convex functions: minimizing some terms while others are to grow."""

import jax
import jax.numpy as jnp
from jax import lax

from pathcond_jax._solve import flat_objective, stacks
from pathcond_jax._solve.flat_objective import Minimize, Problem, Run
from pathcond_jax._spec.spec import ArchSpec

_MOST_ROUNDS = 50


def descend(
    minimize: Minimize,
    problem: Problem,
    spec: ArchSpec,
    z: jax.Array,
    max_steps: jax.Array,
    tol: jax.Array,
) -> Run:
    """Minimizes a problem with a concave part inside its box: a local minimum.

    Each round replaces the concave part by its tangent, which lies above it, and minimizes what is
    then convex, so that F decreases in every round. Without convex terms that minimum is a vertex
    of the box.

    Args:
      minimize: a method for convex problems.
      problem: with a concave part and a finite box.
      spec: the architecture.
      z: log-scales to start from.
      max_steps: for the convex problem of each round.
      tol: the same.

    Returns:
      The run; its steps are rounds, and there is no bound of the suboptimality.

    References:
      Yuille, Rangarajan, *The concave-convex procedure*, Neural Computation, 2003.
    """
    table, rising, limit = stacks.table(spec), problem.concave, problem.box.limit
    assert rising is not None
    convex = problem._replace(concave=None)
    curved = bool(problem.masses or problem.smooth)

    def lowest(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The minimum with the tangent at z, and the norm of its gradient."""
        slope = problem.slopes() + flat_objective.value_and_gradient(rising, table, z)[1]
        if not curved:
            return limit * jnp.sign(slope), jnp.zeros((), z.dtype)
        round_ = flat_objective.tilted(convex, table, slope)
        run = minimize(round_, spec, round_.box.start(z), max_steps, tol)
        # NaN ends the rounds, and a run that ends there is reported as such.
        return jnp.where(round_.box.finite, run.z, jnp.nan), run.gradient_norm

    def body(state: tuple) -> tuple:
        before, _, _, step = state
        z, gradient = lowest(before)
        return z, jnp.abs(z - before).max(), gradient, step + 1

    infinity = jnp.full((), jnp.inf, z.dtype)
    least = 1e2 * float(jnp.finfo(z.dtype).eps) ** 0.5 * limit
    z, moved, gradient, steps = lax.while_loop(
        lambda state: (state[1] > least) & (state[3] < _MOST_ROUNDS),
        body,
        (z, infinity, infinity, jnp.zeros((), jnp.int32)),
    )
    below, above = (
        flat_objective.value_and_gradient(part, table, z)[0] for part in (rising, problem)
    )
    return Run(z, steps, steps, moved <= least, infinity, above - below, gradient)
