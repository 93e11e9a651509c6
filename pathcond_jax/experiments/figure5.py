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
    mean_interval,
    with_interval,
)

SUMMARY = "autoencoders of growing compression (MNIST or digits)"
DATASETS = ("mnist", "digits", "none")

# Hidden widths by compression factor sqrt(inputs / bottleneck).
WIDTHS = {
    "mnist": {1: [784] * 3, 2: [392, 196, 392], 4: [196, 49, 196], 7: [112, 16, 112]},
    "digits": {1: [64] * 3, 2: [32, 16, 32], 4: [16, 4, 16], 8: [8, 1, 8]},
}
LEARNING_RATES = {"mnist": (1e-3, 1e-2, 1e-1), "digits": (1e-2, 1e-1, 1.0), "none": ()}
NAMES = (methods.NONE, methods.TEN_SWEEPS, methods.OPTIMUM)


def tasks(options: Options) -> list[Task]:
    """The sizes of the log-scales by compression, then training by compression and rate."""
    widths = list(WIDTHS.get(options.dataset, WIDTHS["mnist"]).items())
    rates = LEARNING_RATES[options.dataset]
    seeds, epochs = 3, 500
    if options.quick:
        widths, rates, seeds, epochs = widths[:3:2], rates[1:2], 2, 10
    sizes = [
        Task(
            f"compression {factor}, initialization",
            {"kind": "initialization", "factor": factor, "widths": hidden}
            | {"inputs": 64 if options.dataset == "digits" else 784}
            | {"num_seeds": seeds, "seed": options.seed},
        )
        for factor, hidden in widths
    ]
    trained = [
        Task(
            f"compression {factor}, learning rate {rate:g}",
            {"kind": "training", "factor": factor, "widths": hidden, "learning_rate": rate}
            | {"dataset": options.dataset, "num_epochs": epochs, "batch_size": 128}
            | {"num_seeds": seeds, "methods": list(NAMES[: 2 if options.quick else 3])}
            | {"seed": options.seed},
        )
        for factor, hidden in widths
        for rate in rates
    ]
    return [*sizes, *trained]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Conditions fresh networks, or trains."""
    if settings["kind"] == "initialization":
        return log_scale_sizes(settings)
    data = as_autoencoding(sources.load(settings["dataset"], context.data_dir))
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
        tables.append(
            Table(
                f"Figure 5 on {settings['dataset']}: final training loss, "
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
        panel.set(xlabel="compression factor", yscale="log", title=f"learning rate {rate:g}")
        panel.set(xticks=[r.settings["factor"] for r in chosen])
    if others:
        others[0].set_ylabel("final training loss")
        drawing.legend_below(figure, others[0])
    return figure


def _final(result: Result, name: str) -> np.ndarray:
    return np.asarray(result.values[name]["train_loss"])[:, -1]
