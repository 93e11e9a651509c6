"""Networks people really use, each with the number of neurons that must be found.

``NETWORKS`` maps a name to a factory of a :class:`Network` small enough to run; ``FULL_SIZE`` to
one of published size, shapes only. Parameters are random everywhere, biases and statistics too.
"""

from zoo import attention, convolutional, dense, frameworks
from zoo.network import FULL_SIZE, NETWORKS, Network, relative_change

__all__ = [
    "FULL_SIZE",
    "NETWORKS",
    "Network",
    "attention",
    "convolutional",
    "dense",
    "frameworks",
    "relative_change",
]
