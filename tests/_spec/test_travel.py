"""A spec as a value: in jit and vmap, copied, pickled, and read back in another process."""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pathcond_jax as pathcond

x = jnp.ones((2, 4))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


@pytest.fixture(scope="module")
def params():
    return MLP().init(jax.random.key(0), x)


@pytest.fixture(scope="module")
def spec(params):
    return pathcond.trace_spec(MLP().apply, params, x)


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_jit_needs_no_static_argument(params, spec):
    # A function of its own, since JAX counts by function.
    condition = jax.jit(lambda params, spec: pathcond.condition(params, spec))
    conditioned, _ = condition(params, spec)
    condition(jax.tree.map(lambda leaf: 2 * leaf, params), spec)
    assert condition._cache_size() == 1
    chosen = jax.jit(pathcond.condition, static_argnums=1)(params, spec)[0]
    assert_same(conditioned, chosen)


def test_jit_tells_specs_apart(params, spec):
    condition = jax.jit(lambda params, spec: pathcond.condition(params, spec))
    other = pathcond.trace_spec(MLP().apply, params, x, max_pool="max")
    condition(params, spec)
    condition(params, other)
    assert condition._cache_size() == 2


def test_vmap_over_both_arguments(params, spec):
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    _, solutions = jax.vmap(pathcond.condition)(ensemble, spec)
    assert solutions.status.shape == (2,)


def test_a_copy_is_the_spec(spec):
    assert copy.copy(spec) is spec
    assert copy.deepcopy({"spec": spec})["spec"] is spec


@pytest.mark.parametrize("name", ["pickle", "cloudpickle"])
def test_pickled(params, spec, name):
    library = pytest.importorskip(name)
    loaded = library.loads(library.dumps(spec))

    assert str(loaded) == str(spec)
    assert loaded.treedef == spec.treedef
    assert loaded.leaves == spec.leaves
    # What was compiled for the one serves the other.
    assert loaded.symmetry is spec.symmetry
    assert not loaded.groups[0].incoming[0].index.flags.writeable
    assert_same(
        pathcond.condition(params, loaded, "enorm"), pathcond.condition(params, spec, "enorm")
    )
    with pytest.raises(pathcond.SpecError, match="no program to lift; build it with trace_spec"):
        pathcond.condition(params, loaded)
    with pytest.raises(pathcond.SpecError, match="no apply function to check"):
        pathcond.check_spec(loaded, params, x)


def specs_of_other_containers():
    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    yield pathcond.trace_spec(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, x)
    module = nnx.Sequential(
        nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(5, 2, rngs=nnx.Rngs(1))
    )
    yield pathcond.nnx_spec(module, x)


def test_pickled_with_containers_of_other_libraries():
    for spec in specs_of_other_containers():
        loaded = pickle.loads(pickle.dumps(spec))
        assert loaded.treedef == spec.treedef
        assert loaded.symmetry is spec.symmetry
