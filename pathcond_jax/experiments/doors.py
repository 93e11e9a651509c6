"""What ``pathcond inspect`` accepts: networks of each library, and checkpoints of parameters."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import pathcond_jax as pathcond


class UserError(Exception):
    """What the user gave cannot be used; the message is all there is to show."""


class Network(NamedTuple):
    """A network, whatever library it is of.

    Attributes:
      params: the parameters.
      spec: what may be rescaled in them.
      inputs: example inputs.
    """

    params: Any
    spec: pathcond.ArchSpec
    inputs: tuple[Any, ...]


class Door(NamedTuple):
    """How modules of one library become a network.

    Attributes:
      library: the module that has the class; a user's file that returns one has imported it.
      kind: the name of the class.
      enter: from the module and what was returned after it to the network.
    """

    library: str
    kind: str
    enter: Callable[[Any, Sequence[Any]], Network]


def _traced(apply_fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Network:
    return Network(params, pathcond.trace_spec(apply_fn, params, *inputs), tuple(inputs))


def _linen(model: Any, rest: Sequence[Any]) -> Network:
    if isinstance(rest[0], Mapping) and "params" in rest[0]:
        return _traced(model.apply, rest[0], rest[1:])
    key = jax.random.key(0)
    return _traced(model.apply, model.init({"params": key, "dropout": key}, *rest), rest)


def _nnx(model: Any, rest: Sequence[Any]) -> Network:
    spec = pathcond.nnx_spec(model, *rest)
    return Network(pathcond.nnx_variables(model), spec, tuple(rest))


def _equinox(model: Any, rest: Sequence[Any]) -> Network:
    import equinox as eqx

    params, static = eqx.partition(model, eqx.is_inexact_array)
    return _traced(lambda params, *inputs: eqx.combine(params, static)(*inputs), params, rest)


def _keras(model: Any, rest: Sequence[Any]) -> Network:
    parts = {"params": model.trainable_variables, "state": model.non_trainable_variables}
    # JAX sorts a dictionary; its keys come back in the model's order.
    orders = {part: _names(own) for part, own in parts.items()}
    variables = {
        part: dict(zip(orders[part], [variable.value for variable in own], strict=True))
        for part, own in parts.items()
    }

    def apply_fn(variables: Any, *inputs: Any) -> Any:
        listed = [[variables[part][path] for path in order] for part, order in orders.items()]
        return model.stateless_call(*listed, *inputs, training=False)[0]

    return _traced(apply_fn, variables, rest)


def _names(variables: Sequence[Any]) -> list[str]:
    """Of Keras variables; layers of one name need numbers to tell them apart."""
    paths = [variable.path for variable in variables]
    repeated = len({*paths}) < len(paths)
    return [f"{path}#{number}" if repeated else path for number, path in enumerate(paths)]


DOORS = (
    Door("flax.linen", "Module", _linen),
    Door("flax.nnx", "Module", _nnx),
    Door("equinox", "Module", _equinox),
    Door("keras", "Model", _keras),
)


def network(returned: Any, factory: str) -> Network:
    """The network that a user's function returned.

    Raises:
      UserError: it returned something else.
    """
    if isinstance(returned, tuple) and len(returned) > 1:
        model, *rest = returned
        for door in DOORS:
            library = sys.modules.get(door.library)
            if library is not None and isinstance(model, getattr(library, door.kind)):
                return door.enter(model, rest)
        if callable(model) and len(rest) > 1:
            return _traced(model, rest[0], rest[1:])
    kind = type(returned).__name__
    if isinstance(returned, tuple):
        kind = f"({', '.join(type(item).__name__ for item in returned)})"
    raise UserError(
        f"{factory} must return apply_fn, params, example_input, or a module of Flax, Equinox or "
        f"Keras and an example input; it returned {kind}"
    )


def restored(found: Network, folder: Path) -> Network:
    """The network with the parameters of an Orbax checkpoint, found by their paths.

    Raises:
      UserError: there is no checkpoint, or it lacks a parameter or has it in another shape.
    """
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder}")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder.resolve())
    saved = {
        jax.tree_util.keystr(path, simple=True, separator="/"): value
        for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    leaves, treedef = jax.tree.flatten(found.params)
    values = [
        _saved(saved, leaf, folder, value)
        for leaf, value in zip(found.spec.leaves, leaves, strict=True)
    ]
    return found._replace(params=jax.tree.unflatten(treedef, values))


def _saved(saved: Mapping[str, Any], leaf: pathcond.Leaf, folder: Path, value: Any) -> Any:
    """The value of a leaf: parameters may lie in a train state, variables of nnx below "value".

    What is not trained, such as keys of random numbers, may be missing.
    """
    inner = leaf.path.partition("/")[2]
    for path in (leaf.path, f"params/{leaf.path}", inner):
        for spelling in (path, f"{path}/value"):
            if spelling in saved:
                if np.shape(saved[spelling]) != leaf.shape:
                    raise UserError(
                        f"{leaf.path} has shape {leaf.shape}, and {np.shape(saved[spelling])} in "
                        f"the checkpoint {folder}"
                    )
                return saved[spelling]
    if not leaf.trainable:
        return value
    first = ", ".join(list(saved)[:8])
    raise UserError(f"the checkpoint {folder} has no {leaf.path}; it has {first}, …")
