"""Calibration measures what a person would, and what it cannot measure is an error."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import IMAGES, ROWS, WIDTH, depthwise, made, scanned

import pathcond_jax as pathcond
from pathcond_jax.quantization import calibrate


def exact(network, params, x):
    """Squared derivatives by the parameters, output by output and example by example."""
    jacobian = jax.jacrev(lambda params: jax.vmap(lambda x: network(params, x[None])[0])(x))(params)
    return jax.tree.map(lambda j: jnp.square(j).sum((0, 1)) / len(x), jacobian)


@pytest.mark.parametrize("network", [depthwise, scanned])
def test_few_outputs_are_differentiated_exactly(network):
    params, x, spec = made(network)
    found = calibrate(network, params, spec, [x[:4], x[4:8]], draws=100)
    wanted = exact(network, params, x[:8])
    for one, two in zip(jax.tree.leaves(found.sensitivity), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    assert float(found.num_examples) == 8
    power = jnp.square(network(params, x[:8])).sum() / 8
    np.testing.assert_allclose(found.output_power, power, rtol=1e-5)


@pytest.mark.parametrize("network", [depthwise, scanned])
def test_statistics_of_another_representative_are_those_that_calibration_finds(network):
    params, x, spec = made(network)
    z = tuple(jnp.linspace(-1, 1, group.size) for group in spec.groups)
    found = calibrate(network, params, spec, [x]).rescaled(spec, z)
    wanted = calibrate(network, pathcond.rescale(params, spec, z), spec, [x])
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_statistics_take_the_log_scales_of_their_spec():
    params, x, spec = made(scanned)
    with pytest.raises(pathcond.SpecError, match="log-scales"):
        calibrate(scanned, params, spec, [x]).rescaled(spec, (jnp.zeros(1),))


def test_random_combinations_of_outputs_estimate_the_same():
    params, x, spec = made(scanned)
    wanted = calibrate(scanned, params, spec, [x], draws=100).sensitivity
    found = calibrate(scanned, params, spec, [x], draws=20).sensitivity
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert 0.5 < float(one.sum() / two.sum()) < 2


def test_no_convolution_is_differentiated_within_a_loop():
    params, x, spec = made(depthwise)
    calibrated = lambda params, x: calibrate(depthwise, params, spec, [x])  # noqa: E731
    program = str(jax.make_jaxpr(calibrated)(params, x))
    assert "conv_general_dilated" in program
    assert not any(loop in program for loop in ("scan[", "while["))


@pytest.mark.usefixtures("x64")
def test_derivatives_have_the_precision_of_the_parameters():
    def network(params, x):
        return jax.nn.relu(x @ params["in"]).astype("float32") @ params["out"]

    params = {"in": jnp.ones((2, 3)), "out": jnp.ones((3, 2), jnp.float32)}
    x = jnp.ones((4, 2))
    spec = pathcond.trace_spec(network, params, x)
    found = calibrate(network, params, spec, [x]).sensitivity
    assert {name: str(value.dtype) for name, value in found.items()} == {
        "in": "float64",
        "out": "float32",
    }


def test_ranges_and_moments_of_what_kernels_read():
    params, x, spec = made(depthwise)
    found = calibrate(depthwise, params, spec, [x])
    assert [site.path for site in found.sites] == ["stem", "expand", "depthwise", "project", "head"]
    read = jax.nn.relu(
        jax.lax.conv_general_dilated(
            x, params["stem"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    channels = found.channels[1]
    np.testing.assert_allclose(channels.maximum, read.max((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(channels.minimum, read.min((0, 1, 2)), atol=1e-7)
    np.testing.assert_allclose(channels.mean, read.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(channels.second_moment, (read**2).mean((0, 1, 2)), rtol=1e-5)
    by_x = jax.jacrev(lambda x: x.mean((1, 2)) @ params["head"])(jnp.ones((1, 6, 6, 4)))
    wanted = jnp.square(by_x).sum((0, 1, 2, 3, 4))
    assert found.channels[4].sensitivity.shape == wanted.shape == (4,)


def test_activations_of_zero_are_rounded_without_error():
    params = {"in": jnp.array([[1.0, -1.0]]), "out": jnp.array([[2.0], [3.0]])}
    network = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]  # noqa: E731
    x = jnp.array([[1.0], [-2.0], [3.0], [4.0]])
    spec = pathcond.trace_spec(network, params, x)
    found = calibrate(network, params, spec, [x]).channels[1]
    np.testing.assert_allclose(found.sensitivity, [4 * 3 / 4, 9 * 1 / 4], rtol=1e-6)


def test_channels_in_loops_are_those_of_all_steps():
    params, x, spec = made(scanned)
    found = calibrate(scanned, params, spec, [x])
    by_path = dict(zip((s.path for s in found.sites), found.channels, strict=True))
    first = x @ params["first"]
    hidden = jax.nn.relu(first @ params["blocks"]["up"][0])
    assert by_path["blocks/down"].maximum.shape == (2 * WIDTH,)
    np.testing.assert_allclose(by_path["blocks/down"].maximum[:WIDTH], hidden.max(0), rtol=1e-5)
    np.testing.assert_allclose(by_path["blocks/up"].minimum[:4], first.min(0), rtol=1e-5)


def test_the_activation_criterion_takes_statistics_as_they_are():
    params, x, spec = made(depthwise)
    statistics = calibrate(depthwise, params, spec, [x])
    assert set(statistics) == {group.name for group in spec.groups}
    criterion = pathcond.criteria.activation(statistics, alpha=1.0)
    moved, solution = pathcond.condition(params, spec, criterion)
    after = calibrate(depthwise, moved, spec, [x])
    assert float(solution.status) == pathcond.Status.CONVERGED
    for name in after:
        np.testing.assert_allclose(after[name], 1.0, rtol=1e-3)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        ([ROWS, ROWS.at[0, 0].set(jnp.nan)], "batch 1 has entries that are NaN"),
        ([jnp.zeros_like(ROWS)], "batch 0 is all zeros"),
        (ROWS, r"one array of shape \(12, 5\)"),
    ],
)
def test_batches_that_cannot_be_used(batches, message):
    params, _, spec = made(scanned)
    with pytest.raises(pathcond.SpecError, match=message):
        calibrate(scanned, params, spec, batches)


def test_a_spec_of_other_parameters():
    params, _, spec = made(depthwise)
    folded = {name: value for name, value in params.items() if name != "bias"}
    with pytest.raises(pathcond.SpecError, match="missing 'bias'"):
        calibrate(depthwise, folded, spec, [IMAGES])


def test_activations_that_overflow():
    params, x, spec = made(scanned)
    huge = jax.tree.map(lambda leaf: leaf * 1e30, params)
    with pytest.raises(pathcond.SpecError, match="NaN or infinite on these batches"):
        calibrate(scanned, huge, spec, [x])


def test_a_network_without_kernels():
    def scaled(params, x):
        return x * params["scale"]

    params = {"scale": jnp.ones((1, 5))}
    spec = pathcond.trace_spec(scaled, params, ROWS)
    with pytest.raises(pathcond.SpecError, match="nothing to calibrate"):
        calibrate(scaled, params, spec, [ROWS])


def test_what_no_scheme_rounds_is_named():
    def network(params, x):
        x = jax.nn.relu(x @ params["first"]) * params["gains"]
        return jax.lax.cond(x.sum() > 0, lambda x: x @ params["last"], lambda x: -x[:, :2], x)

    params = {"first": jnp.ones((5, 4)), "gains": jnp.ones((1, 4)), "last": jnp.ones((4, 2))}
    spec = pathcond.trace_spec(network, params, ROWS)
    found = calibrate(network, params, spec, [ROWS])
    assert found.unread == ("gains", "last")
    assert str(found).splitlines()[1] == "no kernel, not rounded: gains, last"


def test_kernels_whose_neurons_are_not_followed_are_named():
    def network(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["last"]

    params = {"first": jnp.ones((5, 4)), "last": jnp.ones((4, 2))}
    # Neurons along diagonals, as a caller may say.
    diagonals = pathcond.Incidence("first", (0, 1), np.add.outer(np.arange(5), np.arange(4)) % 2)
    rows = pathcond.Incidence("last", (0,), np.arange(4) % 2)
    group = pathcond.NeuronGroup("odd", 2, (diagonals,), (rows,))
    spec = pathcond.trace_spec(network, params, ROWS, groups=[group])
    found = calibrate(network, params, spec, [ROWS])
    assert found.unfollowed == ("first",)
    assert "rounded, but not in the criterion: first" in str(found)


def test_eight_devices_find_what_one_does():
    program = pathlib.Path(__file__).with_name("sharded.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert [line.split()[-1] for line in run.stdout.splitlines()] == ["8", "8"]
