"""The snippets of each front door run in order, on small models that stand for the reader's."""

import pathlib
import re
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from zoo.network import lenient

import pathcond_jax as pathcond

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "front_doors.md").read_text("utf-8")
SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}
X = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


class NnxModel(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.out = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.hidden(x))))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(2)(nn.relu(x))


class EquinoxModel(eqx.Module):
    layers: list
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.layers = [eqx.nn.Linear(4, 5, key=one), eqx.nn.Linear(5, 2, key=two)]
        self.norm = eqx.nn.BatchNorm(5, "batch", mode="batch")

    def __call__(self, x, state):
        x, state = self.norm(self.layers[0](x), state)
        return self.layers[1](jax.nn.relu(x)), state


def haiku_forward(x):
    return hk.nets.MLP([5, 2])(x)


def haiku_forward_with_state(x, train):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(5)(x), train)
    return hk.Linear(2)(jax.nn.relu(x))


def keras_model():
    import keras

    layers = [keras.layers.Dense(5), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    return keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(2)])


def nnx_loss(model, x, y):
    return ((model(x) - y) ** 2).mean()


def updated(names):
    """An optimizer's state and gradients, for a snippet that updates with them."""
    made = names["optimizer"].init(names["params"])
    return {"opt_state": made, "grads": jax.tree.map(jnp.ones_like, names["params"])}


def equinox_parts(model):
    return dict(zip(("params", "static"), eqx.partition(model, eqx.is_inexact_array), strict=True))


def equinox_with_state():
    model, state = eqx.nn.make_with_state(EquinoxModel)(jax.random.key(0))
    return {**equinox_parts(model), "state": state}


def haiku_with_state():
    net = hk.transform_with_state(haiku_forward_with_state)
    params, state = net.init(jax.random.key(0), X, True)
    return {"net": net, "params": params, "state": state}


# For each snippet of a section: what the reader has when it begins.
READERS = {
    "Flax nnx": [
        lambda names: {"CNN": NnxModel, "nnx": nnx},
        lambda names: {"loss_fn": nnx_loss},
    ],
    "Flax linen": [
        lambda names: {"model": LinenModel(), "key": jax.random.key(0)},
        lambda names: {"Any": Any},
    ],
    "Equinox": [
        lambda names: {"eqx": eqx, "model": eqx.nn.MLP(4, 2, 5, 1, key=jax.random.key(0))},
        lambda names: equinox_with_state(),
    ],
    "Haiku": [
        lambda names: {"hk": hk, "forward": haiku_forward, "key": jax.random.key(0)},
        lambda names: haiku_with_state(),
    ],
    "Keras 3 on JAX": [lambda names: {"model": keras_model()}],
    "Plain JAX": [
        lambda names: {"params": {"w": jnp.ones((4, 5)), "b": jnp.ones(5), "v": jnp.ones((5, 2))}},
    ],
}


def test_every_section_with_a_snippet_is_run():
    assert {title: len(found) for title, found in SECTIONS.items() if found} == {
        title: len(found) for title, found in READERS.items()
    }


@pytest.fixture(autouse=True)
def keras_settings(monkeypatch, tmp_path):
    """Keras asks for its backend and writes its settings when it is imported."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))


@lenient
@pytest.mark.parametrize("title", READERS)
def test_section(title):
    names: dict[str, Any] = {"jax": jax, "jnp": jnp, "optax": optax, "pathcond": pathcond}
    for snippet, reader in zip(SECTIONS[title], READERS[title], strict=True):
        names |= {"x": X, "__name__": "snippet", **reader(names)}
        if "optimizer.update(grads" in snippet:
            before, after = snippet.rsplit("updates, opt_state", 1)
            exec(compile(before, title, "exec"), names)
            names |= updated(names)
            snippet = "updates, opt_state" + after
        exec(compile(snippet, title, "exec"), names)
        spec = names["spec"]
        assert spec.num_neurons == 5
        if "solution" in names:
            assert names["solution"].status == pathcond.Status.CONVERGED
    if "train_step" in names:
        names["train_step"](names["model"], names["optimizer"], X, X[:, :2])
        assert int(names["optimizer"].step[...]) == 1
    if title == "Flax linen":
        grads = jax.tree.map(jnp.ones_like, names["state"].params)
        stepped = names["state"].apply_gradients(
            grads=grads, batch_stats=names["variables"]["batch_stats"]
        )
        assert int(stepped.opt_state.recondition.num_updates) == 1
