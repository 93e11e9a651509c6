"""The architecture spec: which entries of a parameter tree share a scale, as plain data."""

import dataclasses
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
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
    """

    path: str
    axes: tuple[int, ...]
    index: np.ndarray

    def __post_init__(self) -> None:
        index = np.array(self.index)
        if not np.issubdtype(index.dtype, np.integer):
            raise SpecError(f"{self.path}: index has dtype {index.dtype}; integers are needed")
        index = index.astype(np.int32)
        index.setflags(write=False)
        object.__setattr__(self, "axes", tuple(int(a) for a in np.atleast_1d(self.axes)))
        object.__setattr__(self, "index", index)

    def __str__(self) -> str:
        return f"{self.path}[{','.join(map(str, self.axes))}]"


@dataclasses.dataclass(frozen=True, eq=False)
class NeuronGroup:
    """Neurons of one layer or stream; neuron k of the group has one scale λ_k > 0.

    Rescaling multiplies the incoming slices by λ_k and divides the outgoing slices by it.

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
      reason: one sentence.
    """

    path: str
    axis: int | None
    operation: str
    source: str
    reason: str

    def __str__(self) -> str:
        axis = "" if self.axis is None else f" axis {self.axis}"
        where = f" at {self.source}" if self.source else ""
        return f"{self.path}{axis}: {self.reason}{where}"


@dataclasses.dataclass(frozen=True, eq=False)
class ArchSpec:
    """What may be rescaled in a network: static, printable, compared and hashed by identity.

    Build it once with ``trace_spec`` or ``chain_spec``; close over it or pass it as a static
    argument of ``jax.jit``. Outside of ``jit`` a second trace of the same network finds all
    compiled.

    Attributes:
      groups: the neuron groups in forward order.
      leaves: every leaf of the parameter tree, in flattening order.
      treedef: the structure of the parameter tree.
      pinned: what may not be rescaled, and why.
      program: the traced network, which path lifting runs on one example; None if there is none.
      apply_fn: the network as a function; None if there is none.
      example_inputs: the shapes and dtypes of the inputs after the parameters.
      max_pool: how path lifting treats max pooling, ``"paths"`` or ``"max"``.
    """

    groups: tuple[NeuronGroup, ...]
    leaves: tuple[Leaf, ...]
    treedef: Any
    pinned: tuple[Pinned, ...] = ()
    program: Any = None
    max_pool: str = "paths"
    apply_fn: Callable[..., Any] | None = None
    example_inputs: tuple[PyTree, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.groups, (tuple, list)) or not all(
            isinstance(group, NeuronGroup) for group in self.groups
        ):
            raise SpecError(f"groups is a sequence of NeuronGroup, not {self.groups!r}")
        object.__setattr__(self, "groups", tuple(self.groups))
        for group in self.groups:
            _check_group(group, self._by_path)

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
    def _by_path(self) -> dict[str, Leaf]:
        return {leaf.path: leaf for leaf in self.leaves}

    def leaf(self, path: str) -> Leaf:
        """The leaf at ``path``.

        Raises:
          SpecError: the tree has no such leaf.
        """
        if path not in self._by_path:
            raise SpecError(f"no parameter {path!r}; the tree has {_some(self._by_path)}")
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

    def __str__(self) -> str:
        return _table(self)

    __repr__ = __str__


_SYMMETRIES: weakref.WeakValueDictionary[Any, ArchSpec] = weakref.WeakValueDictionary()


def _contents(group: NeuronGroup) -> tuple[Any, ...]:
    """What a group is made of, to be compared by value."""
    sides = [
        tuple((i.path, i.axes, i.index.shape, i.index.tobytes()) for i in side)
        for side in (group.incoming, group.outgoing)
    ]
    return group.name, group.size, *sides


def is_traced(value: Any) -> bool:
    """Whether a transformation of JAX is tracing the value, so that it is not known yet."""
    return isinstance(value, jax.core.Tracer)


def compute_dtype(*dtypes: Any) -> Any:
    """The dtype to compute on values of these dtypes in: the widest float, at least float32."""
    # jnp.promote_types refuses mixed floats where the user has asked for strict promotion.
    floats = [jnp.dtype(d) for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return max([jnp.dtype(jnp.float32), *floats], key=lambda d: jnp.finfo(d).bits)


def leaf_path(key_path: Any) -> str:
    """The name of a leaf, keys joined by ``/``; the array of a Flax nnx variable goes by its."""
    last = key_path[-1] if len(key_path) > 1 else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def layer_path(path: str) -> str:
    """The layer that the leaf at ``path`` belongs to; "" if the tree is flat."""
    return path.rpartition("/")[0]


def no_neuron(spec: ArchSpec) -> str:
    """Why a spec without groups has none, in one sentence for an error."""
    # Every network pins its inputs and outputs; what operations pin tells more.
    between = [pin for pin in spec.pinned if pin.operation]
    telling = {(pin.reason, pin.source): pin for pin in reversed(between or spec.pinned)}
    reasons = [str(pin) for pin in reversed(telling.values())]
    shown = "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if reasons[4:] else "")
    return (
        f"the network has no neuron to rescale{f' ({shown})' if shown else ''}; a neuron is a unit "
        "between two trainable layers, behind an activation that scales pass, such as relu"
    )


def describe_leaves(
    params: PyTree, trainable: Callable[[str], bool] | PyTree | None = None
) -> tuple[tuple[Leaf, ...], Any]:
    """The leaves and structure of a parameter tree of arrays or shapes.

    Args:
      params: a pytree of arrays or ``jax.ShapeDtypeStruct``.
      trainable: None: floating leaves, and only those under ``"params"`` if the tree is a
        mapping with that key, and of Flax nnx variables those of ``Param``. A function of the
        leaf's path, or a pytree prefix of booleans.

    Returns:
      The leaves in flattening order, and the tree structure.

    Raises:
      SpecError: a leaf is no array, or one declared trainable is not of floating dtype.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [leaf_path(key) for key, _ in flat]
    declared = _declared_trainable(params, trainable, paths)
    leaves = []
    for path, (_, value), chosen in zip(paths, flat, declared, strict=True):
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            if not isinstance(value, (bool, int, float, complex)):
                raise SpecError(
                    f"parameter {path!r} is no array, but of type {type(value).__name__}; pass the "
                    "arrays of your model only (equinox.partition, flax.nnx.split) and let "
                    "apply_fn close over the rest"
                )
            value = jax.eval_shape(jnp.asarray, value)
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        if chosen and not floating and trainable is not None:
            raise SpecError(
                f"parameter {path!r} has dtype {value.dtype}; only floats can be trainable: cast "
                "it or leave it out of `trainable`"
            )
        leaves.append(Leaf(path, tuple(value.shape), value.dtype, bool(chosen and floating)))
    if not any(leaf.trainable for leaf in leaves):
        found = ", ".join(f"{leaf.path}: {leaf.dtype}" for leaf in leaves[:4]) or "no array at all"
        raise SpecError(
            f"the parameter tree has no trainable floating-point leaf; it has {found}. Cast "
            "integers to floats, and see that `trainable`, where given, selects something"
        )
    return tuple(leaves), treedef


