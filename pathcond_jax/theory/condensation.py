"""Condensation: from small initialization neurons gather on a few input directions.

With an activation whose first p − 1 derivatives vanish at 0 (multiplicity p), and inputs x̃ with a
one appended, the direction u of a neuron first climbs or descends ``h(u) = mean y_i ⟨u, x̃_i⟩^p``.
The direction of a neuron's incoming weights does not change when that neuron is rescaled.

References:
  Zhou, Zhou, Jin, Luo, Zhang, Xu, *Towards understanding the condensation of neural networks at
  initial training*, NeurIPS 2022, arXiv 2105.11686.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csgraph

from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import Incidence, PyTree, SpecError


def neuron_orientations(params: PyTree, spec: ArchSpec) -> tuple[jax.Array, ...]:
    """The direction of what enters each neuron: weights, then biases, scaled to length 1.

    Only rescaling the neurons *before* it can turn it: in the first layer nothing can. (Unless what
    enters takes different powers of its scale, as with a bias that is added behind a square.) Of a
    network whose activation is not homogeneous, ``chain_spec`` describes the neurons.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.

    Returns:
      One array (group.size, entries) per group of the spec, the entries of its incoming parameters
      of most axes first, so that biases are last; zero for a neuron that nothing enters.

    Raises:
      SpecError: ``params`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[3.0, 0.0], [4.0, 2.0]])}, "b": {"w": jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> pathcond.neuron_orientations(params, spec)[0].round(2).tolist()
      [[0.6, 0.8], [0.0, 1.0]]
    """
    values = dict(zip((leaf.path for leaf in spec.leaves), match_leaves(spec, params), strict=True))
    orientations = []
    for group in spec.groups:
        # Matrices before vectors: the bias comes last.
        incoming = sorted(group.incoming, key=lambda i: -np.ndim(values[i.path]))
        parts = [_by_neuron(values[i.path], i, group.size) for i in incoming]
        dtype = compute_dtype(*(part.dtype for part in parts))
        entries = jnp.concatenate([part.astype(dtype) for part in parts], axis=1)
        # Two divisions, so that squares of small weights do not vanish.
        largest = jnp.abs(entries).max(1, keepdims=True)
        entries = entries / jnp.where(largest > 0, largest, 1)
        length = jnp.linalg.norm(entries, axis=1, keepdims=True)
        orientations.append(entries / jnp.where(length > 0, length, 1))
    return tuple(orientations)


def condensed_groups(
    params: PyTree, spec: ArchSpec, tol: float = 0.05, *, signed: bool = True
) -> tuple[np.ndarray, ...]:
    """Which neurons point the same way: connected components of small angles.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.
      tol: neurons whose directions are at an angle of at most this, in radians, are connected.
      signed: whether opposite directions differ.

    Returns:
      One NumPy array (group.size,) per group of the spec, the number of the component of each
      neuron, from 0 in order of the first neuron; -1 for neurons that nothing enters. The largest
      plus one is the number of orientations.

    Raises:
      SpecError: ``params`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[3.0, -1.0, 6.0]])}, "b": {"w": jnp.ones((3, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> pathcond.condensed_groups(params, spec)[0].tolist()
      [0, 1, 0]
      >>> pathcond.condensed_groups(params, spec, signed=False)[0].tolist()
      [0, 0, 0]
    """
    return tuple(_components(u, tol, signed) for u in neuron_orientations(params, spec))


def condensation_directions(
    inputs: jax.typing.ArrayLike, targets: jax.typing.ArrayLike, multiplicity: int = 1
) -> np.ndarray:
    """Where neurons gather, to leading order: the critical points of h on the unit circle.

    For multiplicity 1 these are ``±v/|v|`` with ``v = mean y_i x̃_i``, in any dimension; neuron j
    with output weight a_j goes to the side of ``sign(a_j + ⟨w_j, v/|v|⟩)``. For inputs of one
    dimension h is a trigonometric polynomial of degree p, with at most 2p critical points.

    Args:
      inputs: (n, d); d must be 1 if the multiplicity is not.
      targets: (n,), or what is left to explain of them.
      multiplicity: p, 1 for tanh, 2 for x · tanh.

    Returns:
      Unit vectors, a NumPy array (count, d + 1); the last entry belongs to the bias.

    Raises:
      SpecError: shapes do not fit, or the multiplicity is not 1 and the inputs have several
        dimensions.

    Example:
      >>> import numpy as np
      >>> import pathcond_jax as pathcond
      >>> x = np.array([[-1.0], [2.0]])
      >>> pathcond.condensation_directions(x, np.array([1.0, 2.0])).round(3).tolist()
      [[0.707, 0.707], [-0.707, -0.707]]
    """
    x, y = np.asarray(inputs, np.float64), np.asarray(targets, np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise SpecError(f"inputs {x.shape} and targets {y.shape}; (n, d) and (n,) are needed")
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    if multiplicity == 1:
        pull = y @ x
        return np.stack([pull, -pull]) / np.linalg.norm(pull)
    if x.shape[1] != 2 or multiplicity < 1:
        raise SpecError(
            f"multiplicity {multiplicity} with inputs of {x.shape[1] - 1} dimensions: only "
            "multiplicity 1, or one dimension, is predicted"
        )
    angles = _critical_angles(x, y, multiplicity)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _by_neuron(value: jax.Array, incidence: Incidence, size: int) -> jax.Array:
    """The entries of a leaf by neuron: array (size, entries), padded with zeros."""
    value = jnp.asarray(value)
    rest = tuple(axis for axis in range(value.ndim) if axis not in incidence.axes)
    slices = jnp.transpose(value, incidence.axes + rest).reshape(incidence.index.size, -1)
    flat = incidence.index.reshape(-1)
    members = [np.flatnonzero(flat == neuron) for neuron in range(size)]
    most = max(map(len, members))
    rows = np.array([np.pad(m, (0, most - len(m)), constant_values=len(flat)) for m in members])
    padded = jnp.concatenate([slices, jnp.zeros_like(slices[:1])])
    return padded[rows].reshape(size, -1)


def _components(orientations: jax.Array, tol: float, signed: bool) -> np.ndarray:
    u = np.asarray(orientations, np.float64)
    present = (u != 0).any(axis=1)
    # Of unit vectors; arccos of a cosine would lose small angles to rounding.
    gaps = [np.linalg.norm(u[:, None] - side * u[None], axis=2) for side in (1, -1)]
    distance = gaps[0] if signed else np.minimum(*gaps)
    near = (distance <= 2 * math.sin(min(tol, math.pi) / 2)) & present[:, None] & present[None]
    labels = csgraph.connected_components(near, directed=False)[1]
    _, first, inverse = np.unique(labels[present], return_index=True, return_inverse=True)
    numbers = np.full(len(u), -1)
    numbers[present] = np.argsort(np.argsort(first))[inverse]
    return numbers


def _critical_angles(x: np.ndarray, y: np.ndarray, degree: int) -> np.ndarray:
    """The angles at which ``Σ y_i ⟨u, x_i⟩^p`` is stationary on the circle.

    h is a homogeneous polynomial; with u = (cos a, sin a), h'(a) = u_0 ∂h/∂u_1 − u_1 ∂h/∂u_0 is
    one too. Its real roots in the ratio u_1 / u_0 are the critical points, each with its opposite.
    """
    # h = Σ_k coefficients[k] u_0^(p − k) u_1^k.
    coefficients = np.array(
        [
            math.comb(degree, k) * np.sum(y * x[:, 0] ** (degree - k) * x[:, 1] ** k)
            for k in range(degree + 1)
        ]
    )
    slope = np.zeros(degree + 1)
    slope[:-1] += np.arange(1, degree + 1) * coefficients[1:]
    slope[1:] -= np.arange(degree, 0, -1) * coefficients[:-1]
    roots = np.roots(slope[::-1])
    angles = np.arctan(roots[np.abs(roots.imag) <= 1e-9 * (1 + np.abs(roots))].real)
    if slope[-1] == 0:
        angles = np.append(angles, np.pi / 2)
    return np.concatenate([angles, angles + np.pi])
