"""The studies: their numbers, how they are stored and resumed, and their statistics."""

import csv
import json
import pathlib

import jax
import numpy as np
import pytest
from rich.console import Console

from pathcond_jax.__main__ import main
from pathcond_jax.experiments import (
    figure4,
    helps,
    methods,
    models,
    reproduce,
    sources,
    training,
)
from pathcond_jax.experiments.store import Store, plain, restored, write_runs, write_tables
from pathcond_jax.experiments.study import Options, Report, Result, Table, Task, mean_interval

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
HITS = {"A": (None, 801, 1712), "B": (None, 1660, 1597), "C": (None, 3450, 13364)}
QUIET = Console(quiet=True)


@pytest.mark.slow
def test_figure_1_gives_the_golden_numbers(tmp_path):
    report = reproduce.main("figure1", out=tmp_path, console=QUIET)
    with np.load(GOLDEN / "toy_figure_1.npz") as file:
        golden = dict(file)
    store = Store(tmp_path / "figure1")
    for task in reproduce.study("figure1").tasks(Options()):
        name, values = task.name[-1], store.load(task).values
        assert tuple(values[way]["hit"] for way in values) == HITS[name]
        np.testing.assert_allclose(values["conditioned"]["start"], golden[f"rescaled_{name}"], 1e-6)
        assert values["conditioned"]["final_loss"] < 1e-16
        for way, key in (("plain", "loss_plain"), ("conditioned", "loss_path")):
            at = np.isin(values[way]["steps"], np.arange(0, 15000, 100))
            losses = np.array(values[way]["losses"])[at]
            np.testing.assert_allclose(losses, golden[f"{key}_{name}"], rtol=1e-6, atol=1e-20)
    assert [row[3] for row in report.tables[0].rows][:3] == ["never", "801", "1712"]
    for file in ("figure1.png", "figure1.pdf", "figure1.csv"):
        assert (tmp_path / file).stat().st_size > 50
    assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")


def test_proposition_5_1():
    settings = reproduce.study("figure4").tasks(Options(quick=True))[-1].settings
    keys = jax.random.split(jax.random.key(0), settings["seeds"])
    values = figure4.check_proposition(settings["widths"], settings["deviations"], keys)
    # Of a weight of layer 2 in 4-6-3-5-2: 4 · 5 · 2 paths; the other layers' variances.
    by_hand = 4 * 5 * 2 * 0.7**2 * 1.4**2 * 0.5**2
    assert values["expected"][values["names"].index("weight 2")] == pytest.approx(by_hand)
    assert len(values["names"]) == 7
    off = (values["measured"] - values["expected"]) / values["standard_error"]
    assert abs(off).max() < 3
    assert (values["standard_error"] < 0.05 * values["expected"]).all()


class Grid:
    """A study that fails at one of its tasks until it is repaired."""

    SUMMARY, DATASETS = "a grid", ("digits",)

    def __init__(self):
        self.done, self.broken = [], True

    def tasks(self, options):
        return [Task(f"run {k}", {"k": k, "seed": options.seed}) for k in range(3)]

    def run(self, settings, context):
        if settings["k"] == 2 and self.broken:
            raise KeyboardInterrupt
        self.done.append(settings["k"])
        context.advance(1.0)
        return {"square": np.float32(settings["k"] ** 2), "all": np.array([1.0, np.nan, -np.inf])}

    def report(self, results):
        rows = [(r.name, f"{r.values['square']:g}") for r in results]
        return Report([Table("squares", ("run", "square"), rows)], {}, ["Squares grow."])


@pytest.fixture
def grid(monkeypatch):
    module = Grid()
    monkeypatch.setattr(reproduce, "study", lambda name: module)
    return module


