"""Modules of network libraries, given where a function or a tree of parameters belongs."""

import sys
from typing import Any, NamedTuple


class _Kind(NamedTuple):
    """A class of modules: its library, its name, and what to give instead of a module."""

    library: str
    name: str
    function: str
    params: str


_KINDS = (
    _Kind(
        *("flax.nnx", "Module"),
        function="call nnx_spec(model, *inputs)",
        params="call condition_nnx(model, *inputs), or pass nnx_variables(model) and "
        "nnx_spec(model, *inputs)",
    ),
    _Kind(
        *("flax.linen", "Module"),
        function="pass model.apply and its variables",
        params="pass its variables, which model.init returns",
    ),
    _Kind(
        *("keras", "Model"),
        function="pass a function that calls model.stateless_call, and its variables",
        params="pass [variable.value for variable in model.trainable_variables]",
    ),
)


def instead_of_function(given: Any) -> str:
    """What to do instead of passing a module as ``apply_fn``; "" if it is none."""
    return next((f"it is a {_named(kind)}: {kind.function}" for kind in _kinds(given)), "")


def instead_of_params(given: Any) -> str:
    """What to do instead of passing a module as parameters; "" if it is none."""
    return next((f"it is a {_named(kind)}: {kind.params}" for kind in _kinds(given)), "")


def _kinds(given: Any) -> list[_Kind]:
    # Whoever has a module has imported its library.
    loaded = [(sys.modules.get(kind.library), kind) for kind in _KINDS]
    return [kind for library, kind in loaded if isinstance(given, getattr(library, kind.name, ()))]


def _named(kind: _Kind) -> str:
    return f"{kind.library} {kind.name.lower()}"
