"""Programs for accelerators that the machine does not have: lowered for each of them on a CPU.

Lowering fails on a primitive without a rule for the platform. Nothing is compiled, and nothing is
run: shapes stand for all arguments.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest
from zoo import NETWORKS

import pathcond_jax as pathcond

PLATFORMS = ("tpu", "cuda", "rocm")
# Attention is no sum over paths, so the scanned transformer has no path criterion.
LIFTABLE = ("mlp", "lenet")
NAMES = (*LIFTABLE, "language-model-scan")
METHODS = ("newton", "block", "coordinate")


class Shapes(NamedTuple):
    spec: pathcond.ArchSpec
    params: Any


def structs(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@functools.cache
def shapes(name):
    """A zoo network as shapes, with its spec: traced once for all tests."""
    network = NETWORKS[name]()
    params, x = structs(network.params), structs(network.x)
    return Shapes(pathcond.trace_spec(network.apply_fn, params, x), params)


def outputs(function, *arguments):
    """Lowers for all accelerators; the shapes of what the program returns."""
    # Raises also on a call into a library that JAX does not promise to keep.
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    return jax.tree.unflatten(exported.out_tree, structs(exported.out_avals))


def assert_conditions(name, criterion, **options):
    spec, params = shapes(name)
    conditioned, solution = outputs(
        lambda params: pathcond.condition(params, spec, criterion, **options), params
    )
    assert conditioned == params
    assert [z.shape for z in solution.log_scales] == [(group.size,) for group in spec.groups]


def assert_updates(optimizer, params):
    """Lowers an update, and the addition of what it returns."""

    def step(grads, state, params):
        # optax relies on the promotion that the tests forbid.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    assert outputs(step, params, state, params) == (params, state)


def test_a_program_for_cpus_only_is_found():
    square = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    with pytest.raises(NotImplementedError, match=r"eig.*tpu"):
        outputs(jnp.linalg.eig, square)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LIFTABLE)
def test_condition_on_paths(name, method):
    assert_conditions(name, "path", method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_condition_on_norms(name, method):
    assert_conditions(name, "enorm", method=method)


@pytest.mark.parametrize("name", NAMES)
def test_condition_on_ranges(name):
    assert_conditions(name, "equalize")


@pytest.mark.parametrize("name", NAMES)
def test_reconditioned(name):
    spec, params = shapes(name)
    criterion = "path" if name in LIFTABLE else "enorm"
    inner = optax.adamw(optax.cosine_decay_schedule(1e-3, 100))
    assert_updates(pathcond.reconditioned(inner, spec, every=5, criterion=criterion), params)


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("name", LIFTABLE)
def test_scale_by_path(name, every):
    spec, params = shapes(name)
    assert_updates(pathcond.scale_by_path(spec, every=every, damping=0.1), params)
