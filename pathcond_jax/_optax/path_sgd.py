"""Path-SGD: gradients divided by the diagonal of the path-lifting Gram matrix."""

import functools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from pathcond_jax._lifting.gram import scaled_gram_diagonal
from pathcond_jax._optax.matching import Completion, held, whole
from pathcond_jax._optax.schedule import check_is_spec, integer, missing_params, widest_dtype
from pathcond_jax._optax.transport import parameter_shapes
from pathcond_jax._spec.sharding import automatic
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import PyTree, SpecError


class ScaleByPathState(NamedTuple):
    """State of :func:`scale_by_path`.

    Attributes:
      num_updates: the number of updates so far, int32.
      diagonal: the latest Gram diagonal, like the parameters, each leaf divided by 2 to the power
        of its entry of ``exponent``; None if it is computed at every update.
      exponent: int32, ``(number of leaves,)``; None with ``diagonal``.
    """

    num_updates: jax.Array
    diagonal: PyTree
    exponent: jax.Array | None


def scale_by_path(
    spec: ArchSpec, every: int = 1, damping: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Path-SGD: divides the gradient by the diagonal of the path-lifting Gram matrix.

    ``update_i = gradient_i / (g_i + damping · mean(g))``, and 0 where g_i is 0: for entries on no
    path, and for leaves that are not trainable. Without damping, and with ``every=1``, training
    from any rescaling of the same parameters gives the same sequence of functions. Where a
    parameter is NaN or infinite nothing is updated; with ``every=k`` the last diagonal stays.

    Args:
      spec: the architecture, traced from the parameters that the optimizer updates.
      every: k; g is computed at the first update and at every k-th after it.
      damping: relative to the mean of g over the trainable entries that the optimizer holds.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state :class:`ScaleByPathState`, to be
      followed by a learning rate. Its update requires ``params``; running statistics that g
      depends on are handed over as in :func:`pathcond_jax.recondition`. Where g is known already,
      ``update(..., gram_diagonal=g)``, a pytree like the updates, spares its computation.

    Raises:
      SpecError: an argument cannot be used, or, at update, the parameters are missing or have
        another structure than the spec.
      NotPathLiftableError: the network is not a sum over paths.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 2.0 * jnp.ones((1, 1))}, "b": {"w": jnp.ones((1, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> optimizer = optax.chain(pathcond.scale_by_path(spec), optax.scale(-0.1))
      >>> gradients = {"a": {"w": jnp.ones((1, 1))}, "b": {"w": jnp.ones((1, 1))}}
      >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
      >>> updates["a"]["w"].item(), updates["b"]["w"].item()
      (-0.1, -0.025)

    References:
      Neyshabur, Salakhutdinov, Srebro, *Path-SGD*, 2015, arXiv 1506.02617, in the form of the
      diagonal of ∂Φᵀ∂Φ; Lebeurrier, Vayer, Gribonval, 2026, arXiv 2602.19799.
    """
    check_is_spec(spec)
    every = integer("every", every, 1)
    if not damping >= 0:
        raise SpecError(f"damping is {damping}; it cannot be negative")
    lift = functools.partial(scaled_gram_diagonal, spec=spec)
    jax.eval_shape(lift, parameter_shapes(spec))
    complete = Completion("scale_by_path", spec, lambda params: jax.tree.leaves(lift(params)))
    dtype = widest_dtype(spec)

    def init(params: PyTree) -> ScaleByPathState:
        count = jnp.zeros((), jnp.int32)
        if every == 1:
            return ScaleByPathState(count, None, None)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
        return ScaleByPathState(count, zeros, jnp.zeros((len(jax.tree.leaves(params)),), jnp.int32))

    def lifted(params: PyTree, extra: Mapping[str, Any]) -> _Scaled:
        """The diagonal at each leaf that the optimizer holds."""
        positions = held(spec, params, "params")
        others = complete(positions, params, extra)

        def at_leaves(leaves: list[Any]) -> tuple[list[jax.Array], jax.Array]:
            values = {**others, **dict(zip(positions, leaves, strict=True))}
            found = lift(whole(spec, values))
            mantissas, exponents = map(jax.tree.leaves, (found.mantissa, found.exponent))
            return (
                [mantissas[k].astype(dtype) for k in positions],
                jnp.stack([exponents[k] for k in positions]),
            )

        return automatic(at_leaves, jax.tree.leaves(params))

    def update(
        updates: PyTree,
        state: ScaleByPathState,
        params: PyTree = None,
        *,
        gram_diagonal: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByPathState]:
        if params is None:
            raise missing_params("scale_by_path")
        if gram_diagonal is None:
            if held(spec, params, "params") != held(spec, updates, "updates"):
                raise SpecError("scale_by_path: updates and params have different leaves")
            diagonal = functools.partial(lifted, params, extra)
            num_entries = _num_trained(spec, params)
        else:
            num_entries = sum(map(np.size, jax.tree.leaves(gram_diagonal)))
            diagonal = functools.partial(_unscaled, gram_diagonal, dtype)
        if every == 1:
            mantissas, exponents = diagonal()
        else:
            old = (jax.tree.leaves(state.diagonal), state.exponent)
            mantissas, exponents = lax.cond(
                state.num_updates % every == 0,
                lambda old: _if_finite(diagonal(), old),
                lambda old: old,
                old,
            )
        flat, treedef = jax.tree.flatten(updates)
        divided = _divided(flat, mantissas, exponents, damping, num_entries)
        count = optax.safe_increment(state.num_updates)
        if every > 1:
            kept = jax.tree.unflatten(jax.tree.structure(state.diagonal), mantissas)
            return jax.tree.unflatten(treedef, divided), ScaleByPathState(count, kept, exponents)
        return jax.tree.unflatten(treedef, divided), ScaleByPathState(count, None, None)

    return optax.GradientTransformationExtraArgs(init, update)


def _num_trained(spec: ArchSpec, params: PyTree) -> int:
    leaves = [spec.leaves[k] for k in held(spec, params, "params")]
    return sum(leaf.size for leaf in leaves if leaf.trainable)


# An array per leaf and the exponent of the power of two that each is to be multiplied by.
_Scaled = tuple[list[jax.Array], jax.Array]


def _unscaled(diagonal: PyTree, dtype: Any) -> _Scaled:
    mantissas = [jnp.asarray(leaf, dtype) for leaf in jax.tree.leaves(diagonal)]
    return mantissas, jnp.zeros((len(mantissas),), jnp.int32)


def _if_finite(new: _Scaled, old: _Scaled) -> _Scaled:
    """``new`` where all of it is finite, else ``old``."""
    finite = functools.reduce(operator.and_, [jnp.isfinite(m).all() for m in new[0]])
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def _divided(
    updates: list[Any],
    mantissas: list[jax.Array],
    exponents: jax.Array,
    damping: float,
    num_entries: int,
) -> list[Any]:
    logs = exponents.astype(mantissas[0].dtype) * float(np.log(2))
    sums = jnp.stack([mantissa.sum() for mantissa in mantissas])
    finite = jnp.isfinite(sums).all()
    log_mean = jax.nn.logsumexp(logs, b=sums) - float(np.log(num_entries))
    divided = []
    for update, mantissa, exponent, log in zip(updates, mantissas, exponents, logs, strict=True):
        u = jnp.asarray(update)
        if not jnp.issubdtype(u.dtype, jnp.floating):
            divided.append(update)
            continue
        below = mantissa + damping * jnp.exp(log_mean - log) if damping else mantissa
        on_path = (mantissa > 0) & finite
        quotient = u.astype(mantissa.dtype) / jnp.where(on_path, below, 1)
        divided.append(jnp.where(on_path, jnp.ldexp(quotient, -exponent), 0).astype(u.dtype))
    return divided
