import io
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from rich.console import Console

import pathcond_jax as pathcond
from pathcond_jax import __main__ as cli
from pathcond_jax import plotting
from pathcond_jax.experiments import data, demo, models, training

ROOT = Path(__file__).parents[2]


def blobs(num_train=24, num_test=8):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, num_train + num_test).astype(np.int32)
    inputs = rng.normal(size=(len(labels), 2)).astype(np.float32) + 4.0 * labels[:, None]
    return data.split(inputs.astype(np.float32), labels, num_test, seed=0)


def train(params, keys, rates, **options):
    model = models.MLP((8,), num_outputs=2)
    options = {"num_epochs": 5, "batch_size": 8, **options}
    return training.train(model.apply, optax.sgd, blobs(), params, keys, rates, **options)


@pytest.fixture(scope="module")
def runs():
    keys = jax.random.split(jax.random.key(0), 3)
    model = models.MLP((8,), num_outputs=2)
    params = jax.vmap(lambda key: model.init(key, jnp.zeros((1, 2))))(keys)
    return params, keys, jnp.array([0.1, 0.3, 1e30])


def result(epochs, *, rates=(0.1, 0.3), accuracy=0.95, num_epochs=10):
    """A demo result in which each start (rate, seed, start) reaches the threshold at an epoch."""
    epochs = np.asarray(epochs, float)
    count = np.arange(1, num_epochs + 1)
    reached = np.where(count >= epochs[..., None], 1.0, 0.5)
    curve = np.where(np.isnan(epochs)[..., None], np.nan, reached)
    seeds = epochs.shape[1]
    model = models.MLP((3,), num_outputs=2)
    study = demo.Study("net", model, model, rates, rates[0], seeds, num_epochs)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    spec = pathcond.trace_spec(model.apply, params, jnp.zeros((1, 2)))
    score = np.ones((seeds, 4))
    starts = demo.Starts(None, (np.ones((seeds, 4, 3)),), score, score, score.astype(int))
    curves = training.Curves(curve, curve, curve, np.where(np.isnan(curve), np.nan, accuracy))
    return demo.Result(study, spec, starts, 1e-7 * score, np.full(seeds, 1e-7), curves)


def test_digits_are_split_without_loss():
    digits = data.load_digits()
    assert digits.train_inputs.shape == (1347, 8, 8, 1)
    assert digits.test_inputs.shape == (450, 8, 8, 1)
    assert digits.train_inputs.dtype == np.float32
    assert digits.train_labels.dtype == np.int32
    everything = np.concatenate([digits.train_inputs, digits.test_inputs])
    assert everything.min() == 0.0
    assert everything.max() == 1.0
    assert everything.sum() == pytest.approx(data.datasets.load_digits().data.sum() / 16)
    assert np.bincount(np.concatenate([digits.train_labels, digits.test_labels])).min() > 170
    np.testing.assert_array_equal(digits.test_inputs, data.load_digits().test_inputs)


@pytest.mark.parametrize("num_test", [0, 1797, -1])
def test_a_split_needs_both_parts(num_test):
    with pytest.raises(ValueError, match="num_test must lie between"):
        data.load_digits(num_test)


@pytest.mark.parametrize("size", [(3, 3), (1, 2), (4, 5)])
def test_convolution_by_products_is_the_convolution(size):
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    conv = nn.Conv(5, size)
    params = conv.init(jax.random.key(1), x)
    other = conv.clone(conv_general_dilated=models.convolve_by_products)
    np.testing.assert_allclose(other.apply(params, x), conv.apply(params, x), atol=2e-6)


@pytest.mark.parametrize(
    "option",
    [
        {"strides": 2},
        {"padding": "VALID"},
        {"kernel_dilation": 2},
        {"input_dilation": 2},
        {"feature_group_count": 2},
    ],
)
def test_convolution_by_products_refuses_what_it_cannot_do(option):
    conv = nn.Conv(4, (3, 3), conv_general_dilated=models.convolve_by_products, **option)
    with pytest.raises(NotImplementedError, match="stride 1"):
        conv.init(jax.random.key(0), jnp.zeros((1, 6, 6, 2)))


