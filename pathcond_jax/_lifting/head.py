"""What to do about an operation that refuses paths only at the head of a network."""

from pathcond_jax._lifting.values import NotPathLiftableError, RefusedOperationError, at
from pathcond_jax._program.graph import Graph, Node


def advised(refused: RefusedOperationError, graph: Graph) -> NotPathLiftableError:
    """The error with the advice to return the logits, if all that is behind them is refused.

    Args:
      refused: the error.
      graph: the program in which it was raised.
    """
    if not is_at_the_head(refused.node, graph):
        return refused
    head = refused.node.function or refused.node.operation
    return NotPathLiftableError(
        f"{at(refused.node)} {refused.why}, but no parameter comes after it: let apply_fn return "
        f"the logits, which go into {head}, and leave {head} to the loss, as "
        "optax.softmax_cross_entropy does; or use a criterion that needs no path lifting, such as "
        "condition(..., criterion='enorm')"
    )


def is_at_the_head(node: Node, graph: Graph) -> bool:
    """Whether the outputs are a function of one value, the logits, that goes into ``node``."""
    needed = {number for number in graph.outputs if number not in graph.constants}
    met = False
    for earlier in reversed(graph.nodes):
        if needed.isdisjoint(earlier.outputs):
            continue
        needed -= set(earlier.outputs)
        needed |= {number for number in earlier.inputs if number not in graph.constants}
        met |= earlier is node
        if not needed.isdisjoint(graph.inputs):
            return False
        if met and len(needed) == 1:
            return True
    return False
