"""What a spec is made of: leaves, neuron groups and where they meet, what is pinned."""

import dataclasses
from typing import Any

import numpy as np

PyTree = Any


class SpecError(ValueError):
    """A spec, or a parameter tree that does not fit it, cannot be used."""


@dataclasses.dataclass(frozen=True, eq=False)
class Incidence:
    """Where the neurons of one group meet one parameter leaf.

    Attributes:
      path: the leaf, as in ``"params/Dense_0/kernel"``.
      axes: the axes of the leaf along which the neurons are laid out.
      index: integer array of shape ``[leaf.shape[a] for a in axes]``: the neuron, within its
        group, that each slice belongs to; -1 where a slice belongs to none.
      power: the power of the neuron's scale that these slices take, positive.
    """

    path: str
    axes: tuple[int, ...]
    index: np.ndarray
    power: float = 1.0

    def __post_init__(self) -> None:
        index = np.array(self.index)
        if not np.issubdtype(index.dtype, np.integer):
            raise SpecError(f"{self.path}: index has dtype {index.dtype}; integers are needed")
        index = index.astype(np.int32)
        index.setflags(write=False)
        object.__setattr__(self, "axes", tuple(int(a) for a in np.atleast_1d(self.axes)))
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "power", _positive(self.power, self.path))

    def __reduce__(self) -> tuple[Any, ...]:
        # Through __post_init__, which makes the index read-only again.
        return Incidence, (self.path, self.axes, self.index, self.power)

    def __str__(self) -> str:
        power = "" if self.power == 1 else f"^{self.power:g}"
        return f"{self.path}[{','.join(map(str, self.axes))}]{power}"


@dataclasses.dataclass(frozen=True, eq=False)
class NeuronGroup:
    """Neurons of one layer or stream; neuron k of the group has one scale λ_k > 0.

    Rescaling multiplies the incoming slices by λ_k and divides the outgoing slices by it. Behind
    an activation that is homogeneous of another degree, slices take powers of it: of
    ``relu(x @ w + b) ** 2 @ v`` w and b take λ_k and v takes λ_k². Powers are relative to each
    other: the same neuron could be written with 1/2 and 1.

    Attributes:
      name: the layer that creates the neurons, for people.
      size: the number of neurons.
      incoming: the weights and biases that enter the neurons.
      outgoing: the weights that leave them.
    """

    name: str
    size: int
    incoming: tuple[Incidence, ...]
    outgoing: tuple[Incidence, ...]

    def __post_init__(self) -> None:
        for side in ("incoming", "outgoing"):
            given = getattr(self, side)
            if not isinstance(given, (tuple, list)) or not all(
                isinstance(incidence, Incidence) for incidence in given
            ):
                raise SpecError(
                    f"group {self.name!r}: {side} is a sequence of Incidence, not {given!r}"
                )
            object.__setattr__(self, side, tuple(given))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree.

    Attributes:
      path: its place in the tree, keys joined by ``/``.
      shape: its shape.
      dtype: its dtype.
      trainable: whether it is trained; only trainable entries count in ``p``.
      state: whether it is rescaled with the trainable leaves although it is not trained.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    trainable: bool
    state: bool = False

    @property
    def size(self) -> int:
        """The number of entries."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class Pinned:
    """An axis of a trainable leaf that may not be rescaled, and why.

    Attributes:
      path: the leaf.
      axis: the axis, or None for the whole leaf.
      operation: the operation that forbids it, such as ``"tanh"``.
      source: the user's line that runs the operation, ``"file.py:12 (function)"``, or "".
      reason: one sentence. Where it says that only an ε fixes a scale, this is proved: in the
        program with 0 in place of every small constant that is added or compared, all entries
        that share the scale can be multiplied by any positive number together.
      summed: whether the axis is one that the operation sums over or slides along, as the window
        of a convolution: in no other network would it have a scale.
    """

    path: str
    axis: int | None
    operation: str
    source: str
    reason: str
    summed: bool = False

    def __str__(self) -> str:
        axis = "" if self.axis is None else f" axis {self.axis}"
        where = f" at {self.source}" if self.source else ""
        return f"{self.path}{axis}: {self.reason}{where}"


@dataclasses.dataclass(frozen=True)
class Rounded:
    """An operation that rounds values which neurons scale to a lower precision.

    There a rescaling is exact only if its scales are powers of two.

    Attributes:
      dtype: the dtype to which it rounds.
      operation: the operation, such as ``"convert_element_type"``.
      source: the user's line that runs it, or "".
    """

    dtype: str
    operation: str
    source: str


def _positive(power: Any, path: str) -> float:
    try:
        number = float(power)
    except (TypeError, ValueError):
        raise SpecError(f"{path}: power is {power!r}; a number is needed") from None
    if not 0 < number < float("inf"):
        raise SpecError(f"{path}: power is {number:g}; it must be positive and finite")
    return number


def listed(names: Any, limit: int = 6) -> str:
    names = list(names)
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
