"""Path lifting against paths enumerated one by one, and against what it must be by theory."""

import functools
import inspect
import itertools
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from path_oracle import Edge, Network, brute_force

import pathcond_jax as pathcond

# float64 sums of up to thousands of products.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def flat(tree):
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


INPUTS, NODES, OUTPUTS = 2, 7, 2


def any_graph(tree, x):
    """A directed acyclic graph on ``NODES`` scalars, whatever its edges: they are in ``tree``.

    A node is the sum over frozen edges, weights and a bias, under a ReLU, times a scale that is
    trained or frozen. Frozen edges of weight 1 are skips, or pooling.
    """
    params, frozen = tree["params"], tree["frozen"]
    h, weights = x, params["weight"] * frozen["has_weight"]
    for k, j in enumerate(range(INPUTS, NODES)):
        y = h @ frozen["edge"][:j, j : j + 1] + h @ weights[:j, j : j + 1]
        y = jax.nn.relu(y + (params["bias"] * frozen["has_bias"])[k])
        scale = jnp.where(frozen["has_scale"][k], params["scale"][k], frozen["scale"][k])
        h = jnp.concatenate([h, y * scale], 1)
    return h[:, -OUTPUTS:]


@st.composite
def graphs(draw):
    """The values of ``any_graph`` and its edges."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chance = {
        key: draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])) for key in ("edge", "weight", "node")
    }
    unit = draw(st.booleans())
    zeros = draw(st.sampled_from([0.0, 0.0, 0.3]))
    hidden, square = NODES - INPUTS, (NODES, NODES)
    edge = np.where(
        rng.random(square) < chance["edge"], 1.0 if unit else rng.normal(size=square), 0
    )
    has_weight = rng.random(square) < chance["weight"]
    has_bias, has_scale = rng.random((2, hidden)) < chance["node"]
    values = rng.normal(size=NODES * NODES + 2 * hidden)
    values *= rng.random(values.size) >= zeros
    # In the order of the flattened tree.
    bias, scale, weight = np.split(np.arange(values.size), [hidden, 2 * hidden])
    edges = [None] * INPUTS
    fixed = rng.normal(size=hidden)
    for k, j in enumerate(range(INPUTS, NODES)):
        entering = [Edge(i, None, edge[i, j]) for i in range(j) if edge[i, j]]
        weighted = np.flatnonzero(has_weight[:j, j])
        entering += [Edge(int(i), int(weight[i * NODES + j]), 1.0) for i in weighted]
        entering += [Edge(None, int(bias[k]), 1.0)] * bool(has_bias[k])
        own = int(scale[k]) if has_scale[k] else None
        edges.append(Scaled(entering, own, 1.0 if has_scale[k] else fixed[k]))
    tree = {
        "params": {
            "bias": values[bias],
            "scale": values[scale],
            "weight": values[weight].reshape(square),
        },
        "frozen": {
            "edge": edge,
            "has_weight": has_weight.astype(float),
            "has_bias": has_bias.astype(float),
            "has_scale": has_scale,
            "scale": fixed,
        },
    }
    return tree, edges, values


@functools.cache
def figures_of_any_graph():
    shapes = {
        "params": {"bias": (5,), "scale": (5,), "weight": (7, 7)},
        "frozen": {"edge": (7, 7), "has_weight": (7, 7), "has_bias": (5,), "scale": (5,)},
    }
    tree = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    tree["frozen"]["has_scale"] = jnp.zeros(5, bool)
    spec = pathcond.trace_spec(any_graph, tree, jnp.ones((1, INPUTS)))
    # One program for all graphs compiles once.
    return spec, jax.jit(lambda tree: figures(tree, spec))


def figures(params, spec):
    """All that is known of a network's paths."""
    norms = [pathcond.path_norm(params, spec, order) for order in (1, 2)]
    diagonal = [
        leaf.reshape(-1)
        for leaf, about in zip(
            jax.tree.leaves(pathcond.gram_diagonal(params, spec)), spec.leaves, strict=True
        )
        if about.trainable
    ]
    return norms, jnp.concatenate(diagonal), pathcond.gram_matrix(params, spec)


