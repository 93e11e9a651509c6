"""Pictures of log-scales and of training. Needs matplotlib; returns figures, shows none.

Every function draws on ``axes`` if given, else on a new figure, and returns the figure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pathcond_jax.spec import ArchSpec

# Okabe and Ito's palette: distinct under the common kinds of colour blindness, and in grey.
BLACK, ORANGE, BLUE, GREEN, VERMILION = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00"
PALETTE = (BLACK, ORANGE, BLUE, VERMILION, GREEN)
DASHES: tuple[Any, ...] = ("-", "-", "-", (0, (3, 3)), "-.")


def plot_training(
    curves: Mapping[str, np.ndarray],
    *,
    ylabel: str = "training loss",
    log: bool = True,
    axes: Axes | None = None,
) -> Figure:
    """Training curves: a thick median and a thin line for each run.

    Args:
      curves: label to array (runs, epochs); what is not finite is left out.
      ylabel: what the curves show.
      log: whether the vertical axis is logarithmic.
      axes: where to draw.

    Returns:
      The figure.
    """
    axes = _axes(axes)
    for number, (label, runs) in enumerate(curves.items()):
        style = _style(number)
        epochs = np.arange(1, runs.shape[1] + 1)
        finite = np.where(np.isfinite(runs), runs, np.nan)
        for run in finite:
            axes.plot(epochs, run, linewidth=0.6, alpha=0.35, color=style["color"])
        # The median over all runs; once one has diverged, a median of the others would flatter.
        middle = np.median(finite, axis=0)
        axes.plot(epochs, middle, linewidth=1.8, label=label, zorder=3 + number, **style)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    if log:
        axes.set_yscale("log")
    return _finish(axes)


def plot_epochs(
    learning_rates: Sequence[float],
    epochs: Mapping[str, np.ndarray],
    *,
    limit: int,
    ylabel: str = "epochs to the threshold",
    axes: Axes | None = None,
) -> Figure:
    """How many epochs each method took at each learning rate.

    Args:
      learning_rates: the learning rates.
      epochs: label to array (learning rates,); inf where the threshold was not reached.
      limit: the number of epochs trained; crosses above it mark what was not reached.
      ylabel: what ``epochs`` counts.
      axes: where to draw.

    Returns:
      The figure.
    """
    axes = _axes(axes)
    rates = np.asarray(learning_rates)
    missing = 1.15 * limit
    for number, (label, values) in enumerate(epochs.items()):
        # Methods that agree would hide each other.
        x = rates * 10 ** (0.09 * (number - (len(epochs) - 1) / 2))
        color = _style(number)["color"]
        reached = np.isfinite(values)
        axes.plot(
            x,
            np.where(reached, values, np.nan),
            marker="osD^v"[number % 5],
            linestyle=":",
            linewidth=0.8,
            markersize=6,
            color=color,
            label=label,
        )
        axes.plot(
            x[~reached], np.full((~reached).sum(), missing), "x", markersize=6, color=color
        )
    axes.axhline(1.07 * limit, color="0.7", linewidth=0.8)
    axes.set_ylim(0, 1.25 * limit)
    ticks = [t for t in axes.get_yticks() if t <= limit]
    axes.set_yticks([*ticks, missing], [*(f"{t:g}" for t in ticks), "not\nreached"])
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel(ylabel)
    return _finish(axes)


def plot_log_scales(
    spec: ArchSpec,
    log_scales: Mapping[str, Sequence[Any]],
    *,
    bins: int = 41,
    axes: Axes | None = None,
) -> Figure:
    """Histograms of the neurons' log-scales.

    Args:
      spec: the architecture.
      log_scales: label to ``solution.log_scales``: one array (..., group.size) per group.
      bins: the number of bins.
      axes: where to draw.

    Returns:
      The figure.

    Raises:
      ValueError: the log-scales do not fit the spec.
    """
    axes = _axes(axes)
    flat = {label: _flatten(spec, values) for label, values in log_scales.items()}
    reach = max([float(np.abs(values).max()) for values in flat.values()], default=0.0) or 1.0
    edges = np.linspace(-reach, reach, bins + 1)
    for number, (label, values) in enumerate(flat.items()):
        style = _style(number)
        style["linestyle"] = "-"
        weights = np.full(values.shape, 1.0 / values.size)
        kind = dict(bins=edges, weights=weights, histtype="stepfilled")
        axes.hist(values, alpha=0.18, color=style["color"], **kind)
        axes.hist(values, label=label, linewidth=1.4, **style, **{**kind, "histtype": "step"})
    axes.set_xlabel("log-scale of a neuron")
    axes.set_ylabel("fraction of neurons")
    return _finish(axes)


def _flatten(spec: ArchSpec, log_scales: Sequence[Any]) -> np.ndarray:
    arrays = [np.asarray(values) for values in log_scales]
    sizes = [values.shape[-1] if values.ndim else 0 for values in arrays]
    expected = [group.size for group in spec.groups]
    if sizes != expected:
        raise ValueError(f"log-scales of sizes {sizes} for groups of sizes {expected}")
    return np.concatenate([values.reshape(-1) for values in arrays])


def _style(number: int) -> dict[str, Any]:
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def _axes(axes: Axes | None) -> Axes:
    return Figure(figsize=(5.0, 3.6), layout="constrained").subplots() if axes is None else axes


def _finish(axes: Axes) -> Figure:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure
