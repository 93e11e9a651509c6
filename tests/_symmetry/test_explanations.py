"""What a person reads about real networks: what is pinned, for which ε, and what is rounded."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from zoo.network import draw, lenient

import pathcond_jax as pathcond

key = jax.random.key(0)
vectors, images = jnp.ones((2, 4)), jnp.ones((2, 8, 8, 3))


def traced(module, *inputs, **options):
    shapes = jax.eval_shape(lenient(functools.partial(module.init, **options)), key, *inputs)
    return pathcond.trace_spec(lenient(functools.partial(module.apply, **options)), shapes, *inputs)


def pinned_lines(spec):
    """The lines below ``pinned:``, without the places in the code."""
    lines = str(spec).partition("\npinned:\n")[2].splitlines()
    return [line.strip().split(" at ")[0] for line in lines if line.startswith("  ")]


class Residual(nn.Module):
    blocks: int
    train: bool

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=not self.train)
        x = nn.relu(norm()(nn.Conv(4, (3, 3))(x)))
        for _ in range(self.blocks):
            y = nn.relu(norm()(nn.Conv(5, (3, 3), use_bias=False)(x)))
            x = nn.relu(x + norm()(nn.Conv(4, (3, 3), use_bias=False)(y)))
        return nn.Dense(3)(x.mean((1, 2)))

    def apply(self, variables, *args, **kwargs):
        return super().apply(variables, *args, mutable=["batch_stats"], **kwargs)[0]


def test_a_deep_residual_network_in_training_mode():
    spec = traced(Residual(9, True), images)
    assert len(spec.pinned) > 60
    assert pinned_lines(spec) == [
        "20 leaves such as params/Conv_0/bias[0], params/Conv_0/kernel[3]: "
        "scale-invariant but for ε = 1e-05 of BatchNorm",
        "params/Conv_0/kernel[2]: the network's input is fixed",
        "params/Dense_0/bias[0], params/Dense_0/kernel[1]: the network's output must not change",
    ]


def test_the_data_keep_every_axis():
    spec = traced(Residual(1, False), images)
    (window,) = {pin.reason for pin in spec.pinned if pin.summed}
    assert window == "conv_general_dilated sums over it"
    axes = {(pin.path, pin.axis) for pin in spec.pinned if pin.summed}
    assert {("params/Conv_1/kernel", 0), ("params/Conv_1/kernel", 1)} <= axes
    assert window not in str(spec)
    assert "sub in BatchNorm meets an operand whose scale is fixed" in str(spec)


class Transformer(nn.Module):
    blocks: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        for _ in range(self.blocks):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2)(h, h)
            h = nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))
            x = x + nn.Dense(8)(h)
        return nn.Dense(11, use_bias=False)(nn.LayerNorm()(x))


def test_a_transformer():
    spec = traced(Transformer(6), jnp.ones((1, 5), jnp.int32))
    gelu, epsilon, output = pinned_lines(spec)
    assert epsilon.startswith("25 leaves such as params/Dense_1/bias[0], ")
    assert epsilon.endswith(": scale-invariant but for ε = 1e-06 of LayerNorm")
    assert gelu.startswith("18 leaves such as params/Dense_0/bias[0], params/Dense_0/kernel[1]: ")
    assert gelu.endswith("add in gelu needs operands of one scale")
    assert output == "params/Dense_12/kernel[1]: the network's output must not change"


class WeightNormalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(5))(x)


class Normalized(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.norm = nnx.RMSNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


def normalized_nnx():
    graphdef, params = nnx.split(Normalized())
    return lambda p, x: nnx.merge(graphdef, p)(x), params, "first/kernel", 1e-6, "RMSNorm"


def normalized_equinox():
    first, last = eqx.nn.Linear(4, 6, key=key), eqx.nn.Linear(6, 3, key=key)
    model = eqx.nn.Sequential([first, eqx.nn.LayerNorm(6), last])
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return apply_fn, params, "layers/0/weight", 1e-5, "LayerNorm"


def normalized_haiku():
    def forward(x):
        x = hk.LayerNorm(-1, True, True)(hk.Linear(6)(x))
        return hk.Linear(3)(x)

    net = hk.without_apply_rng(hk.transform(forward))
    return net.apply, jax.eval_shape(lenient(net.init), key, vectors), "linear/w", 1e-5, "LayerNorm"


def normalized_by_hand():
    def apply_fn(params, x):
        x = x @ params["w"]
        return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-4) @ params["v"]

    return apply_fn, {"w": jnp.ones((4, 6)), "v": jnp.ones((6, 3))}, "w", 1e-4, "add"


@pytest.mark.parametrize(
    "network", [normalized_nnx, normalized_equinox, normalized_haiku, normalized_by_hand]
)
def test_only_an_epsilon_fixes_the_scale_before_a_normalization(network):
    apply_fn, params, path, epsilon, of = network()
    spec = pathcond.trace_spec(lenient(apply_fn), params, vectors)
    said = {pin.reason for pin in spec.pinned if pin.path == path}
    assert f"scale-invariant but for ε = {epsilon:.3g} of {of}" in said


@pytest.mark.usefixtures("x64")
def test_the_claim_holds_without_the_epsilon():
    def apply_fn(epsilon, params, x):
        x = jax.nn.relu(x @ params["w"]) @ params["v"]
        x = x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + epsilon)
        return jax.nn.relu(x * params["g"][None] + epsilon) @ params["u"]

    shapes = {"w": (4, 5), "v": (5, 6), "g": (6,), "u": (6, 3)}
    params = draw({k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in shapes.items()})
    x = np.random.default_rng(0).normal(size=(7, 4))
    spec = pathcond.trace_spec(functools.partial(apply_fn, 1e-3), params, x)
    said = {(pin.path, pin.axis): pin.reason.split(" of ")[0] for pin in spec.pinned}
    # Neurons between w and v, and, where no ε is added to them, between g and u.
    assert [(i.path, o.path) for g in spec.groups for i in g.incoming for o in g.outgoing] == [
        ("w", "v")
    ]
    assert said["v", 1] == "scale-invariant but for ε = 0.001"
    assert said["g", 0] == "rescalable but for ε = 0.001"

    exact = functools.partial(apply_fn, 0.0)
    before = exact(params, x)
    invariant = exact(params | {"v": 3.0 * params["v"]}, x)
    factors = np.arange(1.0, 7.0)
    moved = {"g": params["g"] * factors, "u": params["u"] / factors[:, None]}
    np.testing.assert_allclose(invariant, before, rtol=1e-12)
    np.testing.assert_allclose(exact(params | moved, x), before, rtol=1e-12)


def test_a_weight_norm_without_an_epsilon_is_said_to_be_one_sided():
    def apply_fn(params, x):
        direction = params["w"] / jnp.linalg.norm(params["w"], axis=0, keepdims=True)
        return x @ direction

    spec = pathcond.trace_spec(apply_fn, {"w": jnp.ones((4, 6))}, vectors)
    said = {pin.axis: pin.reason for pin in spec.pinned}
    assert said[1].startswith("the output does not depend on its scale")
    (line, *_) = pinned_lines(traced(WeightNormalized(), vectors))
    assert "scale-invariant but for ε = 1e-12 of WeightNorm" in line


class Rotary(nn.Module):
    dtype: object

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(6)(x))
        angles = jnp.cos(jnp.arange(6.0)).astype(self.dtype)
        return nn.Dense(3)((h.astype(self.dtype) * angles).astype(x.dtype))


def test_a_scale_that_is_rounded_is_told_with_the_advice():
    spec = traced(Rotary(jnp.bfloat16), vectors)
    assert [place.dtype for place in spec.rounded] == ["bfloat16"]
    assert "test_explanations.py:" in spec.rounded[0].source
    last = str(spec).splitlines()[-1]
    assert last.startswith("rounded: neurons' values are rounded to bfloat16 at test_explanations")
    assert 'rounding="power_of_two"' in last


def test_what_is_rounded_elsewhere_is_not_told():
    def apply_fn(params, x):
        h = jax.nn.relu(x @ params["w"]) @ params["v"]
        return h.astype(jnp.bfloat16)

    params = {"w": jnp.ones((4, 5)), "v": jnp.ones((5, 3))}
    assert pathcond.trace_spec(apply_fn, params, vectors).rounded == ()
    assert traced(Rotary(jnp.float32), vectors).rounded == ()


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6)(nn.gelu(nn.Dense(5)(nn.LayerNorm()(x)))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        stacked = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2)(stacked(name="blocks")(nn.Dense(6)(x), None)[0])


def test_scanned_layers_read_well():
    spec = traced(Stack(), vectors)
    # One group of the whole stack, or one of each of its layers, with the layer's number.
    names = {group.name.partition("[")[0] for group in spec.groups}
    assert names == {"blocks/LayerNorm_0"}
    assert not any("#" in group.name for group in spec.groups)
    assert len(pinned_lines(spec)) <= 6
    assert "joins scales" not in str(spec)
    assert "but for ε = 1e-06 of LayerNorm" in str(spec)
    assert "add in gelu needs operands of one scale" in str(spec)


def test_integer_time_steps_are_an_input_like_any_other():
    def apply_fn(params, x, t):
        angles = t[:, None].astype(x.dtype) * jnp.exp(-jnp.arange(4.0))[None]
        return (jax.nn.relu(x @ params["w"] + jnp.sin(angles) @ params["e"])) @ params["v"]

    params = {"w": jnp.ones((4, 5)), "e": jnp.ones((4, 5)), "v": jnp.ones((5, 3))}
    spec = pathcond.trace_spec(apply_fn, params, vectors, jnp.arange(2))
    assert spec.num_neurons == 5
    assert pinned_lines(spec) == [
        "e[0], w[0]: the network's input is fixed",
        "v[1]: the network's output must not change",
    ]
    with pytest.raises(pathcond.NotPathLiftableError, match="give trace_spec floating inputs"):
        pathcond.path_norm(params, spec)


def test_a_neuron_that_a_scalar_enters_has_a_name():
    def apply_fn(params, x):
        return jax.nn.relu(x.sum(-1, keepdims=True) * params["s"]) @ params["v"]

    spec = pathcond.trace_spec(apply_fn, {"s": jnp.ones(()), "v": jnp.ones((1, 3))}, vectors)
    assert [group.name for group in spec.groups] == ["s"]


def test_a_function_of_each_device_is_told_to_be_traced_without():
    kinds_of_axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("devices",), axis_types=kinds_of_axes)
    rows = jax.sharding.PartitionSpec("devices")

    def layer(params, x):
        return jax.nn.relu(x @ params["w"]) @ params["v"]

    def apply_fn(params, x):
        whole = jax.sharding.PartitionSpec()
        return jax.shard_map(layer, mesh=mesh, in_specs=(whole, rows), out_specs=rows)(params, x)

    params = {"w": jnp.ones((4, 5)), "v": jnp.ones((5, 3))}
    assert pathcond.trace_spec(layer, params, vectors).num_neurons == 5
    spec = pathcond.trace_spec(apply_fn, params, vectors)
    assert spec.num_neurons == 0
    assert "Trace the function without it" in str(spec)
