"""The trees of an optimizer leaf by leaf: what they hold of a spec's, and where the rest is.

An optimizer sees a part of what a spec was built from, in containers of its own: Flax's
``TrainState`` the contents of ``"params"``, ``nnx.Optimizer`` variables at ``init`` and arrays at
``update``. So leaves are matched by path; what is not trained comes as extra arguments of
``update``.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import check_leaf, leaf_path, leaf_positions
from pathcond_jax._spec.types import PyTree, SpecError, listed

Values = Mapping[int, Any]
"""Arrays by their position in ``spec.leaves``."""


def held(spec: ArchSpec, tree: PyTree, what: str) -> tuple[int, ...]:
    """The positions in ``spec.leaves`` of the leaves of a tree of an optimizer.

    Raises:
      SpecError: a leaf is not the spec's, has another shape or is no float.
    """
    positions = leaf_positions(spec, tree, what)
    for position, value in zip(positions, jax.tree.leaves(tree), strict=True):
        check_leaf(spec.leaves[position], value, what)
    return positions


def check_all_held(spec: ArchSpec, positions: tuple[int, ...], tree: PyTree, what: str) -> None:
    """Raises SpecError if a group has a leaf that the optimizer cannot move."""
    lacking = {leaf.path for leaf in spec.leaves} - {spec.leaves[k].path for k in positions}
    for group in spec.groups:
        for incidence in (*group.incoming, *group.outgoing):
            if incidence.path in lacking:
                raise SpecError(
                    _masked(tree, what)
                    or f"{what} lacks {incidence.path!r}, which has to move with the neurons of "
                    f"group {group.name!r}: let the optimizer hold it, or build the spec with "
                    "trainable= (nnx_spec: wrt=) for what the optimizer trains, which pins them"
                )


def whole(spec: ArchSpec, values: Values) -> PyTree:
    """The spec's tree with these values, and zeros where there is none."""
    return jax.tree.unflatten(
        spec.treedef,
        [
            values[k] if k in values else jnp.zeros(leaf.shape, leaf.dtype)
            for k, leaf in enumerate(spec.leaves)
        ],
    )


class Completion:
    """Finds the values that a computation reads and an optimizer does not hold.

    Args:
      name: of the optax element, for messages.
      spec: the architecture.
      function: what is computed from the spec's tree.
    """

    def __init__(self, name: str, spec: ArchSpec, function: Callable[[PyTree], Any]) -> None:
        self._name, self._spec = name, spec
        self._reads = functools.cache(functools.partial(_reads, function, spec))

    def __call__(
        self, positions: tuple[int, ...], params: PyTree, extra: Mapping[str, Any]
    ) -> Values:
        """The values of leaves that are not among ``positions``, of the extra arguments.

        Raises:
          SpecError: one that is read is not given, or could be any of several.
        """
        lacking = set(range(len(self._spec.leaves))).difference(positions)
        given = _handed_over(self._spec, lacking, extra, self._name)
        unknown = tuple(sorted(lacking - set(given)))
        if unknown and self._reads(unknown):
            raise SpecError(_masked(params, "params") or self._not_given(unknown))
        return given

    def _not_given(self, positions: tuple[int, ...]) -> str:
        leaves = [self._spec.leaves[k] for k in positions]
        paths = [leaf.path for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        keyword = paths[0].partition("/")[0] if paths else ""
        # Names of arguments that ``update`` has already.
        keyword = keyword if keyword not in ("updates", "state", "params", "") else "batch_stats"
        return (
            f"{self._name} reads values that the optimizer does not hold, of {listed(paths)}: hand "
            f"the current ones over, update(updates, state, params, {keyword}=...)"
        )


def _handed_over(
    spec: ArchSpec, lacking: set[int], extra: Mapping[str, Any], name: str
) -> dict[int, Any]:
    """A value for each leaf that an extra argument has under its path, or the end of its path."""
    flat = [
        (keyword, leaf_path(key), value)
        for keyword, tree in extra.items()
        for key, value in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    given = {}
    for position in sorted(lacking):
        path = spec.leaves[position].path
        ends = [entry for entry in flat if _is_end(entry[1], path) or "/".join(entry[:2]) == path]
        longest = max((len(end) for _, end, _ in ends), default=0)
        found = [entry for entry in ends if len(entry[1]) == longest]
        if len(found) > 1:
            one, two = (f"{keyword}={end!r}" for keyword, end, _ in found[:2])
            raise SpecError(f"{name}: {path!r} could be {one} or {two}; give it once")
        for keyword, end, value in found:
            check_leaf(spec.leaves[position], value, f"{keyword}={end!r}")
            given[position] = value
    return given


def _is_end(end: str, path: str) -> bool:
    return bool(end) and f"/{path}".endswith(f"/{end}")


def _reads(function: Callable[[PyTree], Any], spec: ArchSpec, positions: tuple[int, ...]) -> bool:
    """Whether what is computed depends on the values of these leaves."""
    structs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in spec.leaves]
    batch = {k: jax.ShapeDtypeStruct((2, *structs[k].shape), structs[k].dtype) for k in positions}
    others = {k: struct for k, struct in enumerate(structs) if k not in batch}
    # What has no batch axis although these values have one does not depend on them.
    batched = jax.vmap(
        lambda others, values: function(whole(spec, {**others, **values})),
        in_axes=(None, 0),
        out_axes=None,
    )
    try:
        jax.eval_shape(batched, others, batch)
    except (ValueError, NotImplementedError):
        return True
    return False


def _masked(tree: PyTree, what: str) -> str:
    """A word about ``optax.masked`` where it took leaves away; "" elsewhere."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    masked = sum(isinstance(node, optax.MaskedNode) for node in nodes)
    if not masked:
        return ""
    return (
        f"{masked} of {len(nodes)} leaves of {what} are masked, and conditioning needs all of "
        "them: put this element after optax.masked or optax.partition instead of inside"
    )
