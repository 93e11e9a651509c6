"""Networks built by construction: two-layer initializations and compositions of triangle waves."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from pathcond_jax._spec.types import PyTree, SpecError

TWO_LAYER_MODES = ("balanced", "dominated", "unbalanced")


def two_layer_init(
    key: jax.Array,
    num_inputs: int,
    num_neurons: int,
    *,
    scale: float | jax.Array = 1.0,
    mode: str = "balanced",
    bias: bool = True,
    dtype: Any = None,
) -> PyTree:
    """Initializes ``Σ_j a_j ReLU(⟨w_j, x⟩ + b_j)`` at scale/√m in one of three regimes.

    The modes fix the sign of the conserved quantity ``a_j² − ‖(w_j, b_j)‖²``, hence whether the
    sign of a_j can change during training. A small scale makes training start with an early
    alignment phase; no rescaling undoes it, because the products a_j w_j do not change.

    Args:
      key: random key.
      num_inputs: d.
      num_neurons: m.
      scale: λ; the inner weights are λ/√m times standard normal numbers.
      mode: ``"balanced"``: |a_j| = ‖(w_j, b_j)‖; ``"dominated"``: |a_j| is up to twice as large;
        ``"unbalanced"``: a_j is λ/√m times a standard normal number.
      bias: whether neurons have biases.
      dtype: of the parameters; None: the default float.

    Returns:
      A chain for ``chain_spec(params, ["hidden", "output"])``, with arrays of the shapes
      ``{"hidden": {"kernel": (d, m), "bias": (m,)}, "output": {"kernel": (m, 1)}}``.

    Raises:
      SpecError: the mode is unknown.

    Example:
      >>> import jax
      >>> import pathcond_jax as pathcond
      >>> params = pathcond.two_layer_init(jax.random.key(0), 2, 5, scale=0.1)
      >>> spec = pathcond.chain_spec(params, ["hidden", "output"])
      >>> (c,) = pathcond.conserved_quantities(params, spec)
      >>> bool((abs(c) < 1e-6).all())
      True

    References:
      Boursier, Flammarion, *Early alignment in two-layer networks training is a two-edged sword*,
      JMLR 2025, arXiv 2401.10791.
    """
    if mode not in TWO_LAYER_MODES:
        raise SpecError(f"no mode {mode!r}; there are {', '.join(map(repr, TWO_LAYER_MODES))}")
    dtype = jnp.zeros((), dtype).dtype
    inner_key, sign_key, size_key = jax.random.split(key, 3)
    inner = jax.random.normal(inner_key, (num_inputs + bias, num_neurons), dtype)
    if mode == "unbalanced":
        outer = jax.random.normal(size_key, (num_neurons,), dtype)
    else:
        outer = jnp.linalg.norm(inner, axis=0) * jax.random.rademacher(
            sign_key, (num_neurons,), dtype
        )
    if mode == "dominated":
        outer = outer * jax.random.uniform(size_key, (num_neurons,), dtype, 1.0, 2.0)
    factor = jnp.asarray(scale, dtype) / jnp.sqrt(jnp.asarray(num_neurons, dtype))
    hidden = {"kernel": factor * inner[:num_inputs]}
    if bias:
        hidden["bias"] = factor * inner[num_inputs]
    return {"hidden": hidden, "output": {"kernel": factor * outer[:, None]}}


def triangle_mlp(
    peaks: jax.Array, s0: float | jax.Array = 0.25, slope: float | jax.Array = 0.0
) -> PyTree:
    """A ReLU network of width 4 that sums compositions of triangle functions on [0, 1].

    With ``T_a`` rising from 0 to 1 on [0, a] and falling back to 0 on [a, 1], and the waves
    ``W_i = T_{a_i} ∘ … ∘ T_{a_0}``, the network computes ``slope · x + Σ_i s_i W_i(x)``, which has
    2^d linear pieces. The factors ``s_{i+1} = s_i (1 − a_{i+1}) a_{i+2}`` make the limit d → ∞
    differentiable; the peak after the last counts as ½. With all peaks ½ the sum is x − x² up to
    4^{−(d+1)}.

    The four neurons of each layer hold the two halves of the wave, the sum so far and the constant
    1, from which later layers take their biases.

    Args:
      peaks: the positions a_0 … a_{d−1} of the peaks, (d,), in the open interval (0, 1).
      s0: the factor of the first wave. It may be negative as long as the partial sums, which pass
        through ReLUs, stay nonnegative.
      slope: of a linear term, nonnegative.

    Returns:
      A chain for ``chain_spec(params, list(params))``, differentiable in all arguments, with arrays
      of the shapes ``{"layer_0": {"kernel": (1, 4), "bias": (4,)}, "layer_1": {"kernel": (4, 4)},
      …, "layer_d": {"kernel": (4, 1)}}``.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = pathcond.triangle_mlp(jnp.full(3, 0.5))
      >>> network = pathcond.chain_spec(params, list(params)).apply_fn
      >>> float(network(params, jnp.array([[0.25]]))[0, 0])  # x − x²
      0.1875

    References:
      Milkert, Hyde, Laine, *Compelling ReLU networks to exhibit exponentially many linear regions
      at initialization and during training*, ICML 2025, arXiv 2311.18022.
    """
    peaks = jnp.asarray(peaks)
    (depth,) = peaks.shape
    dtype = peaks.dtype
    s0, slope, one = (jnp.asarray(value, dtype) for value in (s0, slope, 1.0))
    zero = jnp.zeros((), dtype)
    scales = [s0]
    following = [*peaks[1:], jnp.asarray(0.5, dtype)]
    for here, after in itertools.pairwise(following):
        scales.append(scales[-1] * (1 - here) * after)
    first = peaks[0]
    params = {
        "layer_0": {
            "kernel": jnp.stack([one, one, slope, zero])[None],
            "bias": jnp.stack([zero, -first, zero, one]),
        }
    }
    for number in range(depth):
        a = peaks[number]
        wave = jnp.stack([1 / a, -1 / (a - a**2), zero, zero])
        total = scales[number] * wave + jnp.stack([zero, zero, one, zero])
        constant = jnp.stack([zero, zero, zero, one])
        if number + 1 == depth:
            columns = [total]
        else:
            columns = [wave, wave - peaks[number + 1] * constant, total, constant]
        params[f"layer_{number + 1}"] = {"kernel": jnp.stack(columns, axis=1)}
    return params