def compare(found, phi, jacobian):
    norms, diagonal, matrix = map(np.asarray, found)
    gram = jacobian.T @ jacobian
    np.testing.assert_allclose(norms, [abs(phi).sum(), np.linalg.norm(phi)], **EXACT)
    np.testing.assert_allclose(diagonal, np.diag(gram), **EXACT)
    np.testing.assert_allclose(matrix, gram, **EXACT)
    assert ((diagonal == 0) == (np.diag(gram) == 0)).all()


def compare_paths(lifted, phi):
    # Edges that a graph has not are factors 0 of the traced program.
    lifted = np.sort(np.asarray(lifted))
    np.testing.assert_allclose(lifted[lifted != 0], np.sort(phi[phi != 0]), **EXACT)


@pytest.mark.usefixtures("x64")
@hypothesis.settings(
    max_examples=250, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(graph=graphs())
def test_equals_the_enumerated_paths(graph):
    tree, edges, values = graph
    compare(figures_of_any_graph()[1](tree), *brute_force(*flattened(edges), values))


@pytest.mark.usefixtures("x64")
@hypothesis.settings(
    max_examples=12, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(graph=graphs())
def test_lists_the_enumerated_paths(graph):
    tree, edges, values = graph
    # Not compiled: a frozen switch decides which paths there are.
    lifted = pathcond.lifted(tree, figures_of_any_graph()[0])
    compare_paths(lifted, brute_force(*flattened(edges), values)[0])


class Scaled(NamedTuple):
    """A node whose sum is multiplied by a parameter or a constant."""

    entering: list[Edge]
    parameter: int | None
    constant: float


def flattened(nodes):
    """The edges of a graph with a node for each sum and one for its scaled value."""
    edges, place = [], []
    for node in nodes:
        if node is not None:
            here = [
                edge if edge.source is None else edge._replace(source=place[edge.source])
                for edge in node.entering
            ]
            edges.append(here)
            edges.append([Edge(len(edges) - 1, node.parameter, node.constant)])
        else:
            edges.append(None)
        place.append(len(edges) - 1)
    return edges, place[-OUTPUTS:]


def random_network(seed):
    """Layers of every kind at random, weights used twice among them."""
    rng = np.random.default_rng(seed)
    net = Network(2, rng)
    for _ in range(7):
        source = int(rng.integers(len(net.vectors)))
        width = len(net.vectors[source])
        alike = [k for k, nodes in enumerate(net.vectors) if len(nodes) == width]
        square = [k for k, shape in enumerate(net.leaves) if shape == (width, width)]
        steps = ["dense", "relu", "scale", "frozen", "add", "sub", "concatenate"]
        steps += ["max", "mean"] * (width % 2 == 0) + ["again"] * bool(square)
        match str(rng.choice(steps)):
            case "dense":
                net.dense(source, int(rng.integers(1, 4)), bool(rng.integers(2)))
            case "again":
                net.again(source, int(rng.choice(square)))
            case "relu":
                net.relu(source)
            case "scale" | "frozen" as kind:
                net.scale(source, kind == "frozen")
            case "add" | "sub" as kind:
                net.add(source, int(rng.choice(alike)), kind == "sub")
            case "concatenate":
                net.concatenate(source, int(rng.integers(len(net.vectors))))
            case kind:
                net.pool(source, kind)
    net.dense(len(net.vectors) - 1, 2, True)
    return net


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(12))
def test_layers_of_every_kind(seed):
    net = random_network(seed)
    params = net.params()
    spec = pathcond.trace_spec(net.apply, params, jnp.ones((1, net.inputs)))
    found, listed = jax.jit(lambda p: (figures(p, spec), pathcond.lifted(p, spec)))(params)
    phi, jacobian = net.brute_force()
    compare(found, phi, jacobian)
    compare_paths(listed, phi)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("times", [2, 3])
def test_a_weight_met_more_than_once(times):
    net = Network(2, np.random.default_rng(times))
    net.dense(0, 2, True)
    for k in range(1, times + 1):
        net.relu(2 * k - 1)
        net.again(2 * k, 0)
    params = net.params()
    spec = pathcond.trace_spec(net.apply, params, jnp.ones((1, net.inputs)))
    found, listed = jax.jit(lambda p: (figures(p, spec), pathcond.lifted(p, spec)))(params)
    phi, jacobian = net.brute_force()
    compare(found, phi, jacobian)
    compare_paths(listed, phi)


def draw_mlp(widths, seed=0, scale=1.0, biases=True):
    rng = np.random.default_rng(seed)
    params = {}
    for k, (n, m) in enumerate(itertools.pairwise(widths)):
        layer = {"kernel": jnp.asarray(scale * rng.normal(size=(n, m)) / np.sqrt(n))}
        if biases:
            layer["bias"] = jnp.asarray(scale * rng.normal(size=m))
        params[f"layer{k:04d}"] = layer
    return params, pathcond.chain_spec(params, sorted(params))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("widths", [(2, 3, 2), (3, 4, 3, 2), (2, 3, 3, 3, 1)])
def test_rank_of_the_gram_matrix_is_p_minus_h(widths):
    params, spec = draw_mlp(widths)
    values = np.linalg.eigvalsh(pathcond.gram_matrix(params, spec))
    assert (values > 1e-9 * values[-1]).sum() == spec.num_parameters - spec.num_neurons


def euler(params, spec):
    """Σ θ² g into and out of every neuron."""
    gram = pathcond.gram_diagonal(params, spec)
    mass = jax.tree.map(lambda x, g: np.asarray(x) ** 2 * np.asarray(g), params, gram)
    by_path = {
        leaf.path: np.asarray(m) for leaf, m in zip(spec.leaves, jax.tree.leaves(mass), strict=True)
    }
    sides = []
    for group in spec.groups:
        for incidences in (group.incoming, group.outgoing):
            side = np.zeros(group.size)
            for incidence in incidences:
                rest = tuple(
                    a for a in range(by_path[incidence.path].ndim) if a not in incidence.axes
                )
                summed = by_path[incidence.path].sum(rest)
                order = np.argsort(np.argsort(incidence.axes))
                summed = summed.transpose(order) if len(order) > 1 else summed
                here = incidence.index >= 0
                np.add.at(side, incidence.index[here], summed[here])
            sides.append(side)
    return np.concatenate(sides[::2]), np.concatenate(sides[1::2])


@pytest.mark.usefixtures("x64")
def test_euler_relation():
    into, out = euler(*draw_mlp((3, 5, 4, 2)))
    np.testing.assert_allclose(into, out, rtol=1e-12)


def log_oracle(params):
    """Logarithms of g for a chain, in float64 with one logarithm per layer."""
    layers = [
        jax.tree.map(lambda x: np.asarray(x, np.float64) ** 2, params[k]) for k in sorted(params)
    ]
    x, log = np.ones(layers[0]["kernel"].shape[0]), 0.0
    entering = []
    for layer in layers:
        entering.append((x, log))
        x = x @ layer["kernel"]
        # The bias in units of exp(log), which may be far out of range: then it does not count.
        with np.errstate(over="ignore", under="ignore"):
            bias = layer.get("bias", 0.0) * np.exp(-log)
        x = x + bias
        log += np.log(x.max())
        x = x / x.max()
    a, log_a = np.ones(layers[-1]["kernel"].shape[1]), 0.0
    found = {}
    for name, layer, (x, log) in zip(
        sorted(params)[::-1], layers[::-1], entering[::-1], strict=True
    ):
        with np.errstate(divide="ignore"):
            logs = {"kernel": np.log(x)[:, None] + np.log(a)[None] + log + log_a}
            if "bias" in layer:
                logs["bias"] = np.log(a) + log_a
        found[name] = logs
        a = layer["kernel"] @ a
        log_a += np.log(a.max())
        a = a / a.max()
    return found


def initial(kind, depth, width):
    rng = np.random.default_rng(0)
    params = {}
    for k in range(depth):
        bound = 1 / np.sqrt(width)
        if kind.startswith("torch"):
            kernel, bias = (rng.uniform(-bound, bound, s) for s in ((width, width), width))
        else:
            gain = 2.0 if kind.startswith("he") else 1.0
            kernel, bias = rng.normal(size=(width, width)) * np.sqrt(gain / width), np.zeros(width)
        factor = 10 if kind.endswith("x10") else 1
        params[f"layer{k:04d}"] = {
            "kernel": jnp.asarray(factor * kernel, jnp.float32),
            "bias": jnp.asarray(factor * bias, jnp.float32),
        }
    return params


DEPTH = 1000
KINDS = ("torch", "flax", "he", "torch x10", "flax x10", "he x10")


@pytest.mark.slow
def test_depth_1000_in_float32():
    kinds = [initial(kind, DEPTH, 64) for kind in KINDS]
    spec = pathcond.chain_spec(kinds[0], sorted(kinds[0]))
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kinds)

    @jax.vmap
    def facts(params):
        found = pathcond.scaled_gram_diagonal(params, spec)
        score = pathcond.conditioning_score(params, spec)
        return found, score, pathcond.path_norm(params, spec, log=True)

    found, scores, norms = facts(together)
    assert np.isfinite(scores).all()
    assert np.isfinite(norms).all()
    with np.errstate(divide="ignore"):
        logs = jax.tree.map(
            lambda m, e: np.log(np.asarray(m, np.float64).T) + np.float64(e) * np.log(2.0),
            found.mantissa,
            found.exponent,
        )
    for number, params in enumerate(kinds):
        for name, layer in log_oracle(params).items():
            for key, value in layer.items():
                assert found.mantissa[name][key].dtype == jnp.float32
                np.testing.assert_allclose(logs[name][key].T[number], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [10.0, 1e-3])