def test_runs_trained_together_are_the_runs_trained_alone(runs):
    params, keys, rates = runs
    together, curves = train(params, keys, rates)
    assert curves.train_loss.shape == (3, 5)
    for run in range(2):
        one = jax.tree.map(lambda leaf, k=run: leaf[k : k + 1], (params, keys, rates))
        alone, curve = train(*one)
        for left, right in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(left[run], right[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(curves.test_loss[run], curve.test_loss[0], rtol=1e-4)


def test_training_learns_and_a_diverged_run_has_no_accuracy(runs):
    _, curves = train(*runs, num_epochs=20)
    assert (curves.train_accuracy[:2, -1] == 1.0).all()
    assert (curves.train_loss[:2, -1] < curves.train_loss[:2, 0]).all()
    assert np.isnan(curves.train_accuracy[2]).all()
    assert np.isnan(curves.test_accuracy[2]).all()


def test_epochs_in_parts_are_the_epochs_in_one_piece_and_compile_once(runs):
    done = []
    before = training.run_epochs._cache_size()
    _, parts = train(*runs, num_epochs=6, epochs_per_call=2, on_epochs=done.append)
    assert training.run_epochs._cache_size() == before + 1
    _, whole = train(*runs, num_epochs=6, epochs_per_call=6)
    assert done == [2, 2, 2]
    for one, other in zip(parts, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_optimizers_with_state_train_too(runs):
    params, keys, rates = runs
    model = models.MLP((8,), num_outputs=2)
    momentum = partial(optax.sgd, momentum=0.9)
    _, curves = training.train(
        model.apply, momentum, blobs(), params, keys, 0.1 * rates, num_epochs=10, batch_size=8
    )
    assert (curves.train_accuracy[:2, -1] == 1.0).all()


@pytest.mark.parametrize("batch_size", [0, 25])
def test_a_batch_must_fit_the_training_set(runs, batch_size):
    with pytest.raises(ValueError, match="24 training examples"):
        train(*runs, batch_size=batch_size)


def test_prediction_does_not_depend_on_the_batch_size():
    model = models.CNN((2, 3))
    x = data.load_digits().test_inputs[:10]
    params = model.init(jax.random.key(0), x)
    expected = model.apply(params, x)
    for batch_size in (3, 5, 10, 64):
        got = training.predict(model.apply, params, jnp.asarray(x), batch_size)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_epochs_to_a_threshold():
    curves = np.array([[0.5, 0.99, 0.4], [1.0, 0.0, 0.0], [0.1, np.nan, np.nan]])
    np.testing.assert_array_equal(training.epochs_to(curves, 0.99), [2.0, 1.0, np.inf])


def test_the_four_starts_are_one_function():
    model = models.MLP((12, 9))
    x = jax.random.normal(jax.random.key(0), (20, 5))
    params = model.init(jax.random.key(1), x)
    spec = pathcond.trace_spec(model.apply, params, x)
    starts = jax.jit(demo.make_starts, static_argnums=(2, 3))(params, jax.random.key(2), spec, 3.0)
    outputs = jax.vmap(model.apply, (0, None))(starts.params, x)
    np.testing.assert_allclose(outputs, outputs[:1].repeat(4, 0), rtol=1e-4, atol=1e-5)
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf)[None], starts.params)
    assert demo._start_difference(leaves).max() < 1e-4
    assert [z.shape for z in starts.log_scales] == [(4, 12), (4, 9)]
    largest = max(float(jnp.abs(z[demo.RESCALED]).max()) for z in starts.log_scales)
    assert 1.0 < largest <= 3.0
    a, b, c, d = np.asarray(starts.score_after)
    assert max(c, d) < a < b
    assert c == pytest.approx(d, abs=1e-5)
    np.testing.assert_allclose(starts.score_before, [a, a, a, b], rtol=1e-6)


def test_findings_say_that_it_helped_or_hurt_or_neither():
    last = [[9, 9, 9, 9], [9, 9, 9, 9]]
    text = findings([[[4, 9, 3, 3], [6, 9, 5, 5]], last])
    assert "Conditioning the standard start: it helped." in text
    assert "median epochs 5 → 4" in text
    text = findings([[[4, 2, 6, 6], [6, 2, 9, 9]], last])
    assert text.count("it hurt.") == 2
    text = findings([[[4, 4, 4, 4], [6, 6, 7, 7]], last])
    assert "Conditioning the standard start: no clear difference." in text
    assert "Conditioning the rescaled start: no clear difference." in text


def test_findings_claim_nothing_that_rounding_alone_explains():
    text = findings([[[4, 9, 3, 3], [6, 9, 5, 7]], [[9, 9, 9, 9], [9, 9, 9, 9]]])
    assert "up to 2 epochs apart" in text
    assert "Conditioning the standard start: no clear difference." in text
    assert "Conditioning the rescaled start: it helped." in text


def test_findings_compare_the_accuracies_too():
    shown = result([[[4, 4, 4, 4]] * 2] * 2)
    accuracy = shown.curves.test_accuracy.copy()
    accuracy[..., demo.CONDITIONED, :] += 0.03
    same = "\n".join(demo.findings(shown))
    assert "95.0 %, conditioned 95.0 %; no clear difference." in same
    accuracy[..., demo.RESCALED_CONDITIONED, :] += 0.02
    better = shown._replace(curves=shown.curves._replace(test_accuracy=accuracy))
    assert "95.0 %, conditioned 98.0 %; it helped." in "\n".join(demo.findings(better))


def test_findings_tell_of_runs_that_failed():
    nan, inf = np.nan, np.inf
    text = findings([[[4, nan, 4, 4]] * 2, [[9, 5, 9, 9]] * 2])
    assert "Conditioning the rescaled start: it helped." in text
    assert "median epochs never → 4" in text
    assert "(b) 5 at 0.3" in text
    assert "with a learning rate 3 times larger" in text
    text = findings([[[inf, inf, inf, inf]] * 2, [[inf, inf, inf, inf]] * 2])
    assert text.count("neither reached 99% within 10 epochs") == 2
    assert "(a) never, (b) never" in text
    text = findings([[[nan, nan, 4, 4]] * 2, [[nan, nan, 9, 9]] * 2])
    assert "there is no comparison" in text


def test_findings_of_one_seed_and_one_learning_rate_claim_less():
    text = findings([[[4, 9, 3, 3]]], rates=(0.1,))
    assert "1 seed;" in text
    assert "it helped" not in text
    assert "its own best" not in text


def findings(epochs, **options):
    return "\n".join(demo.findings(result(epochs, **options)))


def test_tables_fit_a_terminal_and_show_every_start():
    failing = [[np.nan, np.nan, 99, 17], [99] * 4, [18] * 4]
    rates = (0.001, 0.01, 0.1, 0.3)
    shown = result([[[14, 99, 13, 13]] * 3, failing, failing, failing], rates=rates, num_epochs=20)
    console = Console(width=80, file=io.StringIO())
    console.print(demo.describe(shown))
    console.print(demo.main_table(shown))
    console.print(demo.learning_rate_table(shown))
    text = console.file.getvalue()
    assert "…" not in text
    for name in demo.STARTS:
        assert text.count(name) == 2
    assert ">20" in text
    assert "div., >20, 18" in text


def test_the_demo_picture_has_a_row_for_each_network(tmp_path):
    shown = result([[[4, np.nan, 3, 3]] * 2, [[5, 9, 4, 4]] * 2])
    figure = demo.plot_demo([shown, shown])
    assert len(figure.axes) == 6
    assert [len(axes.get_title()) > 0 for axes in figure.axes] == [True] * 6
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_plots_make_a_figure_of_their_own():
    shown = result([[[4, 5, 3, 3]] * 2] * 2)
    names = demo.STARTS[:2]
    curves = {name: np.array([[1.0, np.inf, 0.1], [1.0, 0.5, np.nan]]) for name in names}
    assert plotting.plot_training(curves).axes[0].get_yscale() == "log"
    assert plotting.plot_training(curves, log=False).axes[0].get_yscale() == "linear"
    epochs = {name: np.array([3.0, np.inf]) for name in names}
    assert len(plotting.plot_epochs((0.1, 1.0), epochs, limit=10).axes) == 1
    scales = {name: (np.array([0.0, -1.0, 1.0]),) for name in names}
    assert len(plotting.plot_log_scales(shown.spec, scales).axes) == 1
    with pytest.raises(ValueError, match=r"sizes \[2\] for groups of sizes \[3\]"):
        plotting.plot_log_scales(shown.spec, {"one": (np.zeros(2),)})


@pytest.mark.slow
def test_the_demo_runs_from_the_command_line(tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "new" / demo.PICTURE).stat().st_size > 10_000
    for study in demo.studies(quick=True):
        assert study.title in printed
    assert printed.count("The function is the same") == 2
    changes = re.findall(r"moved\s+by\s+more\s+than\s+(\S+)", printed)
    differences = re.findall(r"differs\s+by\s+more\s+than\s+(\S+)", printed)
    assert len(changes) == len(differences) == 2
    assert max(map(float, changes)) < 1e-5
    assert max(map(float, differences)) < 1e-4


def test_help_has_one_line_for_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith(command.summary)
        assert len(line) < 80


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"pathcond {pathcond.__version__}\n"
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {pathcond.__version__}\n" in citation
    assert f"\n## {pathcond.__version__}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def lacking(module):
        def run(_):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        return cli.COMMANDS["demo"]._replace(run=run)

    monkeypatch.setitem(cli.COMMANDS, "demo", lacking("sklearn.datasets"))
    assert cli.main(["demo"]) == 1
    assert "pip install 'pathcond-jax[experiments]'" in capsys.readouterr().err
    monkeypatch.setitem(cli.COMMANDS, "demo", lacking("pathcond_jax.missing"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])
