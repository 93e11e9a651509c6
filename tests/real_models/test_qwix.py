"""Qwix quantizes conditioned networks, linen and nnx; from an unlucky representative it cannot."""

import pathlib
import re

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
import qwix
from flax import linen as nn
from flax import nnx
from nbclient import NotebookClient

import pathcond_jax as pathcond
from pathcond_jax.quantization import calibrate, simulate

# Qwix itself uses deprecated names of Flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")

RULES = {
    "int8": {"weight_qtype": jnp.int8, "act_qtype": jnp.int8},
    "int8, weights": {"weight_qtype": jnp.int8},
    "int4, weights": {"weight_qtype": jnp.int4},
}
# Signal-to-noise ratios of the outputs in dB that conditioned networks reach at least.
LEAST = {"int8": 28.0, "int8, weights": 38.0, "int4, weights": 14.0}
X = jax.random.normal(jax.random.key(1), (64, 16))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (64, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(8)(x)


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        return nn.Dense(8)(x.mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(16, 64, rngs=rngs)
        self.two = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.two(nnx.relu(self.one(x)))))


def decibels(wanted, found):
    return float(10 * jnp.log10(jnp.square(wanted).mean() / jnp.square(found - wanted).mean()))


def unlucky(params, spec):
    rng = np.random.default_rng(0)
    scales = [jnp.asarray(rng.normal(scale=2.0, size=g.size), jnp.float32) for g in spec.groups]
    return pathcond.rescale(params, spec, tuple(scales))


def provider(rule):
    return qwix.PtqProvider([qwix.QuantizationRule(**RULES[rule])])


def quantized_linen(model, params, rule, x):
    quantized = qwix.quantize_model(model, provider(rule))
    shapes = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    return quantized, qwix.quantize_params(params["params"], shapes)


def linen_decibels(model, params, rule, x=X):
    quantized, weights = quantized_linen(model, params, rule, x)
    return decibels(model.apply(params, x), quantized.apply({"params": weights}, x))


@pytest.mark.parametrize("rule", RULES)
def test_linen(rule):
    model = Linen()
    params = model.init(jax.random.key(0), X)
    spec = pathcond.trace_spec(model.apply, params, X)
    moved = unlucky(params, spec)
    conditioned, _ = pathcond.condition(moved, spec, "enorm")
    found = linen_decibels(model, conditioned, rule)
    assert found > LEAST[rule]
    assert found > linen_decibels(model, moved, rule) + 3.0


@pytest.mark.parametrize("rule", RULES)
def test_nnx(rule):
    model = Nnx(nnx.Rngs(0))
    spec = pathcond.nnx_spec(model, X)
    variables = pathcond.nnx_variables(model)
    nnx.update(model, unlucky(variables, spec)["params"])
    wanted = model(X)
    before = decibels(wanted, qwix.quantize_model(model, provider(rule), X)(X))
    pathcond.condition_nnx(model, spec, "enorm")
    found = decibels(wanted, qwix.quantize_model(model, provider(rule), X)(X))
    assert found > LEAST[rule]
    assert found > before + 3.0


def test_the_scheme_rounds_as_qwix_does():
    model, images = Depthwise(), jax.random.normal(jax.random.key(2), (32, 8, 8, 3))
    params = model.init(jax.random.key(0), images)
    spec = pathcond.trace_spec(model.apply, params, images)
    _, weights = quantized_linen(model, params, "int8", images)
    for name, layer in params["params"].items():
        largest = jnp.abs(layer["kernel"].reshape(-1, 8)).max(0)
        scale = weights[name]["kernel"].array.scale
        np.testing.assert_allclose(scale.reshape(-1), largest / 127.5, rtol=1e-6)
    for representative in (params, unlucky(params, spec)):
        statistics = calibrate(model.apply, representative, spec, [images])
        simulated = simulate(model.apply, spec, statistics, "qwix_int8")
        found = decibels(model.apply(params, images), simulated(representative, images))
        real = linen_decibels(model, representative, "int8", images)
        assert found == pytest.approx(real, abs=1.5)


def test_convolutions_are_not_rounded_without_their_activations():
    model, images = Depthwise(), jnp.ones((2, 8, 8, 3))
    params = model.init(jax.random.key(0), images)
    with pytest.raises(ValueError, match="same act_qtype and weight_qtype"):
        quantized_linen(model, params, "int4, weights", images)


@pytest.mark.filterwarnings("default")  # The kernel is a process of its own; this is its client.
def test_the_notebook_prints_what_is_stored(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    root = pathlib.Path(__file__).parents[2]
    stored, fresh = (
        nbformat.read(root / "notebooks" / "04_quantize_with_qwix.ipynb", as_version=4)
        for _ in range(2)
    )
    resources = {"metadata": {"path": str(root)}}
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources=resources).execute()
    found, wanted = (
        "".join(o.get("text", "") for o in notebook.cells[-2].outputs)
        for notebook in (fresh, stored)
    )
    line = re.compile(r"^(.+?) +([\d.]+) dB +([\d.]+) % right$", re.M)
    assert len(line.findall(found)) == 6
    for one, other in zip(line.findall(found), line.findall(wanted), strict=True):
        assert one[0] == other[0]
        assert float(one[1]) == pytest.approx(float(other[1]), abs=2.0)
        assert float(one[2]) == pytest.approx(float(other[2]), abs=2.0)