def test_what_leaves_the_range_is_said(scale):
    params, spec = draw_mlp((8,) * 60, scale=scale, biases=False)
    with pytest.raises(OverflowError, match="scaled_gram_diagonal"):
        pathcond.gram_diagonal(params, spec)
    with pytest.raises(OverflowError, match="log=True"):
        pathcond.path_norm(params, spec)
    plain = jax.jit(lambda p: pathcond.gram_diagonal(p, spec))(params)
    assert set(np.unique(flat(plain))) <= {0.0, np.inf}
    assert (flat(pathcond.scaled_gram_diagonal(params, spec).mantissa) > 0).all()
    assert np.isfinite(pathcond.path_norm(params, spec, log=True))


def test_extreme_entries():
    """Weights whose squares leave the range of float32."""
    params, spec = draw_mlp((2, 3, 2))
    params["layer0000"] = jax.tree.map(lambda x: x * 1e25, params["layer0000"])
    params["layer0001"]["kernel"] = params["layer0001"]["kernel"] * 1e-25
    usual, _ = draw_mlp((2, 3, 2))
    expected = pathcond.gram_diagonal(usual, spec)
    found = pathcond.scaled_gram_diagonal(params, spec)
    for layer, factor in (("layer0000", -50.0), ("layer0001", 50.0)):
        logs = np.log(found.mantissa[layer]["kernel"]) + found.log_scale[layer]["kernel"]
        wanted = np.log(expected[layer]["kernel"]) + factor * np.log(10.0)
        np.testing.assert_allclose(logs, wanted, rtol=0, atol=1e-4)


