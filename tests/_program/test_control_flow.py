"""The structure of loops is read off shapes, whatever a version of JAX calls its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pathcond_jax._program.control_flow import read_scan, read_while
from pathcond_jax._program.graph import trace
from pathcond_jax._program.primitives import find

X = jnp.zeros((4, 3))
W = jnp.zeros((3, 3))


def loops(function, *arguments):
    graph = trace(function, *arguments)
    return [
        read_scan(node, graph.avals) if node.primitive is find("scan") else read_while(node)
        for node in graph.nodes
        if node.primitive in (find("scan"), find("while"))
    ]


def test_scan():
    def step(carry, row):
        state, count = carry
        return (jnp.tanh(row[0] + state @ W), count + row[1].sum()), (state, count)

    (loop,) = loops(
        lambda w, x: lax.scan(
            lambda c, r: step(c, (r, r @ w)), (jnp.zeros(3), 0.0), x, reverse=True
        ),
        W,
        X,
    )
    # W twice: the argument and what the step closes over.
    assert (loop.num_consts, loop.num_carry, loop.length, loop.reverse) == (2, 2, 4, True)
    consts, carry, stacked = loop.inputs(loop.body.inputs)
    shapes = [[loop.body.avals[k].shape for k in part] for part in (consts, carry, stacked)]
    assert shapes == [[(3, 3), (3, 3)], [(3,), ()], [(3,)]]
    carry, stacked = loop.outputs(loop.body.outputs)
    assert [loop.body.avals[k].shape for k in stacked] == [(3,), ()]


@pytest.mark.parametrize("length", [1, 3])
def test_a_carry_of_the_shape_of_the_stack(length):
    """Nothing but the number of axes tells a carry from a stacked operand."""
    square = jnp.zeros((length, length))
    (loop,) = loops(lambda c, x: lax.scan(lambda c, r: (c + r[0], c), c, x), square, square)
    assert (loop.num_consts, loop.num_carry) == (0, 1)


def test_a_scan_without_operands():
    (loop,) = loops(lambda x: lax.scan(lambda c, _: (2 * c, None), x, None, length=5)[0], X)
    assert (loop.num_consts, loop.num_carry, loop.length) == (0, 1, 5)


def test_fori_with_a_known_number_of_steps_is_a_scan():
    (loop,) = loops(lambda x: lax.fori_loop(0, 3, lambda k, y: y + k, x), X)
    assert (loop.num_carry, loop.length) == (2, 3)


def test_map_and_vmap_of_scan():
    (loop,) = loops(lambda x: lax.map(jnp.sin, x), X)
    assert (loop.num_carry, loop.num_consts, loop.length) == (0, 0, 4)
    (loop,) = loops(jax.vmap(lambda x: lax.scan(lambda c, y: (c + y, c), 0.0, x)), X)
    assert (loop.num_carry, loop.length) == (1, 3)


def test_while():
    (loop,) = loops(
        lambda w, x: lax.while_loop(
            lambda state: state[1].sum() < w[0, 0],
            lambda state: (state[0] + 1, state[1] @ w),
            (np.int32(0), x),
        ),
        W,
        X,
    )
    assert (loop.num_condition_consts, loop.num_body_consts) == (1, 1)
    for_condition, for_body, carry = loop.inputs(range(4))
    assert (for_condition, for_body, carry) == ([0], [1], [2, 3])
    assert len(loop.condition.inputs) == len(loop.body.inputs) == 3


def test_fori_with_an_unknown_number_of_steps_is_a_while():
    (loop,) = loops(lambda n, x: lax.fori_loop(0, n, lambda k, y: y + k, x), np.int32(3), X)
    assert loop.num_condition_consts == loop.num_body_consts == 0


def test_associative_scan_has_no_loop():
    assert loops(lambda x: lax.associative_scan(jnp.maximum, x), X) == []
