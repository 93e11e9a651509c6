"""The solvers against the authors' iterates, scipy, and plain NumPy on dense incidences."""

import functools
import itertools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from pathcond_jax._solve import stacks
from pathcond_jax._solve.block import colors
from pathcond_jax._solve.objective import LogSum, Objective, Smooth, reduce_masses
from pathcond_jax._solve.path import path_objective
from pathcond_jax._solve.solution import Solution, Status
from pathcond_jax._solve.solve import default_limit, solve
from pathcond_jax._spec.extended_range import ScaledDiagonal
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import describe_leaves
from pathcond_jax._spec.types import Incidence, NeuronGroup, SpecError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NETWORKS = ("mlp_2-8-8-2", "mlp_2-32-32-32-2", "conv_plain_8-16-20")
METHODS = ("newton", "block", "coordinate")


def spec_of(tree, *groups) -> ArchSpec:
    """Groups are (name, size, incoming, outgoing) with (path, axes, index) for each incidence."""
    leaves, treedef = describe_leaves(tree)
    made = [
        NeuronGroup(name, size, *([Incidence(*i) for i in side] for side in (incoming, outgoing)))
        for name, size, incoming, outgoing in groups
    ]
    return ArchSpec(tuple(made), leaves, treedef)


def draw(rng, shapes, spread=1.0):
    return {name: np.exp(spread * rng.normal(size=shape)) for name, shape in shapes.items()}


def chain(rng, sizes, bias=True, spread=1.0):
    """Dense layers ``w0, b0, w1, ...`` with kernels (in, out)."""
    shapes = {f"w{k}": (a, b) for k, (a, b) in enumerate(itertools.pairwise(sizes))}
    if bias:
        shapes |= {f"b{k}": (b,) for k, b in enumerate(sizes[1:])}
    gram = draw(rng, shapes, spread)
    groups = []
    for k, size in enumerate(sizes[1:-1]):
        neurons = np.arange(size)
        incoming = [(f"w{k}", 1, neurons)] + ([(f"b{k}", 0, neurons)] if bias else [])
        groups.append((f"h{k}", size, incoming, [(f"w{k + 1}", 0, neurons)]))
    return gram, spec_of(gram, *groups)


def recurrent(rng):
    """x + W x: entries between neurons of one group, and a diagonal that no scale moves."""
    gram = draw(rng, {"inside": (3, 4), "loop": (4, 4), "bias": (4,), "outside": (4, 2)})
    n = np.arange(4)
    incoming = [("inside", 1, n), ("loop", 1, n), ("bias", 0, n)]
    return gram, spec_of(gram, ("x", 4, incoming, [("loop", 0, n), ("outside", 0, n)]))


def stream(rng):
    """Two residual branches on one stream, whose second branch skips its inner layer too."""
    shapes = {"stem": (3, 4), "a1": (4, 5), "a2": (5, 4), "b1": (4, 3), "b2": (3, 4)}
    gram = draw(rng, shapes | {"skip": (5, 3), "c1": (5,), "head": (4, 2), "last": (2,)})
    n4, n5, n3 = np.arange(4), np.arange(5), np.arange(3)
    return gram, spec_of(
        gram,
        (
            "stream",
            4,
            [("stem", 1, n4), ("a2", 1, n4), ("b2", 1, n4)],
            [(k, 0, n4) for k in ("a1", "b1", "head")],
        ),
        ("a", 5, [("a1", 1, n5), ("c1", 0, n5)], [("a2", 0, n5), ("skip", 0, n5)]),
        ("b", 3, [("b1", 1, n3), ("skip", 1, n3)], [("b2", 0, n3)]),
    )


def grouped(rng):
    """A grouped convolution (groups, in, out) between channels, a depthwise residual, a flatten."""
    gram = draw(
        rng, {"stem": (3, 4), "conv": (2, 2, 3, 9), "bias": (6,), "depth": (9, 6), "head": (12, 2)}
    )
    before, after = np.arange(4).reshape(2, 2), np.arange(6).reshape(2, 3)
    n6 = np.arange(6)
    return gram, spec_of(
        gram,
        ("before", 4, [("stem", 1, np.arange(4))], [("conv", (0, 1), before)]),
        (
            "after",
            6,
            [("conv", (0, 2), after), ("bias", 0, n6), ("depth", 1, n6)],
            [("depth", 1, n6), ("head", 0, np.repeat(n6, 2))],
        ),
    )


