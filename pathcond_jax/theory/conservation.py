"""What training keeps: conserved quantities of gradient flow, and choosing them by rescaling.

Rescaling changes no loss, so along a gradient flow ``Σ_i B_ih θ_i²`` is constant for every neuron
h: the squared norm of what leaves it minus that of what enters it, each entry times the power of
the neuron's scale that it takes. Rescaling chooses these
numbers and training then keeps them; a gradient step of size η changes them by exactly η² times
the same expression of the gradient.

References:
  Marcotte, Gribonval, Peyré, *Abide by the law and follow the flow: conservation laws for gradient
  flows*, NeurIPS 2023, arXiv 2307.00144.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.flatten_util import ravel_pytree

from pathcond_jax._action.rescale import rescale
from pathcond_jax._solve import stacks
from pathcond_jax._solve.objective import SQUARES, LogSum, Objective, Smooth, reduce_masses
from pathcond_jax._solve.solution import Solution
from pathcond_jax._solve.solve import solve
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.sharding import segment_sum
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import Incidence, PyTree, SpecError
from pathcond_jax.criteria._catalogue import norm

_MOST_ROUNDS = 10


def conserved_quantities(params: PyTree, spec: ArchSpec) -> tuple[jax.Array, ...]:
    """``‖out_h‖² − ‖in_h‖²`` of every neuron: the constants of gradient flow.

    Biases count as incoming. What takes a power q of a neuron's scale counts q times, as follows
    from differentiating a loss along the rescaling (Marcotte et al., 2023): behind a squared ReLU
    the constant is ``2‖out_h‖² − ‖in_h‖²``. Entries that both enter and leave the neurons of a
    group, as in a residual stream, count on both sides.

    Args:
      params: the parameters the spec was built for; of gradients, a step of size η changes the
        quantities of the parameters by η² times the quantities of the gradients.
      spec: the architecture.

    Returns:
      One array ``(group.size,)`` per group of the spec, float32 at least.

    Raises:
      SpecError: ``params`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[1.0, 2.0]])}, "b": {"w": jnp.array([[3.0], [0.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> [c.tolist() for c in pathcond.conserved_quantities(params, spec)]
      [[8.0, -4.0]]
    """
    match_leaves(spec, params)
    return _conserved_quantities(params, spec.symmetry)


@functools.partial(jax.jit, static_argnums=1)
def _conserved_quantities(params: PyTree, spec: ArchSpec) -> tuple[jax.Array, ...]:
    values = dict(zip((leaf.path for leaf in spec.leaves), jax.tree.leaves(params), strict=True))
    quantities = []
    for group in spec.groups:
        sides = [
            [_times(i.power, _energies(values[i.path], i, group.size)) for i in incidences]
            for incidences in (group.outgoing, group.incoming)
        ]
        dtype = compute_dtype(*(part.dtype for side in sides for part in side))
        out, into = (
            functools.reduce(jnp.add, [part.astype(dtype) for part in side]) for side in sides
        )
        quantities.append(out - into)
    return tuple(quantities)


def rescale_to(
    params: PyTree, spec: ArchSpec, target: tuple[jax.Array, ...], **options: Any
) -> tuple[PyTree, Solution]:
    """Rescales so that every neuron has a given conserved quantity; ENorm is the target 0.

    Where no weight is zero there is exactly one such point on the orbit: the minimum of the
    strictly convex ``½ Σ θ_i² e^{−2(Bz)_i} + ⟨target, z⟩``. Training from it keeps the quantities.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.
      target: one array ``(group.size,)`` per group, like ``conserved_quantities``.
      **options: of :func:`pathcond_jax.solve`.

    Returns:
      The rescaled parameters, dtypes kept, and the solution. Where weights are zero a target may be
      out of reach, which the solution's status tells.

    Raises:
      SpecError: ``params`` or ``target`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[1.0]])}, "b": {"w": jnp.array([[6.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> moved, _ = pathcond.rescale_to(params, spec, (jnp.array([5.0]),))
      >>> jnp.round(moved["a"]["w"], 3).tolist(), jnp.round(moved["b"]["w"], 3).tolist()
      ([[2.0]], [[3.0]])
    """
    shapes, wanted = [np.shape(t) for t in target], [(group.size,) for group in spec.groups]
    if shapes != wanted:
        raise SpecError(f"target has shapes {shapes}, the groups of the spec {wanted}")
    balanced = norm().solve(params, spec)
    masses = reduce_masses(spec, params, SQUARES)
    energy = jnp.exp(balanced.objective / spec.num_parameters)
    function = jax.tree_util.Partial(_tilted_energy(spec), masses, energy)
    linear = -jnp.concatenate([jnp.asarray(part) for part in target])
    goal = Objective((), linear, (Smooth(energy, function),))
    options = {"max_steps": 200, "initial": balanced.log_scales, **options}
    solution = solve(goal, spec, **options)
    return rescale(params, spec, solution.log_scales), solution


def num_conservation_laws(
    phi: Callable[[PyTree], PyTree], theta: PyTree, *, seed: int = 0, tol: float | None = None
) -> int:
    """The number of independent quantities that gradient flow keeps, whatever the data.

    Of losses that depend on θ through φ(θ), these are as many as D minus the dimension, at θ, of
    the Lie algebra that the gradients of φ generate. Brackets [f, g] = Df·g − Dg·f are added,
    by forward-mode differentiation, until the dimension stops growing. Random combinations stand
    for all fields, so that φ may have many more components than θ.

    Args:
      phi: a smooth reparametrization, such as a path lifting or a product of matrices.
      theta: a generic point, such as a random one: pytree of floating arrays, D entries in all.
      seed: of the random combinations.
      tol: singular values below this, relative to the largest, count as zero; None: 100 D times
        the machine precision.

    Returns:
      The number of laws.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> theta = jnp.array([0.7, -1.3, 0.4])
      >>> pathcond.num_conservation_laws(lambda x: x[0] * x[1] * x[2], theta)  # x_i² − x_j²
      2
    """
    flat, unravel = ravel_pytree(theta)
    rng = np.random.default_rng(seed)
    tol = 100 * flat.size * float(jnp.finfo(flat.dtype).eps) if tol is None else tol

    def lifted(x: jax.Array) -> jax.Array:
        return ravel_pytree(phi(unravel(x)))[0]

    (width,) = jax.eval_shape(lifted, flat).shape
    mixing = jnp.asarray(rng.normal(size=(flat.size, width)), flat.dtype)

    def gradients(x: jax.Array) -> jax.Array:
        _, pull_back = jax.vjp(lifted, x)
        return jax.vmap(lambda row: pull_back(row)[0])(mixing)

    rank, fields = _independent(gradients, flat, tol)
    for _ in range(_MOST_ROUNDS):
        if rank in (0, flat.size):
            break
        pairs = jnp.asarray(rng.normal(size=(2, flat.size, rank)), flat.dtype)
        larger, fields = _independent(_with_brackets(fields, pairs), flat, tol)
        if larger == rank:
            break
        rank = larger
    return flat.size - rank


@functools.lru_cache(maxsize=64)
def _tilted_energy(spec: ArchSpec) -> Callable[..., jax.Array]:
    """``½ Σ θ² e^{−2Bz} / scale`` as a function of reduced squares, scale and log-scales."""

    def energy(
        masses: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]],
        scale: jax.Array,
        log_scales: tuple[jax.Array, ...],
    ) -> jax.Array:
        table, z = stacks.table(spec), jnp.concatenate(log_scales)
        parts = stacks.stacked(LogSum(1.0, -2.0, *masses), table, z.dtype)
        stacked = stacks.equilibrate(parts, jnp.array(True))
        exponents = stacked.logs - 2 * stacks.spread(table, z)
        shares = stacks.normalized(stacked, table, exponents, jnp.log(scale).astype(z.dtype))
        return 0.5 * functools.reduce(jnp.add, [share.sum() for share in shares])

    return energy


def _times(power: float, values: jax.Array) -> jax.Array:
    return values if power == 1 else power * values


def _energies(value: jax.Array, incidence: Incidence, size: int) -> jax.Array:
    """Squares of a leaf summed over each neuron of an incidence."""
    value = jnp.asarray(value)
    squares = jnp.square(value.astype(compute_dtype(value.dtype)))
    rest = tuple(axis for axis in range(value.ndim) if axis not in incidence.axes)
    order = tuple(sorted(incidence.axes).index(axis) for axis in incidence.axes)
    squares = jnp.transpose(squares.sum(rest), order)
    segments = np.where(incidence.index >= 0, incidence.index, size).reshape(-1)
    return segment_sum(squares.reshape(-1), segments, size + 1)[:size]


Fields = Callable[[jax.Array], jax.Array]


def _independent(fields: Fields, x: jax.Array, tol: float) -> tuple[int, Fields]:
    """The rank of vector fields (count, D) at x, and as many of them, of length 1 at x."""
    values = np.asarray(jax.jit(fields)(x), np.float64)
    singular = np.linalg.svd(values, compute_uv=False)
    rank = int((singular > tol * singular[0]).sum())
    chosen = np.sort(scipy.linalg.qr(values.T, mode="r", pivoting=True)[1][:rank])
    lengths = jnp.asarray(np.linalg.norm(values[chosen], axis=1), x.dtype)
    return rank, lambda x: fields(x)[chosen] / lengths[:, None]


def _with_brackets(fields: Fields, pairs: jax.Array) -> Fields:
    """The fields, and the brackets of random pairs of their combinations."""

    def extended(x: jax.Array) -> jax.Array:
        def bracket(one: jax.Array, two: jax.Array) -> jax.Array:
            f, g = (lambda x, c=c: c @ fields(x) for c in (one, two))
            return jax.jvp(f, (x,), (g(x),))[1] - jax.jvp(g, (x,), (f(x),))[1]

        return jnp.concatenate([fields(x), jax.vmap(bracket)(*pairs)])

    return extended