def test_bfloat16_is_computed_in_float32():
    params, spec = draw_mlp((3, 8, 8, 2))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    found = pathcond.gram_diagonal(half, pathcond.chain_spec(half, sorted(half)))
    expected = pathcond.gram_diagonal(jax.tree.map(lambda x: x.astype(jnp.float32), half), spec)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-6)


def dead_neuron(params):
    params["layer0001"]["kernel"] = params["layer0001"]["kernel"].at[:, 1].set(0)
    params["layer0001"]["bias"] = params["layer0001"]["bias"].at[1].set(0)


def pruned_layer(params):
    params["layer0001"]["kernel"] = jnp.zeros_like(params["layer0001"]["kernel"])


def zero_last_layer(params):
    params["layer0003"] = jax.tree.map(jnp.zeros_like, params["layer0003"])


def all_zero(params):
    for name in params:
        params[name] = jax.tree.map(jnp.zeros_like, params[name])


@pytest.mark.parametrize("change", [dead_neuron, pruned_layer, zero_last_layer, all_zero])
@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_exact_zeros(change, scale):
    params, spec = draw_mlp((3, 4, 4, 4, 2))
    params["layer0000"] = jax.tree.map(lambda x: scale * x, params["layer0000"])
    change(params)
    found = pathcond.scaled_gram_diagonal(params, spec)
    expected = log_oracle_with_zeros(params)
    for name, layer in expected.items():
        for key, value in layer.items():
            mantissa = np.asarray(found.mantissa[name][key], np.float64)
            exponent = float(found.exponent[name][key])
            np.testing.assert_allclose(mantissa * 2.0**exponent, value, rtol=1e-5)
    assert np.isfinite(pathcond.conditioning_score(params, spec))
    assert not np.isnan(pathcond.path_norm(params, spec))


