"""Figure 3 of the paper: a fully convolutional network, without and with BatchNorm.

With BatchNorm the authors rescale the convolutions as if it were not there. That changes the
function that is trained; it is the method "authors" here. "optimum" rescales what leaves the
function alone: BatchNorm's own scale and shift against the next convolution.
"""

from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing, methods, models, sources
from pathcond_jax.experiments.data import Dataset
from pathcond_jax.experiments.study import Context, Options, Report, Result, Table, Task

SUMMARY = "a fully convolutional network, with and without BatchNorm (CIFAR-10 or digits)"
DATASETS = ("cifar10", "digits")

AUTHORS = "authors"
NAMES = (methods.NONE, methods.TEN_SWEEPS, methods.OPTIMUM)
# The authors' for CIFAR-10: full width, learning rate 1e-3, 128 epochs, batches of 128, 3 seeds.
GRID = {
    "cifar10": {"widths": [128, 256, 320], "learning_rate": 1e-3, "num_epochs": 128}
    | {"batch_size": 128},
    "digits": {"widths": [16, 32, 40], "learning_rate": 0.02, "num_epochs": 20}
    | {"batch_size": 32},
}
THRESHOLD = 0.99


def tasks(options: Options) -> list[Task]:
    """A task without and one with BatchNorm."""
    settings = {
        **GRID[options.dataset],
        "dataset": options.dataset,
        "num_seeds": 3,
        "seed": options.seed,
    }
    if options.quick:
        settings |= {"widths": [4, 6, 8], "num_epochs": 2, "num_seeds": 1}
    plain = NAMES[:2] if options.quick else NAMES
    normed = (methods.NONE, AUTHORS) if options.quick else (methods.NONE, AUTHORS, methods.OPTIMUM)
    return [
        Task("without BatchNorm", {"batch_norm": False, "methods": list(plain), **settings}),
        Task("with BatchNorm", {"batch_norm": True, "methods": list(normed), **settings}),
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains all methods and seeds, with or without BatchNorm."""
    data = sources.load(settings["dataset"], context.data_dir)
    task, plain = (
        problem(data, settings, batch_norm) for batch_norm in (settings["batch_norm"], False)
    )
    spec = methods.trace(task)
    init_keys, train_keys = jax.random.split(
        jax.random.key(settings["seed"]), (2, settings["num_seeds"])
    )
    params = jax.jit(jax.vmap(task.init_fn))(init_keys)
    starts, sizes = {}, {}
    for name in settings["methods"]:
        if name == AUTHORS:
            starts[name], sizes[name] = as_authors(params, methods.trace(plain))
        else:
            starts[name], sizes[name] = methods.prepare(params, spec, methods.METHODS[name])
    curves = methods.compare(
        task, starts, spec, train_keys, settings["learning_rate"], advance=context.advance
    )
    return {
        name: methods.described(curves[name], THRESHOLD) | {"log_scales": sizes[name]}
        for name in starts
    }


def problem(data: Dataset, settings: dict[str, Any], batch_norm: bool) -> methods.Problem:
    """The network on a data set, in training mode while it trains."""
    model = models.FullyConvolutional(tuple(settings["widths"]), batch_norm=batch_norm)
    task = methods.problem(
        model, data, num_epochs=settings["num_epochs"], batch_size=settings["batch_size"]
    )
    if not batch_norm:
        return task

    def train_apply(params: Any, inputs: jax.Array) -> tuple[jax.Array, Any]:
        outputs, updated = model.apply(params, inputs, train=True, mutable=["batch_stats"])
        return outputs, {**params, **updated}

    return task._replace(train_apply_fn=train_apply)


def as_authors(params: Any, plain: pathcond.ArchSpec) -> tuple[Any, dict[str, np.ndarray]]:
    """Ten sweeps on the convolutions alone, BatchNorm left out of account."""
    names = {leaf.path.split("/")[1] for leaf in plain.leaves}
    convolutions = {"params": {name: params["params"][name] for name in sorted(names)}}
    moved, sizes = methods.prepare(convolutions, plain, methods.METHODS[methods.TEN_SWEEPS])
    return {**params, "params": {**params["params"], **moved["params"]}}, sizes


def report(results: list[Result]) -> Report:
    """Final losses and accuracies; curves of training loss, training and test accuracy."""
    rows = []
    for result in results:
        for number, (name, values) in enumerate(result.values.items()):
            last = {
                key: np.mean(np.asarray(values[key])[:, -1])
                for key in ("train_loss", "train_accuracy", "test_accuracy")
            }
            rows.append(
                (
                    result.name if number == 0 else "",
                    name,
                    f"{last['train_loss']:.3g}",
                    f"{100 * last['train_accuracy']:.1f}",
                    f"{100 * last['test_accuracy']:.1f}",
                    f"{np.max(values['log_scales']['largest']):.2f}",
                )
            )
    settings = results[0].settings
    title = (
        f"Figure 3 on {settings['dataset']}: widths {'-'.join(map(str, settings['widths']))}, "
        f"learning rate {settings['learning_rate']:g}, {settings['num_epochs']} epochs, "
        f"{settings['num_seeds']} seeds"
    )
    heads = ("network", "method", "train\nloss", "train\n%", "test\n%", "largest\n|log λ|")
    return Report([Table(title, heads, rows)], {"": plot(results)})


def plot(results: list[Result]) -> Figure:
    """A row without and one with BatchNorm."""
    figure, axes = drawing.panels(len(results), 3)
    shown = (
        ("train_loss", "training loss", True),
        ("train_accuracy", "training accuracy", False),
        ("test_accuracy", "test accuracy", False),
    )
    # A method keeps its colour, though the rows do not share all methods.
    names = list(dict.fromkeys(name for result in results for name in result.values))
    for row, result in zip(axes, results, strict=True):
        for panel, (key, label, log) in zip(row, shown, strict=True):
            for number, name in enumerate(names):
                if name in result.values:
                    runs = np.asarray(result.values[name][key])
                    epochs = result.values[name]["epochs"]
                    style = {"color": drawing.COLORS[number]}
                    panel.plot(epochs, runs.T, linewidth=0.6, alpha=0.35, **style)
                    panel.plot(epochs, np.median(runs, axis=0), label=name, **style)
            panel.set(xlabel="epoch", ylabel=label, yscale="log" if log else "linear")
            panel.set_title(result.name, fontsize=10)
    drawing.legend_below(figure, axes[:, 0])
    return figure
