"""Runs of equal blocks, lifted by a loop, against the same blocks lifted one by one."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond
from pathcond_jax._program.rolling import FEWEST, RUN, rolled

relu = jax.nn.relu


def dense(block, x):
    return relu(x @ block["kernel"] + block["bias"])


def without_bias(block, x):
    return relu(x @ block["kernel"])


def residual(block, x):
    return x + relu(x @ block["kernel"] + block["bias"]) @ block["other"]


def normalized(block, x):
    y = x @ block["kernel"]
    return relu((y - 0.5) * block["scale"] / jnp.sqrt(block["variance"] + 0.1) + block["bias"])


def pooled(block, x):
    y = relu(x @ block["kernel"])
    return jnp.maximum(y, x) + y.mean(keepdims=True)


def leaky(block, x):
    return jax.nn.leaky_relu(x * block["scale"] + x @ block["kernel"], 0.1)


BLOCKS = (dense, without_bias, residual, normalized, pooled, leaky)


def network(block, params, x):
    for parameters in params["blocks"]:
        x = block(parameters, x)
    return x @ params["last"]


def drawn(width, depth, seed, dtype: Any = np.float64):
    rng = np.random.default_rng(seed)

    def one():
        return {
            "kernel": rng.normal(size=(width, width)),
            "other": rng.normal(size=(width, width)),
            "bias": rng.normal(size=(width,)),
            "scale": rng.normal(size=(width,)),
            "variance": rng.uniform(0.1, 2, size=(width,)),
        }

    params = {"blocks": [one() for _ in range(depth)], "last": rng.normal(size=(width, 7))}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def is_trained(path):
    return "variance" not in path


def traced(apply, params, **options):
    width = params["last"].shape[0]
    x = jax.ShapeDtypeStruct((width,), params["last"].dtype)
    return pathcond.trace_spec(apply, params, x, trainable=is_trained, **options)


def lengths(spec):
    """How many blocks there are in each run."""
    program = rolled(spec.program, tuple(leaf.trainable for leaf in spec.leaves))
    nodes = [node for node in program.nodes if node.primitive is RUN]
    return [(len(node.inputs) - 1) // len(node.params["trainable"]) for node in nodes]


def assert_same_alone_and_in_a_loop(params, spec, rtol=1e-12):
    one_by_one = pathcond.scaled_gram_diagonal(params, spec)
    looped = jax.jit(lambda p: pathcond.scaled_gram_diagonal(p, spec))(params)
    with np.errstate(divide="ignore"):
        trees = (*one_by_one, *looped)
        for found in zip(*map(jax.tree.leaves, trees), strict=True):
            mantissa, exponent, again, other = map(np.asarray, found)
            expected = np.log(mantissa) + exponent * np.log(2.0)
            actual = np.log(again) + other * np.log(2.0)
            np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.usefixtures("x64")
@hypothesis.settings(max_examples=15)
@hypothesis.given(
    block=st.sampled_from(BLOCKS),
    width=st.integers(2, 5),
    depth=st.integers(FEWEST, FEWEST + 3),
    seed=st.integers(0, 100),
    max_pool=st.sampled_from(["paths", "max"]),
)
def test_a_loop_finds_what_blocks_one_by_one_find(block, width, depth, seed, max_pool):
    params = drawn(width, depth, seed)
    spec = traced(functools.partial(network, block), params, max_pool=max_pool)
    assert lengths(spec) == [depth]
    assert_same_alone_and_in_a_loop(params, spec)
    norm = jax.jit(lambda p: pathcond.path_norm(p, spec, log=True))(params)
    np.testing.assert_allclose(norm, pathcond.path_norm(params, spec, log=True), rtol=1e-12)


def test_ends_of_another_kind_stay_outside():
    def apply(params, x):
        h = network(residual, params, relu(x * params["blocks"][0]["scale"]))
        return h * 2.0

    params = drawn(3, FEWEST, 0, np.float32)
    spec = traced(apply, params)
    assert lengths(spec) == [FEWEST]
    assert_same_alone_and_in_a_loop(params, spec, 1e-4)


def shared(params, x):
    first = params["blocks"][0]
    return network(dense, {**params, "blocks": [first] * FEWEST}, x)


def shared_bias(params, x):
    first = params["blocks"][0]["bias"]
    blocks = [{**block, "bias": first} for block in params["blocks"]]
    return network(dense, {**params, "blocks": blocks}, x)


def read_outside(params, x):
    found = []
    for block in params["blocks"]:
        x = dense(block, x)
        found.append(x)
    return sum(found) @ params["last"]


def twice_in_a_block(params, x):
    def block(parameters, x):
        return relu(relu(x * parameters["scale"]) * parameters["scale"] @ parameters["kernel"])

    return network(block, params, x)


@pytest.mark.parametrize("apply", [shared, shared_bias, read_outside])
def test_what_is_read_elsewhere_is_no_run(apply):
    params = drawn(3, FEWEST, 0, np.float32)
    spec = traced(apply, params)
    assert lengths(spec) == []


def test_weights_that_a_block_meets_twice_are_lifted_one_by_one():
    params = drawn(3, FEWEST, 0, np.float32)
    spec = traced(twice_in_a_block, params)
    assert lengths(spec) == [FEWEST]
    assert_same_alone_and_in_a_loop(params, spec, 1e-4)


def test_a_few_layers_are_no_run():
    params = drawn(3, FEWEST - 1, 0, np.float32)
    assert lengths(traced(functools.partial(network, dense), params)) == []


def test_runs_of_two_kinds():
    def apply(params, x):
        for k, parameters in enumerate(params["blocks"]):
            x = (dense if k < FEWEST + 1 else residual)(parameters, x)
        return x @ params["last"]

    params = drawn(3, 2 * FEWEST + 1, 0, np.float32)
    spec = traced(apply, params)
    assert lengths(spec) == [FEWEST + 1, FEWEST]
    assert_same_alone_and_in_a_loop(params, spec, 1e-4)


def test_dead_networks_and_extreme_depths():
    """Scales that leave the range of float32 by far, and blocks that no path passes."""
    params = drawn(4, 120, 0, np.float32)
    params["blocks"] = jax.tree.map(lambda leaf: leaf * 1e-2, params["blocks"])
    spec = traced(functools.partial(network, dense), params)
    assert_same_alone_and_in_a_loop(params, spec, 1e-4)
    params["blocks"][7]["kernel"] = jnp.zeros((4, 4))
    assert_same_alone_and_in_a_loop(params, spec, 1e-4)


@pytest.mark.usefixtures("x64")
def test_derivatives_and_ensembles_pass_through_a_loop():
    params = drawn(3, FEWEST, 0)
    spec = traced(functools.partial(network, dense), params)

    def norm(params):
        return pathcond.path_norm(params, spec, order=1, log=True)

    slopes = jax.jit(jax.grad(norm))(params)
    for found, expected in zip(
        *map(jax.tree.leaves, (slopes, jax.grad(norm)(params))), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, drawn(3, FEWEST, 1))
    norms = jax.jit(jax.vmap(norm))(several)
    np.testing.assert_allclose(norms, [norm(params), norm(drawn(3, FEWEST, 1))], rtol=1e-12)


def compiled(depth):
    params = drawn(8, depth, 0, np.float32)
    spec = traced(functools.partial(network, dense), params)
    text = jax.jit(lambda p: pathcond.condition(p, spec)).lower(params).compile().as_text()
    return text.count(" while("), text.count(" fusion(") + text.count(" dot(")


def test_a_further_layer_is_a_few_kernels():
    """As many loops whatever the depth; rescaling takes two or three kernels for each leaf."""
    (loops, kernels), (more_loops, more_kernels) = compiled(FEWEST), compiled(FEWEST + 24)
    assert loops == more_loops
    assert (more_kernels - kernels) / 24 <= 12
