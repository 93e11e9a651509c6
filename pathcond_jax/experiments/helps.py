"""Does conditioning help? Every method on small problems, at its own best learning rate.

``--dataset digits`` has five problems trained by plain SGD; ``--dataset fashion_mnist`` an MLP and
a CNN, each by SGD, SGD with momentum and Adam, also compared at the paper's learning rate.

Each method starts from the same initializations and sees the same batches. The optima do not
depend on the representative, so from the unbalanced starts only "none" and sweeps are run.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from scipy import stats

from pathcond_jax.experiments import drawing, methods, models, sources, training
from pathcond_jax.experiments.data import Dataset
from pathcond_jax.experiments.figure5 import as_autoencoding
from pathcond_jax.experiments.study import (
    Context,
    Options,
    Report,
    Result,
    Table,
    Task,
    chosen_methods,
    epochs_text,
    mean_interval,
)

SUMMARY = "whether conditioning helps, at every method's own best learning rate"
DATASETS = ("digits", "fashion_mnist")

SPREAD = 2.0
FROM_UNBALANCED = (methods.NONE, "1 sweep", "3 sweeps", methods.TEN_SWEEPS)
LEARNING_RATES: Sequence[float] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Learning rates of SGD, of SGD with momentum, and of Adam on images.
PAPER_RATE = 1e-3
# By how a marker is filled.
LEGEND = {"full": "each at its own best learning rate", "none": f"at learning rate {PAPER_RATE:g}"}
RATES: dict[str, Sequence[float]] = {
    "SGD": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "momentum": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "Adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
OPTIMIZERS: dict[str, training.MakeOptimizer] = {
    "SGD": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "Adam": optax.adam,
}


class Setup(NamedTuple):
    """A problem of the study.

    Attributes:
      make: the problem, for a data set and a number of epochs.
      dataset: its data.
      num_epochs: of the full study.
      threshold: of the training score.
      score: what the score is.
      optimizer: one of ``OPTIMIZERS``.
      learning_rates: to choose from.
    """

    make: Callable[[Dataset, int], methods.Problem]
    dataset: str
    num_epochs: int
    threshold: float
    score: str = "accuracy"
    optimizer: str = "SGD"
    learning_rates: Sequence[float] = LEARNING_RATES


def _mlp(widths: tuple[int, ...], data: Dataset, num_epochs: int) -> methods.Problem:
    model = models.MLP(widths)
    return methods.problem(model, data, num_epochs=num_epochs, batch_size=64)


def _moons_mlp(data: Dataset, num_epochs: int) -> methods.Problem:
    model = models.MLP((16, 32, 16), num_outputs=2)
    return methods.problem(model, data, num_epochs=num_epochs, batch_size=70)


def _autoencoder(data: Dataset, num_epochs: int) -> methods.Problem:
    return methods.problem(
        models.MLP((32, 8, 32), num_outputs=64),
        as_autoencoding(data),
        num_epochs=num_epochs,
        batch_size=32,
        goal=training.RECONSTRUCTION,
    )


def _cnn(channels: tuple[int, ...], data: Dataset, num_epochs: int) -> methods.Problem:
    model = models.CNN(channels, kernel_init=nn.initializers.he_normal())
    fast = model.clone(convolution=models.convolve_by_products)
    return methods.problem(model, data, num_epochs=num_epochs, batch_size=64, trained_model=fast)


def _on_images(make: Callable[[Dataset, int], methods.Problem], name: str) -> dict[str, Setup]:
    """A problem on Fashion-MNIST, with each optimizer."""
    return {
        f"{name}, {optimizer}": Setup(
            make,
            "fashion_mnist",
            10,
            0.9,
            optimizer=optimizer,
            learning_rates=RATES[optimizer],
        )
        for optimizer in OPTIMIZERS
    }


DIGITS = {
    "moons MLP 16-32-16": Setup(_moons_mlp, "moons", 40, 0.99),
    "digits MLP 64-64-64-64": Setup(functools.partial(_mlp, (64,) * 4), "digits", 20, 0.99),
    "digits MLP 96-12-96-12": Setup(functools.partial(_mlp, (96, 12, 96, 12)), "digits", 20, 0.99),
    "autoencoder 32-8-32": Setup(_autoencoder, "digits", 30, 0.6, "explained variance"),
    "CNN 8-16, He": Setup(functools.partial(_cnn, (8, 16)), "digits", 12, 0.99),
}
IMAGES = {
    **_on_images(functools.partial(_mlp, (64,) * 3), "MLP 64-64-64"),
    **_on_images(functools.partial(_cnn, (4, 8)), "CNN 4-8"),
}
SETUPS = {**DIGITS, **IMAGES}
GRIDS: dict[str, dict[str, Any]] = {
    "digits": {
        "problems": DIGITS,
        "num_seeds": 5,
        "methods": list(methods.METHODS),
        "from_unbalanced": FROM_UNBALANCED,
        "subset": None,
    },
    "fashion_mnist": {
        "problems": IMAGES,
        "num_seeds": 3,
        "methods": [methods.NONE, methods.TEN_SWEEPS, methods.OPTIMUM],
        "from_unbalanced": (),
        "subset": 1000,
    },
}


def tasks(options: Options) -> list[Task]:
    """A task for each problem; it runs all learning rates, methods and seeds."""
    sizes: dict[str, Any] = {"learning_rates": None, "num_epochs": None}
    sizes |= GRIDS[options.dataset]
    problems = dict(sizes.pop("problems"))
    if options.quick:
        problems = dict(list(problems.items())[:1])
        sizes |= {"learning_rates": [0.03, 0.3, 3.0], "num_seeds": 3}
        sizes |= {"methods": [methods.NONE, "1 sweep", "norm 0.3"]}
    sizes |= options.sizes
    chosen = chosen_methods(sizes["methods"], methods.METHODS)
    return [
        Task(
            name,
            {
                **sizes,
                "problem": name,
                "dataset": options.dataset,
                "learning_rates": list(sizes["learning_rates"] or setup.learning_rates),
                "num_epochs": sizes["num_epochs"]
                or setup.num_epochs // (2 if options.quick else 1),
                "from_unbalanced": [m for m in sizes["from_unbalanced"] if m in chosen],
                "spread": SPREAD,
                "threshold": setup.threshold,
                "seed": options.seed,
            },
        )
        for name, setup in problems.items()
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains everything on one problem."""
    setup = SETUPS[settings["problem"]]
    data = sources.load(setup.dataset, context.data_dir, subset=settings["subset"])
    task = setup.make(data, settings["num_epochs"])
    spec = methods.trace(task)
    keys = jax.random.split(jax.random.key(settings["seed"]), (3, settings["num_seeds"]))
    standard = jax.jit(jax.vmap(task.init_fn))(keys[0])
    rescaled = jax.jit(
        jax.vmap(lambda key, params: methods.unbalanced(key, params, spec, settings["spread"]))
    )(keys[1], standard)
    starts, sizes, again = {}, {}, {}
    for origin, params, names in (
        ("standard", standard, settings["methods"]),
        ("unbalanced", rescaled, settings["from_unbalanced"]),
    ):
        for name in names:
            method = methods.METHODS[name]
            label = f"{origin}: {name}"
            starts[label], sizes[label] = methods.prepare(params, spec, method)
            again[label] = method
    initial = _initial_losses(task, standard)
    rates = settings["learning_rates"]
    by_rate = [
        methods.compare(
            task,
            starts,
            spec,
            keys[2],
            rate,
            again=again,
            make_optimizer=OPTIMIZERS[setup.optimizer],
            advance=lambda part: context.advance(part / len(rates)),
        )
        for rate in rates
    ]
    return {
        label: _described([curves[label] for curves in by_rate], settings, initial)
        | {"log_scales": sizes[label]}
        for label in starts
    }


