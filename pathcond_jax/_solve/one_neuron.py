"""Exact minimization over some of the neurons: one after the other, or whole groups at once.

Both methods treat a single term. With x = exp(s Δz_h), B the outgoing mass of neuron h, C its
incoming mass and D the rest, ``F = w log S − b Δz_h`` where ``S = B x + C/x + D``. It is
stationary where ``B x² + tilt S x − C = 0``, tilt = −b/(w s), which is (#in − #out)/p for the
path criterion: the paper's Lemma 4.1. Masses are handled as logarithms relative to S.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._solve.flat_objective import Problem


class Neurons(NamedTuple):
    """What the exact minimum over one neuron, or each of several, depends on but the rest D.

    Attributes:
      out: log B.
      into: log C.
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


def log_x(neurons: Neurons, total: jax.Array) -> jax.Array:
    """log x at the minimum, where S is exp(total); 0 for neurons that may not move."""
    log_x = balance(neurons.out, neurons.into, neurons.tilt, total)
    return jnp.where(neurons.alive, jnp.clip(log_x, neurons.low, neurons.high), 0)


def neurons_at(
    problem: Problem,
    out: jax.Array,
    into: jax.Array,
    z: jax.Array,
    start: int | jax.Array | np.ndarray = 0,
) -> Neurons:
    """The neurons from ``start`` on, with the logarithms of their B and C."""
    linear, alive, z = (
        lax.dynamic_slice_in_dim(array, start, out.size)
        for array in (problem.linear, problem.box.alive, z)
    )
    tilt = -linear / (problem.weights[0] * problem.exponents[0])
    limit = problem.box.limit
    low, high = (problem.exponents[0] * (bound - z) for bound in (-limit, limit))
    # A negative exponent turns the box around.
    return Neurons(out, into, tilt, alive, jnp.minimum(low, high), jnp.maximum(low, high))
