"""How much of the path norm goes through each parameter."""

import functools

import jax
import jax.numpy as jnp

from pathcond_jax._lifting.gram import sum_and_derivatives
from pathcond_jax._spec import extended_range
from pathcond_jax._spec.extended_range import Scaled
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError


def path_saliency(params: PyTree, spec: ArchSpec, order: int = 1) -> PyTree:
    """The share of the path norm that goes through each entry; no rescaling changes it.

    With Φ_p the product of the weights along path p and q the order,

        s_i = |θ_i|^q · ∂(Σ_p |Φ_p|^q) / ∂|θ_i|^q  /  Σ_p |Φ_p|^q:

    the share of the paths that meet entry i, counted as often as they meet it, so that the shares
    of a layer that every path crosses sum to 1. Order 1 is SynFlow's score, divided by the sum over
    all paths; order 2 is θ_i² g_i with g the Gram diagonal, divided likewise (where no path meets
    an entry twice). Being shares they stay within the range of float32 at any depth.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.
      order: q, 1 or 2.

    Returns:
      A pytree like ``params``, float32 at least; zeros at leaves that are not trainable, and
      everywhere if no path is left.

    Raises:
      NotPathLiftableError: an operation of the network is not a sum over paths.
      SpecError: ``params`` does not fit the spec, or the order is another.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from pathcond_jax.quantization import path_saliency
      >>> params = {"a": {"w": jnp.array([[3.0, 1.0]])}, "b": {"w": jnp.array([[2.0], [-4.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> jnp.round(path_saliency(params, spec)["a"]["w"], 3).tolist()
      [[0.6, 0.4]]

    References:
      Tanaka, Kunin, Yamins, Ganguli, *Pruning neural networks without any data by iteratively
      conserving synaptic flow*, NeurIPS 2020. Lebeurrier, Vayer, Gribonval, *Path-conditioned
      training*, 2026, arXiv 2602.19799.
    """
    if order not in (1, 2):
        raise SpecError(f"order is 1 or 2, not {order!r}")
    values = match_leaves(spec, params)
    total, derivatives = sum_and_derivatives(params, spec, order)
    dtype = total.mantissa.dtype
    shares = [
        jnp.zeros(leaf.shape, dtype) if found is None else _share(value, found, total, order)
        for leaf, value, found in zip(spec.leaves, values, derivatives, strict=True)
    ]
    return jax.tree.unflatten(spec.treedef, shares)


@functools.partial(jax.jit, static_argnums=3)
def _share(value: jax.Array, derivative: Scaled, total: Scaled, order: int) -> jax.Array:
    """``|value|^order · derivative / total``, 0 where there is nothing to share."""
    dtype = total.mantissa.dtype
    power = extended_range.powered(jnp.asarray(value), order, dtype)
    some = total.mantissa != 0
    mantissa = power.mantissa * derivative.mantissa / jnp.where(some, total.mantissa, 1)
    exponent = power.exponent + derivative.exponent - total.exponent
    share = extended_range.times_power_of_two(mantissa, exponent)
    # NaN stays: it is no number that something could be pruned by.
    return jnp.where(some | jnp.isnan(mantissa), share, 0)
