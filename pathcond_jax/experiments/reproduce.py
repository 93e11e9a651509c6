"""``pathcond reproduce``: the studies by name, and what runs them.

To add a study, write a module as ``study.py`` describes and list it in ``STUDIES``.
"""

import dataclasses
import functools
import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from pathcond_jax.experiments import own, sources
from pathcond_jax.experiments.sizes import OWN, OWN_SIZES, TAKEN, flag
from pathcond_jax.experiments.store import Store, write_runs, write_tables
from pathcond_jax.experiments.study import (
    Context,
    Options,
    Report,
    Result,
    Study,
    Table,
    Task,
    UsageError,
    compiled_fast,
)

# A name is also the module's name in this package; the line says what it shows.
STUDIES = {
    "figure1": "one neuron, three starts: losses and trajectories",
    "figure2": "how many epochs deep MLPs take, by learning rate (CIFAR-10, Fashion-MNIST, digits)",
    "figure3": "a fully convolutional network, with and without BatchNorm (the same data)",
    "figure4": "unequal widths and the size of the log-scales",
    "figure5": "autoencoders of growing compression (MNIST, Fashion-MNIST or digits)",
    "moons": "small MLPs on two moons",
    "timing": "what conditioning costs",
    "helps": "whether conditioning helps, at every method's own best learning rate",
    "conservation": "what rescaling chooses and training keeps, neuron by neuron",
    "alignment": "a small initialization that never fits three points",
    "condensation": "tanh neurons that gather on one line, as predicted",
    "triangle": "networks with exponentially many linear pieces learn x³",
    "prune": "what pruning by magnitude and by path norm keeps (digits or Fashion-MNIST)",
    "quantize": "what rounding to 8 to 2 bits costs at each representative (digits, Fashion-MNIST)",
    "finetuning": "the penalty that gradient descent minimizes after pretraining",
}
MEASURE_TIME = ("timing",)


def study(name: str) -> Study:
    """The module of a study.

    Raises:
      UsageError: there is no such study.
    """
    if name not in STUDIES:
        raise UsageError(f"no study {name!r}; there are {', '.join(STUDIES)}")
    module: Study = importlib.import_module(f"{__package__}.{name}")
    return module


def main(
    name: str,
    *,
    out: Path,
    quick: bool = False,
    seed: int = 0,
    dataset: str | None = None,
    data_dir: Path | None = None,
    sizes: Mapping[str, Any] | None = None,
    fresh: bool = False,
    console: Console | None = None,
) -> Report:
    """Runs what is not finished yet of a study, then prints and writes its report.

    Args:
      name: a name in ``STUDIES``.
      out: where the results, the figures, ``<name>.csv`` with the tables and ``<name>_runs.csv``
        with every number of every run go.
      quick: the small grid.
      seed: of everything random.
      dataset: one of the study's data sets; None: the paper's.
      data_dir: where downloaded data sets lie.
      sizes: what to use instead of the study's own, by the names in ``sizes.TAKEN``; a network of
        the user's is measured again each time.
      fresh: do not use stored results.
      console: where to print.

    Returns:
      The report.

    Raises:
      UsageError: the study or data set does not exist, or the study has no such size.
      DataError: a file of the data set is missing or damaged.
      UserError: the user's network or examples cannot be used.
    """
    console = console or Console()
    module = study(name)
    asked = _sizes(name, sizes or {})
    theirs = _own(asked, dataset)
    known = "" if theirs is not None else _dataset(name, module, dataset)
    options = Options(quick, seed, known, asked)
    if options.dataset in sources.LOADERS:
        # A missing file is better reported now than after an hour of other tasks.
        sources.load(options.dataset, data_dir)
    store = Store(out / name)
    with compiled_fast(quick and name not in MEASURE_TIME):
        context = Context(data_dir, theirs)
        again = fresh or theirs is not None
        results = _run_all(module, module.tasks(options), store, context, again, console)
    report = module.report(results)
    for table in report.tables:
        console.print()
        console.print(as_rich(table))
    for sentence in report.findings:
        console.print(f"• {sentence}", highlight=False, markup=False)
    console.print()
    for path in _write(name, report, results, out):
        console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    console.print(f"Results of each run: {store.folder}", highlight=False, soft_wrap=True)
    return report


def as_rich(table: Table) -> RichTable:
    """The table as rich prints it."""
    drawn = RichTable(
        title=table.title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, head in enumerate(table.heads):
        drawn.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


def _dataset(name: str, module: Study, asked: str | None) -> str:
    if asked is None:
        return module.DATASETS[0] if module.DATASETS else ""
    if asked not in module.DATASETS:
        known = ", ".join(module.DATASETS) or "none: it needs no data"
        raise UsageError(f"{name} has no data set {asked!r}; there are {known}")
    return asked


def _sizes(name: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    known = TAKEN.get(name, ())
    for size in asked:
        if size not in known:
            options = ", ".join(map(flag, known)) or "none of these options"
            raise UsageError(f"{name} does not take {flag(size)}; it takes {options}")
    return asked


def _own(asked: Mapping[str, Any], dataset: str | None) -> own.Own | None:
    """The user's network, if there is one."""
    given = [name for name in OWN if name in asked]
    if not given:
        return None
    for name in ("weights", "inputs"):
        if name not in asked:
            raise UsageError(f"{flag(given[0])} needs {flag(name)}, {OWN[name].meaning}")
    others = [flag(name) for name in asked if name not in (*OWN, *OWN_SIZES)]
    others += ["--dataset"] if dataset is not None else []
    if others:
        raise UsageError(f"--weights is trained already, {', '.join(others)} would mean nothing")
    checkpoint = Path(asked["checkpoint"]) if "checkpoint" in asked else None
    return own.load(asked["weights"], Path(asked["inputs"]), checkpoint, asked.get("subset"))


def _run_all(
    module: Study,
    tasks: Sequence[Task],
    store: Store,
    context: Context,
    fresh: bool,
    console: Console,
) -> list[Result]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    results = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(tasks))
        for number, task in enumerate(tasks):
            progress.update(bar, description=f"{task.name} ({number + 1}/{len(tasks)})")
            result = None if fresh else store.load(task)
            if result is None:
                advance = functools.partial(progress.advance, bar)
                start = time.perf_counter()
                values = module.run(task.settings, dataclasses.replace(context, advance=advance))
                result = store.save(task, values, time.perf_counter() - start)
            results.append(result)
            progress.update(bar, completed=number + 1)
        progress.update(bar, description="finished")
    return results


def _write(name: str, report: Report, results: Sequence[Result], out: Path) -> list[Path]:
    paths = [out / f"{name}.csv", out / f"{name}_runs.csv"]
    write_tables(paths[0], report.tables)
    write_runs(paths[1], results)
    for suffix, figure in report.figures.items():
        stem = f"{name}_{suffix}" if suffix else name
        for kind in ("png", "pdf"):
            path = out / f"{stem}.{kind}"
            figure.savefig(path, dpi=150)
            paths.append(path)
    return paths
