"""What criteria read: powers of parameters, squares, second moments, statistics of neurons."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pathcond_jax._spec.arrays import Part, each, entries_of, widened
from pathcond_jax._spec.extended_range import (
    ZERO,
    computed_once,
    exponent_of,
    largest,
    power_of_two,
)
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import NeuronGroup, PyTree, SpecError


def powers(
    values: list[Any], p: float, extra: tuple[float, ...]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """``|value|^p 2^extra`` of each, as mantissas and the exponents of powers of two."""
    wide = [widened(value) for value in values]
    tops = largest(wide)
    scales, factors, exponents = _normalizing(tops, p, np.array(extra, tops.dtype))
    arguments = [(value, Part(scales, k, 1), Part(factors, k, 1)) for k, value in enumerate(wide)]
    return each(_power, arguments, [(p,)] * len(wide)), entries_of(exponents)


@functools.partial(jax.jit, static_argnums=1)
def _normalizing(
    tops: jax.Array, p: float, extra: np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each leaf is multiplied by before and after the power, and the exponent then left."""
    exponents = exponent_of(tops)
    exponents = jnp.where(exponents > ZERO, exponents, 0)
    logs = p * exponents.astype(tops.dtype) + extra
    whole = jnp.floor(logs)
    return (
        computed_once(power_of_two(-exponents, tops.dtype)),
        computed_once(jnp.exp2(logs - whole)),
        computed_once(whole.astype(jnp.int32)),
    )


@functools.partial(jax.jit, static_argnums=3)
def _power(value: jax.Array, scale: jax.Array, factor: jax.Array, p: float) -> jax.Array:
    scale, factor = (number.reshape(()).astype(value.dtype) for number in (scale, factor))
    return _raised(value * scale, p) * factor


def _raised(value: jax.Array, p: float) -> jax.Array:
    """``|value|^p``."""
    # An absolute value that something else reads as well is written to memory: none for even p.
    return value ** int(p) if p % 2 == 0 else jnp.abs(value) ** p


def squared(tree: PyTree, spec: ArchSpec, what: str) -> PyTree:
    def square(value: Any) -> jax.Array:
        return jnp.square(widened(value))

    values = match_leaves(spec, tree, what)
    return jax.tree.unflatten(
        spec.treedef,
        [
            square(value) if leaf.trainable else value
            for leaf, value in zip(spec.leaves, values, strict=True)
        ],
    )


def second_moments(source: Any, params: PyTree, spec: ArchSpec) -> list[Any]:
    """One array like each parameter, from any of the sources of :func:`fisher`."""
    if callable(source):
        gradients = source(params)
        flat, treedef = jax.tree.flatten(gradients)
        shapes = [np.shape(value) for value in flat]
        fits = treedef == spec.treedef and all(
            not leaf.trainable or shape[len(shape) - len(leaf.shape) :] == leaf.shape
            for leaf, shape in zip(spec.leaves, shapes, strict=True)
        )
        if not fits:
            raise SpecError(
                "fisher: the function must return a tree like the parameters, whose arrays end "
                f"with the shapes of the parameters; it has {shapes[:4]} for "
                f"{[leaf.shape for leaf in spec.leaves[:4]]}"
            )
        return [
            jnp.square(jnp.asarray(g)).reshape(-1, *leaf.shape).sum(0) if leaf.trainable else g
            for leaf, g in zip(spec.leaves, flat, strict=True)
        ]
    if jax.tree.structure(source) != spec.treedef:
        found = optax.tree_utils.tree_get(source, "nu")
        if found is None:
            raise SpecError(
                "fisher: neither a function, nor a tree like the parameters, nor the state of an "
                "optimizer with second moments `nu`"
            )
        source = found
    return match_leaves(spec, source, "fisher: second moments")


def _check_read_once(group: NeuronGroup) -> None:
    """One statistic says nothing of a neuron and of its square."""
    for one, two in itertools.combinations(group.outgoing, 2):
        both = np.intersect1d(one.index[one.index >= 0], two.index[two.index >= 0])
        if one.power != two.power and both.size:
            raise SpecError(
                f"activation: in group {group.name!r} {one.path!r} and {two.path!r} read different "
                f"powers of a neuron, {one.power:g} and {two.power:g}, and one statistic does not "
                "describe both; pass None for this group"
            )


def log_statistics(statistics: Any, spec: ArchSpec) -> tuple[jax.Array, ...]:
    """The logarithm of each neuron's statistic; NaN for a group that has none."""
    if isinstance(statistics, Mapping):
        unknown = set(statistics) - {group.name for group in spec.groups}
        if unknown:
            known = ", ".join(repr(group.name) for group in spec.groups)
            raise SpecError(f"activation: no group {min(unknown)!r}; there are {known}")
        statistics = [statistics.get(group.name) for group in spec.groups]
    if len(statistics) != len(spec.groups):
        raise SpecError(
            f"activation: {len(statistics)} statistics for {len(spec.groups)} groups of the spec"
        )
    logs = []
    for group, value in zip(spec.groups, statistics, strict=True):
        if value is not None and np.shape(value) != (group.size,):
            raise SpecError(
                f"activation: statistics of group {group.name!r} have shape {np.shape(value)}, "
                f"not {(group.size,)}"
            )
        if value is not None:
            _check_read_once(group)
        logs.append(
            jnp.full(group.size, -jnp.inf) if value is None else jnp.log(jnp.asarray(value))
        )
    return tuple(logs)
