"""A trained network from the user's disk, quantized and pruned by the studies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization
from rich.console import Console
from zoo.network import lenient

from pathcond_jax.__main__ import main
from pathcond_jax.experiments import own, reproduce
from pathcond_jax.experiments.doors import UserError

PROGRAM = """
import pathlib
import jax, jax.numpy as jnp
from flax import linen as nn, serialization

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (6, 8):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu6(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(4)(x.mean((1, 2)))

IMAGE = jnp.ones((1, 5, 5, 2))

def saved():
    variables = Net().init(jax.random.key(0), IMAGE)
    content = (pathlib.Path(__file__).parent / "net.msgpack").read_bytes()
    return Net(), serialization.from_bytes(variables, content), IMAGE

def plain():
    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], (50, 9)), "v": jax.random.normal(keys[1], (9, 4))}
    return lambda p, x: jax.nn.relu(x.reshape(-1, 50) @ p["w"]) @ p["v"], params, IMAGE

def one_example():
    _, params, image = plain()
    return lambda p, x: jax.nn.relu(x.reshape(50) @ p["w"]) @ p["v"], params, image[0]

def two_inputs():
    apply_fn, params, image = plain()
    both = {"image": image, "weight": jnp.ones((1, 1))}
    return lambda p, both: (apply_fn(p, both["image"]) * both["weight"],), params, both

def two_outputs():
    apply_fn, params, image = plain()
    return lambda p, x: (apply_fn(p, x), apply_fn(p, x)), params, image

def mean():
    apply_fn, params, image = plain()
    return lambda p, x: apply_fn(p, x).mean(), params, image

def rigid():
    return lambda p, x: jnp.tanh(x.reshape(-1, 50) @ p["w"]), {"w": jnp.ones((50, 4))}, IMAGE

def failing():
    return Net(), open("no such file").read(), IMAGE