def match_leaves(spec: ArchSpec, tree: PyTree, what: str = "params") -> list[Any]:
    """The leaves of ``tree`` in the order of ``spec.leaves``.

    Raises:
      SpecError: the structure or a shape differs from the spec's, or a trainable leaf is no float.
    """
    if not isinstance(spec, ArchSpec):
        raise SpecError(
            f"spec must be an ArchSpec, not of type {type(spec).__name__}; the arguments are "
            f"({what}, spec)"
        )
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    if treedef != spec.treedef:
        raise SpecError(
            f"{what} has another structure than the tree the spec was built from: "
            f"{_difference([leaf_path(k) for k, _ in flat], treedef, spec)}"
        )
    shapes = [np.shape(value) for _, value in flat]
    for leaf, shape, (_, value) in zip(spec.leaves, shapes, flat, strict=True):
        if shape != leaf.shape:
            raise SpecError(
                f"{what}: {leaf.path!r} has shape {shape}, the spec was built for {leaf.shape}"
                + _stacked(shapes, spec)
            )
        if leaf.trainable and not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise SpecError(
                f"{what}: {leaf.path!r} has dtype {jnp.result_type(value)}; floats are needed"
            )
    return [value for _, value in flat]


def _difference(paths: Sequence[str], treedef: Any, spec: ArchSpec) -> str:
    """What makes a tree another one than the spec's."""
    known = list(spec._by_path)
    if known == [f"params/{path}" for path in paths]:
        return 'it is the contents of "params"; pass the whole tree, {"params": ...}'
    if paths == [f"params/{path}" for path in known]:
        return 'it is wrapped in {"params": ...}; pass what is inside'
    missing = [path for path in known if path not in set(paths)]
    extra = [path for path in paths if path not in spec._by_path]
    if not missing and not extra:
        return f"the same leaves in other containers, {treedef} instead of {spec.treedef}"
    named = (("missing", missing), ("unexpected", extra))
    return "; ".join(f"{word} {_some(names)}" for word, names in named if names)


