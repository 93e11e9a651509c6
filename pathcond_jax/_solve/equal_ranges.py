"""Equal ranges: the fixed point at which incoming and outgoing maxima of every neuron agree."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pathcond_jax._solve import stacks
from pathcond_jax._solve.block import colors
from pathcond_jax._solve.objective import LogSum
from pathcond_jax._solve.solution import Solution, Status
from pathcond_jax._solve.stacks import Masses, Table
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.spec import ArchSpec, no_neuron
from pathcond_jax._spec.types import SpecError

_TOLERANCE = {32: 1e-5, 64: 1e-10}


def balance_ranges(
    term: LogSum,
    spec: ArchSpec,
    given: tuple[jax.Array, ...] | None,
    alpha: float,
    *,
    max_steps: int = 1000,
    tol: float | None = None,
    max_log_scale: float | None = None,
    initial: tuple[jax.Array, ...] | None = None,
    **others: Any,
) -> Solution:
    """Sweeps over sets of groups until ``(1 − α) log out = α log in`` for every neuron.

    Args:
      term: the largest absolute weights of each reduced entry.
      spec: the architecture.
      given: logarithms of the incoming ranges at z = 0, one array per group, −inf for neurons to
        leave alone; None: the incoming weights'.
      alpha: α, 1/2 for equal ranges.
      max_steps: at most so many sweeps.
      tol: stop when no log-scale moves by more; None: 1e-5 in float32, 1e-10 in float64.
      max_log_scale: the box |z| ≤ max_log_scale.
      initial: log-scales to start from.
      **others: none; other methods are not for ranges.

    Returns:
      The solution. ``objective`` is the largest ``|(1 − α) log out − α log in|`` and
      ``gradient_norm`` the Euclidean norm of them; there is no bound of the suboptimality.
    """
    if others:
        raise SpecError(f"ranges are balanced by sweeps, which have no option {min(others)!r}")
    if not spec.num_neurons:
        raise SpecError(no_neuron(spec))
    return _balance(term, given, initial, max_steps, tol, max_log_scale, alpha, spec=spec.symmetry)


@functools.partial(jax.jit, static_argnames=("spec",))
def _balance(
    term: LogSum,
    given: Any,
    initial: Any,
    max_steps: Any,
    tol: Any,
    limit: Any,
    alpha: Any,
    *,
    spec: ArchSpec,
) -> Solution:
    table = stacks.table(spec)
    dtype = compute_dtype(*(mass.dtype for mass in term.masses))
    parts = stacks.stacked(term, table, dtype)
    finite = stacks.are_masses(parts)
    if given is not None:
        given = jnp.concatenate([jnp.asarray(part).astype(dtype) for part in given])
        finite &= (given < jnp.inf).all()
    masses = stacks.equilibrate(parts, finite)
    alpha = jnp.asarray(alpha, dtype)
    tol = jnp.asarray(_TOLERANCE[jnp.finfo(dtype).bits] if tol is None else tol).astype(dtype)
    limit = jnp.asarray(jnp.inf if limit is None else limit).astype(dtype)

    def gaps(z: jax.Array) -> jax.Array:
        out, into = _log_ranges(masses, table, z)
        gap = (1 - alpha) * out - alpha * (into if given is None else given + z)
        return jnp.where(finite & jnp.isfinite(gap), gap, 0)

    def sweep(state: tuple) -> tuple:
        before, _, step = state
        z = before
        for mask, joined in zip(*colors(spec), strict=True):
            # Where neurons of a color meet on an edge, whole steps could go back and forth.
            length = 0.5 if joined else 1.0
            z = jnp.clip(jnp.where(mask, z + length * gaps(z), z), -limit, limit)
        return z, jnp.abs(z - before).max(), step + 1

    start = jnp.zeros((table.size,), dtype)
    if initial is not None:
        start = jnp.concatenate([jnp.asarray(part).astype(dtype) for part in initial])
        start = jnp.where(finite & jnp.isfinite(start), jnp.clip(start, -limit, limit), 0)
    z, moved, steps = lax.while_loop(
        lambda state: (state[1] > tol) & (state[2] < max_steps),
        sweep,
        (start, jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32)),
    )
    left = gaps(z)
    clipped = (jnp.abs(z) >= limit).any()
    status = jnp.where(clipped, Status.CLIPPED, Status.CONVERGED)
    status = jnp.where(moved <= tol, status, Status.STEP_LIMIT)
    status = jnp.where(finite, status, Status.NON_FINITE)
    known = jnp.where(finite, 0, jnp.nan).astype(dtype)
    return Solution(
        log_scales=tuple(jnp.split(z, table.starts[1:-1])),
        objective=known + jnp.abs(left).max(),
        gradient_norm=known + jnp.linalg.norm(left),
        suboptimality=known + jnp.inf,
        num_steps=steps,
        num_products=1 + len(colors(spec).mask) * steps,
        status=status.astype(jnp.int32),
    )


def _log_ranges(masses: Masses, table: Table, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logarithms of the largest outgoing and of the largest incoming weight: (H,) each."""
    exponents = masses.logs - stacks.spread(table, z)
    maxima = []
    for values, (x, y) in zip(masses.values, stacks.split(table, exponents), strict=True):
        logs = jnp.log(values)
        rows = (logs + y[:, None, :]).max(2) + x
        maxima.append((rows, (logs + x[:, :, None]).max(1) + y))
    return stacks.over_neurons(table, stacks.join(maxima), -jnp.inf, lambda met: met.max(1))
