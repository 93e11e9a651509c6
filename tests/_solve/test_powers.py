"""Solvers where entries take other powers of their neuron's scale than 1, against scipy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import pathcond_jax as pathcond
from pathcond_jax import criteria
from pathcond_jax._solve.objective import Ranges
from pathcond_jax._solve.solve import default_limit, solve
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import describe_leaves


def spec_of(tree, *groups):
    """Groups are (name, size, incoming, outgoing) with (path, axis, index, power) for each."""
    leaves, treedef = describe_leaves(tree)
    made = [
        pathcond.NeuronGroup(
            name, size, *([pathcond.Incidence(*i) for i in side] for side in (incoming, outgoing))
        )
        for name, size, incoming, outgoing in groups
    ]
    return ArchSpec(tuple(made), leaves, treedef)


def drawn(shapes):
    rng = np.random.default_rng(5)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def squared():
    """Two hidden layers with squared ReLU and biases."""
    n, m = np.arange(4), np.arange(5)
    tree = drawn({"a": (3, 4), "b": (4,), "c": (4, 5), "d": (5,), "e": (5, 2), "f": (2,)})
    return tree, spec_of(
        tree,
        ("one", 4, [("a", 1, n, 1), ("b", 0, n, 1)], [("c", 0, n, 2)]),
        ("two", 5, [("c", 1, m, 1), ("d", 0, m, 1)], [("e", 0, m, 2)]),
    )


def several():
    """relu(a) ** 2 and relu(a) ** 0.7 are read by two layers, and biases are added before both."""
    n = np.arange(4)
    tree = drawn({"a": (3, 4), "b": (4,), "c": (4,), "d": (4, 5), "e": (4, 2), "f": (2,)})
    incoming = [("a", 1, n, 1), ("b", 0, n, 1), ("c", 0, n, 2)]
    return tree, spec_of(tree, ("one", 4, incoming, [("d", 0, n, 2), ("e", 0, n, 0.7)]))


def parts():
    """One layer of which some neurons are squared, some take a root and one does neither."""
    tree = drawn({"a": (3, 5), "b": (5, 2)})
    incoming = [("a", 1, [0, 1, -1, -1, -1], 2), ("a", 1, [-1, -1, 2, 3, 4], 1)]
    outgoing = [("b", 0, [-1, -1, 2, 3, -1], 2), ("b", 0, [0, 1, -1, -1, 4], 1)]
    return tree, spec_of(tree, ("one", 5, incoming, outgoing))


def recurrent():
    """A kernel that reads each neuron's scale and writes its square."""
    n = np.arange(4)
    tree = drawn({"a": (3, 4), "loop": (4, 4), "b": (4,), "c": (4, 2)})
    incoming = [("a", 1, n, 2), ("loop", 1, n, 2), ("b", 0, n, 2)]
    return tree, spec_of(tree, ("one", 4, incoming, [("loop", 0, n, 1), ("c", 0, n, 3)]))


def opposite():
    """A kernel whose diagonal no scale moves, both sides being cubed."""
    n = np.arange(4)
    tree = drawn({"a": (3, 4), "loop": (4, 4), "c": (4, 2)})
    incoming = [("a", 1, n, 1), ("loop", 1, n, 3)]
    return tree, spec_of(tree, ("one", 4, incoming, [("loop", 0, n, 3), ("c", 0, n, 2)]))


CASES = {case.__name__: case for case in (squared, several, parts, recurrent, opposite)}


@functools.cache
def built(case):
    """One spec per case, so that each solver compiles once for all tests."""
    return CASES[case]()


@pytest.fixture(params=CASES)
def case(request, x64):
    return built(request.param)


def incidences(spec):
    """B, (p, H), from the definition."""
    columns = []
    for group in spec.groups:
        matrices = {leaf.path: np.zeros((*leaf.shape, group.size)) for leaf in spec.leaves}
        for sign, side in ((-1, group.incoming), (1, group.outgoing)):
            for i in side:
                (axis,) = i.axes
                members = i.index[:, None] == np.arange(group.size)
                entries = np.moveaxis(matrices[i.path], axis, -2)
                entries += sign * i.power * members
        columns.append(np.concatenate([m.reshape(-1, group.size) for m in matrices.values()]))
    return np.concatenate(columns, axis=1)


def value_and_gradient(z, b, w, s, a, linear):
    """F and its gradient from the definition."""
    logs = np.log(a) + s * (b @ z)
    mass = np.exp(logs - logs.max())
    value = w * (logs.max() + np.log(mass.sum())) - linear @ z
    return value, w * s * (mass @ b) / mass.sum() - linear