def log_oracle_with_zeros(params):
    """g of a chain in float64, zeros and all."""
    layers = [
        jax.tree.map(lambda x: np.asarray(x, np.float64) ** 2, params[k]) for k in sorted(params)
    ]
    values = [np.ones(layers[0]["kernel"].shape[0])]
    for layer in layers:
        values.append(values[-1] @ layer["kernel"] + layer["bias"])
    a, found = np.ones(values[-1].size), {}
    for name, layer, x in zip(sorted(params)[::-1], layers[::-1], values[-2::-1], strict=True):
        found[name] = {"kernel": np.outer(x, a), "bias": a}
        a = layer["kernel"] @ a
    return found


def test_not_a_number_is_not_hidden():
    params, spec = draw_mlp((2, 3, 2))
    for bad in (np.nan, np.inf):
        params["layer0000"]["kernel"] = params["layer0000"]["kernel"].at[0, 0].set(bad)
        assert not np.isfinite(flat(pathcond.gram_diagonal(params, spec))).all()


def test_ensemble_and_recompilation():
    members = [draw_mlp((3, 8, 8, 2), seed=k)[0] for k in range(3)]
    _, spec = draw_mlp((3, 8, 8, 2))
    together = jax.tree.map(lambda *x: jnp.stack(x), *members)
    traces = []

    @jax.jit
    def lifted(params):
        traces.append(1)
        return jax.vmap(lambda p: pathcond.gram_diagonal(p, spec))(params)

    found = lifted(together)
    lifted(jax.tree.map(lambda x: x + 1, together))
    assert len(traces) == 1
    for k, params in enumerate(members):
        one = pathcond.gram_diagonal(params, spec)
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda x, k=k: x[k], found)), flat(one), rtol=1e-5
        )


def test_bad_calls():
    params, spec = draw_mlp((2, 3, 2))
    with pytest.raises(pathcond.SpecError, match="order is 1 or 2"):
        pathcond.path_norm(params, spec, order=3)
    wide, wide_spec = draw_mlp((128, 128, 128))
    with pytest.raises(pathcond.SpecError, match="16384"):
        pathcond.gram_matrix(wide, wide_spec)
    with pytest.raises(pathcond.SpecError, match="paths"):
        pathcond.lifted(wide, wide_spec)
    bare = pathcond.ArchSpec(spec.groups, spec.leaves, spec.treedef)
    with pytest.raises(pathcond.SpecError, match="no program"):
        pathcond.path_norm(params, bare)


def line_of(function, text):
    """The number of the line of ``function`` that contains ``text``."""
    lines, start = inspect.getsourcelines(function)
    return start + next(k for k, line in enumerate(lines) if text in line)


def softmax(p, x):
    return jax.nn.softmax(x @ p["w"]) @ p["v"]  # here


def gelu(p, x):
    return jax.nn.gelu(x @ p["w"]) @ p["v"]  # here


def layer_norm(p, x):
    h = x @ p["w"]
    h = h - h.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6)  # here
    return h @ p["v"]


def product_of_signals(p, x):
    h = x @ p["w"]
    return (h * jax.nn.relu(h)) @ p["v"]  # here


def attention(p, x):
    h = x @ p["w"]
    return (h @ h.T) @ h @ p["v"]  # here


def relu6(p, x):
    return jax.nn.relu6(x @ p["w"]) @ p["v"]  # here


def divided(p, x):
    h = x @ p["w"]
    return (h / h.max(-1, keepdims=True)) @ p["v"]  # here


def embedded(p, x):
    return p["v"][jnp.argmax(x @ p["w"], -1)]  # here


def features(p, x):
    h = x @ p["w"]
    return (h > 0).astype(h.dtype) @ p["v"]  # here


def gain(p, x):
    h = x @ p["w"]
    return h * (p["v"][:, :1] * (h.sum() > 0).astype(h.dtype)).T  # here


