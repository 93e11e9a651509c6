"""What the figures of all studies share: panels, one look, legends beside the data."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pathcond_jax.plotting import PALETTE

# Okabe and Ito's remaining colours; yellow is left out, it does not print.
COLORS = (*PALETTE, "#56B4E9", "#CC79A7", "#7F7F7F", "#8C564B", "#999933")
MARKERS = "osD^vPX<>*"


def panels(
    rows: int, columns: int, *, width: float = 3.6, height: float = 3.0
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes as an array (rows, columns), tidied."""
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        tidy(one)
    return figure, axes


def tidy(axes: Axes) -> None:
    """The look of every panel."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def legend_below(figure: Figure, axes: Axes | Iterable[Axes], columns: int | None = None) -> None:
    """One legend under all panels, where it covers nothing; a label shown twice is listed once."""
    entries: dict[str, Artist] = {}
    for one in [axes] if isinstance(axes, Axes) else axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(str(label), handle)
    columns = columns or min(len(entries), 5)
    handles, labels = list(entries.values()), list(entries)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def dodged(rates: Sequence[float], number: int, count: int) -> np.ndarray:
    """Learning rates moved aside a little, so that methods that agree do not hide each other."""
    return np.asarray(rates) * 10 ** (0.05 * (number - (count - 1) / 2))


def rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    """A horizontal axis of learning rates, each with its tick."""
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")


def limited_axis(axes: Axes, limit: int) -> None:
    """A vertical axis of epochs; what was not reached is drawn at 1.12 times the limit."""
    axes.axhline(1.06 * limit, color="0.7", linewidth=0.8)
    axes.set_ylim(0, 1.2 * limit)
    ticks = [tick for tick in axes.get_yticks() if 0 <= tick <= limit]
    axes.set_yticks([*ticks, 1.12 * limit], [*(f"{tick:g}" for tick in ticks), f"> {limit}"])


def factor_axis(axes: Axes) -> None:
    """A vertical axis of ratios, logarithmic; intervals beyond a factor of 20 are cut."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # A range within a few percent is no finding: show what a third would be.
    axes.set_ylim(np.clip(low, 1 / 20, 0.75), np.clip(high, 1.33, 20))
    _plain_ticks(axes, "{:g}×")


def loss_axis(axes: Axes) -> None:
    """A vertical axis of losses, logarithmic, at least over a factor of 1.5."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    middle = (low * high) ** 0.5
    axes.set_ylim(min(low, middle / 1.5**0.5), max(high, middle * 1.5**0.5))
    _plain_ticks(axes, "{:g}")


def _plain_ticks(axes: Axes, form: str) -> None:
    """Round numbers along a logarithmic vertical axis: seven at most."""
    low, high = axes.get_ylim()
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
    for steps in (
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
        (1, 1.5, 2, 3, 5, 7),
        (1, 2, 5),
        (1, 3),
        (1,),
    ):
        ticks = np.outer(decades, steps).ravel()
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) <= 7:
            break
    axes.set_yticks(ticks, [form.format(tick) for tick in ticks])
    axes.minorticks_off()


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Writes each label right of the end of its curve, in its color, none over another.

    Args:
      axes: with final limits and scale.
      ends: label to the height of the end and the color; what is not finite is left out.
    """
    shown = {name: end for name, end in ends.items() if np.isfinite(end[0])}
    if not shown:
        return
    heights = {
        name: axes.transAxes.inverted().transform(axes.transData.transform((1, y)))[1]
        for name, (y, _) in shown.items()
    }
    order = sorted(heights, key=heights.__getitem__)
    places = spread([heights[name] for name in order], 0.075)
    for name, place in zip(order, places, strict=True):
        axes.text(
            1.02,
            place,
            name,
            color=shown[name][1],
            fontsize=8,
            va="center",
            transform=axes.transAxes,
        )


def spread(heights: Sequence[float], gap: float) -> np.ndarray:
    """Ascending heights moved apart to at least ``gap``, about their middle."""
    steps = gap * np.arange(len(heights))
    lifted = np.maximum.accumulate(np.asarray(heights) - steps) + steps
    return lifted - np.mean(lifted - np.asarray(heights))
