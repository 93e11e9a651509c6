"""What a study is: a grid of tasks, each finished on its own, and a report on all of them.

A study is a module of this package with these names; ``reproduce.STUDIES`` lists it.

    SUMMARY = "one line for the command's help"
    DATASETS = ("cifar10", "digits")    # the paper's first; () where no data is needed

    def tasks(options: Options) -> list[Task]
    def run(settings: dict, context: Context) -> dict
    def report(results: list[Result]) -> Report

``tasks`` is the grid. A task's settings hold *everything* that its result depends on (sizes,
learning rate, seed, data set, ...) as JSON: a finished result is found again by its settings.
``run`` does one task and returns numbers, strings, and lists, dicts or numpy arrays of them.
``report`` sees the finished results in the order of the tasks, arrays as nested lists.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from matplotlib.figure import Figure

from pathcond_jax.experiments.own import Own


class UsageError(ValueError):
    """There is no such study, or it has no such data set, option or method."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
      quick: a small grid that takes less than a minute on two cores.
      seed: of everything random.
      dataset: one of the study's ``DATASETS``; "" if it has none.
      sizes: what to use instead of the study's own sizes, by the names of its settings.
    """

    quick: bool = False
    seed: int = 0
    dataset: str = ""
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Task(NamedTuple):
    """One run of a study: a name for people, and the settings that determine its result."""

    name: str
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a run needs beside its settings.

    Attributes:
      data_dir: where downloaded data sets lie.
      own: the user's network and examples, where the study is of these.
      advance: call it with the fraction of the task just done, for the progress bar.
    """

    data_dir: Path | None = None
    own: Own | None = None
    advance: Callable[[float], None] = lambda _: None


class Result(NamedTuple):
    """A finished task; ``values`` is what ``run`` returned, as read back from JSON."""

    name: str
    settings: dict[str, Any]
    values: dict[str, Any]


class Table(NamedTuple):
    """A table of text; the first column is aligned left, the others right."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


class Report(NamedTuple):
    """What a study found.

    Attributes:
      tables: to print.
      figures: suffix of the file name ("" for the only one) to figure.
      findings: sentences to print below the tables.
    """

    tables: Sequence[Table]
    figures: Mapping[str, Figure]
    findings: Sequence[str] = ()


class Study(Protocol):
    """A module that is a study."""

    SUMMARY: str
    DATASETS: tuple[str, ...]

    def tasks(self, options: Options) -> list[Task]:
        """The grid."""

    def run(self, settings: dict[str, Any], context: Context) -> dict[str, Any]:
        """Does one task."""

    def report(self, results: list[Result]) -> Report:
        """Tables, figures and sentences."""


def chosen_methods(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """The names, if all are known.

    Raises:
      UsageError: one is not.
    """
    return _chosen("method", names, known)


def chosen_networks(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """The same of networks."""
    return _chosen("network", names, known)


def _chosen(kind: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    known = list(known)
    for name in names:
        if name not in known:
            raise UsageError(f"no {kind} {name!r}; there are {', '.join(map(repr, known))}")
    return list(names)


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Runs its body with float64 enabled."""
    # jax.enable_x64 is newer than the oldest supported JAX; the option is in all of them.
    before = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@contextlib.contextmanager
def compiled_fast(wanted: bool) -> Iterator[None]:
    """Small grids take longer to compile than to run, so XLA leaves out most optimizations."""
    option = "jax_disable_most_optimizations"
    before = jax.config.values[option]
    jax.config.update(option, before or wanted)
    try:
        yield
    finally:
        jax.config.update(option, before)


# Kernels made without the fusion emitters; versions of XLA that have no other kind lack the option.
_HASTE: dict[str, str | bool] = {"xla_cpu_use_fusion_emitters": False}


def run_once(function: Callable[..., Any], *args: Any) -> Any:
    """Compiles a function in haste and calls it: for what takes longer to compile than to run."""
    lowered = jax.jit(function).lower(*args)
    try:
        compiled = lowered.compile(_HASTE)
    except jax.errors.JaxRuntimeError:
        compiled = lowered.compile()
    return compiled(*args)


def mean_interval(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the last axis and the half-width of its 95 % confidence interval.

    Student's t; nan half-widths for a single value.
    """
    from scipy import stats

    values = np.asarray(values, float)
    count = values.shape[-1]
    mean = values.mean(axis=-1)
    if count < 2:
        return mean, np.full_like(mean, np.nan)
    # Diverged runs are infinite: their interval is undefined, and that is no error.
    with np.errstate(invalid="ignore"):
        error = values.std(axis=-1, ddof=1) / np.sqrt(count)
    return mean, stats.t.ppf(0.975, count - 1) * error


def with_interval(values: Any, digits: int = 3) -> str:
    """Mean and 95 % confidence interval as text, ``"1.23 ± 0.04"``."""
    mean, half = (float(part) for part in mean_interval(values))
    return f"{mean:.{digits}g}" + (f" ± {half:.2g}" if np.isfinite(half) else "")


def epochs_text(epochs: float, limit: int) -> str:
    """A number of epochs, ``"> 20"`` where the limit of 20 came first."""
    return f"{epochs:g}" if np.isfinite(epochs) else f"> {limit}"
