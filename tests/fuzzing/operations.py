"""All operations of random programs, by name."""

# They enter themselves into their table when their modules are imported.
from fuzzing import elementwise, layers, loops, moves, places, sums, weights, wrappers  # noqa: F401
from fuzzing.table import LAYERS, UNUSUAL

__all__ = ["LAYERS", "UNUSUAL"]
