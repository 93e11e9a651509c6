"""Figure 5 of the paper: autoencoders of growing compression.

How far conditioning moves them at initialization needs no data (``--dataset none``); how they
train does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from pathcond_jax.experiments import drawing, methods, models, sources, training
from pathcond_jax.experiments.data import Dataset
from pathcond_jax.experiments.study import (
    Context,
    Options,
    Report,
    Result,
    Table,
    Task,
    chosen_methods,
    mean_interval,
    with_interval,
)

SUMMARY = "autoencoders of growing compression (MNIST, Fashion-MNIST or digits)"
DATASETS = ("mnist", "fashion_mnist", "digits", "none")

NAMES = (methods.NONE, methods.TEN_SWEEPS, methods.OPTIMUM)
# Hidden widths by compression factor sqrt(inputs / bottleneck).
LARGE = {1: [784] * 3, 2: [392, 196, 392], 4: [196, 49, 196], 7: [112, 16, 112]}
SMALL = {1: [64] * 3, 2: [32, 16, 32], 4: [16, 4, 16], 8: [8, 1, 8]}
PAPER = {"learning_rates": [1e-3, 1e-2, 1e-1], "num_epochs": 500, "batch_size": 128}
SIZES: dict[str, dict[str, Any]] = {
    "mnist": {"widths": LARGE, **PAPER},
    "fashion_mnist": {"widths": LARGE, **PAPER, "num_epochs": 10, "batch_size": 32}
    | {"subset": 1000, "methods": list(NAMES[:2])},
    "digits": {"widths": SMALL, **PAPER, "learning_rates": [1e-2, 1e-1, 1.0]},
    "none": {"widths": LARGE, **PAPER, "learning_rates": []},
}


def tasks(options: Options) -> list[Task]:
    """The sizes of the log-scales by compression, then training by compression and rate."""
    sizes: dict[str, Any] = {"subset": None, "num_seeds": 3, "seed": options.seed}
    sizes |= {"methods": list(NAMES)}
    sizes |= SIZES[options.dataset]
    if options.quick:
        sizes |= {"num_seeds": 2, "num_epochs": 10, "methods": list(NAMES[:2])}
        sizes |= {"widths": dict(list(sizes["widths"].items())[:3:2])}
        sizes |= {"learning_rates": sizes["learning_rates"][1:2]}
    sizes |= options.sizes
    chosen_methods(sizes["methods"], methods.METHODS)
    widths, rates = (sizes.pop(key) for key in ("widths", "learning_rates"))
    at_start = {"kind": "initialization", "inputs": 64 if options.dataset == "digits" else 784}
    trained = {"kind": "training", "dataset": options.dataset, **sizes}
    return [
        *(
            Task(
                f"compression {factor}, initialization",
                {**at_start, "factor": factor, "widths": hidden}
                | {key: sizes[key] for key in ("num_seeds", "seed")},
            )
            for factor, hidden in widths.items()
        ),
        *(
            Task(
                f"compression {factor}, learning rate {rate:g}",
                {**trained, "factor": factor, "widths": hidden, "learning_rate": rate},
            )
            for factor, hidden in widths.items()
            for rate in rates
        ),
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Conditions fresh networks, or trains."""
    if settings["kind"] == "initialization":
        return log_scale_sizes(settings)
    data = as_autoencoding(
        sources.load(settings["dataset"], context.data_dir, subset=settings["subset"])
    )
    model = models.AuthorsMLP(tuple(settings["widths"]), num_outputs=data.train_labels.shape[1])
    task = methods.problem(
        model,
        data,
        num_epochs=settings["num_epochs"],
        batch_size=settings["batch_size"],
        goal=training.RECONSTRUCTION,
    )
    return methods.run_methods(
        task,
        settings["methods"],
        num_seeds=settings["num_seeds"],
        seed=settings["seed"],
        learning_rate=settings["learning_rate"],
        threshold=0.5,
        advance=context.advance,
    )


