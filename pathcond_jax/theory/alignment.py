"""Early alignment: where the neurons of a two-layer ReLU network turn before they grow.

From a small initialization neuron j first moves by ``ẇ_j = a_j D(w_j)`` with
``D(w) = (1/n) Σ_k 1[⟨w, x_k⟩ > 0] y_k x_k``: all neurons turn to the few *extremal* vectors, or
leave the data. Directions and activations are the same on a whole rescaling orbit.

References:
  Boursier, Flammarion, *Early alignment in two-layer networks training is a two-edged sword*,
  JMLR 2025, arXiv 2401.10791.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._spec.types import PyTree, SpecError

_MOST_PATTERNS = 20


def extremal_vectors(
    inputs: jax.typing.ArrayLike, targets: jax.typing.ArrayLike, *, bias: bool = True
) -> np.ndarray:
    """The nonzero vectors D(w) that lie in the activation cone that gives rise to them.

    Args:
      inputs: X, (n, d).
      targets: y, (n,).
      bias: whether neurons have a bias: X gets a column of ones, the last.

    Returns:
      A NumPy array (count, d) or, with a bias, (count, d + 1). Examples on the border of a cone
      count as inactive.

    Raises:
      SpecError: shapes do not fit, or there are more than 20 examples in more than two dimensions,
        the bias included.

    Example:
      >>> import numpy as np
      >>> import pathcond_jax as pathcond
      >>> X, y = np.array([[-0.75], [-0.5], [0.125]]), np.array([1.1, 0.1, 0.8])
      >>> pathcond.extremal_vectors(X, y).round(4).tolist()
      [[-0.2583, 0.6667]]
    """
    _check_shapes(inputs, targets)
    x, y = np.asarray(inputs, np.float64), np.asarray(targets, np.float64)
    x = np.hstack([x, np.ones_like(x[:, :1])]) if bias else x
    if x.shape[1] <= 2:
        directions = _one_per_sector(x)
        patterns = np.unique(directions @ x.T > 0, axis=0)
    elif len(x) <= _MOST_PATTERNS:
        patterns = (np.arange(2 ** len(x))[:, None] >> np.arange(len(x))) & 1 == 1
    else:
        raise SpecError(
            f"{len(x)} examples in {x.shape[1]} dimensions have too many activation patterns; "
            f"at most {_MOST_PATTERNS} examples, or two dimensions, are enumerated"
        )
    forces = patterns @ (y[:, None] * x) / len(x)
    found = forces[((forces @ x.T > 0) == patterns).all(1) & (forces != 0).any(1)]
    return np.unique(found, axis=0)


def alignment(params: PyTree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The cosine between each hidden neuron (w_j, b_j) and the force D(w_j, b_j) on it.

    1: the neuron points where it is pulled, -1: opposite. Works under ``jit``.

    Args:
      params: of a two-layer network, as ``two_layer_init`` makes them.
      inputs: X, (n, d).
      targets: y, (n,), or what is left to explain of it, y − f(X).

    Returns:
      An array (m,); 0 for neurons that no force acts on, such as those that no example activates.

    Raises:
      SpecError: the parameters are not those of a two-layer network, or shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"hidden": {"kernel": jnp.array([[1.0, -3.0]])},
      ...           "output": {"kernel": jnp.ones((2, 1))}}
      >>> pathcond.alignment(params, jnp.array([[1.0]]), jnp.array([2.0])).tolist()
      [1.0, 0.0]
    """
    if not isinstance(params, Mapping) or "kernel" not in params.get("hidden", {}):
        raise SpecError(
            "alignment needs the parameters of a two-layer network: "
            '{"hidden": {"kernel": …, "bias": …}, "output": {"kernel": …}}'
        )
    _check_shapes(inputs, targets)
    hidden = params["hidden"]
    neurons = jnp.asarray(hidden["kernel"])
    x, y = (jnp.asarray(part).astype(neurons.dtype) for part in (inputs, targets))
    if x.shape[1] != neurons.shape[0]:
        raise SpecError(f"inputs have {x.shape[1]} features, the network {neurons.shape[0]}")
    if "bias" in hidden:
        neurons = jnp.concatenate([neurons, hidden["bias"][None]])
        x = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1)
    active = (x @ neurons > 0).astype(x.dtype)
    forces = x.T @ (y[:, None] * active) / len(x)
    sizes = jnp.linalg.norm(forces, axis=0) * jnp.linalg.norm(neurons, axis=0)
    return jnp.where(sizes > 0, (forces * neurons).sum(0) / jnp.where(sizes > 0, sizes, 1), 0)


def _check_shapes(inputs: Any, targets: Any) -> None:
    if np.ndim(inputs) != 2 or np.shape(targets) != np.shape(inputs)[:1]:
        raise SpecError(
            f"inputs {np.shape(inputs)} and targets {np.shape(targets)}; (n, d) and (n,) are needed"
        )


def _one_per_sector(x: np.ndarray) -> np.ndarray:
    """A direction inside each activation cone of at most two dimensions."""
    if x.shape[1] < 2:
        return np.array([[1.0], [-1.0]])[:, : x.shape[1]]
    normals = np.arctan2(x[:, 1], x[:, 0])
    borders = np.unique(np.concatenate([normals + np.pi / 2, normals - np.pi / 2]) % (2 * np.pi))
    middles = borders + 0.5 * np.diff(np.append(borders, borders[0] + 2 * np.pi))
    return np.stack([np.cos(middles), np.sin(middles)], axis=1)
