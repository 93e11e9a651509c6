"""Weights that are functions of a parameter which a path meets again: a norm, or an explanation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond

RNG = np.random.default_rng(0)
SHAPES = {"a": (2, 1), "b": (1, 3), "s": (), "t": (2, 2), "v": (3, 2)}


def kron_twice(params, x):
    """One product in two branches."""
    kernel = jnp.kron(params["a"], params["b"])
    return jax.nn.relu(x @ kernel) @ params["v"] + jax.nn.relu((2 * x) @ kernel) @ params["v"]


def kron_on_its_own_path(params, x):
    kernel = jnp.kron(params["a"], params["b"])
    return jax.nn.relu(jax.nn.relu(x @ kernel) @ params["v"]) @ kernel


def scalar_around_a_product(params, x):
    h = jax.nn.relu(x * params["s"]) @ jnp.kron(params["a"], params["b"])
    return h * params["s"]


def kron_of_itself(params, x):
    kernel = jnp.kron(params["t"], params["t"])[:2, :2]
    return jax.nn.relu(x @ kernel) @ params["t"]


def matrix_of_a_product(params, x):
    """Rows of a product of matrices, and one of its factors again."""
    kernel = (params["v"] @ params["t"])[:2]
    return jax.nn.relu(x @ kernel) @ params["t"]


TIED = (kron_twice, kron_on_its_own_path, scalar_around_a_product)
FUNCTIONS = (kron_of_itself, matrix_of_a_product)


def traced(program):
    params = {name: jnp.asarray(RNG.normal(size=shape)) for name, shape in SHAPES.items()}
    with jax.numpy_rank_promotion("allow"):
        return params, pathcond.trace_spec(program, params, jnp.ones((1, 2)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("program", TIED, ids=lambda program: program.__name__)
def test_the_norm_is_the_networks_own_at_absolute_values(program):
    params, spec = traced(program)

    norm = pathcond.path_norm(params, spec, order=1)

    with jax.numpy_rank_promotion("allow"):
        absolute = program(jax.tree.map(abs, params), jnp.ones((1, 2)))
    np.testing.assert_allclose(norm, absolute.sum(), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("program", TIED, ids=lambda program: program.__name__)
def test_the_gram_diagonal_is_that_of_the_listed_paths(program):
    params, spec = traced(program)
    gram = pathcond.gram_diagonal(params, spec)
    jacobian = jax.jit(jax.jacobian(lambda params: pathcond.lifted(params, spec)))(params)

    for name, found in gram.items():
        listed = jnp.square(jacobian[name]).sum(0)
        np.testing.assert_allclose(found, listed, rtol=1e-9, err_msg=name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("program", FUNCTIONS, ids=lambda program: program.__name__)
def test_what_has_no_gram_diagonal_says_why(program):
    params, spec = traced(program)
    assert pathcond.path_norm(params, spec) > 0

    with pytest.raises(pathcond.NotPathLiftableError, match=r"more than once|share parameters"):
        pathcond.gram_diagonal(params, spec)
