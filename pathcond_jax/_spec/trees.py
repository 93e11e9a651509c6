"""Parameter trees: names of leaves, which are trained, and whether a tree fits a spec."""

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._spec.modules import instead_of_params
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import Leaf, PyTree, SpecError, listed


def leaf_path(key_path: Any) -> str:
    """The name of a leaf, keys joined by ``/``; the array of a Flax nnx variable goes by its."""
    last = key_path[-1] if len(key_path) > 1 else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def layer_path(path: str) -> str:
    """The layer that the leaf at ``path`` belongs to; "" if the tree is flat."""
    return path.rpartition("/")[0]


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
      SpecError: a leaf is no array, one declared trainable is not of floating dtype, or two have
        paths that read alike.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [leaf_path(key) for key, _ in flat]
    _check_distinct(paths, [key for key, _ in flat])
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
        why = instead_of_params(tree) or _difference([leaf_path(k) for k, _ in flat], treedef, spec)
        raise SpecError(
            f"{what} has another structure than the tree the spec was built from: {why}"
        )
    values = [value for _, value in flat]
    for leaf, value in zip(spec.leaves, values, strict=True):
        check_leaf(leaf, value, what, lambda: _stacked([np.shape(v) for v in values], spec))
    return values


def _check_distinct(paths: Sequence[str], keys: Sequence[Any]) -> None:
    first: dict[str, Any] = {}
    for path, key in zip(paths, keys, strict=True):
        if path in first:
            one, two = (jax.tree_util.keystr(k) for k in (first[path], key))
            raise SpecError(
                f"two leaves of the parameter tree read {path!r}, params{one} and params{two}; "
                'rename one of them, without a "/" in the key'
            )
        first[path] = key


def check_leaf(
    leaf: Leaf, value: Any, what: str = "params", hint: Callable[[], str] = lambda: ""
) -> None:
    """Raises SpecError if ``value`` cannot stand for ``leaf``.

    Args:
      leaf: the leaf that the spec was built for.
      value: an array.
      what: the name of the tree that it comes from.
      hint: what to add to the message about another shape.
    """
    if np.shape(value) != leaf.shape:
        raise SpecError(
            f"{what}: {leaf.path!r} has shape {np.shape(value)}, the spec was built for "
            f"{leaf.shape}{hint()}"
        )
    if leaf.trainable and not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise SpecError(
            f"{what}: {leaf.path!r} has dtype {jnp.result_type(value)}; floats are needed"
        )


def leaf_positions(spec: ArchSpec, tree: PyTree, what: str = "params") -> tuple[int, ...]:
    """Where the leaves of a tree that holds a part of the spec's stand in ``spec.leaves``.

    Leaves are matched by path, whatever the containers: the tree may be the contents of one of
    the spec's subtrees, such as ``"params"``, or have the spec's tree inside, and may lack leaves.

    Args:
      spec: the architecture.
      tree: a pytree, of arrays or anything else.
      what: its name in messages.

    Returns:
      One position for each leaf of ``tree``, in flattening order.

    Raises:
      SpecError: a leaf is not in the spec, or the paths fit several of its subtrees.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    if treedef == spec.treedef:
        return tuple(range(len(flat)))
    paths = [leaf_path(key) for key, _ in flat]
    known = {leaf.path: position for position, leaf in enumerate(spec.leaves)}
    fitting = {}
    for root in _roots(paths[:1], known):
        place = [known.get(_below(root, path), -1) for path in paths]
        if -1 not in place and len(set(place)) == len(place):
            fitting[root] = tuple(place)
    if _AS_IT_IS in fitting:
        return fitting[_AS_IT_IS]
    # Beside the parameters there may be a copy of them, or their statistics, under the same names.
    trained = [p for p in fitting.values() if all(spec.leaves[k].trainable for k in p)]
    places = sorted(trained or fitting.values())
    if len(places) > 1:
        could_be = " or ".join(repr(spec.leaves[place[0]].path) for place in places[:2])
        raise SpecError(
            f"{what}: {paths[0]!r} could be {could_be} of the tree the spec was built from; pass a "
            "tree that has more of the path"
        )
    if not places and paths:
        roots = sorted(_roots(paths, known)) or [_AS_IT_IS]
        nearest = max(roots, key=lambda root: sum(_below(root, path) in known for path in paths))
        raise SpecError(
            f"{what} has another structure than the tree the spec was built from: "
            f"{_difference([_below(nearest, path) for path in paths], treedef, spec)}"
        )
    return places[0] if places else ()


# What is taken off the front of a path, and what is put there instead.
_Root = tuple[str, str]
_AS_IT_IS: _Root = ("", "")


def _roots(paths: Sequence[str], known: Iterable[str]) -> set[_Root]:
    """What makes one of the paths a known one."""
    roots = set()
    for path, other in itertools.product(paths, known):
        if f"/{other}".endswith(f"/{path}"):
            roots.add(("", other[: len(other) - len(path)]))
        elif path.endswith(f"/{other}"):
            roots.add((path[: len(path) - len(other)], ""))
    return roots


def _below(root: _Root, path: str) -> str:
    removed, added = root
    return added + path.removeprefix(removed)


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
    return "; ".join(f"{word} {listed(names)}" for word, names in named if names)


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
