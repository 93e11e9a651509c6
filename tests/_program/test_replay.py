"""Programs that are replayed compute what they computed, and hooks reach every operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXAMPLES

from pathcond_jax._program.graph import trace
from pathcond_jax._program.replay import flat_function, places, replay, untouched

RNG = np.random.default_rng(0)
LAYERS, WIDTH = 3, 4


def drawn(shape):
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return jnp.zeros(shape.shape, shape.dtype)
    return jnp.asarray(RNG.uniform(0.1, 0.9, shape.shape).astype(shape.dtype))


def network(weights, x):
    """Layers in a loop, behind a call and before one."""

    def layer(x, w):
        return jax.nn.relu(x @ w), x.sum()

    x, sums = jax.lax.scan(layer, jax.jit(jnp.sin)(x), weights["stack"])
    return jax.checkpoint(jnp.dot)(x, weights["last"]), sums


WEIGHTS = {
    "stack": drawn(jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), np.float32)),
    "last": drawn(jax.ShapeDtypeStruct((WIDTH, 2), np.float32)),
}
X = drawn(jax.ShapeDtypeStruct((5, WIDTH), np.float32))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_replay_computes_what_the_program_computes(name):
    program, shapes = EXAMPLES[name]
    values = [drawn(shape) for shape in shapes]
    graph = trace(program, *shapes)
    made = replay(graph, values, untouched).outputs
    for one, two in zip(made, jax.tree.leaves(program(*values)), strict=True):
        one, two = (
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in (one, jnp.asarray(two))
        )
        assert one.dtype == two.dtype
        np.testing.assert_allclose(one, two, rtol=1e-6)


def multiplications(graph):
    return [place for place, _, node in places(graph) if node.primitive.name == "dot_general"]


def multiplying(place, node, operands, fed):
    if node.primitive.name != "dot_general":
        return operands, None
    assert place in multiplications(trace(network, WEIGHTS, X))
    x, w = operands
    return [x * fed, w], jnp.abs(x).max()


def test_hooks_replace_and_record_operands_in_calls_and_loops():
    graph = trace(network, WEIGHTS, X)
    inside, outside = sorted(multiplications(graph), key=len, reverse=True)
    assert (len(inside), len(outside)) == (2, 1)
    factors = jnp.array([2.0, 3.0, 5.0])
    fed = {inside: factors, outside: jnp.array(0.5)}
    found = replay(graph, [*jax.tree.leaves(WEIGHTS), X], multiplying, fed)
    # A ReLU passes on positive factors.
    outputs, _ = network(WEIGHTS, X)
    np.testing.assert_allclose(found.outputs[0], 2 * 3 * 5 * 0.5 * outputs, rtol=1e-5)
    assert found.records[inside].shape == (LAYERS,)
    np.testing.assert_allclose(found.records[inside][0], jnp.sin(X).max(), rtol=1e-6)
    assert found.records[outside].shape == ()


def test_replays_are_differentiated_mapped_and_compiled():
    graph = trace(network, WEIGHTS, X[:1])
    leaves = jax.tree.leaves(WEIGHTS)

    def loss(leaves, x):
        return flat_function(graph)(*leaves, x[None])[0].sum()

    found = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(leaves, X)
    wanted = jax.vmap(jax.grad(lambda weights, x: network(weights, x[None])[0].sum()), (None, 0))(
        WEIGHTS, X
    )
    for one, two in zip(found, jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
