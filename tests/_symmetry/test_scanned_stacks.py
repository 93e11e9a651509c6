"""A scanned stack of layers is one thing: as many groups as in one layer, as free as unrolled."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from scanned import STACKS, unrolled
from zoo.attention import LanguageModel
from zoo.network import lenient

import pathcond_jax as pathcond

X = jnp.asarray([[0.3, 0.9], [0.8, 0.4]])


def directions(spec):
    """The matrix (neurons, entries) of what unit log-scales do to the logarithms of entries."""
    starts = dict(
        zip(
            (leaf.path for leaf in spec.leaves),
            np.cumsum([0, *(leaf.size for leaf in spec.leaves)]),
            strict=False,
        )
    )
    matrix, first = np.zeros((spec.num_neurons, sum(leaf.size for leaf in spec.leaves))), 0
    for group in spec.groups:
        for sign, side in ((1, group.incoming), (-1, group.outgoing)):
            for incidence in side:
                shape = spec.leaf(incidence.path).shape
                wide = [n if a in incidence.axes else 1 for a, n in enumerate(shape)]
                neurons = np.broadcast_to(incidence.index.reshape(wide), shape).reshape(-1)
                entries = np.flatnonzero(neurons >= 0)
                matrix[first + neurons[entries], starts[incidence.path] + entries] += sign
        first += group.size
    return matrix


@pytest.mark.parametrize("name", STACKS)
def test_a_scanned_stack_has_the_freedom_of_its_layers_unrolled(name):
    stack = STACKS[name]
    params = stack.params(4)
    spec = pathcond.trace_spec(stack.apply(lax.scan), params, X)
    other = pathcond.trace_spec(stack.apply(unrolled), params, X)

    found, expected = directions(spec), directions(other)
    ranks = [np.linalg.matrix_rank(m) for m in (found, expected, np.concatenate([found, expected]))]
    assert ranks == [len(expected)] * 3
    assert len(found) == len(expected) > 0
    assert pathcond.check_spec(spec, params, X) < 1e-5


@pytest.mark.parametrize("name", STACKS)
def test_the_number_of_groups_does_not_depend_on_the_number_of_layers(name):
    stack = STACKS[name]
    specs = [
        pathcond.trace_spec(stack.apply(lax.scan), stack.params(length), X) for length in (3, 7)
    ]

    assert [len(spec.groups) for spec in specs] == [stack.groups] * 2


@pytest.mark.parametrize("name", ["dense", "dense_last_first", "residual"])
def test_neurons_lie_as_the_stacked_parameters_do(name):
    stack = STACKS[name]
    spec = pathcond.trace_spec(stack.apply(lax.scan), stack.params(5), X)

    group = spec.group_of("b")[0]
    bias = next(incidence for incidence in group.incoming if incidence.path == "b")
    assert bias.axes == (0, 2)
    assert bias.index.tolist() == np.arange(bias.index.size).reshape(5, -1).tolist()
    assert f"5 × {stack.layers['b'][1]} " in str(spec)


def test_the_residual_stream_meets_stacked_parameters_on_their_own_axis():
    stack = STACKS["residual"]
    spec = pathcond.trace_spec(stack.apply(lax.scan), stack.params(5), X)

    stream = spec.group_of("in")[0]
    assert [str(i) for i in stream.incoming] == ["in[1]", "v[2]"]
    assert [str(i) for i in stream.outgoing] == ["out[0]", "u[1]"]


def test_steps_that_differ_are_followed_each():
    masks = jnp.asarray([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]] * 2)
    params = {"in": jnp.ones((2, 3)), "w": jnp.ones((4, 3, 3)), "out": jnp.ones((3, 2))}

    def apply_fn(run):
        def masked(params, x):
            h, _ = run(
                lambda h, layer: (jnp.maximum(h @ layer["w"], 0.0) * layer["mask"][None], None),
                x @ params["in"],
                {"w": params["w"], "mask": masks},
                reverse=False,
            )
            return h @ params["out"]

        return masked

    specs = [pathcond.trace_spec(apply_fn(run), params, X) for run in (lax.scan, unrolled)]
    assert specs[0].num_neurons == specs[1].num_neurons
    assert pathcond.check_spec(specs[0], params, X) < 1e-5


def of_two_loops(run):
    """A stack that is walked through twice, the second time from its end."""

    def apply_fn(params, x):
        def step(h, layer):
            return h + jnp.maximum(h @ layer["u"], 0.0) @ layer["v"], None

        stacked = {name: params[name] for name in ("u", "v")}
        h = run(step, x @ params["in"], stacked, reverse=False)[0]
        return run(step, h, stacked, reverse=True)[0] @ params["out"]

    return apply_fn


def of_a_loop_and_a_sum(run):
    """A stack whose kernels, added up, are one more layer."""

    def apply_fn(params, x):
        def step(h, layer):
            return h + jnp.maximum(h @ layer["u"], 0.0) @ layer["v"], None

        stacked = {name: params[name] for name in ("u", "v")}
        h = run(step, x @ params["in"], stacked, reverse=False)[0]
        return jnp.maximum(h @ params["u"].sum(0), 0.0) @ params["v"].sum(0) @ params["out"]

    return apply_fn


@pytest.mark.parametrize(("network", "hidden"), [(of_two_loops, 4 * 4), (of_a_loop_and_a_sum, 4)])
def test_what_else_reads_a_stack_counts(network, hidden):
    params = STACKS["residual"].params(4)
    specs = [pathcond.trace_spec(network(run), params, X) for run in (lax.scan, unrolled)]

    assert [spec.num_neurons for spec in specs] == [3 + hidden] * 2
    assert pathcond.check_spec(specs[0], params, X) < 1e-5


def test_tracing_needs_no_more_memory_for_more_layers_than_their_neurons_take():
    def residual(params, h, layer):
        return h + jnp.maximum(h @ layer["u"], 0.0) @ layer["v"], None

    apply_fn = STACKS["residual"]._replace(layers={"u": (), "v": ()}, step=residual).apply(lax.scan)

    def memory(length):
        shapes = {"in": (2, 8), "u": (length, 8, 256), "v": (length, 256, 8), "out": (8, 2)}
        params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
        tracemalloc.start()
        spec = pathcond.trace_spec(apply_fn, params, X, check=False)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        sides = [side for group in spec.groups for side in (*group.incoming, *group.outgoing)]
        return most, sum(side.index.nbytes for side in sides)

    (few, held), (many, held_by_many) = [memory(length) for length in (4, 8, 256)][1:]
    assert many - few < 6 * (held_by_many - held)


def test_a_loop_too_long_to_follow_says_so():
    length, rng = 4000, np.random.default_rng(0)
    masks = jnp.asarray(rng.integers(0, 2, (length, 16)), jnp.float32)
    params = {"in": jnp.ones((2, 16)), "g": jnp.ones((length, 16)), "out": jnp.ones((16, 2))}

    def apply_fn(params, x):
        def step(h, layer):
            gain, mask = layer
            for _ in range(3):
                h = jnp.maximum(h, 0.0) * gain[None] * mask[None]
            return h, None

        h, _ = lax.scan(step, x @ params["in"], (params["g"], masks))
        return h @ params["out"]

    # Tried on numbers, as many steps would take long.
    spec = pathcond.trace_spec(apply_fn, params, X, check=False)
    said = [str(pin) for pin in spec.pinned if pin.path == "g" and pin.axis == 0]
    assert "has too many steps of different scales to follow each" in said[0]


def scanned_linen(remat):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            return h + nn.Dense(2)(nn.relu(nn.Dense(4)(h))), None

    class Net(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x):
            layer = nn.remat(Layer) if remat else Layer
            layers = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            return nn.Dense(2)(layers()(nn.Dense(2)(x), None)[0])

    return Net


def remat_scan(depth):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, h):
            return h + nn.Dense(2)(nn.relu(nn.Dense(4)(h)))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.remat_scan(Layer, lengths=(depth // 2, 2))()(nn.Dense(2)(x))
            return nn.Dense(2)(h)

    return Net()


@pytest.mark.parametrize(
    "net",
    [scanned_linen(remat=False), scanned_linen(remat=True), remat_scan],
    ids=["scan", "scan-remat", "remat-scan"],
)
def test_the_transformations_of_linen_give_one_group_for_all_layers(net):
    for depth in (4, 6):
        module = net(depth)
        params = module.init(jax.random.key(0), X)
        spec = pathcond.trace_spec(module.apply, params, X)

        assert [group.size for group in spec.groups] == [2, 4 * depth]
        assert pathcond.check_spec(spec, params, X) < 1e-5


def test_the_scan_of_nnx_gives_one_group_for_all_layers():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, h):
            return h + self.down(nnx.relu(self.up(h)))

    class Net(nnx.Module):
        def __init__(self, depth, rngs):
            self.layers = nnx.split_rngs(splits=depth)(nnx.vmap(Layer))(rngs)
            self.first, self.last = nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x):
            run = nnx.scan(lambda h, layer: layer(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.last(run(self.first(x), self.layers))

    for depth in (3, 5):
        graphdef, params = nnx.split(Net(depth, nnx.Rngs(0)), nnx.Param)[:2]

        def apply_fn(params, x, graphdef=graphdef):
            return nnx.merge(graphdef, params)(x)

        spec = pathcond.trace_spec(apply_fn, params, X)
        assert [group.size for group in spec.groups] == [2, 4 * depth]
        assert pathcond.check_spec(spec, params, X) < 1e-5


@pytest.mark.parametrize("experts", [3, 6])
def test_experts_and_ensembles_are_one_group(experts):
    rng = np.random.default_rng(0)
    shapes = {"u": (2, 4), "b": (1, 4), "v": (4, 2)}
    params = {n: jnp.asarray(rng.normal(size=(experts, *s))) for n, s in shapes.items()}
    params["gate"] = jnp.asarray(rng.normal(size=(2, experts)))

    def mixed(params, x):
        member = jax.vmap(lambda u, b, v: jnp.maximum(x @ u + b, 0.0) @ v)
        outputs = member(params["u"], params["b"], params["v"])
        return jnp.einsum("be,ebk->bk", jax.nn.softmax(x @ params["gate"]), outputs)

    spec = pathcond.trace_spec(mixed, params, X)
    assert [group.size for group in spec.groups] == [experts * 4]
    assert spec.groups[0].incoming[0].index.shape == (experts, 4)
    assert pathcond.check_spec(spec, params, X) < 1e-5


def test_a_scanned_transformer_has_the_groups_of_one_block():
    tokens = jnp.arange(6)[None] % 5
    specs = {}
    for depth in (2, 4):
        module = LanguageModel(5, 8, 2, depth, scan=True)
        params = jax.eval_shape(lenient(module.init), jax.random.key(0), tokens)
        specs[depth] = pathcond.trace_spec(lenient(module.apply), params, tokens)

    assert len(specs[2].groups) == len(specs[4].groups) == 5
    assert specs[4].num_neurons == 2 * specs[2].num_neurons
    assert "4 × 32 " in str(specs[4])
