"""Numeric proof of a spec: random scales, compared outputs."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._action.rescale import rescale, round_to_powers_of_two
from pathcond_jax._spec.explanation import rounded_at
from pathcond_jax._spec.log_scales import LogScales, by_group
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError

# One example may leave every ReLU of a small network at 0: then others are drawn.
_MOST_DRAWS = 16
# Computation in float32 moves outputs by less.
_ROUNDING = 1e-4
# Of a change that rounding explains, as much comes from the last places of the parameters.
_SHARE_OF_ROUNDING = 0.1


def check_spec(
    spec: ArchSpec, params: PyTree, *inputs: PyTree, seed: int = 0, trials: int = 3
) -> float:
    """Proves a spec numerically: rescales at random and compares the network's outputs.

    A spec holds for all parameters, so that those that are 0, such as new biases, the last kernel
    of a zero-initialized layer or the scale of a residual branch, are drawn at random first: behind
    a zero, no output tells a right spec from a wrong one.

    Args:
      spec: the architecture, built by ``trace_spec`` or ``chain_spec``.
      params: parameters, arrays.
      *inputs: the network's inputs; none: standard normal ones of the traced shapes.
      seed: of the log-scales, drawn from N(0, 1), and of the inputs.
      trials: how many draws.

    Returns:
      The largest change of any output, relative to the largest entry of that output. NaN, with a
      warning, if all outputs are zero and so say nothing; NaN too if one is NaN or infinite.
      Outputs that are themselves what rounding leaves of a sum, which the last places of the
      parameters move as much, are compared under powers of two, which round nothing.
      Where values that neurons scale are rounded to a lower precision, as ``spec.rounded`` lists,
      the outputs move by this rounding, however right the spec: a warning then says so, and by how
      much powers of two move them.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.ones((1, 2))}, "b": {"w": jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> pathcond.check_spec(spec, params) < 1e-6
      True
    """
    match_leaves(spec, params)
    apply_fn = spec.apply_fn
    if apply_fn is None:
        raise SpecError("this spec has no apply function to check; build it with trace_spec")
    key_of_inputs, key_of_zeros, *keys = jax.random.split(jax.random.key(seed), trials + 2)
    params = _without_zeros(key_of_zeros, spec, params)
    drawn = (_random_inputs(key, spec) for key in jax.random.split(key_of_inputs, _MOST_DRAWS))
    for chosen in [inputs] if inputs else drawn:
        before = jax.tree.leaves(apply_fn(params, *chosen))
        if any(map(_says_something, before)):
            break
    else:
        warnings.warn(
            "check_spec: every output is zero everywhere, so that no comparison says anything; "
            "check on other inputs",
            stacklevel=2,
        )
        return math.nan

    def change(log_scales: LogScales) -> float:
        after = jax.tree.leaves(apply_fn(rescale(params, spec, log_scales), *chosen))
        return float(np.max([0.0, *map(_relative_change, before, after)]))

    drawn_scales = [random_log_scales(key, spec) for key in keys]
    worst = float(np.max([0.0, *map(change, drawn_scales)]))
    if spec.rounded and worst > _ROUNDING:
        exact = float(np.max([change(round_to_powers_of_two(z)) for z in drawn_scales]))
        warnings.warn(
            f"check_spec: the outputs move by {worst:.1e}, and by {exact:.1e} if the scales are "
            f"powers of two: {rounded_at(spec.rounded)}",
            stacklevel=2,
        )
    elif worst > _ROUNDING:
        near = apply_fn(_rounded_otherwise(key_of_zeros, spec, params), *chosen)
        rounding = np.max([0.0, *map(_relative_change, before, jax.tree.leaves(near))])
        if rounding > _SHARE_OF_ROUNDING * worst:
            return float(np.max([change(round_to_powers_of_two(z)) for z in drawn_scales]))
    return worst


def _without_zeros(key: jax.Array, spec: ArchSpec, params: PyTree) -> PyTree:
    """The parameters with random numbers, as large as their leaf's others, in place of zeros."""
    values = match_leaves(spec, params)
    keys = jax.random.split(key, len(values))
    return spec.treedef.unflatten(
        _drawn_for_zeros(k, jnp.asarray(value)) if leaf.trainable else value
        for k, leaf, value in zip(keys, spec.leaves, values, strict=True)
    )


def _rounded_otherwise(key: jax.Array, spec: ArchSpec, params: PyTree) -> PyTree:
    """The parameters, their last places changed at random."""
    values = match_leaves(spec, params)
    keys = jax.random.split(key, len(values))
    return spec.treedef.unflatten(
        value + _last_places(k, value) if leaf.trainable else value
        for k, leaf, value in zip(keys, spec.leaves, values, strict=True)
    )


def _last_places(key: jax.Array, value: jax.Array) -> jax.Array:
    return (
        2
        * jnp.finfo(value.dtype).eps
        * value
        * jax.random.rademacher(key, value.shape, value.dtype)
    )


@jax.jit
def _drawn_for_zeros(key: jax.Array, value: jax.Array) -> jax.Array:
    count = jnp.maximum((value != 0).sum(), 1).astype(value.dtype)
    mean = jnp.abs(value).sum() / count
    size = jnp.where(mean > 0, mean, jnp.asarray(0.1, value.dtype))
    # Away from 0, which a few normal numbers may come close to.
    sign = jax.random.rademacher(key, value.shape, value.dtype)
    drawn = sign * jax.random.uniform(key, value.shape, value.dtype, 0.5, 1.5)
    return jnp.where(value == 0, size * drawn, value)


def _says_something(output: jax.Array) -> bool:
    return jnp.issubdtype(jnp.result_type(output), jnp.inexact) and bool(jnp.any(output != 0))


def random_log_scales(key: jax.Array, spec: ArchSpec, dtype: Any = None) -> LogScales:
    """Log-scales drawn from N(0, 1), one array per group."""
    # All at once: each shape that is drawn would be compiled apart.
    drawn = jax.random.normal(key, (spec.num_neurons,), dtype or jnp.zeros(()).dtype)
    return by_group(drawn, [group.size for group in spec.groups])


def _relative_change(before: jax.Array, after: jax.Array) -> float:
    """NaN where an output is NaN or infinite."""
    if not jnp.issubdtype(jnp.result_type(before), jnp.inexact) or not jnp.size(before):
        return 0.0
    wide = np.result_type(before.dtype, np.float64)
    one, two = np.asarray(before).astype(wide), np.asarray(after).astype(wide)
    with np.errstate(invalid="ignore"):
        return float(np.max(abs(two - one)) / max(np.max(abs(one)), np.finfo(np.float64).tiny))


def _random_inputs(key: jax.Array, spec: ArchSpec) -> tuple[PyTree, ...]:
    flat, treedef = jax.tree.flatten(spec.example_inputs)
    keys = jax.random.split(key, max(len(flat), 1))
    drawn = [
        jax.random.normal(k, a.shape, a.dtype)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else jnp.zeros(a.shape, a.dtype)
        for k, a in zip(keys, flat, strict=False)
    ]
    return jax.tree.unflatten(treedef, drawn)
