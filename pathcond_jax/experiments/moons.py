"""The authors' two-moons grid: small MLPs, full-batch gradient descent, five learning rates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pathcond_jax.experiments import drawing, methods, models, sources
from pathcond_jax.experiments.study import (
    Context,
    Options,
    Report,
    Result,
    Table,
    Task,
    epochs_text,
    with_interval,
)

SUMMARY = "small MLPs on two moons"
DATASETS = ("moons",)

WIDTHS: Sequence[list[int]] = (
    [8, 16, 8],
    [16, 32, 32, 16],
    [16, 32, 64, 32, 16],
    [32, 64, 128, 64, 32],
)
LEARNING_RATES: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NAMES: Sequence[str] = (methods.NONE, methods.TEN_SWEEPS, methods.OPTIMUM, methods.ENORM)
THRESHOLD = 0.99


def tasks(options: Options) -> list[Task]:
    """A task for each architecture and learning rate."""
    widths, rates, names, epochs, seeds = WIDTHS, LEARNING_RATES, NAMES, 10000, 10
    if options.quick:
        widths, rates, names, epochs, seeds = WIDTHS[:1], LEARNING_RATES[2:], NAMES[:2], 400, 3
    return [
        Task(
            f"{'-'.join(map(str, hidden))}, learning rate {rate:g}",
            {
                "widths": hidden,
                "learning_rate": rate,
                "num_epochs": epochs,
                "num_seeds": seeds,
                "methods": list(names),
                "seed": options.seed,
            },
        )
        for hidden in widths
        for rate in rates
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains all methods and seeds of one architecture at one learning rate."""
    data = sources.load("moons")
    model = models.AuthorsMLP(tuple(settings["widths"]), num_outputs=2)
    task = methods.problem(
        model, data, num_epochs=settings["num_epochs"], batch_size=len(data.train_labels)
    )
    return methods.run_methods(
        task,
        settings["methods"],
        num_seeds=settings["num_seeds"],
        seed=settings["seed"],
        learning_rate=settings["learning_rate"],
        threshold=THRESHOLD,
        advance=context.advance,
    )


def report(results: list[Result]) -> Report:
    """Final training loss and test accuracy of each method."""
    rows = []
    for result in results:
        for number, (name, values) in enumerate(result.values.items()):
            last = {key: np.asarray(values[key])[:, -1] for key in ("train_loss", "test_accuracy")}
            rows.append(
                (
                    _widths(result) if number == 0 else "",
                    f"{result.settings['learning_rate']:g}" if number == 0 else "",
                    name,
                    with_interval(last["train_loss"]),
                    with_interval(100 * last["test_accuracy"]),
                    epochs_text(np.median(values["epochs_to"]), result.settings["num_epochs"]),
                )
            )
    settings = results[0].settings
    heads = (
        "widths",
        "rate",
        "method",
        "train loss",
        "test %",
        f"epochs to\n{THRESHOLD:.0%} train",
    )
    title = f"Moons: {settings['num_epochs']} epochs, {settings['num_seeds']} seeds, mean ± 95 %"
    return Report([Table(title, heads, rows)], {"": plot(results)})


def plot(results: list[Result]) -> Figure:
    """A panel for each architecture: final training loss against the learning rate."""
    architectures = list(dict.fromkeys(_widths(result) for result in results))
    figure, axes = drawing.panels(1, len(architectures))
    for panel, widths in zip(axes[0], architectures, strict=True):
        chosen = [result for result in results if _widths(result) == widths]
        rates = [result.settings["learning_rate"] for result in chosen]
        for number, name in enumerate(chosen[0].values):
            losses = np.array([np.asarray(r.values[name]["train_loss"])[:, -1] for r in chosen])
            style = {"color": drawing.COLORS[number], "marker": drawing.MARKERS[number]}
            panel.plot(rates, np.median(losses, axis=1), label=name, **style)
            panel.plot(rates, losses, linestyle="", alpha=0.3, markersize=3, **style)
        panel.set(xscale="log", yscale="log", xlabel="learning rate", title=widths)
    axes[0, 0].set_ylabel("final training loss (median, seeds)")
    drawing.legend_below(figure, axes[0, 0])
    return figure


def _widths(result: Result) -> str:
    return "-".join(map(str, result.settings["widths"]))