def minimum(*problem, bound=40.0):
    count = problem[0].shape[1]
    found = scipy.optimize.minimize(
        value_and_gradient,
        np.zeros(count),
        problem,
        jac=True,
        method="L-BFGS-B",
        bounds=[(-bound, bound)] * count,
        options={"maxiter": 20000, "maxfun": 50000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 50},
    )
    return found.x, found.fun


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def norm_problem(tree, spec):
    b = incidences(spec)
    return b, float(len(b)), -2.0, flat(tree) ** 2, np.zeros(b.shape[1])


def path_problem(tree, spec):
    b = incidences(spec)
    return b, float(len(b)), 2.0, flat(tree) ** 2, 2 * b.sum(0)


@pytest.mark.parametrize("method", ["newton", "block"])
def test_the_minimum_of_the_norm_is_the_one_that_scipy_finds(case, method):
    tree, spec = case
    solution = criteria.norm().solve(tree, spec, method=method, max_steps=1000)

    z, value = minimum(*norm_problem(tree, spec))

    assert pathcond.Status(int(solution.status)).name == "CONVERGED"
    assert solution.objective == pytest.approx(value, abs=1e-9 * abs(value))
    np.testing.assert_allclose(np.concatenate(solution.log_scales), z, atol=1e-5)


@pytest.mark.parametrize("method", ["newton", "block"])
def test_the_minimum_of_the_divergence_is_the_one_that_scipy_finds(case, method):
    tree, spec = case
    gram = jax.tree.map(np.square, tree)
    solution = solve(gram, spec, method=method, max_steps=1000, max_log_scale=3.0)

    problem = path_problem(tree, spec)
    value = minimum(*problem, bound=3.0)[1]

    assert solution.objective == pytest.approx(value, abs=1e-8 * abs(value))
    z = np.concatenate(solution.log_scales)
    np.testing.assert_allclose(value_and_gradient(z, *problem)[0], solution.objective, rtol=1e-12)


def test_the_bound_of_the_suboptimality_holds(case):
    tree, spec = case
    value = minimum(*norm_problem(tree, spec))[1]
    for steps in range(4):
        solution = criteria.norm().solve(tree, spec, max_steps=steps)
        gap = float(solution.objective) - value
        assert gap <= float(solution.suboptimality) + 1e-9 * abs(value)


def test_block_sweeps_never_increase_the_objective(case):
    tree, spec = case
    values = [
        float(criteria.norm().solve(tree, spec, method="block", max_steps=k, tol=0.0).objective)
        for k in range(6)
    ]
    assert (np.diff(values) <= 1e-12 * abs(values[0])).all()


def ranges_of(values, spec, neuron):
    """The largest outgoing and incoming entry of each neuron of the first group."""
    found = []
    for side in (spec.groups[0].outgoing, spec.groups[0].incoming):
        sizes = [
            abs(np.moveaxis(values[i.path], i.axes[0], 0)[i.index == neuron]).max(initial=0)
            for i in side
            if np.ndim(values[i.path]) > 1
        ]
        found.append(max(sizes))
    return found


