"""``pathcond inspect``: a user's own network, what may be rescaled, what conditioning does."""

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from rich.console import Console

import pathcond_jax as pathcond
from pathcond_jax import plotting


class UserError(Exception):
    """What the user gave cannot be used; the message is all there is to show."""


def main(target: str, picture: Path | None = None, console: Console | None = None) -> int:
    """Inspects the network that a user's function returns.

    Args:
      target: ``FILE:FACTORY``, a Python file and a function in it without arguments that returns
        ``apply_fn, params, example_input`` (or more inputs, for ``apply_fn(params, *inputs)``).
      picture: where to write the Gram diagonal before and after, as the suffix says.
      console: where to print.

    Returns:
      The exit status: 0, or 1 after an error has been shown.
    """
    console = console or Console()
    file, _, factory = target.rpartition(":")
    path = Path(file)
    try:
        if not file or not factory:
            raise UserError(f"{target!r} is not of the form FILE:FACTORY")
        apply_fn, params, inputs = _network(path, factory)
        spec = pathcond.trace_spec(apply_fn, params, *inputs)
        _show(console, params, spec, inputs, picture)
    except (UserError, pathcond.SpecError) as error:
        console.print(f"{target}: {error}", style="red", highlight=False, markup=False)
        return 1
    except Exception as error:
        shown = traceback.format_exception(type(error), error, theirs(error.__traceback__, path))
        console.print("".join(shown).rstrip(), highlight=False, markup=False, soft_wrap=True)
        return 1
    return 0


def theirs(trace: TracebackType | None, path: Path) -> TracebackType | None:
    """The traceback from the first line of the user's file on; None if it is in none."""
    while trace is not None and Path(trace.tb_frame.f_code.co_filename) != path.resolve():
        trace = trace.tb_next
    return trace


def _network(path: Path, factory: str) -> tuple[Any, Any, tuple[Any, ...]]:
    """Runs the user's function."""
    module = _module(path)
    function = getattr(module, factory, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value)]
        own = ", ".join(name for name in functions if not name.startswith("_")) or "none"
        raise UserError(f"{path} has no function {factory!r}; its functions: {own}")
    returned = function()
    if not isinstance(returned, tuple) or len(returned) < 3 or not callable(returned[0]):
        kind = type(returned).__name__
        if isinstance(returned, tuple):
            kind = f"({', '.join(type(item).__name__ for item in returned)})"
        raise UserError(
            f"{factory} must return apply_fn, params, example_input; it returned {kind}"
        )
    apply_fn, params, *inputs = returned
    return apply_fn, params, tuple(inputs)


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


def _show(
    console: Console,
    params: Any,
    spec: pathcond.ArchSpec,
    inputs: tuple[Any, ...],
    picture: Path | None,
) -> None:
    console.print(str(spec), highlight=False, markup=False, soft_wrap=True)
    console.print()
    if not spec.groups:
        console.print("No neuron can be rescaled: conditioning would do nothing.")
        return
    try:
        conditioned, solution = pathcond.condition(params, spec)
    except pathcond.NotPathLiftableError as error:
        console.print(f"{error}\n\nHere is what that would do:", highlight=False, markup=False)
        _, solution = pathcond.condition(params, spec, "enorm")
        score, picture = "none: the network is no sum over paths", None
    else:
        before, after = (float(pathcond.conditioning_score(p, spec)) for p in (params, conditioned))
        score = f"{before:.4g} → {after:.4g}   (0: all entries equal)"
    status = pathcond.Status(int(solution.status))
    change = pathcond.check_spec(spec, params, *inputs)
    lines = [
        f"conditioning score      {score}",
        f"solver                  {int(solution.num_steps)} steps, {status.name}",
        f"output under random λ   changes by {change:.1e} of its largest entry",
        "log-scales by group     smallest … largest",
    ]
    width = max(len(group.name) for group in spec.groups)
    for group, z in zip(spec.groups, solution.log_scales, strict=True):
        values = np.asarray(z, np.float64)
        lines.append(f"  {group.name:<{width}}  {values.min():+.3f} … {values.max():+.3f}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    table = str(pathcond.report(params, spec))
    console.print(f"\n{table}", highlight=False, markup=False, soft_wrap=True)
    if picture is not None:
        plotting.plot_gram(params, spec, conditioned).savefig(picture, dpi=150)
        console.print(f"\nWrote {picture}", highlight=False, soft_wrap=True)
