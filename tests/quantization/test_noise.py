"""The noise criterion: what it predicts is what is measured, and its minimum is one."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from networks import depthwise, difference, made, scanned, unlucky

import pathcond_jax as pathcond
from pathcond_jax._solve import products
from pathcond_jax.quantization import (
    SCHEMES,
    Scheme,
    calibrate,
    predicted_noise,
    quantization_noise,
    quantize_weights,
    simulate,
)
from pathcond_jax.quantization._noise import _reduced
from pathcond_jax.quantization._rounding import rounding_of

STRETCHES = np.linspace(1.0, 1.3, 12)


def calibrated(network, params, x, spec):
    return calibrate(network, params, spec, [x], draws=48)


@functools.cache
def statistics_of(network):
    """The statistics of the parameters as they are made."""
    return calibrated(network, *made(network))


@pytest.mark.parametrize(
    ("network", "granularity"),
    [(depthwise, "tensor"), (depthwise, "channel"), (depthwise, 4), (scanned, 4)],
)
def test_the_objective_is_the_predicted_noise(network, granularity):
    params, x, spec = made(network)
    statistics = statistics_of(network)
    scheme = Scheme(4, 4, granularity)
    reduced = _reduced(params, statistics, spec, rounding_of(statistics, scheme))
    z = tuple(
        0.4 * jax.random.normal(jax.random.key(k), (group.size,))
        for k, group in enumerate(spec.groups)
    )
    moved = pathcond.rescale(params, spec, z)
    found = predicted_noise(moved, spec, calibrated(network, moved, x, spec), scheme)
    # A norm is a little more than the largest of few entries; of ranges of both signs, less.
    exact = float(jnp.log(found.weights + found.activations))
    assert exact - 0.4 < float(products.value(reduced, z)) < exact + 0.7
    # Its derivatives, written by hand, are those of JAX.
    flat, back = jax.flatten_util.ravel_pytree(z)
    v = jax.random.normal(jax.random.key(9), flat.shape)

    @jax.jit
    def derivatives(flat):
        value = lambda flat: products.value(reduced, back(flat))  # noqa: E731
        model = products.model(reduced, back(flat))
        by_hand = model.gradient, model.product(v), model.diagonal
        return by_hand, (jax.grad(value)(flat), jax.hessian(value)(flat))

    (gradient, product, diagonal), (expected, hessian) = derivatives(flat)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    np.testing.assert_allclose(product, hessian @ v, atol=2e-4)
    assert (diagonal >= jnp.diag(hessian) - 1e-4).all()
    assert float(jnp.linalg.eigvalsh(hessian).min()) > -1e-4


@pytest.mark.parametrize(
    ("network", "scheme"),
    [(depthwise, Scheme(4)), (scanned, "onnxruntime_static_per_channel")],
)
def test_one_answer_from_every_representative(network, scheme):
    params, x, spec = made(network)
    outputs = network(params, x)
    answers = []
    for start in (params, unlucky(params, spec, 3)):
        statistics = calibrated(network, start, x, spec)
        criterion = quantization_noise(statistics, scheme)
        better, solution = pathcond.condition(start, spec, criterion)
        assert int(solution.status) == pathcond.Status.CONVERGED
        changed = jnp.abs(network(better, x) - outputs).max() / jnp.abs(outputs).max()
        assert float(changed) < 2e-6
        before = predicted_noise(start, spec, statistics, scheme)
        after = predicted_noise(better, spec, calibrated(network, better, x, spec), scheme)
        assert float(after.decibel) > float(before.decibel)
        answers.append(better)
    assert difference(*answers) < 1e-4


@pytest.mark.parametrize("network", [depthwise, scanned])
def test_noise_is_predicted_at_other_log_scales_without_data(network):
    params, x, spec = made(network)
    statistics = statistics_of(network)
    z = tuple(
        jax.random.normal(jax.random.key(k), (group.size,)) for k, group in enumerate(spec.groups)
    )
    moved = pathcond.rescale(params, spec, z)
    again = calibrated(network, moved, x, spec)
    for scheme in (Scheme(4), Scheme(8, 4, "channel")):
        found = predicted_noise(params, spec, statistics, scheme, log_scales=z)
        expected = predicted_noise(moved, spec, again, scheme)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), found, expected)


def measured(rounded, outputs):
    """Signal-to-noise ratio in dB, the mean over stretched grids."""
    noise = np.mean([float(jnp.square(rounded(s) - outputs).sum()) for s in STRETCHES])
    return 10 * np.log10(float(jnp.square(outputs).sum()) / noise)


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("network", [depthwise, scanned])
def test_predicted_and_measured_noise_agree(network, bits):
    params, x, spec = made(network)
    statistics = statistics_of(network)
    outputs = network(params, x)
    larger = 10 * np.log10(np.mean(STRETCHES**2))
    for scheme in (Scheme(bits), Scheme(bits, bits, "channel"), Scheme(None, bits)):
        compiled = jax.jit(
            lambda s, scheme=scheme: simulate(network, spec, statistics, scheme, stretch=s)(
                params, x
            )
        )
        found = measured(lambda s, compiled=compiled: compiled(jnp.float32(s)), outputs)
        predicted = float(predicted_noise(params, spec, statistics, scheme).decibel)
        assert abs(predicted - larger - found) < 3


def test_weights_lie_on_grids_of_the_bits_given():
    params, _, spec = made(depthwise)
    statistics = statistics_of(depthwise)
    bits = {"stem": 3, "head": 2}
    rounded = quantize_weights(params, spec, statistics, weight_bits=bits, granularity="channel")
    assert rounded["expand"] is params["expand"]
    for column in rounded["stem"].reshape(-1, 4).T:
        assert len(np.unique(np.abs(column))) <= 4
    for name in bits:
        ranges = [jnp.abs(tree[name]).max() for tree in (rounded, params)]
        np.testing.assert_allclose(*ranges, rtol=1e-6)
    groups = quantize_weights(params, spec, statistics, weight_bits=2, granularity=4)["expand"]
    np.testing.assert_allclose(
        jnp.abs(groups).max((0, 1, 2)), jnp.abs(params["expand"]).max((0, 1, 2)), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, r"weight_bits of 'stem' is 1; quantizers need 2 bits"),
        ({"activation_bits": 0}, "activation_bits of 'stem' is 0"),
        ({"weight_bits": 2.5}, "is 2.5"),
        ({"weight_bits": {"body": 4}}, "no kernel 'body'; kernels that read"),
        ({"weight_bits": None}, "nothing is rounded"),
        ({"granularity": "row"}, "granularity is 'row'"),
        ({"scheme": "tensorrt"}, "no scheme 'tensorrt'; there are 'qwix_int8'"),
        ({"norm_weight": 0.0}, "norm_weight is 0.0"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    statistics = statistics_of(depthwise)
    with pytest.raises(pathcond.SpecError, match=message):
        quantization_noise(statistics, **options)


def test_parameters_that_are_not_finite_come_back_with_a_status():
    params, _, spec = made(scanned)
    statistics = statistics_of(scanned)
    broken = {**params, "first": params["first"].at[0, 0].set(jnp.nan)}
    criterion = quantization_noise(statistics)
    same, solution = pathcond.condition(broken, spec, criterion)
    assert int(solution.status) == pathcond.Status.NON_FINITE
    np.testing.assert_array_equal(same["last"], params["last"])


def test_a_network_without_neurons():
    params = {"w": jnp.ones((5, 2))}
    network = lambda params, x: x @ params["w"]  # noqa: E731
    x = jnp.ones((3, 5))
    spec = pathcond.trace_spec(network, params, x)
    statistics = calibrate(network, params, spec, [x])
    with pytest.raises(pathcond.SpecError, match="no neuron to rescale"):
        pathcond.condition(params, spec, quantization_noise(statistics))


def test_every_scheme_has_a_prediction():
    params, _, spec = made(scanned)
    statistics = statistics_of(scanned)
    found = {name: predicted_noise(params, spec, statistics, name) for name in SCHEMES}
    assert all(float(noise.decibel) > 0 for noise in found.values())
    assert float(found["int4_weights"].decibel) < float(found["int8_weights"].decibel)


def test_the_report_says_what_noise_is_predicted_for_every_column():
    params, _, spec = made(depthwise)
    statistics = statistics_of(depthwise)
    noise = quantization_noise(statistics, Scheme(4, 8, "channel"))
    as_is, enorm, chosen = pathcond.report(params, spec, ["enorm", noise]).columns
    name = "predicted dB, W4A8 per channel"
    assert list(as_is.figures) == list(enorm.figures) == list(chosen.figures) == [name]
    assert chosen.figures[name] > max(as_is.figures[name], enorm.figures[name])
    before = predicted_noise(params, spec, statistics, Scheme(4, 8, "channel"))
    assert as_is.figures[name] == pytest.approx(float(before.decibel), abs=1e-3)
    assert name in str(pathcond.report(params, spec, [noise]))
    assert str(Scheme({"a": 4, "b": 8}, None, 32)) == "W* per 32"
