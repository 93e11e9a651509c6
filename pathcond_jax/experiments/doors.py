"""Networks of a user's: a function in a file that returns one of any library, and checkpoints."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
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


def opened(target: str, checkpoint: Path | None = None) -> Network:
    """The network that a function in a user's file returns.

    Args:
      target: ``FILE:FACTORY``, a Python file and a function in it without arguments that returns
        ``apply_fn, params, example_input`` (or more inputs, for ``apply_fn(params, *inputs)``), or
        a Flax, Equinox or Keras module and its inputs.
      checkpoint: a folder written by Orbax, whose parameters take the place of those returned.

    Raises:
      UserError: there is no such file, function or checkpoint, or it returns something else.
    """
    file, _, factory = target.rpartition(":")
    if not file or not factory:
        raise UserError(f"{target!r} is not of the form FILE:FACTORY")
    module = _module(Path(file))
    function = getattr(module, factory, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value)]
        own = ", ".join(name for name in functions if not name.startswith("_")) or "none"
        raise UserError(f"{file} has no function {factory!r}; its functions: {own}")
    found = network(function(), factory)
    return found if checkpoint is None else restored(found, checkpoint)


def in_their_file(error: Exception, target: str) -> str:
    """An error with its lines from the first of the user's file on; without lines if in none."""
    path, trace = Path(target.rpartition(":")[0]).resolve(), error.__traceback__
    while trace is not None and Path(trace.tb_frame.f_code.co_filename) != path:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _module(path: Path) -> ModuleType:
    """Imports a file; what lies beside it can be imported too."""
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    # Dataclasses and Flax modules look their module up by name.
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        if before is not None:
            sys.modules[path.stem] = before
    return module


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