def concatenated(rng):
    """Two layers of which one is wider, concatenated with the input, then a shuffled residual."""
    gram = draw(rng, {"w1": (2, 3), "w2": (2, 2), "next": (7, 4), "mix": (4, 4), "head": (4, 1)})
    first = np.array([0, 1, 2, -1, -1, -1, -1])
    second = np.array([-1, -1, -1, 0, 1, -1, -1])
    n4, shuffled = np.arange(4), np.array([2, 0, 3, 1])
    return gram, spec_of(
        gram,
        ("first", 3, [("w1", 1, np.arange(3))], [("next", 0, first)]),
        ("second", 2, [("w2", 1, np.arange(2))], [("next", 0, second)]),
        ("sum", 4, [("next", 1, n4), ("mix", 1, shuffled)], [("mix", 0, n4), ("head", 0, n4)]),
    )


CASES = {
    "chain": lambda rng: chain(rng, (3, 5, 4, 2)),
    "wide": lambda rng: chain(rng, (40, 6, 2), bias=False),
    "width 1": lambda rng: chain(rng, (1, 1, 1, 1)),
    "recurrent": recurrent,
    "stream": stream,
    "grouped": grouped,
    "concatenated": concatenated,
}


@functools.cache
def built(case):
    """One spec object per case, so that each solver compiles once for all tests."""
    return CASES[case](np.random.default_rng(3))


@pytest.fixture(params=CASES)
def case(request, x64):
    return built(request.param)


@pytest.fixture(params=["chain", "stream", "grouped"])
def few(request, x64):
    """Three of the cases, for what costs a compilation of its own."""
    return built(request.param)


def incidences(spec: ArchSpec) -> np.ndarray:
    """B, (p, H), from the definition."""
    columns = []
    for group in spec.groups:
        matrices = {leaf.path: np.zeros((*leaf.shape, group.size)) for leaf in spec.leaves}
        for sign, side in ((-1, group.incoming), (1, group.outgoing)):
            for path, axes, index in ((i.path, i.axes, i.index) for i in side):
                order = np.argsort(axes)
                shape = np.ones(matrices[path].ndim - 1, int)
                shape[list(axes)] = index.shape
                full = np.broadcast_to(
                    index.transpose(order).reshape(shape), matrices[path].shape[:-1]
                )
                matrices[path] += sign * (full[..., None] == np.arange(group.size))
        columns.append(np.concatenate([m.reshape(-1, group.size) for m in matrices.values()]))
    return np.concatenate(columns, axis=1)


def flat(spec, tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


def join(log_scales) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in log_scales])


def value_and_gradient(z, b, terms, linear):
    """F from the definition; terms are (w, s, a)."""
    value, gradient = -linear @ z, -linear
    for w, s, a in terms:
        with np.errstate(divide="ignore"):
            logs = np.log(a) + s * (b @ z)
        top = logs.max()
        mass = np.exp(logs - top)
        value = value + w * (top + np.log(mass.sum()))
        gradient = gradient + w * s * (mass @ b) / mass.sum()
    return value, gradient


def path_terms(spec, gram):
    b, masses = incidences(spec), flat(spec, gram)
    present = masses > 0
    return b, [(float(present.sum()), 2.0, masses)], 2 * b[present].sum(0)


def minimum(problem, limit=None, fixed=None):
    """The minimizer that scipy finds, and its value."""
    b, terms, linear = problem
    limit = 50.0 if limit is None else limit
    bounds = [(-limit, limit)] * b.shape[1]
    for k in [] if fixed is None else np.flatnonzero(fixed):
        bounds[k] = (0.0, 0.0)
    found = scipy.optimize.minimize(
        value_and_gradient,
        np.zeros(b.shape[1]),
        (b, terms, linear),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 20000, "maxfun": 50000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 50},
    )
    return found.x, found.fun


