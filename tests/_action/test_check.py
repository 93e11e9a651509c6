"""``check_spec``: it finds wrong specs, also where zeros hide them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from zoo.network import lenient

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


def of_opposite_sums(params, x):
    """Zero but for rounding, as the same products are added up in two orders."""
    h = jax.nn.relu(x @ params["w"] + params["b"][None])
    return h @ params["v"] - h[:, ::-1] @ params["v"][::-1]


def beside_a_large_number(params, x):
    return (network(params, x) + 1e5) - 1e5


def test_what_rounding_leaves_is_compared_under_scales_that_round_nothing():
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 50), "b": (50,), "v": (50, 3)}
    params = {name: jnp.asarray(rng.normal(size=s), "float32") for name, s in shapes.items()}

    spec = pathcond.trace_spec(of_opposite_sums, params, X)

    assert spec.num_neurons >= 50
    assert pathcond.check_spec(spec, params, X) == 0


def test_a_wrong_spec_beside_a_large_number_is_told_apart_from_rounding():
    params, _ = traced()
    spec = pathcond.trace_spec(beside_a_large_number, params, X)
    assert pathcond.check_spec(without(spec, "b"), params, X) > 1e-1


def test_a_spec_without_neurons_can_be_checked():
    params = {"w": jnp.ones((3, 4))}
    spec = pathcond.trace_spec(lambda params, x: x @ params["w"], params, X)
    assert pathcond.check_spec(spec, params, X) == 0


def test_rounding_to_a_lower_precision_is_told_apart_from_a_wrong_spec():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(16)(x)).astype(jnp.bfloat16)
            return nn.Dense(4)(h.astype(x.dtype))

    model, x = Net(), jnp.ones((3, 5))
    params = lenient(model.init)(jax.random.key(0), x)
    spec = pathcond.trace_spec(lenient(model.apply), params, x)

    with pytest.warns(UserWarning, match='rounding="power_of_two"') as told:
        change = pathcond.check_spec(spec, params, x)

    assert 1e-4 < change < 1e-1
    (message,) = [str(warning.message) for warning in told]
    assert float(message.partition("and by ")[2].split(" ")[0]) < 1e-6
    assert "rounded to bfloat16 at test_check.py:" in message
