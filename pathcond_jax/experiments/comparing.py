"""Ways to train compared at every learning rate: numbers, tables, sentences and the figure.

A result is that of ``published.run``; its settings name the network (``network``), the way
(``method``), ``learning_rates``, ``num_epochs`` and ``threshold``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from pathcond_jax.experiments import drawing, published, training
from pathcond_jax.experiments.study import Report, Result, Table, epochs_text, mean_interval

# From a result, that without conditioning, and the number of a learning rate.
Cell = Callable[[Result, Result | None, int], str]
Ways = Mapping[str, Result]
# By network, then by way.
Grid = Mapping[str, Ways]
# Of the training accuracy; what the settings say is the second one.
FIRST_THRESHOLD = 0.9
# For the figure, where nothing reaches those.
LOWER_THRESHOLDS = (0.2, 0.3, 0.5, 0.7)


class Factor(NamedTuple):
    """A geometric mean over seeds and the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite(self.mean):
            return "–"
        mean, low, high = (f"{x:.2f}" if x < 10 else f"{x:.3g}" for x in self)
        return f"{mean} ({low}–{high})" if np.isfinite(self.low) else mean


def factor(ratios: np.ndarray) -> Factor:
    """The mean of positive ratios (seeds,); nan where one is not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, half = mean_interval(np.log(np.asarray(ratios, float)))
        return Factor(*(float(np.exp(x)) for x in (mean, mean - half, mean + half)))


def crossing(epochs: np.ndarray, losses: np.ndarray, target: float) -> float:
    """When a curve first comes down to a target, between points by interpolating log(loss)."""
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return np.inf
    k = int(below[0])
    if k == 0:
        return float(epochs[0])
    high, low = np.log(np.maximum(losses[k - 1 : k + 1], 1e-12))
    share = (high - np.log(max(target, 1e-12))) / (high - low)
    return float(epochs[k - 1] + share * (epochs[k] - epochs[k - 1]))


def speed(epochs: np.ndarray, losses: np.ndarray, reference: np.ndarray) -> float:
    """How many times faster than the reference a run came to the larger of both final losses.

    Args:
      epochs: of the points, (points,).
      losses: of the run, (points,).
      reference: of the other run, (points,).

    Returns:
      A ratio of numbers of epochs; nan if a curve is not finite.
    """
    if not (np.isfinite(losses).all() and np.isfinite(reference).all()):
        return np.nan
    target = max(losses[-1], reference[-1])
    return crossing(epochs, reference, target) / crossing(epochs, losses, target)


def speeds(result: Result, reference: Result) -> np.ndarray:
    """The ratios of :func:`speed` for each learning rate and seed."""
    epochs = np.asarray(result.values["curves"]["epoch"])[0, 0]
    pairs = zip(_losses(result), _losses(reference), strict=True)
    return np.array([[speed(epochs, *runs) for runs in zip(*pair, strict=True)] for pair in pairs])


def equal_rate(rates: Sequence[float], losses: np.ndarray, loss: float) -> float:
    """The learning rate at which final losses (rates,) come down to ``loss``: log-log, from below.

    0 where already the smallest rate ends lower; inf where none does.
    """
    below = np.flatnonzero(losses <= loss)
    if not len(below):
        return np.inf
    k = int(below[0])
    if k == 0:
        return float(rates[0]) if losses[0] == loss else 0.0
    high, low = np.log(np.maximum(losses[k - 1 : k + 1], 1e-12))
    share = (high - np.log(max(loss, 1e-12))) / (high - low)
    return float(np.exp(np.log(rates[k - 1]) + share * np.log(rates[k] / rates[k - 1])))


def equal_rates(result: Result, reference: Result) -> np.ndarray:
    """For each rate and seed: at how many times that rate the reference ends as low."""
    rates = result.settings["learning_rates"]
    final, others = (_losses(r)[..., -1] for r in (result, reference))
    return np.array(
        [
            [equal_rate(rates, others[:, seed], loss) / rate for seed, loss in enumerate(by_seed)]
            for rate, by_seed in zip(rates, final, strict=True)
        ]
    )


def epochs_to(result: Result, threshold: float) -> np.ndarray:
    """The first epoch of the curves that reaches a training accuracy, (rates, seeds), or inf."""
    curves = result.values["curves"]
    points = training.epochs_to(np.asarray(curves["train_accuracy"]), threshold)
    epochs = np.append(np.asarray(curves["epoch"])[0, 0], np.inf)
    last = len(epochs) - 1
    return epochs[np.minimum(points - 1, last).astype(int)]


def thresholds(ways: Ways) -> list[float]:
    """The training accuracies that the tables count epochs to."""
    return sorted({FIRST_THRESHOLD, next(iter(ways.values())).settings["threshold"]})


def best(result: Result) -> int:
    """Which learning rate ends with the lowest training loss, averaged as logarithms."""
    losses = _losses(result)[..., -1]
    logs = np.log(np.maximum(np.where(np.isfinite(losses), losses, np.inf), 1e-12))
    return int(np.argmin(logs.mean(axis=1)))


def by_network(results: Sequence[Result]) -> Grid:
    """The results in nested dictionaries, in their order."""
    grid: dict[str, dict[str, Result]] = {}
    for result in results:
        settings = result.settings
        grid.setdefault(settings["network"], {})[settings["method"]] = result
    return grid


def report(results: list[Result], title: str) -> Report:
    """Tables of every quantity by way and learning rate, what explains them, and the figure."""
    grid = by_network(results)
    tables = [_start_table(network, ways) for network, ways in grid.items()]
    for network, ways in grid.items():
        for heading, cell in cells(ways).items():
            tables.append(_table(f"{network}: {heading}", ways, cell))
    tables[0] = tables[0]._replace(title=f"{title}\n\n{tables[0].title}")
    return Report(tables, {"": plot(grid)}, findings(grid))


def _losses(result: Result) -> np.ndarray:
    return np.asarray(result.values["curves"]["train_loss"], float)


def _start_table(network: str, ways: Ways) -> Table:
    """What each way does before the first step."""
    kernels = [key for key in next(iter(ways.values())).values["norms"] if key.endswith("kernel")]
    rows = [
        (
            name,
            f"{np.mean(result.values['change']):.2g}",
            f"{np.max(result.values['log_scales']['largest']):.2f}",
            " ".join(f"{np.mean(result.values['norms'][key]):.2f}" for key in kernels),
        )
        for name, result in ways.items()
    ]
    heads = ("method", "change of\nthe function", "largest\n|log λ|", "norms of the kernels /")
    return Table(f"{network}: the start", (*heads[:-1], f"{heads[-1]}\nbefore, by layer"), rows)


def _table(title: str, ways: Ways, cell: Cell) -> Table:
    rates = next(iter(ways.values())).settings["learning_rates"]
    reference = ways.get(published.NONE)
    rows = [
        (name, *(cell(result, reference, k) for k in range(len(rates))))
        for name, result in ways.items()
    ]
    return Table(title, ("method", *(f"rate {rate:g}" for rate in rates)), rows)


def _epochs_cell(result: Result, reference: Result | None, k: int, *, threshold: float) -> str:
    limit = result.settings["num_epochs"]
    epochs = epochs_to(result, threshold)[k]
    # One word for all seeds where none arrived.
    shown = epochs[:1] if np.isinf(epochs).all() else epochs
    return ", ".join(epochs_text(x, limit) for x in shown)


def _loss_cell(result: Result, reference: Result | None, k: int) -> str:
    final = _losses(result)[k, :, -1]
    return f"{np.exp(np.log(np.maximum(final, 1e-12)).mean()):.3g}"


def _test_cell(result: Result, reference: Result | None, k: int) -> str:
    return f"{100 * np.mean(np.asarray(result.values['curves']['test_accuracy'])[k, :, -1]):.1f}"


def _speed_cell(result: Result, reference: Result | None, k: int) -> str:
    if reference is None or result is reference:
        return ""
    return str(factor(speeds(result, reference)[k]))


def _rate_cell(result: Result, reference: Result | None, k: int) -> str:
    if reference is None or result is reference:
        return ""
    ratios = equal_rates(result, reference)[k]
    if np.isinf(ratios).any():
        return "none as low"
    return str(factor(ratios)) if (ratios > 0).all() else "below all"


def cells(ways: Ways) -> dict[str, Cell]:
    """From what a table shows to the text for one way at one learning rate."""
    return {
        **{
            f"epochs to {threshold:.0%} training accuracy, by seed": functools.partial(
                _epochs_cell, threshold=threshold
            )
            for threshold in thresholds(ways)
        },
        "final training loss, geometric mean": _loss_cell,
        "final test accuracy in %": _test_cell,
        "times as fast as no conditioning (95 % interval)": _speed_cell,
        "no conditioning ends as low at so many times the learning rate": _rate_cell,
    }


def findings(grid: Grid) -> list[str]:
    """For each network: what each way gains, and how far numbers of layers explain it."""
    return [
        sentence
        for network, ways in grid.items()
        if published.NONE in ways
        for sentence in (
            *_gains(network, ways),
            *_explained(network, ways),
            _at_best(network, ways),
        )
    ]


def _gains(network: str, ways: Ways) -> list[str]:
    reference = ways[published.NONE]
    rates = reference.settings["learning_rates"]
    sentences = []
    for name, result in ways.items():
        if result is reference:
            continue
        found = [factor(by_seed) for by_seed in speeds(result, reference)]
        parts = []
        for word, holds in VERDICTS.items():
            at = [f"{rate:g}" for rate, one in zip(rates, found, strict=True) if holds(one)]
            parts += [f"{word} {', '.join(at)}"] if at else []
        sentences.append(f"{network}, {name} against none: {'; '.join(parts)}.")
    return sentences


VERDICTS: dict[str, Callable[[Factor], bool]] = {
    "faster at the learning rates": lambda one: one.low > 1,
    "slower at": lambda one: one.high < 1,
    "no clear difference at": lambda one: not (one.low > 1 or one.high < 1),
}


def _explained(network: str, ways: Ways) -> list[str]:
    """How each rescaling compares with one number for each layer."""
    published_or_optimum = published.PUBLISHED if published.PUBLISHED in ways else published.OPTIMUM
    pairs = (
        (published_or_optimum, published.MATCHED),
        (published_or_optimum, published.OUTPUT),
        (published.OPTIMUM, published.MATCHED_OPTIMUM),
    )
    sentences = []
    for rescaled, control in pairs:
        if rescaled not in ways or control not in ways:
            continue
        rates = ways[rescaled].settings["learning_rates"]
        found = [factor(by_seed) for by_seed in speeds(ways[rescaled], ways[control])]
        shown = "; ".join(f"{one} at {rate:g}" for one, rate in zip(found, rates, strict=True))
        sentences.append(
            f"{network}: {rescaled!r} is so many times as fast as {control!r}, "
            f"where no neuron is treated apart: {shown}."
        )
    return sentences


def _at_best(network: str, ways: Ways) -> str:
    """Every way at its own best learning rate."""
    reference = ways[published.NONE]
    least = _losses(reference)[best(reference), :, -1]
    parts = []
    for name, result in ways.items():
        k = best(result)
        ratio = factor(_losses(result)[k, :, -1] / least)
        against = "" if result is reference else f", {ratio} times"
        rate = result.settings["learning_rates"][k]
        parts.append(f"{name} {_loss_cell(result, None, k)}{against} (rate {rate:g})")
    return (
        f"{network}, final training loss of each at its own best learning rate: {'; '.join(parts)}."
    )


def plot(grid: Grid) -> Figure:
    """A row for each network: epochs and speed by learning rate, and the curves at one."""
    figure, axes = drawing.panels(len(grid), 3, width=4.4, height=3.4)
    names = list(dict.fromkeys(name for ways in grid.values() for name in ways))
    colors = dict(zip(names, drawing.COLORS, strict=False))
    for (network, ways), (first, second, third) in zip(grid.items(), axes, strict=True):
        _plot_epochs(first, ways, colors)
        _plot_speeds(second, ways, colors)
        _plot_curves(third, ways, colors)
        first.set_title(network, fontsize=10, loc="left")
    drawing.legend_below(figure, axes[:, 0], columns=len(names))
    return figure


def _plot_epochs(panel: Any, ways: Ways, colors: Mapping[str, str]) -> None:
    settings = next(iter(ways.values())).settings
    limit, rates = settings["num_epochs"], settings["learning_rates"]
    # The highest accuracy that something reaches: a panel of "not reached" shows nothing.
    threshold = next(
        (
            accuracy
            for accuracy in sorted({*thresholds(ways), *LOWER_THRESHOLDS}, reverse=True)
            if any(np.isfinite(_median_epochs(result, accuracy)).any() for result in ways.values())
        ),
        max(thresholds(ways)),
    )
    for name, result in ways.items():
        epochs = _median_epochs(result, threshold)
        panel.plot(
            drawing.dodged(rates, list(ways).index(name), len(ways)),
            np.where(np.isfinite(epochs), epochs, 1.12 * limit),
            color=colors[name],
            marker=drawing.MARKERS[list(colors).index(name)],
            linewidth=1,
            label=name,
        )
    drawing.rate_axis(panel, rates)
    drawing.limited_axis(panel, limit)
    panel.set_ylabel(f"epochs to {threshold:.0%} (median)")


def _median_epochs(result: Result, threshold: float) -> np.ndarray:
    """Over the seeds, for each learning rate."""
    return np.median(epochs_to(result, threshold), axis=1)


def _plot_speeds(panel: Any, ways: Ways, colors: Mapping[str, str]) -> None:
    reference = ways.get(published.NONE)
    others = {name: result for name, result in ways.items() if result is not reference}
    if reference is None or not others:
        return
    rates = reference.settings["learning_rates"]
    for number, (name, result) in enumerate(others.items()):
        found = np.array([factor(by_seed) for by_seed in speeds(result, reference)])
        mean, low, high = found.T
        error = np.nan_to_num([mean - low, high - mean])
        panel.errorbar(
            drawing.dodged(rates, number, len(others)),
            mean,
            error,
            color=colors[name],
            marker=drawing.MARKERS[list(colors).index(name)],
            linewidth=0.8,
            capsize=2,
        )
    panel.axhline(1, color="0.4", linewidth=0.8)
    drawing.rate_axis(panel, rates)
    drawing.factor_axis(panel)
    panel.set_ylabel("times as fast as none")


def _plot_curves(panel: Any, ways: Ways, colors: Mapping[str, str]) -> None:
    # The first learning rate at which some curve comes down at all.
    falls = np.array(
        [losses[..., -1] < 0.9 * losses[..., 0] for losses in map(_losses, ways.values())]
    )
    k = int(falls.any(axis=(0, 2)).argmax())
    ends = {}
    for name, result in ways.items():
        losses, epochs = _losses(result)[k], np.asarray(result.values["curves"]["epoch"])[0, 0]
        middle = np.median(losses, axis=0)
        panel.plot(epochs, losses.T, color=colors[name], linewidth=0.5, alpha=0.35)
        panel.plot(epochs, middle, color=colors[name], linewidth=1.5)
        ends[name] = (float(middle[-1]), colors[name])
    rate = next(iter(ways.values())).settings["learning_rates"][k]
    panel.set(xlabel="epoch", ylabel="training loss")
    drawing.loss_axis(panel)
    panel.set_title(f"learning rate {rate:g}", fontsize=10)
    drawing.label_ends(panel, ends)
