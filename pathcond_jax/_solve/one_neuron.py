"""Exact minimization over some of the neurons: one after the other, or whole groups at once.

Both methods treat a single term. With x = exp(s Δz_h), B the outgoing mass of neuron h, C its
incoming mass and D the rest, ``F = w log S − b Δz_h`` where ``S = B x + C/x + D``. It is
stationary where ``B x² + tilt S x − C = 0``, tilt = −b/(w s), which is (#in − #out)/p for the
path criterion: the paper's Lemma 4.1. Masses are handled as logarithms relative to S.

Where entries take other powers of the scale, ``S = Σ_p B_p x^p + C_p x^−p + D`` is stationary where
``Σ_p p (B_p x^p − C_p x^−p) + tilt S = 0``, which has one root and no closed form.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._solve.flat_objective import Problem
from pathcond_jax._solve.stacks import logsumexp

_MOST_STEPS = 60
_POWER_ONE = (1.0,)


class Neurons(NamedTuple):
    """What the exact minimum over one neuron, or each of several, depends on but the rest D.

    Attributes:
      out: log B; with powers one row for each.
      into: log C, likewise.
      tilt: −b/(w s).
      alive: whether it may move.
      low: lower bound of log x.
      high: upper bound of log x.
    """

    out: jax.Array
    into: jax.Array
    tilt: jax.Array
    alive: jax.Array
    low: jax.Array
    high: jax.Array


def balance(out: jax.Array, into: jax.Array, tilt: jax.Array, total: jax.Array) -> jax.Array:
    """log x for the positive root of ``B x² + tilt S x − C = 0`` given log B, log C, log S.

    With x = sqrt(C/B) v it reads v² + 2κ v − 1 = 0, so log v = −asinh κ: nothing cancels or
    overflows, whatever the depth of the network.
    """
    size = jnp.log(jnp.abs(tilt)) + total - 0.5 * (out + into) - float(np.log(2))
    # asinh of e^size, in log form where e^size overflows.
    large = size + jnp.log1p(jnp.sqrt(1 + jnp.exp(-2 * jnp.maximum(size, 0))))
    root = jnp.where(size > 0, large, jnp.arcsinh(jnp.exp(jnp.minimum(size, 0))))
    return 0.5 * (into - out) - jnp.sign(tilt) * root


def balance_of_powers(
    out: jax.Array, into: jax.Array, tilt: jax.Array, total: jax.Array, powers: tuple[float, ...]
) -> jax.Array:
    """log x for the root of ``Σ_p p (B_p x^p − C_p x^−p) + tilt S = 0``; 0 where there is none.

    What grows with x and what falls, each a sum of positive parts, are equal at the root. The
    logarithm of their quotient has a slope between the least power and twice the largest:
    Newton's steps on it, kept inside a bracket, go astray nowhere.
    """
    p = jnp.asarray(powers, total.dtype)[:, None]
    level = jnp.log(jnp.abs(tilt)) + total
    # Each with one row more, of what does not change with x.
    sides = [
        (jnp.log(p) + logs, jnp.where(present, level, -jnp.inf)[None])
        for logs, present in ((out, tilt > 0), (into, tilt < 0))
    ]

    def quotient(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Its logarithm and the slope of that."""
        values, slopes = [], []
        for sign, (logs, constant) in zip((1, -1), sides, strict=True):
            moved = logs + sign * p * x[None]
            side = logsumexp(jnp.concatenate([moved, constant]), 0)
            values.append(side)
            slopes.append((p * jnp.exp(moved - side[None])).sum(0))
        return values[0] - values[1], slopes[0] + slopes[1]

    def body(state: tuple) -> tuple:
        x, low, high, _, step = state
        value, slope = quotient(x)
        known = jnp.isfinite(value)
        low, high = (
            jnp.where(known & (value < 0), x, low),
            jnp.where(known & (value > 0), x, high),
        )
        following = x - jnp.where(known, value / jnp.where(known, slope, 1), 0)
        outside = (following <= low) | (following >= high)
        following = jnp.where(outside & (value != 0) & known, 0.5 * (low + high), following)
        moved = (jnp.abs(following - x) / (1 + jnp.abs(x))).max()
        return following, low, high, moved, step + 1

    def unfinished(state: tuple) -> jax.Array:
        return (state[3] > 2 * jnp.finfo(total.dtype).eps) & (state[4] < _MOST_STEPS)

    infinity = jnp.full(tilt.shape, jnp.inf, total.dtype)
    first = (jnp.zeros_like(infinity), -infinity, infinity, jnp.full_like(total, jnp.inf))
    root: jax.Array = lax.while_loop(unfinished, body, (*first, jnp.zeros((), jnp.int32)))[0]
    return root


def log_x(neurons: Neurons, total: jax.Array, powers: tuple[float, ...] = _POWER_ONE) -> jax.Array:
    """log x at the minimum, where S is exp(total); 0 for neurons that may not move."""
    parts = (neurons.out, neurons.into, neurons.tilt, total)
    log_x = balance(*parts) if powers == _POWER_ONE else balance_of_powers(*parts, powers)
    return jnp.where(neurons.alive, jnp.clip(log_x, neurons.low, neurons.high), 0)


def log_masses(
    neurons: Neurons, log_x: jax.Array, powers: tuple[float, ...]
) -> tuple[jax.Array, jax.Array]:
    """The logarithms of ``Σ_p B_p x^p + C_p x^−p`` and of its second derivative in log x."""
    if powers == _POWER_ONE:
        mass = jnp.logaddexp(neurons.out + log_x, neurons.into - log_x)
        return mass, mass
    p = jnp.asarray(powers, log_x.dtype)[:, None]
    shift = p * log_x[None]
    logs = jnp.stack([neurons.out + shift, neurons.into - shift])
    squared = logs + 2 * jnp.log(p)[None]
    return logsumexp(logs.reshape(-1, log_x.size), 0), logsumexp(squared.reshape(-1, log_x.size), 0)


def neurons_at(
    problem: Problem,
    met: tuple[jax.Array, ...],
    z: jax.Array,
    start: int | jax.Array | np.ndarray = 0,
    powers: tuple[float, ...] = _POWER_ONE,
) -> Neurons:
    """The neurons from ``start`` on; ``met``: logarithms of their B and C, of each power."""
    out, into = met if powers == _POWER_ONE else (jnp.stack(met[::2]), jnp.stack(met[1::2]))
    alive, z = (
        lax.dynamic_slice_in_dim(array, start, out.shape[-1]) for array in (problem.box.alive, z)
    )
    tilt = jnp.zeros_like(z)
    if problem.linear is not None:
        linear = lax.dynamic_slice_in_dim(problem.linear, start, out.shape[-1])
        tilt = -linear / (problem.weights[0] * problem.exponents[0])
    limit = problem.box.limit
    low, high = (problem.exponents[0] * (bound - z) for bound in (-limit, limit))
    # A negative exponent turns the box around.
    return Neurons(out, into, tilt, alive, jnp.minimum(low, high), jnp.maximum(low, high))
