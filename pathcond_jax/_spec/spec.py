"""The architecture spec: which entries of a parameter tree share a scale, as plain data."""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
import numpy as np

from pathcond_jax._spec.explanation import explained, rounded_at, shortened
from pathcond_jax._spec.types import Leaf, NeuronGroup, Pinned, PyTree, Rounded, SpecError, listed


# Without leaves for JAX: `jax.jit(condition)(params, spec)` and a vmap over both need no more.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class ArchSpec:
    """What may be rescaled in a network: static, printable, compared and hashed by identity.

    Build it once with ``trace_spec`` or ``chain_spec``; close over it, or pass it to a function
    that is transformed by ``jax.jit`` or ``jax.vmap``: it is a pytree without leaves, and a static
    argument if it is declared one. Outside of ``jit`` a second trace of the same network finds all
    compiled.

    A copy is the spec itself. ``pickle`` and ``cloudpickle`` store what is plain data: groups,
    leaves and reasons, but neither the program nor the apply function. What comes back rescales
    and solves; for path lifting, trace the network again.

    Attributes:
      groups: the neuron groups in forward order.
      leaves: every leaf of the parameter tree, in flattening order.
      treedef: the structure of the parameter tree.
      explain: gives ``pinned``, which takes as long as finding the groups and is for people.
      program: the traced network, which path lifting runs on one example; None if there is none.
      apply_fn: the network as a function; None if there is none.
      example_inputs: the shapes and dtypes of the inputs after the parameters.
      rounded: where values that neurons scale are rounded to a lower precision. There only scales
        that are powers of two are exact, as ``condition(..., rounding="power_of_two")`` takes.
      max_pool: how path lifting treats max pooling, ``"paths"`` or ``"max"``.
    """

    groups: tuple[NeuronGroup, ...]
    leaves: tuple[Leaf, ...]
    treedef: Any
    explain: Callable[[], tuple[Pinned, ...]] = tuple
    program: Any = None
    max_pool: str = "paths"
    apply_fn: Callable[..., Any] | None = None
    example_inputs: tuple[PyTree, ...] = ()
    rounded: tuple[Rounded, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.groups, (tuple, list)) or not all(
            isinstance(group, NeuronGroup) for group in self.groups
        ):
            raise SpecError(f"groups is a sequence of NeuronGroup, not {self.groups!r}")
        object.__setattr__(self, "groups", tuple(self.groups))
        for group in self.groups:
            _check_group(group, self._by_path)

    @cached_property
    def pinned(self) -> tuple[Pinned, ...]:
        """What may not be rescaled, and why."""
        return self.explain()

    @property
    def num_neurons(self) -> int:
        """H, the number of scales."""
        return sum(group.size for group in self.groups)

    @property
    def num_parameters(self) -> int:
        """p, the number of trainable entries, rescaled or not."""
        return sum(leaf.size for leaf in self.leaves if leaf.trainable)

    @cached_property
    def symmetry(self) -> "ArchSpec":
        """The groups and leaves alone: one object for all specs in which these are equal.

        What is compiled for it serves every trace of the same network.
        """
        bare = ArchSpec(self.groups, self.leaves, self.treedef)
        key = (tuple(map(_contents, self.groups)), self.leaves, self.treedef)
        return _SYMMETRIES.setdefault(key, bare)

    @cached_property
    def rescaled_paths(self) -> frozenset[str]:
        """The paths of the leaves that any neuron enters or leaves."""
        return frozenset(
            incidence.path
            for group in self.groups
            for incidence in (*group.incoming, *group.outgoing)
        )

    @cached_property
    def rescaled_axes(self) -> frozenset[tuple[str, int]]:
        """The leaves and their axes along which neurons are laid out."""
        return frozenset(
            (incidence.path, axis)
            for group in self.groups
            for incidence in (*group.incoming, *group.outgoing)
            for axis in incidence.axes
        )

    @cached_property
    def powers(self) -> tuple[float, ...]:
        """The different powers that entries take of their scales; (1.0,) in a ReLU network."""
        incidences = [i for group in self.groups for i in (*group.incoming, *group.outgoing)]
        return tuple(sorted({incidence.power for incidence in incidences})) or (1.0,)

    @cached_property
    def _by_path(self) -> dict[str, Leaf]:
        return {leaf.path: leaf for leaf in self.leaves}

    def leaf(self, path: str) -> Leaf:
        """The leaf at ``path``.

        Raises:
          SpecError: the tree has no such leaf.
        """
        if path not in self._by_path:
            raise SpecError(f"no parameter {path!r}; the tree has {listed(self._by_path)}")
        return self._by_path[path]

    def group_of(self, path: str) -> tuple[NeuronGroup, ...]:
        """The groups whose neurons enter or leave the leaf at ``path``.

        Raises:
          SpecError: the tree has no such leaf.
        """
        self.leaf(path)
        return tuple(
            group
            for group in self.groups
            if any(i.path == path for i in (*group.incoming, *group.outgoing))
        )

    def __copy__(self) -> "ArchSpec":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "ArchSpec":
        return self

    def __reduce__(self) -> tuple[Callable[..., "ArchSpec"], tuple[Any, ...]]:
        # Containers that are not JAX's own may compare unequal inside an unpickled treedef.
        skeleton = jax.tree.unflatten(self.treedef, range(len(self.leaves)))
        plain = (self.groups, self.leaves, skeleton, self.pinned, self.max_pool, self.rounded)
        return _unpickled, plain

    def __str__(self) -> str:
        return _table(self)

    __repr__ = __str__