def _stacked(shapes: Sequence[tuple[int, ...]], spec: ArchSpec) -> str:
    """A hint where every leaf has one more leading axis."""
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) > 1 or any(
        shape[1:] != leaf.shape for shape, leaf in zip(shapes, spec.leaves, strict=True)
    ):
        return ""
    return f"; every leaf has a leading axis of {shapes[0][0]}: map over it with jax.vmap"


def _declared_trainable(params: PyTree, trainable: Any, paths: Sequence[str]) -> list[bool]:
    if trainable is None:
        if isinstance(params, Mapping) and "params" in params:
            return [path == "params" or path.startswith("params/") for path in paths]
        return _not_state(params)
    if callable(trainable):
        return [bool(trainable(path)) for path in paths]
    for key, flag in jax.tree_util.tree_leaves_with_path(trainable):
        if not isinstance(flag, (bool, np.bool_)):
            where = f" at {leaf_path(key)!r}" if key else ""
            raise SpecError(
                "trainable is a function of a leaf's path, or a pytree prefix of booleans; it has "
                f"{flag!r}{where}"
            )
    try:
        full = jax.tree.map(
            lambda flag, sub: jax.tree.map(lambda _: bool(flag), sub), trainable, params
        )
        return jax.tree.leaves(full)
    except ValueError as error:
        raise SpecError(f"trainable is no prefix of the parameter tree: {error}") from None


def _not_state(params: PyTree) -> list[bool]:
    """False for the leaves of Flax nnx variables other than ``Param``, such as ``BatchStat``."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return [True] * len(jax.tree.leaves(params))
    variables = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return [
        not isinstance(variable, nnx.Variable) or isinstance(variable, nnx.Param)
        for variable in variables
        for _ in jax.tree.leaves(variable)
    ]


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
                raise SpecError(f"{where}: no such parameter; the tree has {_some(leaves)}")
            if not (leaf.trainable or leaf.state):
                raise SpecError(f"{where}: the parameter is not trainable")
            if len(set(incidence.axes)) < len(incidence.axes) or any(
                not 0 <= a < len(leaf.shape) for a in incidence.axes
            ):
                raise SpecError(
                    f"{where}: the parameter has shape {leaf.shape}; its axes are "
                    f"{_some(range(len(leaf.shape)))}, each once at most"
                )
            expected = tuple(leaf.shape[a] for a in incidence.axes)
            if incidence.index.shape != expected:
                raise SpecError(
                    f"{where}: index has shape {incidence.index.shape}, not {expected}, that of "
                    f"the parameter {leaf.shape} along these axes"
                )
            if ((incidence.index < -1) | (incidence.index >= group.size)).any():
                raise SpecError(f"{where}: index outside -1..{group.size - 1}")


def _some(names: Any, limit: int = 6) -> str:
    names = list(names)
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _table(spec: ArchSpec) -> str:
    head = ("group", "size", "incoming [axis]", "outgoing [axis]")
    rows = [
        (
            group.name,
            str(group.size),
            ", ".join(map(str, group.incoming)),
            ", ".join(map(str, group.outgoing)),
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
        lines += ["pinned:", *(f"  {pin}" for pin in spec.pinned)]
    return "\n".join(lines)
