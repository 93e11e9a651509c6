"""Every study on its small grid; `make studies` runs them, and the figures stay to be looked at.

Programs are compiled as for all tests: the times in the figure of `timing` say nothing.
"""

import csv
import json
import pathlib

import jax
import pytest
from rich.console import Console

from pathcond_jax.experiments import reproduce
from pathcond_jax.experiments.store import AXES

OUT = pathlib.Path(__file__).parents[2] / "build" / "studies"


@pytest.mark.study
@pytest.mark.parametrize("name", reproduce.STUDIES)
def test_quick(name):
    dataset = "digits" if "digits" in reproduce.study(name).DATASETS else None
    console = Console(quiet=True)
    # As in the user's process: optax's Adam relies on the promotion that the tests forbid.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        report = reproduce.main(
            name, out=OUT, quick=True, dataset=dataset, fresh=True, console=console
        )
    assert report.tables
    assert all(table.rows for table in report.tables)
    assert report.figures
    for suffix in report.figures:
        stem = f"{name}_{suffix}" if suffix else name
        assert (OUT / f"{stem}.png").stat().st_size > 10_000
        assert (OUT / f"{stem}.pdf").stat().st_size > 5_000
    with (OUT / f"{name}.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == sum(len(table.rows) for table in report.tables)
    with (OUT / f"{name}_runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # Every number of every run is in some row.
    written = sum(_numbers(json.loads(path.read_text("utf-8"))["values"]) for path in _stored(name))
    settings = _settings(name)
    assert sum(map(_values, rows, [settings] * len(rows))) >= written > 0


def _stored(name):
    return (OUT / name).glob("*.json")


def _settings(name):
    return {k for path in _stored(name) for k in json.loads(path.read_text("utf-8"))["settings"]}


def _values(row, settings):
    """How many cells of a row hold values; settings are in the rows of whole runs."""
    others = {"run", "part", *AXES} | (set() if row.get("part") or row.get("i") else settings)
    return sum(bool(cell) for name, cell in row.items() if name not in others)


def _numbers(value):
    """How many numbers there are in nested dictionaries and lists."""
    if isinstance(value, dict):
        return sum(map(_numbers, value.values()))
    if isinstance(value, list):
        return sum(map(_numbers, value))
    return int(isinstance(value, (int, float)))