def _initial_losses(task: methods.Problem, params: Any) -> np.ndarray:
    """The training loss of each seed before any step, (seeds,)."""

    def loss(params: Any) -> jax.Array:
        outputs = training.predict(task.train_fn, params, task.data.train_inputs, task.batch_size)
        return task.goal.loss(outputs, task.data.train_labels)

    return np.asarray(jax.jit(jax.vmap(loss))(params))


def _described(
    by_rate: list[training.Curves], settings: dict[str, Any], initial: np.ndarray
) -> dict[str, Any]:
    """Arrays (rates, seeds) of one start, and its largest stable learning rate by seed."""
    reached = [
        training.epochs_to(curves.train_accuracy, settings["threshold"]) for curves in by_rate
    ]
    final = {
        name: np.stack([getattr(curves, name)[:, -1] for curves in by_rate])
        for name in training.Curves._fields
    }
    rates = settings["learning_rates"]
    stable = methods.largest_stable(rates, final["train_loss"], initial)
    return {"epochs_to": np.stack(reached), **final, "largest_stable": stable}


class Best(NamedTuple):
    """A start at its own best learning rate; arrays are by seed."""

    rate: float
    loss: np.ndarray
    score: np.ndarray
    epochs: np.ndarray


def best(values: dict[str, Any], rates: list[float]) -> Best:
    """Chooses the learning rate with the smallest geometric mean of the final training loss."""
    losses = np.asarray(values["train_loss"], float)
    # Far below any loss that matters, and above zero.
    logs = np.log(np.maximum(np.where(np.isfinite(losses), losses, np.inf), 1e-12))
    chosen = int(np.argmin(logs.mean(axis=1)))
    score, epochs = (np.asarray(values[k])[chosen] for k in ("test_accuracy", "epochs_to"))
    return Best(rates[chosen], losses[chosen], score, epochs)


