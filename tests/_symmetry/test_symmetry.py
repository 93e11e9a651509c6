"""What the analysis says: modes of batch normalization, explanations, shapes only."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from zoo import NETWORKS, relative_change
from zoo.network import lenient, vector

import pathcond_jax as pathcond


def sides(spec):
    return [
        (str(incidence), incidence.index.tolist())
        for group in spec.groups
        for incidence in (*group.incoming, *group.outgoing)
    ]


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "densenet"])
def test_batch_normalization_has_the_same_groups_in_training_and_inference(name):
    inference, training = NETWORKS[name](), NETWORKS[f"{name}-training"]()
    specs = [pathcond.trace_spec(n.apply_fn, n.params, n.x) for n in (inference, training)]

    assert sides(specs[0]) == sides(specs[1])
    assert not any("batch_stats" in path for path, _ in sides(specs[0]))


def test_state_can_be_rescaled_for_inference_only():
    network, training = NETWORKS["densenet"](), NETWORKS["densenet-training"]()
    options = {"rescale_state": True}

    spec = pathcond.trace_spec(network.apply_fn, network.params, network.x, **options)
    same = pathcond.trace_spec(training.apply_fn, training.params, training.x, **options)

    # Now each normalization also leaves the convolution's channels before it.
    assert spec.num_neurons > network.neurons
    assert any("batch_stats" in path and "mean" in path for path, _ in sides(spec))
    assert not any("var" in path for path, _ in sides(spec))
    assert spec.num_parameters == same.num_parameters
    assert relative_change(network, spec) < 1e-5
    assert same.num_neurons == network.neurons


def test_a_convolution_before_batch_normalization_has_its_channels_and_running_mean():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(4, name="before")(x))
            return nn.Dense(2)(nn.relu(x))

    net, x = Net(), vector(6, 3)
    variables = lenient(net.init)(jax.random.key(0), x)
    spec = pathcond.trace_spec(lenient(net.apply), variables, x, rescale_state=True)

    first = spec.groups[0]
    assert [str(i) for i in first.incoming] == [
        "batch_stats/BatchNorm_0/mean[0]",
        "params/before/bias[0]",
        "params/before/kernel[1]",
    ]
    assert [str(i) for i in first.outgoing] == ["params/BatchNorm_0/scale[0]"]


def reasons(apply_fn, params, x):
    spec = pathcond.trace_spec(apply_fn, params, x)
    return {(pin.path, pin.axis): pin for pin in spec.pinned}


def line_of(function, text):
    lines, start = inspect.getsourcelines(function)
    return start + next(k for k, line in enumerate(lines) if text in line)


MATRICES = {"w": np.ones((3, 4), np.float32), "v": np.ones((4, 2), np.float32)}


@pytest.mark.parametrize(
    ("activation", "operation"),
    [
        (jnp.tanh, "tanh"),
        (jax.nn.relu6, "min in relu6"),
        (jax.nn.gelu, "add in gelu"),
        (jax.nn.sigmoid, "sigmoid"),
        (jax.nn.softmax, "exp in softmax"),
        (jnp.exp, "exp"),
        (lambda x: jnp.minimum(x, 1.0), "min"),
        (lambda x: jnp.where(x > 1.0, x, 0.0), "gt"),
        (lambda x: x + 1.0, "add"),
        (lambda x: lax.while_loop(lambda y: y.sum() < 0, lambda y: y + 1, x), "add"),
        (lambda x: jnp.linalg.cholesky(x.T @ x), "cholesky"),
        (lambda x: x / (jnp.linalg.norm(x) + 1e-6), "add"),
    ],
)
def test_reasons_name_the_operation_and_the_users_line(activation, operation):
    def apply_fn(params, x):
        hidden = x @ params["w"]
        return activation(hidden)[:2] @ params["v"]

    found = reasons(apply_fn, MATRICES, vector(5, 3).astype(np.float32))

    pin = found["w", 1]
    assert operation in pin.operation
    assert operation in pin.reason
    # Lambdas of this file run their operations on their own lines.
    if not inspect.getmodule(activation) or activation.__name__ != "<lambda>":
        assert f"test_symmetry.py:{line_of(apply_fn, 'activation(hidden)')} " in pin.source
    assert "test_symmetry.py:" in pin.source
    assert found["w", 0].reason == "the network's input is fixed"
    assert found["v", 1].reason == "the network's output must not change"
    assert operation.split(" ")[0] in found["v", 0].reason or "scale" in found["v", 0].reason


def test_layer_normalization_is_named():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.LayerNorm()(nn.Dense(4, name="before")(x))))

    net, x = Net(), vector(6, 3)
    found = reasons(lenient(net.apply), lenient(net.init)(jax.random.key(0), x), x)

    pin = found["params/before/kernel", 1]
    assert pin.reason == "scale-invariant but for ε = 1e-06 of LayerNorm"
    assert f"test_symmetry.py:{line_of(Net, 'nn.LayerNorm()')} (" in pin.source


def test_every_axis_is_rescaled_or_explained():
    for name in ("lenet", "transformer-block", "mobilenetv2-relu6", "swiglu", "scan-over-layers"):
        network = NETWORKS[name]()
        spec = pathcond.trace_spec(network.apply_fn, network.params, network.x)

        pinned = {(pin.path, pin.axis) for pin in spec.pinned}
        rescaled = {
            (incidence.path, axis)
            for group in spec.groups
            for incidence in (*group.incoming, *group.outgoing)
            for axis in incidence.axes
        }
        for leaf in spec.leaves:
            for axis, size in enumerate(leaf.shape):
                if leaf.trainable and size > 1:
                    assert {(leaf.path, axis)} & (pinned | rescaled), (name, leaf.path, axis)
        assert all(pin.reason for pin in spec.pinned)
        told = {pin.path for pin in spec.pinned if not pin.summed} | spec.rescaled_paths
        assert all(
            pin.reason in str(spec) for pin in spec.pinned if not (pin.summed and pin.path in told)
        )


def test_group_of_finds_the_groups_of_a_leaf():
    network = NETWORKS["mlp"]()
    spec = pathcond.trace_spec(network.apply_fn, network.params, network.x)

    assert [g.name for g in spec.group_of("params/Dense_1/kernel")] == ["Dense_0", "Dense_1"]
    assert [g.name for g in spec.group_of("params/Dense_3/bias")] == []
    with pytest.raises(pathcond.SpecError, match="no parameter 'params/Dense_9/bias'"):
        spec.group_of("params/Dense_9/bias")


def test_a_program_of_unsupported_operations_is_explained_not_refused():
    def apply_fn(params, x):
        x = jnp.sin(x @ params["a"]) + jnp.linalg.inv(params["b"])
        x = lax.while_loop(lambda y: y.sum() > 1, lambda y: y / 2, x @ params["c"])
        x = jax.pure_callback(np.sin, x, x) @ params["d"]
        return jnp.fft.fft(x.astype(jnp.complex64)).real, jnp.linalg.svd(x)[1]

    params = {name: np.ones((3, 3), np.float32) for name in "abcd"}
    spec = pathcond.trace_spec(apply_fn, params, jnp.ones((3, 3)))

    assert spec.groups == ()
    named = {pin.operation.split(" ")[0] for pin in spec.pinned}
    assert {"sin", "gt", "svd"} <= named
    assert all(pin.source for pin in spec.pinned if pin.operation)


def test_what_leaves_a_squared_activation_takes_the_square_of_the_scale():
    def apply_fn(params, x):
        return jnp.square(jax.nn.relu(x @ params["w"])) @ params["v"]

    spec = pathcond.trace_spec(apply_fn, MATRICES, vector(5, 3).astype(np.float32))

    sides = [(*map(str, group.incoming), *map(str, group.outgoing)) for group in spec.groups]
    assert sides == [("w[1]", "v[0]^2")]


def test_captured_statistics_are_not_taken_for_zeros():
    # Running means start at 0; in a closure they are still means, not a proof that nothing moves.
    mean = jnp.zeros(4)

    def apply_fn(params, x):
        return jax.nn.relu((x @ params["w"] - mean[None]) * params["g"][None]) @ params["v"]

    params = {**MATRICES, "g": np.ones(4, np.float32)}
    spec = pathcond.trace_spec(apply_fn, params, vector(5, 3).astype(np.float32))

    assert [[str(i) for i in group.incoming] for group in spec.groups] == [["g[0]"]]


def test_a_model_that_insists_on_its_batch_size():
    def apply_fn(params, x):
        assert x.shape[0] == 4, "batches of four"
        return jax.nn.relu(x @ params["w"]) @ params["v"]

    spec = pathcond.trace_spec(apply_fn, MATRICES, vector(4, 3).astype(np.float32))
    assert spec.num_neurons == 4
    assert np.isfinite(pathcond.conditioning_score(MATRICES, spec))


def test_powers_that_a_loop_makes_cancel_but_for_rounding():
    """Thirds of one scale on the axes of the kernel of each step add up to 0 but for rounding."""

    def apply_fn(params, x):
        def step(carry, _):
            first, second = carry
            return (jax.nn.relu(second @ params["u"]), jax.nn.relu(first)), second

        start = jnp.moveaxis(jnp.tensordot(x, params["w"], ((0,), (0,))), 2, 0)
        (_, last), _ = jax.lax.scan(step, (start, jnp.zeros((2, 3, 4))), None, length=7)
        return last, last @ params["v"]

    shapes = {"w": (2, 2), "u": (4, 4), "v": (4, 3)}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    spec = pathcond.trace_spec(apply_fn, params, jax.ShapeDtypeStruct((2, 3, 4), np.float32))

    sides = [(*map(str, group.incoming), *map(str, group.outgoing)) for group in spec.groups]
    assert sides == [("w[1]^3", "u[1]")]
