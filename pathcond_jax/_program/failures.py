"""What happens when a rule itself fails: the analysis goes on without it, and says so."""

import warnings

import jax

from pathcond_jax._program.graph import Node


class RuleFailedWarning(UserWarning):
    """A rule of this library failed; the operation was treated as one without a rule."""


def failure(error: Exception) -> str:
    """What follows the operation's name in the reason for which nothing is known about it."""
    return (
        f"is not understood under JAX {jax.__version__} ({type(error).__name__}: {error}); "
        "please report this"
    )


def warn_of_failure(node: Node, because: str) -> None:
    """Warns that the rule of an operation failed."""
    where = f" at {node.source}" if node.source else ""
    warnings.warn(f"{node.operation}{where} {because}", RuleFailedWarning, stacklevel=2)