def log_ratio(losses: np.ndarray, against: np.ndarray) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval of log10(loss / against), paired by seed."""
    floor = 1e-12
    ratios = np.log10(np.maximum(losses, floor)) - np.log10(np.maximum(against, floor))
    mean, half = mean_interval(ratios)
    return float(mean), float(half)


def at_rate(
    values: dict[str, Any], reference: dict[str, Any], rates: list[float], rate: float
) -> tuple[float, float] | None:
    """The log-ratio of the final losses of two starts at one learning rate; None if not run."""
    if rate not in rates:
        return None
    losses = (np.asarray(v["train_loss"], float)[rates.index(rate)] for v in (values, reference))
    return log_ratio(*losses)


def report(results: list[Result]) -> Report:
    """For each problem and start: own best rate, same rate, stability, and the verdicts."""
    tables = [_table(result) for result in results]
    return Report(tables, {"": plot(results)}, findings(results))


def _table(result: Result) -> Table:
    settings = result.settings
    rates = settings["learning_rates"]
    reference = best(result.values["standard: none"], rates)
    same = rates.index(reference.rate)
    rows = []
    for label, values in result.values.items():
        own = best(values, rates)
        mean, half = log_ratio(own.loss, reference.loss)
        at_same, _ = log_ratio(np.asarray(values["train_loss"])[same], reference.loss)
        paper = at_rate(values, result.values["standard: none"], rates, PAPER_RATE)
        stable = np.exp(np.mean(np.log(np.maximum(values["largest_stable"], 1e-6))))
        rows.append(
            (
                label.removeprefix("standard: ").replace("unbalanced: ", "unbal.: "),
                f"{own.rate:g}",
                f"{np.exp(np.mean(np.log(np.maximum(own.loss, 1e-12)))):.2g}",
                f"{mean:+.2f} ±{half:.2f}" if label != "standard: none" else "",
                f"{at_same:+.2f}",
                "" if paper is None else "{:+.2f} ±{:.2f}".format(*paper),
                epochs_text(float(np.median(own.epochs)), settings["num_epochs"]),
                f"{100 * np.mean(own.score):.1f}",
                f"{stable:.2g}",
            )
        )
    score = SETUPS[settings["problem"]].score
    title = (
        f"{settings['problem']}: {settings['num_epochs']} epochs, {settings['num_seeds']} seeds; "
        "at each start's own best learning rate"
    )
    heads = (
        "start",
        "best\nrate",
        "train\nloss",
        "log10 of\nratio",
        f"at rate\n{reference.rate:g}",
        f"at rate\n{PAPER_RATE:g}",
        f"epochs to\n{settings['threshold']:g}",
        "test %" if score == "accuracy" else "test %\nexplained",
        "stable\nup to",
    )
    return Table(title, heads, rows)


def verdicts(results: list[Result]) -> dict[str, dict[str, str]]:
    """For each method and problem: "helps", "hurts" or "same" as no rescaling, by final loss.

    The 95 % interval of the paired log-ratio, widened for the number of comparisons (Bonferroni).
    """
    table: dict[str, dict[str, str]] = {}
    for result in results:
        rates = result.settings["learning_rates"]
        names = [n for n in result.settings["methods"] if n != methods.NONE]
        reference = best(result.values["standard: none"], rates).loss
        count, total = result.settings["num_seeds"], len(names) * len(results)
        widened = stats.t.ppf(1 - 0.025 / total, count - 1) / stats.t.ppf(0.975, count - 1)
        for name in names:
            mean, half = log_ratio(best(result.values[f"standard: {name}"], rates).loss, reference)
            clear = abs(mean) > half * widened
            word = ("helps" if mean < 0 else "hurts") if clear else "same"
            table.setdefault(name, {})[result.settings["problem"]] = word
    return table


def overall(results: list[Result], label: str) -> tuple[tuple[float, float], float]:
    """A start against "standard: none" on all problems together.

    Returns:
      Mean and half-width of the 95 % interval of log10 of the ratio of the final losses, averaged
      over the problems for each seed; and the geometric mean of the ratio of the largest stable
      learning rates.
    """
    logs, stable = [], []
    for result in results:
        rates = result.settings["learning_rates"]
        own, reference = result.values[label], result.values["standard: none"]
        pair = (best(values, rates).loss for values in (own, reference))
        logs.append(np.subtract(*(np.log10(np.maximum(loss, 1e-12)) for loss in pair)))
        pair = (np.maximum(values["largest_stable"], 1e-6) for values in (own, reference))
        stable.append(np.log10(np.divide(*pair)).mean())
    mean, half = mean_interval(np.mean(logs, axis=0))
    return (float(mean), float(half)), float(10 ** np.mean(stable))


def findings(results: list[Result]) -> list[str]:
    """The verdicts as sentences, and what conditioning does to unbalanced starts."""
    sentences = []
    for name, words in verdicts(results).items():
        counts = [list(words.values()).count(word) for word in ("helps", "same", "hurts")]
        (mean, half), stable = overall(results, f"standard: {name}")
        sentences.append(
            f"{name}, from the standard start: lower final loss on {counts[0]}, no clear "
            f"difference on {counts[1]}, higher on {counts[2]} of {len(words)} problems; on "
            f"average 10^({mean:+.2f} ± {half:.2f}) times the loss, and stable up to {stable:.2g} "
            "times the learning rate."
        )
    for name in results[0].settings["from_unbalanced"]:
        (mean, half), stable = overall(results, f"unbalanced: {name}")
        sentences.append(
            f"{name}, from the unbalanced start: on average 10^({mean:+.2f} ± {half:.2f}) times "
            f"the final loss of the standard start, stable up to {stable:.2g} times its learning "
            "rate."
        )
    return sentences


def plot(results: list[Result]) -> Figure:
    """For each problem, the log-ratio of the final loss against no rescaling, by method.

    Filled: each at its own best learning rate. Hollow: both at the paper's.
    """
    most = max(len(result.values) for result in results)
    width, height = max(2.9, 6 / len(results)), 1.6 + 0.2 * most
    figure, axes = drawing.panels(1, len(results), width=width, height=height)
    for panel, result in zip(axes[0], results, strict=True):
        rates, none = result.settings["learning_rates"], result.values["standard: none"]
        labels = [label for label in result.values if label != "standard: none"]
        reference = best(none, rates).loss
        for place, label in enumerate(labels):
            origin = label.startswith("unbalanced")
            style = {"color": drawing.COLORS[1 if origin else 2], "marker": "s" if origin else "o"}
            values = result.values[label]
            found = [(0.0, "full", log_ratio(best(values, rates).loss, reference))]
            paper = at_rate(values, none, rates, PAPER_RATE)
            if paper is not None:
                found.append((0.3, "none", paper))
            for offset, fill, (mean, half) in found:
                if np.isfinite(mean):
                    panel.errorbar(
                        mean,
                        place + offset,
                        xerr=half,
                        fillstyle=fill,
                        capsize=2,
                        label=LEGEND[fill],
                        **style,
                    )
                else:
                    panel.text(0, place, "diverged", fontsize=8, va="center")
        panel.axvline(0, color="0.5", linewidth=0.8)
        panel.set_title(result.settings["problem"], fontsize=9)
        panel.set_xlabel("log10 (final loss /\nfinal loss without)")
        shown = [label.replace("standard: ", "") for label in labels]
        panel.set_yticks(range(len(labels)), shown if panel is axes[0, 0] else [])
        panel.set_ylim(len(labels) - 0.4, -0.6)
    drawing.legend_below(figure, axes[0])
    return figure
