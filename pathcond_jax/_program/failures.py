"""What happens when a rule itself fails: the analysis goes on without it, and says so."""

import warnings

import jax


class RuleFailedWarning(UserWarning):
    """A rule of this library failed; the operation was treated as one without a rule."""


def failure(error: Exception) -> str:
    """What follows the operation's name in the reason for which nothing is known about it."""
    return (
        f"is not understood under JAX {jax.__version__} ({type(error).__name__}: {error}); "
        "please report this"
    )


def warn_of_failure(operation: str, source: str, because: str) -> None:
    """Warns that the rule of an operation failed, at a line of the user's or ""."""
    where = f" at {source}" if source else ""
    warnings.warn(f"{operation}{where} {because}", RuleFailedWarning, stacklevel=2)