@pytest.mark.parametrize(
    ("apply_fn", "operation"),
    [
        (softmax, "exp"),
        (gelu, "gelu"),
        (layer_norm, "integer_pow|square"),
        (product_of_signals, "mul"),
        (attention, "dot_general"),
        (relu6, "min in relu6"),
        (divided, "div"),
        (embedded, "gather"),
        (features, "dot_general"),
        (gain, "mul"),
    ],
)
def test_no_path_lifting(apply_fn, operation):
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 4))}
    spec = pathcond.trace_spec(apply_fn, params, jnp.ones((2, 3)))
    line = line_of(apply_fn, "# here")
    for figure in (pathcond.path_norm, pathcond.gram_diagonal, pathcond.gram_matrix):
        with pytest.raises(pathcond.NotPathLiftableError) as error:
            figure(params, spec)
        assert error.match(rf"({operation}).* at test_lifting.py:{line} \({apply_fn.__name__}\)")
        assert error.match("criterion")


@pytest.mark.parametrize(
    "activation",
    [
        lambda h, a: jnp.where(a > 0, 5 * h, h),
        lambda h, a: h * jnp.where(a > 0, 5.0, 1.0),
    ],
)
def test_slopes_that_another_signal_chooses_are_no_activation(activation):
    params = {"w": jnp.ones((2, 3)), "u": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}

    def apply_fn(params, x):
        return activation(jax.nn.relu(x @ params["w"]), x @ params["u"]) @ params["v"]

    spec = pathcond.trace_spec(apply_fn, params, jnp.ones((1, 2)))
    with pytest.raises(pathcond.NotPathLiftableError, match="another signal"):
        pathcond.path_norm(params, spec)


@pytest.mark.parametrize(
    "activation",
    [
        lambda h, a, b: h * jnp.where(h > 0, a, b),
        lambda h, a, b: h * jnp.where(h > 0, a, 0.0),
        lambda h, a, b: jnp.where(h > 0, a * h, b * h),
    ],
)
def test_slopes_that_are_all_parameters_are_weights_of_paths(activation):
    """They are rescaled with the weights behind them, and no path norm without them stays."""
    params = {"w": jnp.ones((2, 3)), "a": jnp.ones((1, 3)), "b": jnp.ones((1, 3))}
    params["v"] = jnp.ones((3, 1))

    def apply_fn(params, x):
        return activation(x @ params["w"], params["a"], params["b"]) @ params["v"]

    spec = pathcond.trace_spec(apply_fn, params, jnp.ones((1, 2)))
    assert spec.num_neurons == 6
    with pytest.raises(pathcond.NotPathLiftableError, match="chooses by the input between"):
        pathcond.path_norm(params, spec)


@pytest.mark.parametrize(
    "activation",
    [
        lambda h, a, b: jnp.maximum(a * h, b * h),
        lambda h, a, b: jnp.maximum(h, b * h),
    ],
)
def test_a_maximum_of_multiples_keeps_its_path_norm(activation):
    params = {"w": jnp.ones((2, 3)), "a": jnp.ones((1, 3)), "b": jnp.ones((1, 3))}
    params["v"] = jnp.ones((3, 1))

    def apply_fn(params, x):
        return activation(x @ params["w"], params["a"], params["b"]) @ params["v"]

    spec = pathcond.trace_spec(apply_fn, params, jnp.ones((1, 2)))
    scales = tuple(jnp.arange(1.0, group.size + 1) for group in spec.groups)
    moved = pathcond.rescale(params, spec, scales)
    before, after = (pathcond.path_norm(tree, spec, log=True) for tree in (params, moved))
    np.testing.assert_allclose(after, before, rtol=1e-5)


@pytest.mark.parametrize(
    "activation",
    [
        lambda h, a: jnp.where(h > 0, 5 * h, h),
        lambda h, a: h * jnp.where(h > 0, 5.0, 1.0),
        lambda h, a: h * (a > 0).astype(h.dtype),
        lambda h, a: jnp.where(a > 0, h, 0.0),
        lambda h, a: 2.0 * h * jnp.where(2.0 * h < 0, 0.1, 1.0) / 2.0,
    ],
)
def test_own_slopes_and_gates_of_others_are(activation):
    params = {"w": jnp.ones((2, 3)), "u": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}

    def apply_fn(params, x):
        return activation(x @ params["w"], x @ params["u"]) @ params["v"]

    spec = pathcond.trace_spec(apply_fn, params, jnp.ones((1, 2)))
    assert pathcond.path_norm(params, spec, order=1) == 6
