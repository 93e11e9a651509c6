"""Where an operation comes from: the user's line, and what the operation is part of.

A traceback runs from where JAX binds the primitive, through the functions of JAX and the layers of
network libraries, out to the user's function. Whose a frame is follows from the folder of its file:
the user's files are those that are not installed.
"""

import enum
import functools
import itertools
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

# Here programs are traced: beyond are those who ask for it.
_TRACING = os.path.dirname(os.path.abspath(__file__)) + os.sep
# Libraries of layers: their lines say nothing about a model that is an installed package itself.
_FRAMEWORKS = (
    *("jaxlib", "flax", "haiku", "equinox", "optax", "chex", "numpy", "keras", "einops", "penzai"),
    "pathcond_jax",
)
# Files in which JAX enters functions of its user's.
_CALL_BOUNDARY = (
    *("pjit.py", "custom_derivatives.py", "ad_checkpoint.py", "loops.py", "conditionals.py"),
)
# Files in which JAX binds primitives and enters jitted functions.
_MACHINERY = (
    *("source_info_util.py", "core.py", "partial_eval.py", "batching.py", "api.py", "api_util.py"),
    *("traceback_util.py", "linear_util.py", "profiler.py", "util.py"),
    *_CALL_BOUNDARY,
)
# Files whose functions say no more than the primitives that they bind.
_PLUMBING = ("ufuncs.py", "array_methods.py", "ufunc_api.py")
# What the names of code begin with that was made while the program ran.
_GENERATED = ("<frozen", "<@", "<attrs", "<makefun", "<decorator")
# Methods that a user knows by their class.
_CALLS = ("__call__", "call")


class Origin(NamedTuple):
    """Where an operation comes from; "" stands for what there is not.

    Attributes:
      line: the user's line, ``"file.py:12 (function)"``.
      activation: the outermost function of ``jax.nn`` that runs the operation.
      layer: the innermost layer of a library, by its class.
      function: the function of a library or of ``jax.numpy``.
    """

    line: str = ""
    activation: str = ""
    layer: str = ""
    function: str = ""

    @property
    def name(self) -> str:
        """What the operation is part of, as its user calls it."""
        return self.activation or self.layer or self.function

    def inside(self, call: "Origin") -> "Origin":
        """The origin of an operation in a function that is called at ``call``."""
        return Origin(
            self.line or call.line,
            call.activation or self.activation,
            self.layer or call.layer,
            call.function or self.function,
        )


class _Owner(enum.Enum):
    """Whose a file is."""

    JAX = enum.auto()
    PYTHON = enum.auto()
    FRAMEWORK = enum.auto()
    PACKAGE = enum.auto()
    USER = enum.auto()


def origin_of(source_info: Any, call: Origin | None = None) -> Origin:
    """Where an equation comes from.

    The line is the innermost one of the user's; if there is none, the innermost one of the
    installed package that holds the model.

    Args:
      source_info: of the equation.
      call: where the function is called that the equation is in. Such functions are traced once
        and shared, so that lines outside of the function may be those of an earlier call.
    """
    found = getattr(source_info, "traceback", None)
    frames = list(itertools.dropwhile(_binds, found.frames)) if found else []
    origin = Origin()
    for frame in frames:
        if frame.file_name.startswith(_TRACING):
            break
        file, owner = _name(frame.file_name), _owner(frame.file_name)
        line = f"{file}:{frame.line_num} ({frame.function_name})"
        if owner is _Owner.USER:
            origin = origin._replace(line=line)
            break
        if owner is _Owner.JAX:
            if call is not None and file in _CALL_BOUNDARY:
                break
            origin = _in_jax(origin, file, frame.function_name)
        elif owner is not _Owner.PYTHON:
            origin = _in_library(origin, frame.function_name)
            if owner is _Owner.PACKAGE:
                origin = origin._replace(line=origin.line or line)
    return origin.inside(call) if call is not None else origin


def calling_line() -> str:
    """The innermost line of the user's that is running now, or ""."""
    for frame, number in traceback.walk_stack(None):
        code = frame.f_code
        if _owner(code.co_filename) is _Owner.USER:
            return f"{os.path.basename(code.co_filename)}:{number} ({code.co_qualname})"
    return ""


def name_of_call(name: str) -> str:
    """The name of a jitted function if it is one of ``jax.nn``, else ""."""
    return name if name in _activations() else ""


def _binds(frame: Any) -> bool:
    """Whether a frame only binds a primitive or enters a function."""
    return _name(frame.file_name) in _MACHINERY and _owner(frame.file_name) is _Owner.JAX


def _in_jax(origin: Origin, file: str, name: str) -> Origin:
    # Beyond a layer, JAX runs the layer, not the operation.
    if origin.layer:
        return origin
    if name in _activations():
        return origin._replace(activation=name)
    if name in _array_functions() and file not in _PLUMBING:
        return origin._replace(function=name)
    return origin


def _in_library(origin: Origin, name: str) -> Origin:
    *outer, last = name.split(".")
    if "<locals>" in outer:
        return origin
    if last in _CALLS and outer and not outer[-1].startswith("_"):
        return origin._replace(layer=origin.layer or outer[-1])
    public = not outer and not last.startswith(("_", "<"))
    return origin._replace(function=origin.function or last) if public else origin


@functools.cache
def _name(file: str) -> str:
    return os.path.basename(file)


@functools.cache
def _activations() -> frozenset[str]:
    return _functions_of([jax.nn])


@functools.cache
def _array_functions() -> frozenset[str]:
    return _functions_of([jax.numpy, jax.numpy.linalg, jax.numpy.fft, jax.scipy.special])


def _functions_of(modules: Iterable[Any]) -> frozenset[str]:
    return frozenset(
        name
        for module in modules
        for name in dir(module)
        if not name.startswith("_")
        and callable(getattr(module, name))
        and not isinstance(getattr(module, name), type)
    )


@functools.cache
def _owner(file: str) -> _Owner:
    # A framework that a frame comes from is imported by then.
    if file.startswith(_folders_of(["jax"])):
        return _Owner.JAX
    if file.startswith(_folders_of(_FRAMEWORKS)):
        return _Owner.FRAMEWORK
    if file.startswith(_GENERATED):
        return _Owner.PYTHON
    if {"site-packages", "dist-packages"} & set(os.path.normpath(file).split(os.sep)):
        return _Owner.PACKAGE
    if file.startswith(_installed()):
        return _Owner.PACKAGE
    return _Owner.PYTHON if file.startswith(_interpreter()) else _Owner.USER


def _folders_of(modules: Iterable[str]) -> tuple[str, ...]:
    files = [getattr(sys.modules.get(name), "__file__", None) for name in modules]
    return tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in files if file)


@functools.cache
def _installed() -> tuple[str, ...]:
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    folders |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(folder + os.sep for folder in folders)


@functools.cache
def _interpreter() -> tuple[str, ...]:
    """The standard library, and the commands that installing a package writes."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "scripts")}
    return tuple(folder + os.sep for folder in folders)
