"""Where an operation comes from: the user's line, and the library function it is part of."""

import functools
import os
import sys
from typing import Any

_LIBRARIES = ("jax", "jaxlib", "flax", "haiku", "equinox", "optax", "chex", "numpy", "pathcond_jax")


def _library_folders() -> tuple[str, ...]:
    """Folders whose frames are not the user's: this package and the network libraries."""
    # Which of them are imported changes while a program runs.
    return _folders_of(tuple(name for name in _LIBRARIES if name in sys.modules))


@functools.cache
def _folders_of(modules: tuple[str, ...]) -> tuple[str, ...]:
    files = [getattr(sys.modules[name], "__file__", None) for name in modules]
    return tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in files if file)


# Files in which JAX binds primitives and enters jitted functions.
_MACHINERY = (
    *("source_info_util.py", "core.py", "partial_eval.py", "pjit.py", "api.py", "api_util.py"),
    *("custom_derivatives.py", "traceback_util.py", "linear_util.py", "profiler.py", "util.py"),
)
# Files whose functions are the operations themselves.
_PLUMBING = (*_MACHINERY, "lax.py", "ufuncs.py", "array_methods.py", "ufunc_api.py", "slicing.py")
_CALL_BOUNDARY = ("pjit.py", "custom_derivatives.py", "ad_checkpoint.py")


def origin_of(eqn: Any, caller: tuple[str, str] | None) -> tuple[str, str]:
    """The user's line and the library function of an operation, or those of its call."""
    line, function = user_line(eqn.source_info, within_call=caller is not None)
    return (line, function) if line or caller is None else (caller[0], function or caller[1])


def user_line(source_info: Any, within_call: bool = False) -> tuple[str, str]:
    """Where an operation comes from.

    Args:
      source_info: of the equation.
      within_call: the equation is inside a jitted function. Such functions are traced once and
        shared, so that lines outside of the function may be those of an earlier call.

    Returns:
      The innermost line of the equation's traceback that is not a library's, and the innermost
      public library function that this line runs; "" where there is none.
    """
    traceback = getattr(source_info, "traceback", None)
    frames = traceback.frames if traceback else []
    files = [os.path.basename(frame.file_name) for frame in frames]
    bound = next((k for k, name in enumerate(files) if name not in _MACHINERY), 0)
    libraries, function = _library_folders(), ""
    for frame, name in zip(frames[bound:], files[bound:], strict=True):
        if within_call and name in _CALL_BOUNDARY:
            return "", function
        if frame.file_name.startswith(libraries) or name in ("contextlib.py", "functools.py"):
            if not function and name not in _PLUMBING:
                function = public_name(frame.function_name)
        elif not frame.file_name.startswith("<frozen"):
            return f"{name}:{frame.line_num} ({frame.function_name})", function
    return "", ""


def public_name(function: str) -> str:
    """What a user calls a library function, such as a layer by its class; "" if nothing."""
    *outer, name = function.split(".")
    if name == "__call__" and outer:
        name = outer[-1]
    return "" if name.startswith(("_", "<")) or "<locals>" in outer else name