def log_scale_sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """The largest and the mean |log λ| after 10 sweeps, by seed."""
    size = settings["inputs"]
    model = models.AuthorsMLP(tuple(settings["widths"]), num_outputs=size)
    nothing = np.zeros((1, size), np.float32)
    data = Dataset(nothing, nothing, nothing, nothing)
    task = methods.problem(model, data, num_epochs=0, batch_size=1)
    keys = jax.random.split(jax.random.key(settings["seed"]), settings["num_seeds"])
    params = jax.vmap(task.init_fn)(keys)
    return methods.prepare(params, methods.trace(task), methods.METHODS[methods.TEN_SWEEPS])[1]


def as_autoencoding(data: Dataset) -> Dataset:
    """The same inputs, flat, with themselves as labels."""
    train, test = (
        jnp.asarray(part).reshape(len(part), -1) for part in (data.train_inputs, data.test_inputs)
    )
    return Dataset(train, train, test, test)


def report(results: list[Result]) -> Report:
    """Log-scales by compression; final losses by compression, rate and method."""
    sizes = [r for r in results if r.settings["kind"] == "initialization"]
    trained = [r for r in results if r.settings["kind"] == "training"]
    tables = [
        Table(
            f"Figure 5: |log λ| after 10 sweeps, {sizes[0].settings['num_seeds']} seeds",
            ("compression", "hidden widths", "largest", "mean"),
            [
                (
                    str(r.settings["factor"]),
                    "-".join(map(str, r.settings["widths"])),
                    with_interval(r.values["largest"]),
                    with_interval(r.values["mean"]),
                )
                for r in sizes
            ],
        )
    ]
    if trained:
        settings = trained[0].settings
        images = f", {settings['subset']} images" if settings["subset"] else ""
        tables.append(
            Table(
                f"Figure 5 on {settings['dataset']}{images}: final training loss, "
                f"{settings['num_epochs']} epochs",
                ("compression", "rate", *settings["methods"]),
                [
                    (
                        str(r.settings["factor"]),
                        f"{r.settings['learning_rate']:g}",
                        *(with_interval(_final(r, name)) for name in settings["methods"]),
                    )
                    for r in trained
                ],
            )
        )
    return Report(tables, {"": plot(sizes, trained)})


def plot(sizes: list[Result], trained: list[Result]) -> Figure:
    """Largest |log λ| against compression; then final loss, a panel for each learning rate."""
    rates = sorted({r.settings["learning_rate"] for r in trained})
    figure, axes = drawing.panels(1, 1 + len(rates))
    first, *others = axes[0]
    factors = [r.settings["factor"] for r in sizes]
    middle, half = mean_interval([r.values["largest"] for r in sizes])
    first.errorbar(factors, middle, half, marker="o", color=drawing.COLORS[2], capsize=2)
    first.set(xlabel="compression factor", ylabel="largest |log λ| at initialization")
    first.set(xticks=factors, ylim=(0, None))
    for panel, rate in zip(others, rates, strict=True):
        chosen = [r for r in trained if r.settings["learning_rate"] == rate]
        for number, name in enumerate(chosen[0].settings["methods"]):
            middle, half = mean_interval([_final(r, name) for r in chosen])
            panel.errorbar(
                [r.settings["factor"] for r in chosen],
                middle,
                half,
                marker=drawing.MARKERS[number],
                color=drawing.COLORS[number],
                capsize=2,
                label=name,
            )
        panel.set(xlabel="compression factor", title=f"learning rate {rate:g}")
        drawing.loss_axis(panel)
        panel.set(xticks=[r.settings["factor"] for r in chosen])
    if others:
        others[0].set_ylabel("final training loss")
        drawing.legend_below(figure, others[0])
    return figure


def _final(result: Result, name: str) -> np.ndarray:
    return np.asarray(result.values[name]["train_loss"])[:, -1]
