"""``check_spec``: it finds wrong specs, also where zeros hide them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond

X = jax.random.normal(jax.random.key(0), (4, 3))


def network(params, x):
    h = jax.nn.relu(x @ params["w"] + params["b"][None])
    return x + params["gamma"][None] * (h @ params["v"])


def traced(**zeros):
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 5), "b": (5,), "v": (5, 3), "gamma": (3,)}
    params = {
        name: jnp.zeros(shape) if name in zeros else jnp.asarray(rng.normal(size=shape), "float32")
        for name, shape in shapes.items()
    }
    return params, pathcond.trace_spec(network, params, X)


def without(spec, path):
    """The same groups, but for what they say of one leaf."""
    groups = [
        dataclasses.replace(
            group,
            incoming=[i for i in group.incoming if i.path != path],
            outgoing=[i for i in group.outgoing if i.path != path],
        )
        for group in spec.groups
    ]
    return dataclasses.replace(spec, groups=tuple(groups))


@pytest.mark.parametrize("zeros", [(), ("v",), ("gamma",), ("b",), ("b", "v", "gamma")])
def test_a_right_spec_passes_and_one_without_the_bias_does_not(zeros):
    params, spec = traced(**dict.fromkeys(zeros))

    assert pathcond.check_spec(spec, params, X) < 1e-5
    assert pathcond.check_spec(without(spec, "b"), params, X) > 1e-3


def test_outputs_that_are_zero_whatever_the_parameters_say_nothing():
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    spec = pathcond.trace_spec(
        lambda params, x: jax.nn.relu(x @ params["w"]) @ params["v"], params, X
    )
    with pytest.warns(UserWarning, match="every output is zero"):
        assert math.isnan(pathcond.check_spec(spec, params, jnp.zeros((4, 3))))


def test_a_spec_without_neurons_can_be_checked():
    params = {"w": jnp.ones((3, 4))}
    spec = pathcond.trace_spec(lambda params, x: x @ params["w"], params, X)
    assert pathcond.check_spec(spec, params, X) == 0
