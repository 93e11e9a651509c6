"""Pictures of log-scales and of training. Needs matplotlib; returns figures, shows none.

Every function draws on ``axes`` if given, else on a new figure, and returns the figure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pathcond_jax._action.condition import condition
from pathcond_jax._lifting.gram import conditioning_score, scaled_gram_diagonal
from pathcond_jax._solve.solution import Solution
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import PyTree

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
      curves: label to array (runs, epochs); what is not finite is left out, and named if every
        run of a label ends so.
      ylabel: what the curves show.
      log: whether the vertical axis is logarithmic.
      axes: where to draw.

    Returns:
      The figure.

    Example:
      >>> import numpy as np
      >>> from pathcond_jax import plotting
      >>> curves = {"as is": np.array([[2.0, 1.0]]), "conditioned": np.array([[2.0, 0.7]])}
      >>> plotting.plot_training(curves).axes[0].get_ylabel()
      'training loss'
    """
    axes = _axes(axes)
    for number, (label, runs) in enumerate(curves.items()):
        color = PALETTE[number % len(PALETTE)]
        epochs = np.arange(1, runs.shape[1] + 1)
        finite = np.where(np.isfinite(runs), runs, np.nan)
        for run in finite:
            axes.plot(epochs, run, linewidth=0.6, alpha=0.35, color=color)
        # The median over all runs; once one has diverged, a median of the others would flatter.
        middle = np.median(finite, axis=0)
        dashes = DASHES[number % len(DASHES)]
        axes.plot(
            epochs, middle, color=color, linestyle=dashes, linewidth=1.8, label=label, zorder=3
        )
    failed = [label for label, runs in curves.items() if not np.isfinite(runs[:, -1]).any()]
    if failed:
        note = f"diverged: {', '.join(failed)}"
        axes.text(0.98, 0.97, note, transform=axes.transAxes, ha="right", va="top", fontsize=9)
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

    Example:
      >>> import numpy as np
      >>> from pathcond_jax import plotting
      >>> epochs = {"as is": np.array([np.inf, 12.0]), "conditioned": np.array([15.0, 11.0])}
      >>> plotting.plot_epochs([0.01, 0.1], epochs, limit=20).axes[0].get_ylabel()
      'epochs to the threshold'
    """
    axes = _axes(axes)
    rates = np.asarray(learning_rates)
    missing = 1.15 * limit
    for number, (label, values) in enumerate(epochs.items()):
        # Methods that agree would hide each other.
        x = rates * 10 ** (0.09 * (number - (len(epochs) - 1) / 2))
        color = PALETTE[number % len(PALETTE)]
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
        axes.plot(x[~reached], np.full((~reached).sum(), missing), "x", markersize=6, color=color)
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
    log_scales: Solution | Mapping[str, Sequence[Any]],
    *,
    bins: int = 25,
    colors: Sequence[str] = PALETTE,
    axes: Axes | None = None,
) -> Figure:
    """Histograms of the neurons' log-scales.

    Args:
      spec: the architecture.
      log_scales: a solution; or label to ``solution.log_scales``, one array (..., group.size)
        per group.
      bins: the number of bins.
      colors: one for each label.
      axes: where to draw.

    Returns:
      The figure.

    Raises:
      ValueError: the log-scales do not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from pathcond_jax import plotting
      >>> params = {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> _, solution = pathcond.condition(params, spec)
      >>> len(plotting.plot_log_scales(spec, solution).axes)
      1
    """
    axes = _axes(axes)
    if isinstance(log_scales, Solution):
        log_scales = {"": log_scales.log_scales}
    flat = {label: _flatten(spec, values) for label, values in log_scales.items()}
    reach = max([float(np.abs(values).max()) for values in flat.values()], default=0.0) or 1.0
    edges = np.linspace(-reach, reach, bins + 1)
    for color, (label, values) in zip(colors, flat.items(), strict=False):
        counts, _ = np.histogram(values, edges)
        fractions = counts / values.size
        axes.stairs(fractions, edges, fill=True, alpha=0.18, color=color)
        axes.stairs(fractions, edges, linewidth=1.4, color=color, label=label or None)
    axes.set_xlabel("log-scale of a neuron")
    axes.set_ylabel("fraction of neurons")
    return _finish(axes)


def plot_gram(
    params: PyTree,
    spec: ArchSpec,
    after: PyTree | None = None,
    *,
    axes: Axes | None = None,
) -> Figure:
    """The Gram diagonal of each trainable leaf, before and after conditioning.

    Boxes show the median and the quartiles, whiskers 5 % and 95 % of the positive entries, all
    relative to the geometric mean of the diagonal. Conditioning makes the boxes meet at 1.

    Args:
      params: the parameters.
      spec: the architecture.
      after: the conditioned parameters; None: ``condition(params, spec)`` makes them.
      axes: where to draw.

    Returns:
      The figure.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from pathcond_jax import plotting
      >>> params = {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> conditioned, _ = pathcond.condition(params, spec)
      >>> len(plotting.plot_gram(params, spec, conditioned).axes)
      1
    """
    if after is None:
        after, _ = condition(params, spec)
    leaves = [leaf for leaf in spec.leaves if leaf.trainable and leaf.size]
    height = 1.4 + 0.42 * len(leaves)
    if axes is None:
        axes = Figure(figsize=(6.0, height), layout="constrained").subplots()
    score = [float(conditioning_score(p, spec)) for p in (params, after)]
    for shift, color, word, value, tree in (
        (-0.19, BLACK, "before", score[0], params),
        (0.19, VERMILION, "after", score[1], after),
    ):
        logs = _log_diagonal(tree, spec)
        center = np.concatenate(logs).mean()
        stats = [
            dict(zip(_BOX, np.exp(np.percentile(log - center, (5, 25, 50, 75, 95))), strict=True))
            for log in logs
            if log.size
        ]
        places = [k + shift for k, log in enumerate(logs) if log.size]
        axes.bxp(
            stats,
            positions=places,
            widths=0.3,
            orientation="horizontal",
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": "white", "edgecolor": color},
            medianprops={"color": color, "linewidth": 2},
            whiskerprops={"color": color},
            capprops={"color": color},
        )
        axes.plot([], [], color=color, linewidth=2, label=f"{word} (score {value:.3g})")
    axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_ylim(len(leaves) - 0.4, -0.6)
    axes.set_yticks(range(len(leaves)), [leaf.path.removeprefix("params/") for leaf in leaves])
    axes.set_xlabel("Gram diagonal / its geometric mean")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return _finish(axes)


_BOX = ("whislo", "q1", "med", "q3", "whishi")


def _log_diagonal(params: PyTree, spec: ArchSpec) -> list[np.ndarray]:
    """The logarithms of the positive entries of the Gram diagonal, a flat array for each leaf."""
    scaled = scaled_gram_diagonal(params, spec)
    parts = zip(
        spec.leaves,
        jax.tree.leaves(scaled.mantissa),
        jax.tree.leaves(scaled.log_scale),
        strict=True,
    )
    logs = []
    for leaf, mantissa, scale in parts:
        if leaf.trainable and leaf.size:
            flat = np.asarray(mantissa, np.float64).reshape(-1)
            logs.append(np.log(flat[flat > 0]) + float(scale))
    return logs


def _flatten(spec: ArchSpec, log_scales: Sequence[Any]) -> np.ndarray:
    arrays = [np.asarray(values) for values in log_scales]
    sizes = [values.shape[-1] if values.ndim else 0 for values in arrays]
    expected = [group.size for group in spec.groups]
    if sizes != expected:
        raise ValueError(f"log-scales of sizes {sizes} for groups of sizes {expected}")
    return np.concatenate([values.reshape(-1) for values in arrays])


def _axes(axes: Axes | None) -> Axes:
    return Figure(figsize=(5.0, 3.6), layout="constrained").subplots() if axes is None else axes


def _finish(axes: Axes) -> Figure:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    figure = axes.figure.figure
    assert isinstance(figure, Figure)
    return figure
