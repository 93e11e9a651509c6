"""What finetuning prefers: the penalties that gradient descent implicitly minimizes.

A diagonal linear network ``β_i = w⁺_i v⁺_i − w⁻_i v⁻_i`` learns a main task, coefficients β,
together with an auxiliary task or after it, coefficients β_aux. Among all β that fit, training
finds the one with the least penalty, which tells how it weighs sparsity against the reuse of
auxiliary features. Rescaling neurons does not change these coefficients; scaling all weights
before finetuning does change what is learned, and the network's function too.

References:
  Lippl, Lindsey, *Inductive biases of multi-task learning and finetuning: multiple regimes of
  feature reuse*, NeurIPS 2024, arXiv 2310.02396.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.trees import describe_leaves
from pathcond_jax._spec.types import PyTree

_GRID = 512
_BISECTIONS = 60


def mtl_penalty(beta: jax.Array, beta_aux: jax.Array) -> jax.Array:
    """The penalty of learning both tasks at once: ``Σ √(β² + β_aux²)``, a group lasso.

    Args:
      beta: coefficients of the main task, any shape, floating.
      beta_aux: coefficients of the auxiliary task, the same shape.

    Returns:
      A scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> float(pathcond.mtl_penalty(jnp.array([3.0, 1.0]), jnp.array([4.0, 0.0])))
      6.0
    """
    return jnp.hypot(beta, beta_aux).sum()


def ptft_penalty(beta: jax.Array, beta_aux: jax.Array, gamma: float | jax.Array = 0.0) -> jax.Array:
    """The penalty of pretraining on the auxiliary task and then finetuning.

    ``Σ s q(2β/s)`` with ``s = |β_aux| + γ²`` and ``q(z) = 2 − √(4 + z²) + z asinh(z/2)``: like
    |β| where the features are small beside the task (sparsity), like β² where they are large.

    Args:
      beta: coefficients of the main task, any shape, floating.
      beta_aux: coefficients of the auxiliary task, the same shape.
      gamma: the readout weights' magnitude when finetuning begins. Together with β_aux it must
        not be zero: a feature of size 0 costs infinitely much.

    Returns:
      A scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> round(float(pathcond.ptft_penalty(jnp.array([1.0]), jnp.array([1.0]))), 4)
      0.9343
    """
    size = jnp.abs(beta_aux) + jnp.square(jnp.asarray(gamma, beta_aux.dtype))
    z = 2 * beta / size
    # 2 − √(4 + z²) without its cancellation.
    q = z * jnp.arcsinh(z / 2) - z * (z / (2 + jnp.hypot(z, jnp.asarray(2, z.dtype))))
    return (size * q).sum()


def relu_finetuning_penalty(
    beta: jax.Array,
    beta_aux: jax.Array,
    correlation: jax.Array,
    readout: float | jax.Array = 0.0,
) -> jax.Array:
    """The penalty of finetuning a ReLU feature whose direction may turn.

    ``Σ min over m > 0 of (β/m − v₀)² + m² + m₀² − 2 m m₀ c`` with ``m₀ = √β_aux``: the squared
    distance that the weights travel. At the minimum ``m⁴ − m₀ c m³ + v₀ β m − β² = 0``.

    Args:
      beta: coefficients of the main task, nonnegative, any shape, floating.
      beta_aux: coefficients of the auxiliary task, nonnegative, the same shape.
      correlation: c in [−1, 1], between the features of the two tasks, the same shape.
      readout: v₀, the readout weight when finetuning begins.

    Returns:
      A scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> one, none = jnp.array([1.0]), jnp.array([0.0])
      >>> float(pathcond.relu_finetuning_penalty(one, none, none))  # 2|β|: m = 1
      2.0
    """
    start = jnp.sqrt(beta_aux)
    readout = jnp.asarray(readout, beta.dtype)

    def cost(m: jax.Array) -> jax.Array:
        return (beta / m - readout) ** 2 + m**2 + start**2 - 2 * m * start * correlation

    # The derivative in m is zero, so that of the minimum needs none of m's.
    return cost(jax.lax.stop_gradient(_best_norm(beta, start, correlation, readout))).sum()


def order_and_dependence(
    penalty: Callable[[jax.Array, jax.Array], jax.Array], beta: jax.Array, beta_aux: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How a penalty scales: its exponents in β and in β_aux.

    The order is 1 where it prefers sparse solutions and 2 where it does not; the dependence says
    how much cheaper larger features are. For a penalty without a scale of its own they sum to 1,
    a conservation law: what favours sparsity less reuses features more.

    Args:
      penalty: function of (β, β_aux), such as ``ptft_penalty``.
      beta: coefficients of the main task.
      beta_aux: coefficients of the auxiliary task.

    Returns:
      ``∂ log ℓ/∂ log β`` and ``∂ log ℓ/∂ log β_aux``, scaling all coefficients alike; scalars.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> one = jnp.array([1.0])
      >>> order, dependence = pathcond.order_and_dependence(pathcond.ptft_penalty, one, one)
      >>> round(float(order), 3), round(float(dependence), 3)
      (1.887, -0.887)
    """

    def log_penalty(log_beta: jax.Array, log_aux: jax.Array) -> jax.Array:
        return jnp.log(penalty(beta * jnp.exp(log_beta), beta_aux * jnp.exp(log_aux)))

    zero = jnp.zeros((), beta.dtype)
    order, dependence = jax.grad(log_penalty, (0, 1))(zero, zero)
    return order, dependence