def _unpickled(
    groups: tuple[NeuronGroup, ...],
    leaves: tuple[Leaf, ...],
    skeleton: PyTree,
    pinned: tuple[Pinned, ...],
    max_pool: str,
    rounded: tuple[Rounded, ...],
) -> ArchSpec:
    treedef = jax.tree.structure(skeleton)
    return ArchSpec(groups, leaves, treedef, lambda: pinned, max_pool=max_pool, rounded=rounded)


_SYMMETRIES: weakref.WeakValueDictionary[Any, ArchSpec] = weakref.WeakValueDictionary()


def _contents(group: NeuronGroup) -> tuple[Any, ...]:
    """What a group is made of, to be compared by value."""
    sides = [
        tuple((i.path, i.axes, i.index.shape, i.index.tobytes(), i.power) for i in side)
        for side in (group.incoming, group.outgoing)
    ]
    return group.name, group.size, *sides


def no_neuron(spec: ArchSpec) -> str:
    """Why a spec without groups has none, in one sentence for an error."""
    # Every network pins its inputs and outputs; what operations pin tells more.
    between = [pin for pin in spec.pinned if pin.operation]
    reasons = explained(between or spec.pinned, spec.rescaled_axes)
    shown = "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if reasons[4:] else "")
    return (
        f"the network has no neuron to rescale{f' ({shown})' if shown else ''}; a neuron is a unit "
        "between two trainable layers, behind an activation that scales pass, such as relu"
    )


def _check_group(group: NeuronGroup, leaves: Mapping[str, Leaf]) -> None:
    for side in ("incoming", "outgoing"):
        if not getattr(group, side):
            raise SpecError(
                f"group {group.name!r} has no {side} parameter; a neuron needs both, or its scale "
                "changes the function"
            )
        for incidence in getattr(group, side):
            where = f"group {group.name!r}, {side} {incidence}"
            leaf = leaves.get(incidence.path)
            if leaf is None:
                raise SpecError(f"{where}: no such parameter; the tree has {listed(leaves)}")
            if not (leaf.trainable or leaf.state):
                raise SpecError(f"{where}: the parameter is not trainable")
            if len(set(incidence.axes)) < len(incidence.axes) or any(
                not 0 <= a < len(leaf.shape) for a in incidence.axes
            ):
                raise SpecError(
                    f"{where}: the parameter has shape {leaf.shape}; its axes are "
                    f"{listed(range(len(leaf.shape)))}, each once at most"
                )
            expected = tuple(leaf.shape[a] for a in incidence.axes)
            if incidence.index.shape != expected:
                raise SpecError(
                    f"{where}: index has shape {incidence.index.shape}, not {expected}, that of "
                    f"the parameter {leaf.shape} along these axes"
                )
            if ((incidence.index < -1) | (incidence.index >= group.size)).any():
                raise SpecError(f"{where}: index outside -1..{group.size - 1}")


def _size(group: NeuronGroup) -> str:
    """The number of neurons, as a product where they lie so in a parameter: layers × width."""
    shapes = [
        incidence.index.shape
        for incidence in (*group.incoming, *group.outgoing)
        if np.array_equal(incidence.index.reshape(-1), np.arange(group.size))
    ]
    axes = min(map(len, shapes), default=0)
    return " × ".join(next((map(str, x) for x in shapes if len(x) == axes), [str(group.size)]))


def _table(spec: ArchSpec) -> str:
    head = ("group", "size", "incoming [axis]", "outgoing [axis]")
    rows = [
        (
            group.name,
            _size(group),
            shortened(map(str, group.incoming)),
            shortened(map(str, group.outgoing)),
        )
        for group in spec.groups
    ]
    widths = [max(len(row[c]) for row in [head, *rows]) for c in range(4)]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines.append(
        f"{spec.num_neurons} neurons in {len(spec.groups)} group{'s' * (len(spec.groups) != 1)}; "
        f"{spec.num_parameters} trainable entries"
    )
    if spec.pinned:
        lines += ["pinned:", *(f"  {line}" for line in explained(spec.pinned, spec.rescaled_axes))]
    if spec.rounded:
        lines += [f"rounded: {rounded_at(spec.rounded)}"]
    return "\n".join(lines)
