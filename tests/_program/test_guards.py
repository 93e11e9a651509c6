"""A program without its guards has the same values, and none of what they put in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathcond_jax._program.graph import trace
from pathcond_jax._program.guards import without_guards
from pathcond_jax._program.primitives import find
from pathcond_jax._program.replay import flat_function

where = jnp.where
X = jnp.asarray([[-1.0, 0.0, 2.0, 3.0], [0.5, -2.0, jnp.nan, 0.0]])


def selections(graph):
    """How many selections a program has, in its loops too."""
    return sum(
        (node.primitive is find("select_n")) + sum(map(selections, node.bodies))
        for node in graph.nodes
    )


def in_a_row(x):
    """A guard of each row, in what is selected entry by entry."""
    size = jnp.sum(jnp.abs(x), 1, keepdims=True)
    return where(size > 0, x / where(size > 0, size, 1.0), 0.0)


def one_for_all(x):
    """A guard of all entries together."""
    first = x[0, 0]
    return where(first < 0, jnp.sin(where(first < 0, x, 1.0)), x)


LEFT = {
    "the same predicate": (lambda x: where(x > 0, jnp.log(where(x > 0, x, 1.0)), 0.0), 1),
    "the other case": (lambda x: where(x > 0, 0.0, jnp.exp(where(x > 0, x, 1.0))), 1),
    "negated": (lambda x: where(x != 0, 1 / where(x == 0, 1.0, x), 0.0), 1),
    "not": (lambda x: where(~(x > 0), 0.0, jnp.log(where(x > 0, x, 1.0))), 1),
    "both": (lambda x: where((x > 0) & (x < 3), where((x > 0) & (x < 3), x, 1.0) ** 2, 0.0), 1),
    "each row": (in_a_row, 1),
    "one for all": (one_for_all, 1),
    "in a loop": (
        lambda x: jax.lax.map(lambda r: where(r > 0, jnp.log(where(r > 0, r, 1.0)), 0.0), x),
        1,
    ),
    "no complement beside what is no number": (
        lambda x: where(x > 0, 0.0, where(x <= 0, x, 1.0)),
        2,
    ),
    "another bound": (lambda x: where(x > 0, jnp.log(where(x > 1, x, 1.0)), 0.0), 2),
    "another value": (lambda x: where(x > 0, where(x[::-1] > 0, x, 1.0), 0.0), 2),
    "other places": (lambda x: where(x > 0, where(x > 0, x, 1.0)[::-1], 0.0), 2),
    "a sum": (lambda x: where(x > 0, jnp.cumsum(where(x > 0, x, 1.0), 1), 0.0), 2),
    "needed elsewhere": (lambda x: (lambda y: where(x > 0, y, 0.0) + y)(where(x > 0, x, 1.0)), 2),
}


@pytest.mark.parametrize("name", LEFT)
def test_values_stay_and_guards_go(name):
    function, left = LEFT[name]
    graph = trace(function, X)

    shorter = without_guards(graph)

    assert selections(shorter) == left
    np.testing.assert_array_equal(flat_function(shorter)(X)[0], flat_function(graph)(X)[0])


def test_a_program_without_guards_is_left_as_it_is():
    graph = trace(lambda x: where(x > 0, x, 0.0) + where(x > 1, x, 0.0), X)

    assert without_guards(graph) is graph