def scale_network(params: PyTree, gamma: float | jax.Array) -> PyTree:
    """Multiplies all weights by γ, which is *not* a rescaling symmetry.

    Between pretraining and finetuning, γ < 1 makes a network keep more of its features' structure.
    The output of a network with L layers and no biases is multiplied by γ^L.

    Args:
      params: pytree of arrays; of a mapping with the key ``"params"`` only what is under it, and
        everywhere only floating leaves, are scaled.
      gamma: the factor.

    Returns:
      A pytree like ``params``, dtypes kept.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> pathcond.scale_network({"w": jnp.array([2.0]), "step": jnp.array(3)}, 0.5)["w"].tolist()
      [1.0]
    """
    leaves, treedef = describe_leaves(params)
    values = [
        _times(value, gamma) if leaf.trainable else value
        for leaf, value in zip(leaves, jax.tree.leaves(params), strict=True)
    ]
    return jax.tree.unflatten(treedef, values)


def _times(value: jax.Array, factor: float | jax.Array) -> jax.Array:
    value = jnp.asarray(value)
    dtype = compute_dtype(value.dtype)
    return (value.astype(dtype) * jnp.asarray(factor, dtype)).astype(value.dtype)


def _best_norm(
    beta: jax.Array, start: jax.Array, correlation: jax.Array, readout: jax.Array
) -> jax.Array:
    """The m > 0 of least cost: the best local minimum of a grid in log m, then bisection."""
    beta = jnp.maximum(beta, jnp.finfo(beta.dtype).tiny ** 0.25)
    pull, kept = jnp.abs(start * correlation), jnp.abs(readout)

    def cost(m: jax.Array) -> jax.Array:
        return (beta / m - readout) ** 2 + m**2 - 2 * m * start * correlation

    def slope(m: jax.Array) -> jax.Array:
        return m**4 - start * correlation * m**3 + readout * beta * m - beta**2

    # Fujiwara's bounds of the roots of the polynomial and, for 1/m, of the reversed one.
    high = 2 * jnp.maximum(jnp.maximum(pull, jnp.cbrt(kept * beta)), jnp.sqrt(beta))
    low = 0.5 / jnp.maximum(jnp.maximum(kept / beta, jnp.cbrt(pull) / beta ** (2 / 3)), beta**-0.5)
    low, high = jnp.log(low), jnp.log(high)
    steps = jnp.linspace(0, 1, _GRID, dtype=beta.dtype)
    best = jnp.argmin(jax.vmap(lambda t: cost(jnp.exp(low + (high - low) * t)))(steps), axis=0)
    below, above = (
        low + (high - low) * jnp.clip(best + side, 0, _GRID - 1).astype(beta.dtype) / (_GRID - 1)
        for side in (-1, 1)
    )

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        below, above = bracket
        middle = 0.5 * (below + above)
        rising = slope(jnp.exp(middle)) > 0
        return jnp.where(rising, below, middle), jnp.where(rising, middle, above)

    below, above = jax.lax.fori_loop(0, _BISECTIONS, halve, (below, above))
    return jnp.exp(0.5 * (below + above))