def name(solution: Solution) -> str:
    return Status(int(solution.status)).name


@functools.cache
def golden(network, dtype=np.float64):
    """The stored Gram diagonal as a tree in PyTorch's layout, its spec, and the figures."""
    with np.load(GOLDEN / f"{network}.npz") as file:
        data = dict(file)
    names = [str(n) for n in data["param_names"]]
    shapes = [data[f"param/{n}"].shape for n in names]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = np.split(data["diag_G"].astype(dtype), ends)
    gram = {n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}
    weights = [n for n in names if n.endswith("weight")]
    groups = []
    for weight, following in itertools.pairwise(weights):
        neurons = np.arange(gram[weight].shape[0])
        bias = weight.replace("weight", "bias")
        incoming = [(n, 0, neurons) for n in (weight, bias) if n in gram]
        groups.append((weight, neurons.size, incoming, [(following, 1, neurons)]))
    return gram, spec_of(gram, *groups), data


@pytest.mark.parametrize("network", NETWORKS)
def test_sweeps_are_the_authors_iterates(x64, network):
    gram, spec, data = golden(network)
    for sweeps_done in (1, 3, 10):
        solution = solve(gram, spec, method="coordinate", max_steps=sweeps_done, tol=0.0)
        z = join(solution.log_scales)
        np.testing.assert_allclose(2 * z, data[f"Z_{sweeps_done}"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(solution.objective, data[f"F_{sweeps_done}"], rtol=1e-12)
        assert int(solution.num_steps) == sweeps_done


@pytest.mark.parametrize("network", NETWORKS)
def test_the_authors_stopping_rule(x64, network):
    gram, spec, data = golden(network)
    solution = solve(gram, spec, method="coordinate")
    nine = solve(gram, spec, method="coordinate", max_steps=9, tol=0.0)
    change = np.abs(data["Z_10"] - 2 * join(nine.log_scales)).sum()
    assert (name(solution) == "CONVERGED") == (change < 1e-2)
    assert int(solution.num_steps) == 10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("network", NETWORKS)
def test_newton_reaches_the_optimum_in_few_products(x64, network, dtype):
    gram, spec, data = golden(network, dtype)
    solution = solve(gram, spec)
    tol = 1e-4 if dtype == np.float32 else 1e-6
    assert solution.objective.dtype == dtype
    assert name(solution) == "CONVERGED"
    assert int(solution.num_steps) <= 15
    assert int(solution.num_products) <= 100
    assert solution.gradient_norm <= 1e-5 * spec.num_parameters
    np.testing.assert_allclose(2 * join(solution.log_scales), data["Z_conv"], rtol=0, atol=tol)
    np.testing.assert_allclose(solution.objective, data["F_conv"], rtol=1e-6)
    assert solution.suboptimality <= 1e-6 * solution.objective


@pytest.mark.parametrize("method", METHODS)
def test_minimum_of_any_spec(case, method):
    gram, spec = case
    problem = path_terms(spec, gram)
    z, value = minimum(problem)
    solution = solve(gram, spec, method=method, max_steps=20000, tol=1e-9)
    assert name(solution) == "CONVERGED"
    np.testing.assert_allclose(solution.objective, value, rtol=1e-9)
    np.testing.assert_allclose(join(solution.log_scales), z, rtol=0, atol=1e-4)
    slope = value_and_gradient(join(solution.log_scales), *problem)[1]
    assert np.linalg.norm(slope) <= 1e-6 * spec.num_parameters
    np.testing.assert_allclose(solution.gradient_norm, np.linalg.norm(slope), rtol=0, atol=1e-6)


def test_block_never_increases_the_objective(few):
    gram, spec = few
    values = [
        float(solve(gram, spec, method="block", max_steps=k, tol=0.0).objective) for k in range(5)
    ]
    assert np.all(np.diff(values) <= 1e-9 * np.abs(values[0]))


def one_sweep(z, b, gram, linear, limit=np.inf):
    """Every neuron in turn to the root of its quadratic, from the definition."""
    p, z = float(len(gram)), z.copy()
    for h in range(len(z)):
        mass = gram * np.exp(2 * b @ z)
        out, into = mass[b[:, h] > 0].sum(), mass[b[:, h] < 0].sum()
        rest, surplus = mass[b[:, h] == 0].sum(), -linear[h] / 2
        square, half, constant = out * (surplus + p), rest * surplus, into * (surplus - p)
        root = np.sqrt(half**2 - 4 * square * constant)
        x = -2 * constant / (half + root) if half > 0 else (root - half) / (2 * square)
        z[h] = np.clip(z[h] + 0.5 * np.log(x), -limit, limit)
    return z


@pytest.mark.parametrize("limit", [None, 0.3])
def test_sweeps_follow_the_definition(case, limit):
    gram, spec = case
    b, terms, linear = path_terms(spec, gram)
    z = np.zeros(b.shape[1])
    for steps in range(1, 4):
        z = one_sweep(z, b, terms[0][2], linear, limit or np.inf)
        solution = solve(
            gram, spec, method="coordinate", max_steps=steps, tol=0.0, max_log_scale=limit
        )
        np.testing.assert_allclose(join(solution.log_scales), z, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_minimum_in_a_box(case, method):
    gram, spec = case
    problem = path_terms(spec, gram)
    free = np.abs(minimum(problem)[0]).max()
    limit = 0.5 * free
    z, value = minimum(problem, limit)
    solution = solve(gram, spec, method=method, max_steps=20000, tol=1e-10, max_log_scale=limit)
    found = join(solution.log_scales)
    assert name(solution) == "CLIPPED"
    assert np.abs(found).max() == limit
    np.testing.assert_allclose(solution.objective, value, rtol=1e-10)
    np.testing.assert_allclose(found, z, rtol=0, atol=1e-4)
    slope = value_and_gradient(found, *problem)[1]
    inside = np.abs(found) < limit
    assert np.all(slope[~inside] * found[~inside] <= 0)
    assert np.linalg.norm(slope[inside]) <= 1e-6 * spec.num_parameters
    assert solution.gradient_norm <= 1e-6 * spec.num_parameters


@pytest.mark.parametrize("method", METHODS)
def test_the_bound_holds_at_every_step(few, method):
    gram, spec = few
    problem = path_terms(spec, gram)
    best = minimum(problem)[1]
    for steps in range(6):
        solution = solve(gram, spec, method=method, max_steps=steps, tol=0.0, max_log_scale=30.0)
        gap = float(solution.objective) - best
        assert float(solution.suboptimality) >= gap - 1e-9 * abs(best)
    assert name(solution) in ("STEP_LIMIT", "CONVERGED")


@pytest.mark.parametrize("method", METHODS)
def test_dead_neurons_keep_their_scale(x64, method):
    gram, spec = chain(np.random.default_rng(0), (3, 5, 4, 4, 2))
    gram["w0"][:, 1] = gram["b0"][1] = 0  # no incoming mass
    gram["w2"][2] = 0  # no outgoing mass
    gram["w1"][:, 3] = gram["b1"][3] = 0  # neither
    gram["w2"][3] = 0
    gram["w3"][:] = 0  # an output layer without mass
    dead = np.zeros(13, bool)
    dead[[1, 5 + 2, 5 + 3, 9, 10, 11, 12]] = True
    problem = path_terms(spec, gram)
    z, value = minimum(problem, fixed=dead)
    solution = solve(gram, spec, method=method, max_steps=5000, tol=1e-9)
    assert name(solution) == "CONVERGED"
    found = join(solution.log_scales)
    np.testing.assert_array_equal(found[dead], 0)
    np.testing.assert_allclose(found, z, rtol=0, atol=1e-4)
    np.testing.assert_allclose(solution.objective, value, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_no_mass_at_all(method):
    gram, spec = chain(np.random.default_rng(0), (2, 3, 2))
    nothing = jax.tree.map(lambda a: np.zeros_like(a, np.float32), gram)
    solution = solve(nothing, spec, method=method)
    np.testing.assert_array_equal(join(solution.log_scales), 0)
    assert name(solution) == "CONVERGED"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("method", METHODS)
def test_input_that_is_not_finite(method, bad):
    gram, spec = chain(np.random.default_rng(0), (2, 3, 2))
    gram = jax.tree.map(np.float32, gram)
    gram["w1"][1, 1] = bad
    solution = solve(gram, spec, method=method, initial=(jnp.ones(3),))
    np.testing.assert_array_equal(join(solution.log_scales), 0)
    assert name(solution) == "NON_FINITE"
    assert np.isnan(solution.objective)


@pytest.mark.parametrize("method", METHODS)
def test_vmap_is_a_loop(method):
    rng = np.random.default_rng(0)
    spec = chain(rng, (3, 5, 4, 2))[1]
    grams = [jax.tree.map(np.float32, chain(rng, (3, 5, 4, 2))[0]) for _ in range(3)]
    grams[1]["w0"][0, 0] = np.nan
    stacked = jax.tree.map(lambda *a: np.stack(a), *grams)
    together = jax.vmap(lambda gram: solve(gram, spec, method=method))(stacked)
    for k, gram in enumerate(grams):
        alone = solve(gram, spec, method=method)
        same = jax.tree.map(lambda a, k=k: a[k], together)
        chex.assert_trees_all_close(same, alone, rtol=1e-4, atol=1e-4)
        assert int(same.status) == int(alone.status)


@pytest.mark.parametrize("method", METHODS)
def test_one_compilation(method):
    # No other test has this size, so nothing is compiled yet.
    rng, sizes = np.random.default_rng(0), (3, 7, 4, 2)
    spec = chain(rng, sizes)[1]
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    for k in range(3):
        gram = jax.tree.map(np.float32, chain(rng, sizes)[0])
        before = sum("compile" in event for event in compiled)
        solve(gram, spec, method=method, max_steps=3 + k, tol=10.0**-k, max_log_scale=1.0 + k)
        after = sum("compile" in event for event in compiled)
        assert (after > before) == (k == 0)

    # chex counts by the line of the function, which the parametrized cases share.
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(gram):
        return solve(gram, spec, method=method).log_scales

    for _ in range(2):
        run(jax.tree.map(np.float32, chain(rng, sizes)[0]))


def test_without_jit():
    gram, spec = built("chain")
    gram = jax.tree.map(np.float32, gram)
    compiled = solve(gram, spec, max_steps=2)
    with jax.disable_jit():
        stepped = solve(gram, spec, max_steps=2)
    chex.assert_trees_all_close(stepped.log_scales, compiled.log_scales, atol=1e-4)


@functools.cache
def deep(depth, width=8):
    """A default-initialized network whose Gram diagonal leaves the range of float32."""
    rng = np.random.default_rng(0)
    sizes = [width] * (depth + 1) + [3]
    kernels = [rng.uniform(-1, 1, (a, b)) ** 2 / a for a, b in itertools.pairwise(sizes)]
    biases = [rng.uniform(-1, 1, k.shape[1]) ** 2 / k.shape[0] for k in kernels]
    forward, backward = [np.ones(width)], [np.ones(3)]
    for kernel, bias in zip(kernels, biases, strict=True):
        forward.append(forward[-1] @ kernel + bias)
    for kernel in reversed(kernels):
        backward.append(kernel @ backward[-1])
    backward.reverse()
    gram = {}
    for k in range(len(kernels)):
        gram[f"w{k}"] = np.outer(forward[k], backward[k + 1])
        gram[f"b{k}"] = backward[k + 1]
    return gram, chain(rng, sizes)[1]


def in_scaled_form(gram, dtype):
    exponents = jax.tree.map(lambda a: np.int32(np.log2(a.max())), gram)
    mantissas = jax.tree.map(lambda a, k: (a / 2.0**k).astype(dtype), gram, exponents)
    return ScaledDiagonal(mantissas, exponents)


@pytest.mark.parametrize("method", METHODS)
def test_depth_120_in_float32(x64, method):
    gram, spec = deep(120)
    assert min(leaf.min() for leaf in gram.values()) < 1e-55
    options = {"method": method, "max_log_scale": 25.0, "max_steps": 60}
    narrow = solve(in_scaled_form(gram, np.float32), spec, **options)
    wide = solve(gram, spec, **options)
    assert narrow.objective.dtype == np.float32
    np.testing.assert_allclose(narrow.objective, wide.objective, rtol=1e-5)
    assert np.abs(join(narrow.log_scales)).max() == 25
    if method != "block":
        np.testing.assert_allclose(
            join(narrow.log_scales), join(wide.log_scales), rtol=0, atol=1e-3
        )
    if method == "newton":
        assert name(narrow) == name(wide) == "CLIPPED"
        assert narrow.suboptimality <= 1e-5 * abs(narrow.objective)


def test_masses_beyond_the_range_of_doubles(x64):
    gram, spec = chain(np.random.default_rng(0), (3, 5, 4, 2))
    shifts = {"w0": 2000, "b0": -2000, "w1": 0, "b1": 900, "w2": -1500, "b2": 0}
    exponents = {key: np.int32(value) for key, value in shifts.items()}
    # A log-scale moves by at most 20 in a step, and the optimum is 635 away.
    solution = solve(ScaledDiagonal(gram, exponents), spec, max_log_scale=1e4, max_steps=100)
    assert name(solution) == "CONVERGED"
    assert np.isfinite(join(solution.log_scales)).all()
    assert solution.gradient_norm <= 1e-6 * spec.num_parameters
    wide = solve(
        ScaledDiagonal(gram, exponents),
        spec,
        method="block",
        max_steps=2000,
        tol=1e-9,
        max_log_scale=1e4,
    )
    np.testing.assert_allclose(solution.objective, wide.objective, rtol=1e-9)


def test_without_a_box_scales_stay_in_the_range_of_the_parameters():
    gram, spec = deep(120)
    gram = in_scaled_form(gram, np.float32)
    small = jax.tree.map(lambda leaf: leaf.astype(np.float32), gram.mantissa)
    spec = ArchSpec(spec.groups, describe_leaves(small)[0], spec.treedef)
    assert 39 < default_limit(spec) < 40
    solution = solve(gram, spec)
    assert name(solution) == "UNBOUNDED"
    limit = np.float32(default_limit(spec))
    assert np.abs(join(solution.log_scales)).max() == limit


def norm_terms(spec, params, weight):
    """Masses and reduced term of ``weight · log Σ θ² e^{−2Bz}``."""
    squares = jax.tree.map(np.square, params)
    reduced = LogSum(weight, -2.0, *reduce_masses(spec, squares))
    return (weight, -2.0, flat(spec, squares)), reduced


def test_a_sum_of_terms(few):
    gram, spec = few
    params = draw(np.random.default_rng(1), {k: v.shape for k, v in gram.items()})
    dense, reduced = norm_terms(spec, params, 0.3 * spec.num_parameters)
    b, terms, linear = path_terms(spec, gram)
    z, value = minimum((b, [*terms, dense], linear))
    path = path_objective(spec, gram)
    goal = path._replace(terms=(*path.terms, reduced))
    solution = solve(goal, spec)
    assert name(solution) == "CONVERGED"
    np.testing.assert_allclose(solution.objective, value, rtol=1e-9)
    np.testing.assert_allclose(join(solution.log_scales), z, rtol=0, atol=1e-4)
    for steps in range(5):
        early = solve(goal, spec, max_steps=steps, max_log_scale=30.0)
        gap = float(early.objective) - value
        assert float(early.suboptimality) >= gap - 1e-9 * abs(value)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_norm(few, method):
    gram, spec = few
    dense, reduced = norm_terms(spec, gram, 1.0)
    zero = np.zeros(spec.num_neurons)
    z, value = minimum((incidences(spec), [dense], zero))
    solution = solve(Objective((reduced,), zero), spec, method=method, max_steps=20000, tol=1e-9)
    np.testing.assert_allclose(solution.objective, value, rtol=1e-9)
    np.testing.assert_allclose(join(solution.log_scales), z, rtol=0, atol=1e-4)


def test_smooth_functions(few):
    gram, spec = few

    def function(log_scales):
        return sum(jnp.sum(jnp.cosh(z - 0.5)) for z in log_scales)

    b, terms, linear = path_terms(spec, gram)

    def total(z):
        value, slope = value_and_gradient(z, b, terms, linear)
        return value + 3 * np.cosh(z - 0.5).sum(), slope + 3 * np.sinh(z - 0.5)

    smooth = Smooth(3.0, jax.tree_util.Partial(function))
    found = scipy.optimize.minimize(total, np.zeros(b.shape[1]), jac=True, tol=1e-12)
    solution = solve(path_objective(spec, gram)._replace(smooth=(smooth,)), spec)
    assert name(solution) == "CONVERGED"
    np.testing.assert_allclose(join(solution.log_scales), found.x, rtol=0, atol=1e-5)
    alone = solve(
        path_objective(spec, gram)._replace(
            terms=(), linear=np.zeros(spec.num_neurons), smooth=(smooth,)
        ),
        spec,
    )
    np.testing.assert_allclose(join(alone.log_scales), 0.5, rtol=0, atol=1e-6)


def test_warm_start(x64):
    gram, spec, _ = golden(NETWORKS[1])
    cold = solve(gram, spec)
    warm = solve(gram, spec, initial=cold.log_scales)
    assert int(warm.num_steps) <= 2
    chex.assert_trees_all_close(warm.log_scales, cold.log_scales, atol=1e-9)
    for method in ("block", "coordinate"):
        swept = solve(gram, spec, method=method, initial=cold.log_scales)
        assert int(swept.num_steps) == 1
        assert name(swept) == "CONVERGED"


def test_the_optimum_does_not_depend_on_the_representative():
    rng = np.random.default_rng(5)
    gram, spec = stream(rng)
    b = incidences(spec)
    shift = rng.normal(size=b.shape[1])
    moved = flat(spec, gram) * np.exp(2 * b @ shift)
    ends = np.cumsum([leaf.size for leaf in spec.leaves])[:-1]
    parts = zip(np.split(moved, ends), spec.leaves, strict=True)
    other = jax.tree.unflatten(
        spec.treedef, [part.reshape(leaf.shape).astype(np.float32) for part, leaf in parts]
    )
    one = solve(jax.tree.map(np.float32, gram), spec)
    two = solve(other, spec)
    np.testing.assert_allclose(
        join(one.log_scales), join(two.log_scales) + shift, rtol=0, atol=1e-4
    )


def test_colors():
    rng = np.random.default_rng(0)
    even_odd = colors(chain(rng, (2, 2, 3, 4, 2))[1])
    np.testing.assert_array_equal(even_odd.joined, [False, False])
    np.testing.assert_array_equal(even_odd.mask[0], ~even_odd.mask[1])
    assert len(colors(stream(rng)[1]).mask) == 3
    np.testing.assert_array_equal(colors(recurrent(rng)[1]).joined, [True])


def test_blocks_sum_what_the_definition_sums(few):
    gram, spec = few
    b, z = incidences(spec), np.random.default_rng(1).normal(size=spec.num_neurons)
    table = stacks.table(spec)
    parts = stacks.stacked(path_objective(spec, gram).terms[0], table, jnp.float64)
    assert stacks.are_masses(parts)

    @jax.jit
    def summed(z):
        masses = stacks.equilibrate(parts, jnp.array(True))
        spread = stacks.spread(table, z)
        exponents = masses.logs + 2 * spread
        total = stacks.log_total(masses, table, exponents)
        gradient = stacks.collect(table, jnp.exp(stacks.log_sums(masses, table, exponents)))
        weights = stacks.normalized(masses, table, exponents, total)
        image = stacks.matvecs(weights, table, spread)
        sums = stacks.matvecs(weights, table, jnp.ones_like(image))
        return total, gradient, weights, stacks.collect(table, image + sums * spread)

    total, gradient, weights, product = summed(jnp.asarray(z))
    mass = flat(spec, gram) * np.exp(2 * b @ z)
    np.testing.assert_allclose(np.exp(total), mass.sum())
    out, into = gradient
    np.testing.assert_allclose(out - into, mass @ b, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sum(w.sum() for w in weights), 1)
    out, into = product
    np.testing.assert_allclose(out - into, b.T @ (mass / mass.sum() * (b @ z)), atol=1e-9)


def test_what_neurons_of_many_and_of_few_arrays_meet():
    rng = np.random.default_rng(0)
    n4, n2, count = np.arange(4), np.arange(2), 9
    heads, ends = ([f"{name}{k}" for k in range(count)] for name in ("head", "end"))
    gram = draw(rng, {"stem": (3, 4)} | dict.fromkeys(heads, (4, 2)) | dict.fromkeys(ends, (2, 1)))
    few = [(h, 2, [(h, 1, n2)], [(e, 0, n2)]) for h, e in zip(heads, ends, strict=True)]
    many = ("many", 4, [("stem", 1, n4)], [(head, 0, n4) for head in heads])
    spec = spec_of(gram, many, *few)
    table = stacks.table(spec)
    assert [rows.shape for rows in table.places] == [(4 + 2 * 2 * count, 1), (4, count)]
    values = rng.random(table.slots.shape[1]).astype(np.float32)
    sums, largest = np.zeros((2, 2 * table.size + 1))
    for slots in table.slots:
        np.add.at(sums, slots, values)
        np.maximum.at(largest, slots, values)
    found = stacks.collect(table, values)
    np.testing.assert_allclose(np.concatenate(found), sums[:-1], rtol=1e-6)
    found = stacks.over_neurons(table, values, -np.inf, lambda met: met.max(1))
    np.testing.assert_array_equal(np.concatenate(found), largest[:-1].astype(np.float32))
    found = stacks.collect_log(table, np.log(values))
    np.testing.assert_allclose(np.concatenate(found), np.log(sums[:-1]), rtol=1e-5, atol=1e-6)


def test_wrong_calls():
    gram, spec = chain(np.random.default_rng(0), (2, 3, 2))
    with pytest.raises(SpecError, match="unknown method 'bfgs'; there are 'newton'"):
        solve(gram, spec, method="bfgs")
    with pytest.raises(SpecError, match="tol is -1"):
        solve(gram, spec, tol=-1.0)
    with pytest.raises(SpecError, match="max_log_scale is nan"):
        solve(gram, spec, max_log_scale=float("nan"))
    with pytest.raises(SpecError, match=r"initial has shapes .*\(4,\).*\(3,\)"):
        solve(gram, spec, initial=(jnp.zeros(4),))
    with pytest.raises(SpecError, match="'w1' has dtype int"):
        solve(gram | {"w1": np.ones((3, 2), np.int32)}, spec)
    with pytest.raises(SpecError, match="no neuron"):
        solve(gram, spec_of(gram))
    term = path_objective(spec, jax.tree.map(np.float32, gram))
    with pytest.raises(SpecError, match=r"single logarithm.*use method='newton'"):
        solve(term._replace(terms=2 * term.terms), spec, method="coordinate")
    with pytest.raises(SpecError, match="no term"):
        solve(term._replace(terms=()), spec)
    with pytest.raises(SpecError, match="concave"):
        solve(term._replace(concave=term.terms), spec)


def test_entries_of_opposite_neurons_survive_a_switch_of_precision():
    """The arrangement is cached across the switch, and JAX caches how it converted its arrays."""
    gram, spec = recurrent(np.random.default_rng(11))
    assert len(stacks.table(spec).pieces) > 1
    narrow = solve(jax.tree.map(np.float32, gram), spec)
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        wide = solve(gram, spec)
    finally:
        jax.config.update("jax_enable_x64", before)
    assert wide.objective.dtype == np.float64
    np.testing.assert_allclose(join(narrow.log_scales), join(wide.log_scales), atol=1e-4)
