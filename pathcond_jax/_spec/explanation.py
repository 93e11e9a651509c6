"""What is pinned and what is rounded, in as few lines as a person reads."""

import re
from collections.abc import Collection, Iterable, Sequence

from pathcond_jax._spec.types import Pinned, Rounded

# So many names are written out; of more, as many examples of different kinds are.
_NAMES = 3
_LINES = 2


def explained(pinned: Iterable[Pinned], rescaled: Collection[tuple[str, int]]) -> list[str]:
    """One line per reason: the leaves that are pinned for it, the reason, and the user's lines.

    Axes that an operation sums over are left out where more is to say of their leaf: neurons lie
    along its other axes, or these are pinned for another reason.

    Args:
      pinned: what is pinned.
      rescaled: leaves and axes along which neurons are laid out.
    """
    pinned = list(pinned)
    told = {path for path, _ in rescaled} | {pin.path for pin in pinned if not pin.summed}
    groups: dict[tuple[bool, str], list[Pinned]] = {}
    for pin in pinned:
        if not (pin.summed and pin.path in told):
            # The ends of the network go last.
            groups.setdefault((not pin.operation, pin.reason), []).append(pin)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return [f"{_leaves(pins)}: {reason}{_where(pins)}" for (_, reason), pins in ordered]


def rounded_at(rounded: Sequence[Rounded]) -> str:
    """Where scales are rounded, and how a rescaling is exact nevertheless."""
    dtypes = ", ".join(sorted({place.dtype for place in rounded}))
    return (
        f"neurons' values are rounded to {dtypes}{_where(rounded)}; there a rescaling is exact "
        'only by powers of two, as rounding="power_of_two" chooses them'
    )


def shortened(names: Iterable[str]) -> str:
    """A few names, or how many there are and examples that differ in more than numbers."""
    names = list(names)
    if len(names) <= _NAMES:
        return ", ".join(names)
    kinds = {re.sub(r"\d+", "0", name): name for name in reversed(names)}
    examples = list(reversed(kinds.values()))[:_NAMES]
    return f"{len(names)} leaves such as {', '.join(examples)}"


def _leaves(pins: Iterable[Pinned]) -> str:
    axes: dict[str, list[int]] = {}
    for pin in pins:
        axes.setdefault(pin.path, []).extend([] if pin.axis is None else [pin.axis])
    return shortened(
        f"{path}[{','.join(map(str, found))}]" if found else path for path, found in axes.items()
    )


def _where(places: Iterable[Pinned | Rounded]) -> str:
    lines = list(dict.fromkeys(place.source for place in places if place.source))
    more = f" and {len(lines) - _LINES} more lines" if lines[_LINES:] else ""
    return f" at {', '.join(lines[:_LINES])}{more}" if lines else ""
