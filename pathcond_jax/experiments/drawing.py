"""What the figures of all studies share: panels, one look, legends beside the data."""

from collections.abc import Iterable

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
