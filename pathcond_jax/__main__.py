"""The console command ``pathcond``: one table of subcommands."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pathcond_jax import __version__
from pathcond_jax.experiments import sizes


class Command(NamedTuple):
    """A subcommand.

    Attributes:
      summary: one line for ``--help``.
      add_arguments: declares its arguments.
      run: runs it; imports what it needs, so that the rest works without the extras.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed and one learning rate: about 15 seconds"
    )


def _run_demo(arguments: argparse.Namespace) -> None:
    from pathcond_jax.experiments import demo

    demo.main(arguments.out, arguments.quick)


def _add_reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a study; list: show them")
    parser.add_argument("--quick", action="store_true", help="a small grid, within a minute")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), metavar="DIR", help="default: results"
    )
    parser.add_argument("--dataset", metavar="NAME", help="instead of the paper's, such as digits")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where CIFAR-10, MNIST and Fashion-MNIST lie (default: where Debian's package puts "
        "the last one, else data)",
    )
    for title, options in _REPLACED.items():
        group = parser.add_argument_group(title)
        for name, size in options.items():
            group.add_argument(
                sizes.flag(name), dest=name, type=size.read, metavar=size.metavar, help=size.meaning
            )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--fresh", action="store_true", help="run again what is finished")


_REPLACED = {
    "instead of the sizes of the study, where it has them": sizes.SIZES,
    "instead of the networks that quantize and prune train": sizes.OWN,
}


def _run_reproduce(arguments: argparse.Namespace) -> int:
    from pathcond_jax.experiments import doors, reproduce, sources, study

    if arguments.name == "list":
        width = max(map(len, reproduce.STUDIES))
        for name, summary in reproduce.STUDIES.items():
            print(f"{name:<{width}}  {summary}")
        return 0
    given = {k: v for k, v in vars(arguments).items() if k != "command"}
    asked = {name: given.pop(name) for options in _REPLACED.values() for name in options}
    asked = {name: value for name, value in asked.items() if value is not None}
    try:
        reproduce.main(**given, sizes=asked)
    except (sources.DataError, study.UsageError, doors.UserError) as error:
        print(f"pathcond reproduce {arguments.name}: {error}", file=sys.stderr)
        return 1
    return 0


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="FILE:FACTORY",
        help="a Python file and its function that returns apply_fn, params, example_input, or a "
        "Flax, Equinox or Keras module and an example input",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the Gram diagonal before and after"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write all of it as one page for a browser"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="take the parameters from a folder written by Orbax",
    )


def _run_inspect(arguments: argparse.Namespace) -> int:
    from pathcond_jax.experiments import inspection

    return inspection.main(
        arguments.target, arguments.picture, arguments.html, arguments.checkpoint
    )


def _run_operations(arguments: argparse.Namespace) -> None:
    del arguments
    from pathcond_jax import operations

    print(operations())


COMMANDS = {
    "demo": Command(
        "train two networks on digits, before and after conditioning",
        _add_run_arguments,
        _run_demo,
    ),
    "reproduce": Command(
        "run a study, and write its numbers and its figure",
        _add_reproduce_arguments,
        _run_reproduce,
    ),
    "inspect": Command(
        "show what may be rescaled in your network, and what it would do",
        _add_inspect_arguments,
        _run_inspect,
    ),
    "operations": Command(
        "list JAX's operations, and what scales and paths do in each",
        lambda parser: None,
        _run_operations,
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line, built from the table."""
    lines = [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    top = argparse.ArgumentParser(
        prog="pathcond",
        description="Path-conditioned training in JAX.",
        epilog="\n".join(["commands (pathcond COMMAND --help says more):", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, description=command.summary)
        command.add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        return COMMANDS[arguments.command].run(arguments) or 0
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pathcond_jax":
            raise
        print(
            f"pathcond {arguments.command} needs {error.name}, which is not installed; "
            "install the extras: pip install 'pathcond-jax[experiments]'",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
