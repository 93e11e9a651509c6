"""``pathcond inspect``: every front door, checkpoints, dead neurons, and pages."""

import io
import re

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from zoo.network import lenient

import pathcond_jax as pathcond
from pathcond_jax.experiments import inspection

PROGRAM = """
import jax, jax.numpy as jnp
x = jnp.ones((2, 5))

def linen():
    from flax import linen as nn
    layers = [nn.Dense(6), nn.relu, nn.Dropout(0.1, deterministic=True), nn.Dense(3)]
    return nn.Sequential(layers), x

def linen_with_variables():
    model, _ = linen()
    return model, model.init(jax.random.key(1), x), x

def of_nnx():
    from flax import nnx
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(5, 6, rngs=rngs), nnx.relu, nnx.Dropout(0.1, rngs=rngs)
    return nnx.Sequential(*layers, nnx.Linear(6, 3, rngs=rngs)), x

def of_equinox():
    import equinox as eqx
    return eqx.nn.MLP(5, 3, 6, 1, key=jax.random.key(0)), x[0]

def of_keras():
    import keras
    layers = [keras.layers.Dense(6, activation="relu"), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((5,)), *layers]), x

def plain():
    params = {"w": jnp.ones((5, 6)).at[:, 2].set(0), "v": jnp.ones((6, 3)).at[4].set(0)}
    return lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], params, x

def of_softmax():
    params = {"w": jnp.ones((5, 6)), "v": jnp.ones((6, 3))}
    return lambda p, x: jax.nn.softmax(jax.nn.relu(x @ p["w"]) @ p["v"]), params, x

def wrong():
    return 3
"""


@pytest.fixture
def inspect(tmp_path, monkeypatch):
    """Inspects what a function of the program returns: the exit status and what is printed."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)

    def run(factory, **options):
        console = Console(file=io.StringIO(), width=200)
        status = inspection.main(f"{file}:{factory}", console=console, **options)
        return status, console.file.getvalue()

    return run


@lenient
@pytest.mark.parametrize(
    "factory", ["linen", "linen_with_variables", "of_nnx", "of_equinox", "of_keras", "plain"]
)
def test_every_front_door(inspect, factory):
    status, printed = inspect(factory)
    assert status == 0, printed
    assert "6 neurons in 1 group" in printed
    header = next(line for line in printed.splitlines() if line.split()[:2] == ["as", "is"])
    assert header.split()[2:] == ["path", "enorm", "equalize"]
    assert ("dead neurons            none" in printed) == (factory != "plain")


@lenient
def test_keras_variables_are_named_as_keras_names_them(inspect):
    status, printed = inspect("of_keras")
    assert status == 0, printed
    assert re.search(r"params/sequential\w*/dense\w*/kernel\[1\]", printed)


def test_keras_variables_of_one_name_are_kept_apart():
    from types import SimpleNamespace

    from pathcond_jax.experiments.doors import _names

    assert _names([SimpleNamespace(path=path) for path in ("a", "b")]) == ["a", "b"]
    assert _names([SimpleNamespace(path="a")] * 2) == ["a#0", "a#1"]


@lenient
def test_dead_neurons_are_named_and_the_page_has_all(inspect, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    status, printed = inspect("plain", page=page, picture=picture)
    assert status == 0
    assert "w: nothing enters 1 of 6: 2" in printed
    assert "w: nothing leaves 1 of 6: 4" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = page.read_text("utf-8")
    assert "nothing leaves 1 of 6: 4" in written
    assert "data:image/png;base64," in written
    assert "conditioning score" in written


@lenient
@pytest.mark.filterwarnings("default")  # Orbax warns of its own changes.
def test_a_checkpoint_takes_the_place_of_the_parameters(inspect, tmp_path):
    import orbax.checkpoint as ocp

    kernel = jax.random.normal(jax.random.key(3), (5, 6)).at[:, 1].set(0)
    layers = {
        "layers_0": {"kernel": kernel, "bias": jnp.zeros(6)},
        "layers_3": {"kernel": jnp.ones((6, 3)), "bias": jnp.zeros(3)},
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": layers, "step": 3})
        checkpointer.save(tmp_path / "part", {"layers_0": layers["layers_0"]})
    assert "dead neurons            none" in inspect("linen")[1]
    status, printed = inspect("linen", checkpoint=tmp_path / "state")
    assert status == 0, printed
    assert "layers_0: nothing enters 1 of 6: 1" in printed
    status, printed = inspect("linen", checkpoint=tmp_path / "part")
    assert status == 1
    assert "has no params/layers_3/bias; it has layers_0/bias, layers_0/kernel" in printed
    status, printed = inspect("linen", checkpoint=tmp_path / "nowhere")
    assert status == 1
    assert "there is no checkpoint folder" in printed


@lenient
def test_a_picture_that_cannot_be_drawn_is_said(inspect, tmp_path):
    picture = tmp_path / "picture.png"
    status, printed = inspect("of_softmax", picture=picture)
    assert status == 0, printed
    assert "return the logits" in printed
    assert f"No {picture}: this network has no Gram diagonal" in printed
    assert not picture.exists()


@pytest.mark.parametrize(
    ("factory", "said"), [("wrong", "it returned int"), ("missing", "its functions: linen")]
)
def test_what_cannot_be_used_is_said(inspect, factory, said):
    status, printed = inspect(factory)
    assert status == 1
    assert said in printed


def test_a_spec_without_neurons_is_no_error():
    from pathcond_jax.experiments.doors import Network

    params, x = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}, jnp.ones((1, 3))
    spec = pathcond.trace_spec(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, x)
    findings = inspection.inspect(Network(params, spec, (x,)))
    assert findings.figure is None
    assert "No neuron can be rescaled" in findings.sections[-1][1]
