"""Every study on its small grid; `make studies` runs them, and the figures stay to be looked at.

Programs are compiled as for all tests: the times in the figure of `timing` say nothing.
"""

import pathlib

import jax
import pytest
from rich.console import Console

from pathcond_jax.experiments import reproduce

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
    assert (OUT / f"{name}.csv").stat().st_size > 50
