"""The demonstration: two networks on handwritten digits, from four starts of one function.

(a) the standard initialization, (b) an unlucky rescaling of it, (c) and (d) both conditioned. All
four compute the same function; they differ in how plain gradient descent moves them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import pathcond_jax as pathcond
from pathcond_jax import plotting
from pathcond_jax.experiments import data, models, training
from pathcond_jax.experiments.study import compiled_fast, run_once

PyTree = Any
STARTS = ("(a) standard", "(b) rescaled", "(c) conditioned (a)", "(d) conditioned (b)")
STANDARD, RESCALED, CONDITIONED, RESCALED_CONDITIONED = range(4)
THRESHOLD = 0.99
PICTURE = "pathcond_demo.png"


@dataclasses.dataclass(frozen=True)
class Study:
    """One network and how it is trained.

    Attributes:
      title: its name, for people.
      model: the Flax module.
      trained_model: a module with the same parameters and function that trains faster.
      learning_rates: of plain SGD.
      main_learning_rate: the one that the table and the curves show.
      num_seeds: how many initializations.
      num_epochs: passes over the training set.
      batch_size: examples per step.
      spread: log-scales of the unlucky rescaling are uniform between ± this.
    """

    title: str
    model: nn.Module
    trained_model: nn.Module
    learning_rates: Sequence[float] = (0.001, 0.01, 0.1, 0.3)
    main_learning_rate: float = 0.1
    num_seeds: int = 3
    num_epochs: int = 20
    batch_size: int = 32
    spread: float = 3.0


class Starts(NamedTuple):
    """The four starts of one seed.

    Attributes:
      params: parameters with a leading axis of length 4, in the order of ``STARTS``.
      log_scales: of the rescaling that made each: one array (4, group.size) per group.
      score_before: the conditioning score before that rescaling, (4,).
      score_after: and after it, (4,).
      steps: the solver's steps, (4,); 0 where it did not run.
    """

    params: PyTree
    log_scales: tuple[jax.Array, ...]
    score_before: jax.Array
    score_after: jax.Array
    steps: jax.Array


class Result(NamedTuple):
    """What a study measured, as numpy arrays.

    Attributes:
      study: the study.
      spec: the network's spec.
      starts: with a leading axis of length ``num_seeds``, parameters left out.
      output_change: largest change of an output relative to the largest output, (seeds, 4).
      start_difference: largest relative difference of a parameter between (c) and (d), (seeds,).
      curves: arrays (learning rates, seeds, 4, epochs).
    """

    study: Study
    spec: pathcond.ArchSpec
    starts: Starts
    output_change: np.ndarray
    start_difference: np.ndarray
    curves: training.Curves


def studies(quick: bool = False) -> tuple[Study, ...]:
    """The two networks of the demonstration; ``quick``: smaller ones, each trained once."""
    layers, channels = (3, (8, 16)) if quick else (6, (8, 16, 32))
    mlp, cnn = models.MLP(widths=(128,) * layers), models.CNN(channels=channels)
    both = (
        Study(f"MLP 64-128×{layers}-10", mlp, mlp),
        Study(
            f"CNN {'-'.join(map(str, channels))}",
            cnn,
            cnn.clone(convolution=models.convolve_by_products),
        ),
    )
    if not quick:
        return both
    return tuple(
        dataclasses.replace(study, num_seeds=1, num_epochs=15, learning_rates=(0.1,))
        for study in both
    )


def make_starts(params: PyTree, key: jax.Array, spec: pathcond.ArchSpec, spread: float) -> Starts:
    """The four starts from one initialization; works under ``jit`` and ``vmap``."""
    drawn = jax.random.uniform(key, (spec.num_neurons,), minval=-spread, maxval=spread)
    unlucky = tuple(jnp.split(drawn, np.cumsum([group.size for group in spec.groups])[:-1]))
    sources = _stack([params, pathcond.rescale(params, spec, unlucky)])
    # To the optimum, so that what (c) and (d) share does not depend on where they came from; one
    # after another, because a solver compiles faster than a batch of solvers.
    conditioned, solutions = jax.lax.map(lambda source: pathcond.condition(source, spec), sources)
    starts = jax.tree.map(lambda *parts: jnp.concatenate(parts), sources, conditioned)
    scores = jax.lax.map(lambda start: pathcond.conditioning_score(start, spec), starts)
    return Starts(
        starts,
        tuple(
            jnp.concatenate([jnp.zeros_like(z)[None], z[None], optimal])
            for z, optimal in zip(unlucky, solutions.log_scales, strict=True)
        ),
        scores[np.array([STANDARD, STANDARD, STANDARD, RESCALED])],
        scores,
        jnp.pad(solutions.num_steps, (2, 0)),
    )


def run_study(
    study: Study,
    dataset: data.Dataset,
    *,
    seed: int = 0,
    on_epochs: Callable[[int], None] = lambda _: None,
) -> Result:
    """Makes the starts of every seed, measures them and trains from them."""
    keys = jax.random.split(jax.random.key(seed), (3, study.num_seeds))
    example = jnp.asarray(dataset.train_inputs[:1])
    params = run_once(jax.vmap(lambda key: study.trained_model.init(key, example)), keys[0])
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
    spec = pathcond.trace_spec(study.model.apply, one, example)
    starts = run_once(
        lambda seeds: jax.lax.map(
            lambda seed: make_starts(seed[0], seed[1], spec, study.spread), seeds
        ),
        (params, keys[1]),
    )
    outputs = run_once(
        jax.vmap(jax.vmap(study.trained_model.apply, (0, None)), (0, None)),
        starts.params,
        dataset.train_inputs,
    )
    # Runs are (seed, start) pairs; the four starts of a seed see the same batches.
    runs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), starts.params)
    run_keys = jnp.repeat(keys[2], len(STARTS))
    curves = [
        training.train(
            study.trained_model.apply,
            optax.sgd,
            dataset,
            runs,
            run_keys,
            jnp.full(run_keys.shape, rate),
            num_epochs=study.num_epochs,
            batch_size=study.batch_size,
            on_epochs=on_epochs,
        )[1]
        for rate in study.learning_rates
    ]
    shape = (len(curves), study.num_seeds, len(STARTS), study.num_epochs)
    return Result(
        study,
        spec,
        jax.device_get(starts._replace(params=None)),
        _output_change(np.asarray(outputs)),
        _start_difference(jax.device_get(starts.params)),
        training.Curves(*(np.stack(part).reshape(shape) for part in zip(*curves, strict=True))),
    )


def describe(result: Result) -> str:
    """What was trained and how, in two lines."""
    study, spec = result.study, result.spec
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    return (
        f"{study.title}: {spec.num_neurons} neurons, {spec.num_parameters} parameters, "
        f"{_count(study.num_seeds, 'seed')}\n"
        f"{study.num_epochs} epochs of plain SGD, batches of {study.batch_size}, "
        f"learning rates {rates}"
    )


def main_table(result: Result) -> Table:
    """What each start is, and how it trains at the main learning rate."""
    heads = (
        "output\nchange",
        "conditioning\nscore",
        "largest\n|log λ|",
        f"epochs to\n{THRESHOLD:.0%}, by seed",
        "test\n%",
    )
    title = f"Learning rate {result.study.main_learning_rate:g}"
    main = _main(result)
    before, after = result.starts.score_before, result.starts.score_after
    rows = []
    for start in range(len(STARTS)):
        moved = start != STANDARD
        largest = max(np.abs(z[:, start]).max() for z in result.starts.log_scales)
        score = f"{before[:, start].mean():.2g} → " if moved else ""
        rows.append(
            (
                f"{result.output_change[:, start].max():.1e}" if moved else "",
                f"{score}{after[:, start].mean():.2g}",
                f"{largest:.2f}" if moved else "",
                _epoch_list(main.train_accuracy[:, start]),
                _mean_accuracy(main.test_accuracy[:, start, -1]),
            )
        )
    return _table(title, heads, rows)


def learning_rate_table(result: Result) -> Table:
    """How fast each start trains at every learning rate."""
    title = f"Epochs to {THRESHOLD:.0%} training accuracy, by learning rate and seed"
    heads = [f"{rate:g}" for rate in result.study.learning_rates]
    curves = result.curves.train_accuracy
    rows = [
        [_epoch_list(curves[rate, :, start]) for rate in range(len(heads))]
        for start in range(len(STARTS))
    ]
    return _table(title, heads, rows)


def findings(result: Result) -> list[str]:
    """What the numbers say, one sentence or two each."""
    study = result.study
    epochs = training.epochs_to(result.curves.train_accuracy, THRESHOLD)
    main = epochs[study.learning_rates.index(study.main_learning_rate)]
    a, b, c, d = main.T
    steps = result.starts.steps[:, CONDITIONED:]
    chance = _largest_gap(c, d)
    sentences = [
        f"The function is the same: no output moved by more than "
        f"{result.output_change.max():.1e} of the largest output.",
        f"(c) and (d) start from the same parameters: no entry differs by more than "
        f"{result.start_difference.max():.1e} of its size. "
        f"The solver took {steps.min()} to {steps.max()} steps.",
        f"Conditioning the standard start: {_compare(a, c, study.num_epochs, chance)}",
        f"Conditioning the rescaled start: {_compare(b, d, study.num_epochs, chance)}",
    ]
    if chance:
        sentences.insert(
            2,
            f"Chance: (c) and (d) differ by rounding alone and reach {THRESHOLD:.0%} up to "
            f"{_count(int(chance), 'epoch')} apart; a difference between starts that is not larger "
            "says nothing.",
        )
    if len(study.learning_rates) > 1:
        sentences.append(_best_rates(study, epochs))
    return [*sentences, _compare_accuracy(_main(result).test_accuracy[..., -1])]


def plot_demo(results: Sequence[Result]) -> Figure:
    """A row for each network: training curves, epochs by learning rate, log-scales."""
    figure = Figure(figsize=(11.0, 3.3 * len(results) + 0.8), layout="constrained")
    rows = figure.subplots(len(results), 3, squeeze=False)
    for result, (left, middle, right) in zip(results, rows, strict=True):
        study = result.study
        losses = _main(result).train_loss
        epochs = training.epochs_to(result.curves.train_accuracy, THRESHOLD)
        plotting.plot_training(
            {name: losses[:, start] for start, name in enumerate(STARTS)}, axes=left
        )
        plotting.plot_epochs(
            study.learning_rates,
            {name: np.median(epochs[..., start], axis=1) for start, name in enumerate(STARTS)},
            limit=study.num_epochs,
            ylabel=f"epochs to {THRESHOLD:.0%} training accuracy",
            axes=middle,
        )
        plotting.plot_log_scales(
            result.spec,
            {
                name: [z[:, start] for z in result.starts.log_scales]
                for start, name in enumerate(STARTS)
                if start != STANDARD
            },
            colors=plotting.PALETTE[1:],
            axes=right,
        )
        for axes, what in (
            (left, f"learning rate {study.main_learning_rate:g}"),
            (middle, f"median of {_count(study.num_seeds, 'seed')}"),
            (right, "rescalings applied"),
        ):
            axes.set_title(f"{study.title}: {what}", fontsize=10)
    change = max(result.output_change.max() for result in results)
    figure.suptitle(f"Four starts of one function: outputs differ by {change:.0e} of the largest")
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main(out: Path, quick: bool = False, console: Console | None = None) -> None:
    """Runs the demonstration: prints tables and findings, writes the picture to ``out``."""
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    dataset, chosen = data.load_digits(), studies(quick)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} epochs"),
        TimeElapsedColumn(),
    )
    with compiled_fast(quick), Progress(*columns, console=console) as progress:
        tasks = [
            progress.add_task(s.title, total=s.num_epochs * len(s.learning_rates)) for s in chosen
        ]
        stopped = Event()

        def run(study: Study, task: TaskID) -> Result:
            def advance(epochs: int) -> None:
                if stopped.is_set():
                    raise KeyboardInterrupt
                progress.advance(task, epochs)

            return run_study(study, dataset, on_epochs=advance)

        # At once, because a small network does not keep two cores busy.
        with ThreadPoolExecutor() as threads:
            try:
                results = list(threads.map(run, chosen, tasks))
            finally:
                stopped.set()
    for result in results:
        console.print()
        console.print(describe(result), highlight=False)
        console.print(main_table(result))
        if len(result.study.learning_rates) > 1:
            console.print(learning_rate_table(result))
        for sentence in findings(result):
            console.print(f"• {sentence}", highlight=False, markup=False)
    path = out / PICTURE
    plot_demo(results).savefig(path, dpi=100)
    console.print(f"\nWrote {path}", highlight=False, soft_wrap=True)


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _main(result: Result) -> training.Curves:
    """The curves at the main learning rate: arrays (seeds, 4, epochs)."""
    rate = result.study.learning_rates.index(result.study.main_learning_rate)
    return training.Curves(*(part[rate] for part in result.curves))


def _output_change(outputs: np.ndarray) -> np.ndarray:
    """From outputs (seeds, 4, examples, classes), the change against the standard start."""
    standard = outputs[:, :1]
    change = np.abs(outputs - standard).max(axis=(2, 3))
    return change / np.abs(standard).max(axis=(2, 3))


def _start_difference(params: PyTree) -> np.ndarray:
    """From leaves (seeds, 4, ...), the largest |d − c| / |c| over the entries with c ≠ 0."""

    def largest(leaf: np.ndarray) -> np.ndarray:
        flat = leaf.reshape(*leaf.shape[:2], -1)
        c, d = flat[:, CONDITIONED], flat[:, RESCALED_CONDITIONED]
        relative = np.divide(np.abs(d - c), np.abs(c), out=np.abs(d - c), where=c != 0)
        return relative.max(axis=1)

    return np.max([largest(leaf) for leaf in jax.tree.leaves(params)], axis=0)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with a row for each start."""
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("start", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, row in zip(STARTS, rows, strict=True):
        table.add_row(name, *row)
    return table


def _epoch_list(curves: np.ndarray) -> str:
    """Epochs to the threshold of some runs, accuracies (runs, epochs), as text."""
    words = []
    for curve, epoch in zip(curves, training.epochs_to(curves, THRESHOLD), strict=True):
        if np.isfinite(epoch):
            words.append(f"{epoch:.0f}")
        else:
            words.append("div." if np.isnan(curve[-1]) else f">{len(curve)}")
    if len(set(words)) > 1:
        return ", ".join(words)
    return "diverged" if words[0] == "div." else words[0]


def _mean_accuracy(accuracies: np.ndarray) -> str:
    return "–" if np.isnan(accuracies).any() else f"{100 * accuracies.mean():.1f}"


def _gain(worse: np.ndarray, better: np.ndarray) -> np.ndarray:
    """The difference of two arrays (seeds,); 0 where both are inf."""
    same = worse == better
    return np.where(same, 0, worse - np.where(same, 0, better))


def _largest_gap(one: np.ndarray, other: np.ndarray) -> float:
    """The largest finite difference of two arrays (seeds,)."""
    gap = np.abs(_gain(one, other))
    return float(gap[np.isfinite(gap)].max(initial=0))


def _verdict(gains: np.ndarray, chance: float) -> str:
    """Judges gains (seeds,): the seeds must agree, and the median exceed what chance explains."""
    one_sign = len(gains) > 1 and ((gains > 0).all() or (gains < 0).all())
    if not one_sign or np.abs(np.median(gains)) <= chance:
        return "no clear difference"
    return "it helped" if gains[0] > 0 else "it hurt"


def _compare(before: np.ndarray, after: np.ndarray, num_epochs: int, chance: float) -> str:
    """Compares two arrays (seeds,) of epochs to the threshold."""
    if np.isinf([before, after]).all():
        return f"neither reached {THRESHOLD:.0%} within {_count(num_epochs, 'epoch')}."
    gains = _gain(before, after)
    return (
        f"{_verdict(gains, chance)}. {THRESHOLD:.0%} was reached sooner with {(gains > 0).sum()} "
        f"and later with {(gains < 0).sum()} of {_count(len(gains), 'seed')}; median epochs "
        f"{_epochs(np.median(before))} → {_epochs(np.median(after))}."
    )


def _best_rates(study: Study, epochs: np.ndarray) -> str:
    """Names each start's best learning rate, from epochs (learning rates, seeds, 4)."""
    median = np.median(epochs, axis=1)
    best, fewest = median.argmin(axis=0), median.min(axis=0)
    parts = [
        f"{name[:3]} {_epochs(fewest[start])}"
        + (f" at {study.learning_rates[best[start]]:g}" if np.isfinite(fewest[start]) else "")
        for start, name in enumerate(STARTS)
    ]
    text = f"Median epochs, each start at its own best of these learning rates: {', '.join(parts)}."
    ratio = study.learning_rates[best[STANDARD]] / study.learning_rates[best[RESCALED]]
    if ratio != 1 and np.isfinite(fewest[[STANDARD, RESCALED]]).all():
        text += (
            f" So the rescaled start does train, with a learning rate "
            f"{max(ratio, 1 / ratio):g} times {'smaller' if ratio > 1 else 'larger'}: what "
            "conditioning repairs there is, in part, the step size."
        )
    return text


def _compare_accuracy(accuracies: np.ndarray) -> str:
    """Compares final test accuracies (seeds, 4) of (a) and (c)."""
    a, _, c, d = 100 * accuracies.T
    if np.isnan([a, c]).any():
        return "Test accuracy: (a) or (c) diverged with some seed, so there is no comparison."
    return (
        f"Test accuracy of the standard start: {a.mean():.1f} %, conditioned {c.mean():.1f} %; "
        f"{_verdict(c - a, _largest_gap(c, d))}."
    )


def _epochs(value: float) -> str:
    return f"{value:g}" if np.isfinite(value) else "never"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
