"""Figure 2 of the paper: MLPs of growing depth, and the epochs they take to fit the data."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pathcond_jax import plotting
from pathcond_jax.experiments import drawing, methods, models, sources
from pathcond_jax.experiments.study import Context, Options, Report, Result, Table, Task

SUMMARY = "how many epochs deep MLPs take (CIFAR-10 or digits)"
DATASETS = ("cifar10", "digits")

DEPTHS = (2, 3, 4, 5, 6, 7, 8)
NAMES = (methods.NONE, methods.TEN_SWEEPS, methods.OPTIMUM, methods.ENORM)
THRESHOLD = 0.99
# The authors' for CIFAR-10: width 500, learning rate 1e-3, 60 epochs, batches of 128, 3 seeds.
GRID = {
    "cifar10": {"width": 500, "learning_rate": 1e-3, "num_epochs": 60, "batch_size": 128},
    "digits": {"width": 100, "learning_rate": 0.05, "num_epochs": 60, "batch_size": 32},
}


def tasks(options: Options) -> list[Task]:
    """A task for each depth."""
    settings = {
        **GRID[options.dataset],
        "dataset": options.dataset,
        "num_seeds": 3,
        "methods": list(NAMES),
        "seed": options.seed,
    }
    if options.quick:
        settings |= {"num_epochs": 8, "num_seeds": 2, "methods": list(NAMES[:2]), "width": 32}
    depths = (2, 4) if options.quick else DEPTHS
    return [Task(f"{depth} hidden layers", {"depth": depth, **settings}) for depth in depths]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains all methods and seeds of one depth."""
    data = sources.load(settings["dataset"], context.data_dir)
    model = models.AuthorsMLP((settings["width"],) * settings["depth"])
    task = methods.problem(
        model, data, num_epochs=settings["num_epochs"], batch_size=settings["batch_size"]
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
    """Epochs to the threshold by depth, and training curves of some depths."""
    names = list(results[0].values)
    rows = [
        (
            str(result.settings["depth"]),
            name,
            ", ".join(f"{epoch:g}" for epoch in values["epochs_to"]),
            f"{np.mean(np.asarray(values['train_loss'])[:, -1]):.3g}",
            f"{100 * np.mean(np.asarray(values['test_accuracy'])[:, -1]):.1f}",
            f"{np.max(values['log_scales']['largest']):.2f}",
        )
        for result in results
        for name, values in result.values.items()
    ]
    settings = results[0].settings
    title = (
        f"Figure 2 on {settings['dataset']}: width {settings['width']}, learning rate "
        f"{settings['learning_rate']:g}, {settings['num_epochs']} epochs"
    )
    heads = (
        "hidden\nlayers",
        "method",
        f"epochs to {THRESHOLD:.0%}\nby seed",
        "train\nloss",
        "test\n%",
        "largest\n|log λ|",
    )
    return Report([Table(title, heads, rows)], {"": plot(results, names)})


def plot(results: list[Result], names: list[str]) -> Figure:
    """Epochs by depth, then training curves at the smallest, middle and largest depth."""
    shown = [results[k] for k in sorted({0, len(results) // 2, len(results) - 1})]
    figure, axes = drawing.panels(1, 1 + len(shown))
    first, *curves = axes[0]
    limit = results[0].settings["num_epochs"]
    depths = [result.settings["depth"] for result in results]
    for number, name in enumerate(names):
        epochs = np.array([np.median(r.values[name]["epochs_to"]) for r in results])
        first.plot(
            np.asarray(depths) + 0.08 * (number - (len(names) - 1) / 2),
            np.where(np.isfinite(epochs), epochs, 1.1 * limit),
            color=drawing.COLORS[number],
            marker=drawing.MARKERS[number],
            label=name,
        )
    first.axhline(1.05 * limit, color="0.7", linewidth=0.8)
    first.text(depths[0], 1.12 * limit, "not reached", va="bottom", fontsize=8, color="0.35")
    first.set(xlabel="hidden layers", ylabel=f"epochs to {THRESHOLD:.0%} (median)")
    first.set(xticks=depths, ylim=(0, 1.25 * limit))
    for panel, result in zip(curves, shown, strict=True):
        losses = {name: np.asarray(result.values[name]["train_loss"]) for name in names}
        plotting.plot_training(losses, axes=panel)
        panel.set_title(f"{result.settings['depth']} hidden layers", fontsize=10)
    drawing.legend_below(figure, first)
    return figure