def test_an_interruption_loses_no_finished_run(grid, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        reproduce.main("grid", out=tmp_path, console=QUIET)
    assert grid.done == [0, 1]
    grid.broken = False
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        report = reproduce.main("grid", out=tmp_path, console=Console(file=file, width=80))
    assert grid.done == [0, 1, 2]
    assert report.tables[0].rows == [("run 0", "0"), ("run 1", "1"), ("run 2", "4")]
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "squares" in log
    assert "• Squares grow." in log
    with (tmp_path / "grid.csv").open(encoding="utf-8") as file:
        assert [row["square"] for row in csv.DictReader(file)] == ["0", "1", "4"]
    with (tmp_path / "grid_runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["square"] for row in rows if row["square"]] == ["0", "1", "4"]
    assert [row["all"] for row in rows if row["run"] == "run 1"] == ["", "1", "nan", "-inf"]
    reproduce.main("grid", out=tmp_path, console=QUIET, seed=1)
    assert grid.done == [0, 1, 2, 0, 1, 2]
    reproduce.main("grid", out=tmp_path, console=QUIET, fresh=True)
    assert len(grid.done) == 9


def test_a_damaged_result_is_run_again(tmp_path):
    store, task = Store(tmp_path), Task("x", {"a": 1})
    assert store.load(task) is None
    saved = store.save(task, {"value": np.arange(3), "loss": float("inf")}, 0.1)
    assert store.load(task) == saved == Result("x", {"a": 1}, {"value": [0, 1, 2], "loss": np.inf})
    assert store.load(Task("x", {"a": 2})) is None
    assert json.loads(store.path(task).read_text(encoding="utf-8"))["values"]["loss"] == "Infinity"
    for content in ("", '{"settings": ', "[]", "{}"):
        store.path(task).write_text(content, encoding="utf-8")
        assert store.load(task) is None
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_json_and_back():
    value = {"a": [1, 2.5, None, "word"], "b": {"c": [float("inf"), -float("inf")]}}
    assert restored(plain(value)) == value
    assert np.isnan(restored(plain(np.array([np.nan])))).all()
    json.dumps(plain({"x": np.float32(np.nan)}), allow_nan=False)


def test_csv_of_runs_has_a_row_for_each_point(tmp_path):
    values = {"loss": 1.0, "curves": {"x": [[1, 2], [3, 4]], "y": [[0.5, 0.25], [0.1, 1 / 3]]}}
    results = [
        Result("a", {"rate": 0.1, "widths": [2, 3]}, values),
        Result("b", {"n": 2}, {"ragged": [[1], [2, 3]], "inner": {"z": 7}}),
    ]
    write_runs(tmp_path / "x.csv", results)
    assert (tmp_path / "x.csv").read_text(encoding="utf-8").splitlines() == [
        "run,rate,widths,loss,part,i,j,x,y,n,ragged,z",
        'a,0.1,"[2, 3]",1,,,,,,,,',
        "a,,,,curves,0,0,1,0.5,,,",
        "a,,,,curves,0,1,2,0.25,,,",
        "a,,,,curves,1,0,3,0.1,,,",
        "a,,,,curves,1,1,4,0.333333,,,",
        "b,,,,,,,,,2,,",
        "b,,,,,0,,,,,[1],",
        'b,,,,,1,,,,,"[2, 3]",',
        "b,,,,inner,,,,,,,7",
    ]


def test_csv_of_tables_has_a_row_for_each_line(tmp_path):
    tables = [
        Table("one", ("name", "train\nloss"), [("a", "1"), ("b", "2")]),
        Table("two", ("name", "x"), [("c", "> 20")]),
    ]
    write_tables(tmp_path / "x.csv", tables)
    assert (tmp_path / "x.csv").read_text(encoding="utf-8").splitlines() == [
        "table,name,train loss,x",
        "one,a,1,",
        "one,b,2,",
        "two,c,,> 20",
    ]


def test_sizes_replace_those_of_a_study(capsys, tmp_path):
    sizes = {"subset": 7, "depths": [4], "num_epochs": 2, "methods": ["none"]}
    tasks = reproduce.study("figure2").tasks(Options(False, 0, "digits", sizes))
    assert [task.settings["network"] for task in tasks] == [
        "4 hidden layers, without BatchNorm",
        "4 hidden layers, with BatchNorm",
    ]
    assert all(task.settings["subset"] == 7 and task.settings["num_epochs"] == 2 for task in tasks)
    command = ["reproduce", "moons", "--out", str(tmp_path), "--epochs", "3"]
    assert main(command) == 1
    assert "moons does not take --epochs" in capsys.readouterr().err
    command = ["reproduce", "figure3", "--dataset", "digits", "--methods", "none,best"]
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert "no method 'best'; there are 'none', '10 sweeps'" in capsys.readouterr().err


def test_networks_are_chosen_by_name(capsys, tmp_path):
    sizes = {"networks": ["CNN", "ResNet"], "num_seeds": 2, "num_epochs": 3}
    tasks = reproduce.study("quantize").tasks(Options(False, 5, "digits", sizes))
    assert [(task.settings["network"], task.settings["seed"]) for task in tasks] == [
        ("CNN", 5),
        ("ResNet", 5),
        ("CNN", 6),
        ("ResNet", 6),
    ]
    assert {task.settings["num_epochs"] for task in tasks} == {3}
    command = ["reproduce", "quantize", "--networks", "VGG", "--out", str(tmp_path)]
    assert main(command) == 1
    assert "no network 'VGG'; there are 'MobileNetV2-like'" in capsys.readouterr().err


def test_the_command_names_what_there_is(capsys, tmp_path):
    assert main(["reproduce", "list"]) == 0
    assert set(reproduce.STUDIES) <= set(capsys.readouterr().out.split())
    assert main(["reproduce", "figure6"]) == 1
    assert "no study 'figure6'; there are figure1, figure2" in capsys.readouterr().err
    assert main(["reproduce", "figure2", "--dataset", "moons"]) == 1
    assert "figure2 has no data set 'moons'; there are cifar10" in capsys.readouterr().err
    assert main(["reproduce", "figure2", "--data-dir", str(tmp_path), "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    for part in ("data_batch_1", "curl", "--data-dir", "--dataset"):
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", reproduce.STUDIES)
@pytest.mark.parametrize("quick", [True, False])
def test_every_grid_can_be_stored(name, quick):
    module = reproduce.study(name)
    assert module.SUMMARY
    for dataset in module.DATASETS or ("",):
        tasks = module.tasks(Options(quick, 0, dataset))
        assert len({Store(pathlib.Path()).path(task) for task in tasks}) == len(tasks) > 0
        assert module.tasks(Options(quick, 1, dataset))[0].settings != tasks[0].settings or (
            name == "figure1"
        )


@pytest.mark.slow
def test_a_result_is_repeatable():
    data = sources.load("moons")
    task = methods.problem(models.MLP((4, 3), num_outputs=2), data, num_epochs=2, batch_size=100)
    options = {"num_seeds": 2, "learning_rate": 0.1, "threshold": 0.99}
    one, two = (methods.run_methods(task, ["none", "1 sweep"], seed=3, **options) for _ in "ab")
    assert plain(one) == plain(two)
    assert one["none"]["train_loss"].shape == (2, 2)


def test_largest_stable_learning_rate():
    losses = np.array([[0.5, 0.5, 2.0], [0.4, np.nan, 0.1], [0.3, 0.1, 0.1]])
    stable = methods.largest_stable([0.1, 1.0, 10.0], losses, np.ones(3))
    np.testing.assert_array_equal(stable, [10.0, 0.1, 0.0])


def test_intervals():
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert np.isnan(mean_interval([1.0])[1])
    assert mean_interval([1.0, np.inf])[0] == np.inf


def test_verdicts_need_a_clear_difference():
    def values(losses):
        empty = {"test_accuracy": np.ones((2, 5)), "epochs_to": np.ones((2, 5))}
        return {"train_loss": [[np.inf] * 5, losses], "largest_stable": np.ones(5), **empty}

    names = ["none", "better", "worse", "noisy"]
    results = {
        "standard: none": values([1.0, 1.1, 0.9, 1.0, 1.2]),
        "standard: better": values([0.1, 0.11, 0.091, 0.1, 0.12]),
        "standard: worse": values([10.0, 11.0, 9.2, 10.0, 12.0]),
        "standard: noisy": values([0.1, 9.0, 0.2, 10.0, 0.3]),
    }
    settings = {"methods": names, "learning_rates": [0.1, 1.0], "num_seeds": 5, "problem": "p"}
    words = helps.verdicts([Result("p", settings, results)])
    assert words == {"better": {"p": "helps"}, "worse": {"p": "hurts"}, "noisy": {"p": "same"}}


def test_reconstruction_goal():
    targets = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], np.float32)
    goal = training.RECONSTRUCTION
    assert goal.loss(targets, targets) == 0
    assert goal.score(targets, targets) == 1
    assert goal.score(np.broadcast_to(targets.mean(0), targets.shape), targets) == pytest.approx(0)
    assert np.isnan(goal.score(targets * np.nan, targets))