"""
COUNT = 160
IMAGES = np.asarray(jax.random.normal(jax.random.key(7), (COUNT, 5, 5, 2)))


class Net(nn.Module):
    """That of the program."""

    @nn.compact
    def __call__(self, x):
        for width in (6, 8):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu6(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(4)(x.mean((1, 2)))


@pytest.fixture
def folder(tmp_path):
    """A program, the weights of its network, and examples."""
    variables = Net().init(jax.random.key(3), IMAGES[:1])
    key = jax.random.key(4)
    variables["batch_stats"] = jax.tree.map(
        lambda x: x + 0.3 * jax.random.uniform(key, x.shape), variables["batch_stats"]
    )
    (tmp_path / "net.msgpack").write_bytes(serialization.to_bytes(variables))
    (tmp_path / "program.py").write_text(PROGRAM)
    logits = np.asarray(Net().apply(variables, IMAGES))
    # Right for three quarters.
    labels = np.where(np.arange(COUNT) % 4 > 0, logits.argmax(-1), (logits.argmax(-1) + 1) % 4)
    np.savez(tmp_path / "labelled.npz", images=IMAGES, labels=labels)
    np.save(tmp_path / "images.npy", IMAGES)
    np.savez(tmp_path / "both.npz", IMAGES, np.full((COUNT, 1), 2.0))
    np.save(tmp_path / "one.npy", IMAGES[:1])
    np.save(tmp_path / "flat.npy", IMAGES.reshape(COUNT, 50))
    np.save(tmp_path / "bytes.npy", np.zeros(IMAGES.shape, np.uint8))
    np.save(tmp_path / "nan.npy", np.full_like(IMAGES, np.nan))
    np.savez(tmp_path / "shares.npz", IMAGES, labels=np.zeros((COUNT, 4)))
    np.savez(tmp_path / "tenth.npz", IMAGES, labels=np.full(COUNT, 9))
    np.savez(tmp_path / "uneven.npz", images=IMAGES, labels=labels[1:])
    return tmp_path


def measured(name, folder, factory, inputs, **sizes):
    given = {"weights": f"{folder}/program.py:{factory}", "inputs": str(folder / inputs)}
    out, console = folder / "out", Console(quiet=True)
    return reproduce.main(name, out=out, quick=True, sizes=given | sizes, console=console)


@lenient
def test_a_network_from_disk_is_quantized(folder):
    methods = ["trained", "unlucky", "noise tWA"]
    report = measured("quantize", folder, "saved", "labelled.npz", methods=methods, num_seeds=2)
    accuracy, ratio, predicted = report.tables
    assert "program.py:saved, 2 seeds: accuracy in % (float " in accuracy.title
    assert [row[0] for row in accuracy.rows] == methods
    found = {row[0]: float(row[1].partition("±")[0]) for row in ratio.rows}
    expected = {row[0]: float(row[1].partition("±")[0]) for row in predicted.rows}
    assert found["unlucky"] + 10 < found["trained"]
    assert found["unlucky"] + 10 < found["noise tWA"]
    # Far from the criterion's choice many entries lie below half a step, with less error than that.
    for name, off in {"trained": 2, "noise tWA": 2, "unlucky": 5}.items():
        np.testing.assert_allclose(found[name], expected[name], atol=off, err_msg=name)
    assert (folder / "out" / "quantize.csv").stat().st_size > 100
    assert (folder / "out" / "quantize.png").read_bytes().startswith(b"\x89PNG")


@lenient
def test_what_is_measured_is_the_network_of_the_user(folder):
    found = own.load(f"{folder}/program.py:saved", folder / "labelled.npz")
    variables = serialization.msgpack_restore((folder / "net.msgpack").read_bytes())
    wanted = Net().apply(variables, IMAGES)
    np.testing.assert_allclose(found.apply_fn(found.params, *found.inputs), wanted, atol=1e-5)
    # Normalization is folded, and ReLU6 is no obstacle.
    assert "batch_stats" not in found.params
    assert found.spec.num_neurons == 6 + 8
    assert found.measure == "accuracy"
    assert np.mean(wanted.argmax(-1) == found.labels) == 0.75
    assert len(own.load(f"{folder}/program.py:saved", folder / "labelled.npz", None, 9).labels) == 9


@lenient
@pytest.mark.filterwarnings("default")  # Orbax warns of its own changes.
def test_parameters_come_from_a_checkpoint(folder):
    import orbax.checkpoint as ocp

    params = {"w": jnp.ones((50, 9)), "v": jnp.zeros((9, 4))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", params)
    found = own.load(f"{folder}/program.py:plain", folder / "images.npy", folder / "state")
    assert not found.apply_fn(found.params, IMAGES).any()


@lenient
def test_pruning_counts_agreement_where_there_are_no_labels(folder):
    report = measured("prune", folder, "plain", "images.npy")
    assert report.tables[0].title.endswith("agreement in % by sparsity (unpruned 100.0)")
    rows = {name: values for name, *values in report.tables[0].rows}
    assert rows["path 2, 1 step"] == rows["path 2, 1 step, from unlucky"]
    assert rows["magnitude, trained"] != rows["magnitude, unlucky"]
    assert "by path norm, by 0.0" in report.findings[0]


@lenient
def test_pruning_says_where_there_is_no_path_norm(folder):
    report = measured("prune", folder, "saved", "images.npy")
    names = [row[0] for row in report.tables[0].rows]
    assert names == [f"magnitude, {name}" for name in ("trained", "unlucky", "enorm", "equalize")]
    assert "no sum over paths" in report.findings[0]


@lenient
@pytest.mark.parametrize(
    ("factory", "inputs"), [("one_example", "images.npy"), ("two_inputs", "both.npz")]
)
def test_networks_of_one_example_and_of_several_inputs(folder, factory, inputs):
    plain = own.load(f"{folder}/program.py:plain", folder / "images.npy")
    found = own.load(f"{folder}/program.py:{factory}", folder / inputs)
    twice = 1 + (factory == "two_inputs")
    logits = found.apply_fn(found.params, *found.inputs)
    wanted = twice * plain.apply_fn(plain.params, *plain.inputs)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    assert (found.labels == plain.labels).all()


@lenient
@pytest.mark.parametrize(
    ("factory", "inputs", "said"),
    [
        ("nothing", "images.npy", "has no function 'nothing'"),
        ("plain", "nowhere.npy", "there is no file"),
        ("plain", "program.py", "no .npy or .npz file of numbers"),
        ("plain", "one.npy", "needs at least 2 examples"),
        ("plain", "uneven.npz", "different numbers of examples: images 160, labels 159"),
        ("plain", "flat.npy", r"has shape \(1, 5, 5, 2\).* have \(160, 50\)"),
        ("plain", "bytes.npy", "inputs of type uint8, the example input is float32"),
        ("plain", "nan.npy", "not finite on the inputs"),
        ("plain", "both.npz", "takes 1 inputs, and .*both.npz has 2"),
        ("plain", "shares.npz", r"must be integers \(160,\).* they are float64 \(160, 4\)"),
        ("plain", "tenth.npz", "run from 9 to 9, and the network has classes 0 to 3"),
        ("two_outputs", "images.npy", "returns 2 arrays; it must return one array of logits"),
        ("mean", "images.npy", r"of 160 examples the network returns \(\)"),
        ("rigid", "images.npy", "no neuron of the network can be rescaled"),
        ("failing", "images.npy", r"fails:\n[\s\S]*in failing[\s\S]*no such file"),
    ],
)
def test_what_cannot_be_measured_is_said(folder, factory, inputs, said):
    with pytest.raises(UserError, match=said):
        own.load(f"{folder}/program.py:{factory}", folder / inputs)


def test_what_does_not_go_together_is_said(folder, capsys):
    weights, inputs = f"--weights={folder}/program.py:plain", f"--inputs={folder}/images.npy"
    wrong = {
        (weights,): "--weights needs --inputs, examples",
        (inputs,): "--inputs needs --weights",
        (weights, inputs, "--epochs=3"): "--weights is trained already, --epochs would mean",
        (weights, inputs, "--dataset=digits"): "--weights is trained already, --dataset would",
        (weights, f"--inputs={folder}/flat.npy"): "has shape (1, 5, 5, 2)",
    }
    for options, message in wrong.items():
        assert main(["reproduce", "quantize", *options, f"--out={folder}/out"]) == 1
        assert message in capsys.readouterr().err
    assert main(["reproduce", "moons", weights, f"--out={folder}/out"]) == 1
    assert "moons does not take --weights" in capsys.readouterr().err
