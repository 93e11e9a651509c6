"""Which weights to cut: masks by saliency, at once or little by little."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pathcond_jax._program import roles
from pathcond_jax._spec.arrays import is_traced, widened
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.quantization._saliency import path_saliency

Saliency = Callable[[PyTree, ArchSpec], PyTree]
"""From parameters and spec to a tree like the parameters; the least salient entries are cut."""


class PruningWarning(UserWarning):
    """A layer of a pruned network lost all its weights."""


def magnitude_saliency(params: PyTree, spec: ArchSpec) -> PyTree:
    """The absolute values of the entries, which depend on the representative.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.

    Returns:
      A pytree like ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[-3.0]])}, "b": {"w": jnp.array([[2.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> pathcond.quantization.magnitude_saliency(params, spec)["a"]["w"].tolist()
      [[3.0]]
    """
    return jax.tree.unflatten(
        spec.treedef, [abs(jnp.asarray(v)) for v in match_leaves(spec, params)]
    )


def prune(
    params: PyTree,
    spec: ArchSpec,
    sparsity: float,
    *,
    saliency: Saliency = path_saliency,
    steps: int = 1,
    pruned: Callable[[str], bool] | None = None,
) -> PyTree:
    """Masks that cut the least salient weights of the whole network.

    With several steps the masked network is scored again after each, and the share of weights that
    is kept falls geometrically, as SynFlow does: scores of a conserved quantity, such as
    ``path_saliency``, then leave every layer some weights, which a single step does not. By
    ``path_saliency`` every representative loses the same weights; by ``magnitude_saliency`` it
    depends on the representative, so condition first (``"enorm"``).

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.
      sparsity: the share of weights to cut, from 0 to less than 1.
      saliency: scores each entry, from parameters and spec.
      steps: how often to score.
      pruned: which leaves may lose entries, by path; None: the weights, which are the trainable
        leaves of two axes or more that the network does not only add.

    Returns:
      A pytree like ``params`` of boolean arrays, False where an entry is cut. They are
      applied by ``jax.tree.map(lambda value, kept: jnp.where(kept, value, 0), params, masks)``.
      Under ``jit``, all True if a saliency is not finite.

    Warns:
      PruningWarning: a layer lost all its weights; it is named. Not under ``jit``.

    Raises:
      SpecError: ``params`` or the saliency does not fit the spec or is not finite, an option
        cannot be used, or nothing is left to prune.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[3.0, 1.0]])}, "b": {"w": jnp.array([[2.0], [-9.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> pathcond.quantization.prune(params, spec, 0.5)["a"]["w"].tolist()
      [[False, True]]

    References:
      Tanaka, Kunin, Yamins, Ganguli, *Pruning neural networks without any data by iteratively
      conserving synaptic flow*, NeurIPS 2020.
    """
    if not 0 <= sparsity < 1:
        raise SpecError(f"sparsity is {sparsity}; it is the share to cut, from 0 to less than 1")
    if not steps >= 1:
        raise SpecError(f"steps is {steps}; there is at least one")
    values = match_leaves(spec, params)
    chosen = _chosen(spec, pruned)
    count = sum(int(np.prod(spec.leaves[k].shape)) for k in chosen)
    kept = tuple(round(count * (1 - sparsity) ** (step / steps)) for step in range(1, steps + 1))
    masks, finite = _masks(values, np.asarray(kept, np.int32), spec, saliency, chosen)
    if not any(map(is_traced, [*masks, finite])):
        _report(spec, chosen, masks, bool(finite))
    return jax.tree.unflatten(spec.treedef, masks)


def _chosen(spec: ArchSpec, pruned: Callable[[str], bool] | None) -> tuple[int, ...]:
    """The positions of the leaves that may lose entries."""
    wanted = pruned or _weights(spec).__contains__
    chosen = tuple(
        k
        for k, leaf in enumerate(spec.leaves)
        if leaf.trainable and leaf.size and wanted(leaf.path)
    )
    if not chosen:
        trainable = ", ".join(leaf.path for leaf in spec.leaves if leaf.trainable)
        raise SpecError(f"no leaf to prune; the trainable leaves are {trainable}")
    return chosen


def _weights(spec: ArchSpec) -> frozenset[str]:
    """The leaves of two axes or more that the network does not only add."""
    return frozenset(leaf.path for leaf in spec.leaves if len(leaf.shape) > 1) - roles.biases(spec)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _masks(
    values: Sequence[Any],
    kept: jax.Array,
    spec: ArchSpec,
    saliency: Saliency,
    chosen: tuple[int, ...],
) -> tuple[list[jax.Array], jax.Array]:
    """A mask per leaf, and whether all scores were finite."""
    shapes = [spec.leaves[k].shape for k in chosen]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes]).tolist()

    def masked(flat: jax.Array) -> list[jax.Array]:
        parts = zip(jnp.split(flat, ends[:-1]), shapes, strict=True)
        masks = [jnp.ones(leaf.shape, bool) for leaf in spec.leaves]
        for k, (part, shape) in zip(chosen, parts, strict=True):
            masks[k] = part.reshape(shape)
        return masks

    def step(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        present, finite = state
        cut = [
            jnp.where(mask, value, jnp.zeros_like(value))
            for mask, value in zip(masked(present), values, strict=True)
        ]
        found = match_leaves(spec, saliency(spec.treedef.unflatten(cut), spec), "saliency")
        scores = jnp.concatenate([widened(found[k]).reshape(-1) for k in chosen])
        # What is cut stays cut; of equal scores the first in the tree goes first.
        order = jnp.argsort(jnp.where(present, scores, -jnp.inf))
        rank = jnp.zeros(ends[-1], jnp.int32).at[order].set(jnp.arange(ends[-1], dtype=jnp.int32))
        following = rank >= ends[-1] - kept[number]
        return following, finite & (jnp.isfinite(scores) | ~present).all()

    start = jnp.ones(ends[-1], bool), jnp.ones((), bool)
    present, finite = lax.fori_loop(0, kept.shape[0], step, start)
    return masked(present | ~finite), finite


def _report(
    spec: ArchSpec, chosen: Sequence[int], masks: Sequence[jax.Array], finite: bool
) -> None:
    """Errors and warnings, where numbers are known."""
    if not finite:
        raise SpecError("the saliency is not finite: a parameter is NaN, infinite or too large")
    weights, paths = _weights(spec), [leaf.path for leaf in spec.leaves]
    lost = [repr(paths[k]) for k in chosen if paths[k] in weights and not masks[k].any()]
    if lost:
        warnings.warn(
            f"all weights of {', '.join(lost)} are cut: the network is disconnected there; take "
            "more steps or less sparsity, or leave them out with `pruned`",
            PruningWarning,
            stacklevel=3,
        )