def test_equal_ranges(case):
    tree, spec = case
    moved, solution = pathcond.condition(tree, spec, "equalize")

    assert pathcond.Status(int(solution.status)).name == "CONVERGED"
    values = jax.tree.map(np.asarray, moved)
    for neuron in range(spec.groups[0].size):
        out, into = ranges_of(values, spec, neuron)
        assert out == pytest.approx(into, rel=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_activations_take_the_power_of_what_reads_them(x64, alpha):
    tree, spec = built("squared")
    largest = [np.array([3.0, 5.0, 2.0, 0.5]), None]
    moved, solution = pathcond.condition(tree, spec, criteria.activation(largest, alpha))

    z = np.asarray(solution.log_scales[0])
    assert not np.asarray(solution.log_scales[1]).any()
    activations = largest[0] * np.exp(2 * z)
    weights = abs(np.asarray(moved["c"])).max(1)
    np.testing.assert_allclose(activations**alpha, weights ** (1 - alpha), rtol=1e-7)


def test_activations_that_are_read_in_two_powers_are_refused(x64):
    tree, spec = built("several")
    with pytest.raises(pathcond.SpecError, match=r"'one'.*'d' and 'e'.*different powers"):
        pathcond.condition(tree, spec, criteria.activation([np.ones(4)]))


def test_other_criteria(x64):
    tree, spec = built("squared")
    grads = jax.tree.map(np.cos, tree)
    before = sum((leaf**2).sum() for leaf in jax.tree.leaves(grads))

    moved = pathcond.condition(tree, spec, criteria.steepest(grads, 0.3))[1]
    after = pathcond.rescale(grads, spec, moved, power=-1)
    assert sum((leaf**2).sum() for leaf in jax.tree.leaves(after)) > before

    own = criteria.convex(lambda z: sum(jnp.sum((part - 0.7) ** 2) for part in z))
    for z in pathcond.condition(tree, spec, own)[1].log_scales:
        np.testing.assert_allclose(z, 0.7, atol=1e-6)

    fisher = criteria.fisher(jax.tree.map(np.square, grads), damping=0.0)
    solution = pathcond.condition(tree, spec, fisher)[1]
    value = minimum(*path_problem(grads, spec))[1]
    assert solution.objective == pytest.approx(value, rel=1e-9)


def test_the_papers_sweeps_name_what_they_cannot_do(x64):
    tree, spec = built("squared")
    message = "method 'coordinate' .* in group 'one' 'c' takes the power 2; use method='newton'"
    with pytest.raises(pathcond.SpecError, match=message):
        criteria.norm().solve(tree, spec, method="coordinate")


def test_the_box_is_where_entries_stay_in_the_range_of_their_dtype():
    n = np.arange(2)
    tree = {"a": np.ones((2, 2), np.float32), "b": np.ones((2, 2), np.float32)}
    one, ten = (
        spec_of(tree, ("one", 2, [("a", 1, n, 1)], [("b", 0, n, power)])) for power in (1, 10)
    )
    assert default_limit(ten) == pytest.approx(default_limit(one) / 10)


def test_a_common_factor_of_the_powers_changes_scales_only(x64):
    n = np.arange(4)
    tree = drawn({"a": (3, 4), "b": (4, 2)})
    found = []
    for factor in (1, 0.5, 3):
        incoming, outgoing = ("a", 1, n, factor), ("b", 0, n, 2 * factor)
        spec = spec_of(tree, ("one", 4, [incoming], [outgoing]))
        found.append(pathcond.condition(tree, spec, "enorm")[0])
    for other in found[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found[0], other)


def test_powers_are_positive_numbers():
    for power in (0, -1, np.nan, np.inf, "two"):
        with pytest.raises(pathcond.SpecError, match=re.escape(f"a: power is {power}"[:12])):
            pathcond.Incidence("a", 0, np.arange(2), power)


def test_goals_of_ranges_are_read_from_the_layout(x64):
    tree, spec = built("several")
    goal = criteria.equalize().goal(tree, spec)
    assert isinstance(goal, Ranges)
    assert float(solve(goal, spec).objective) < 1e-9


LARGEST = [np.linspace(1.0, 3.0, 4), np.linspace(0.5, 4.0, 5)]

KINDS = {
    "norm": lambda tree: criteria.norm(),
    "fisher": lambda tree: criteria.fisher(jax.tree.map(np.square, tree)),
    "sum": lambda tree: criteria.fisher(jax.tree.map(np.square, tree)) + 0.1 * criteria.norm(4),
    "convex": lambda tree: criteria.convex(lambda z: sum(jnp.sum((p - 1.0) ** 2) for p in z)),
    "equalize": lambda tree: criteria.equalize(),
    "activation": lambda tree: criteria.activation(LARGEST, 0.4),
    "steepest": lambda tree: criteria.steepest(jax.tree.map(np.cos, tree), 0.5),
    "difference": lambda tree: (
        criteria.norm() + 0.1 * criteria.steepest(jax.tree.map(np.cos, tree), 0.5)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_every_solver_promises(x64, kind):
    tree, spec = built("squared")
    criterion = KINDS[kind](tree)

    solution = criterion.solve(tree, spec)
    assert solution.status in (pathcond.Status.CONVERGED, pathcond.Status.CLIPPED)
    again = criterion.solve(tree, spec, initial=solution)
    assert int(again.num_steps) <= max(int(solution.num_steps), 1)
    # The largest gap of ranges is 0 to within rounding.
    rounding = 1e-7 * abs(solution.objective) + 4 * jnp.finfo(jnp.float64).eps
    assert float(again.objective) <= float(solution.objective) + float(rounding)
    assert float(solution.objective) <= float(solution.objective_before)

    boxed = criterion.solve(
        tree, spec, initial=(np.full(4, np.nan), np.full(5, 9.0)), max_log_scale=0.05
    )
    assert max(float(abs(z).max()) for z in boxed.log_scales) <= 0.05
    assert boxed.status == pathcond.Status.CLIPPED

    spoilt = tree | {"c": np.where(tree["c"] == tree["c"].max(), np.nan, tree["c"])}
    refused = criterion.solve(spoilt, spec)
    assert refused.status == pathcond.Status.NON_FINITE
    assert not np.concatenate(refused.log_scales).any()
