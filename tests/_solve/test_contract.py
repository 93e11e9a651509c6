"""What all solvers share: options, the box, the initial point, bad numbers, what they return."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond
from pathcond_jax import criteria
from pathcond_jax._solve import flat_objective
from pathcond_jax._solve.flat_objective import Run
from pathcond_jax._solve.objective import Objective
from pathcond_jax._solve.solve import METHODS, Method

Status = pathcond.Status
LAYERS = ["a", "b", "c"]


def network(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((3, 4), (4, 5), (5, 2))
    return {
        name: {"w": jax.random.normal(key, shape)}
        for name, key, shape in zip(LAYERS, keys, shapes, strict=True)
    }


params, grads = network(), network(1)
spec = pathcond.chain_spec(params, LAYERS)
zeros = jax.tree.map(jnp.zeros_like, params)

KINDS = {
    "path": criteria.path(),
    "norm": criteria.norm(),
    "sum": criteria.path() + 0.1 * criteria.norm(),
    "convex": criteria.convex(lambda z: sum(jnp.sum((part - 1.0) ** 2) for part in z)),
    "equalize": criteria.equalize(),
    "activation": criteria.activation([jnp.ones(4), jnp.ones(5)]),
    "steepest": criteria.steepest(grads, 0.5),
    "difference": criteria.norm() + 0.1 * criteria.steepest(grads, 0.5),
}


@pytest.fixture(params=KINDS, scope="module")
def criterion(request):
    return KINDS[request.param]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": -1.0}, "tol is -1.0; it cannot be negative"),
        ({"tol": float("nan")}, "tol is nan"),
        ({"max_steps": -1}, "max_steps is -1; it cannot be negative"),
        ({"max_log_scale": -0.5}, "max_log_scale is -0.5; it cannot be negative"),
        ({"initial": (jnp.zeros(3),)}, r"initial has shapes \(\(3,\),\), .*\(4,\), \(5,\)"),
        ({"method": "bfgs"}, "unknown method 'bfgs'; there are '"),
    ],
)
def test_every_criterion_refuses_the_same_options(criterion, options, message):
    with pytest.raises(pathcond.SpecError, match=message):
        criterion.solve(params, spec, **options)


def test_every_criterion_refuses_unknown_options(criterion):
    with pytest.raises(TypeError, match="'max_step'"):
        criterion.solve(params, spec, max_step=3)


def test_methods_that_do_not_fit_are_refused(criterion):
    ranges = criterion in (KINDS["equalize"], KINDS["activation"])
    with pytest.raises(pathcond.SpecError, match="does not fit this criterion; there are '"):
        criterion.solve(params, spec, method="newton" if ranges else "fixed_point")


def test_every_criterion_starts_in_the_box(criterion):
    initial = (jnp.full(4, jnp.nan), jnp.full(5, 9.0))
    solution = criterion.solve(params, spec, initial=initial, max_log_scale=0.25)
    scales = np.concatenate(solution.log_scales)
    assert np.isfinite(scales).all()
    assert np.abs(scales).max() <= 0.25
    assert solution.status == Status.CLIPPED


def test_every_criterion_starts_from_a_solution(criterion):
    solution = criterion.solve(params, spec)
    again = criterion.solve(params, spec, initial=solution)
    assert int(again.num_steps) <= max(int(solution.num_steps), 1)
    for one, two in zip(solution.log_scales, again.log_scales, strict=True):
        # Rounds of the difference-of-convex iteration end at 1e2 √eps of the box.
        np.testing.assert_allclose(one, two, atol=2e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_every_criterion_reports_bad_numbers(criterion, bad):
    spoilt = {**params, "b": {"w": params["b"]["w"].at[1, 1].set(bad)}}
    solution = criterion.solve(spoilt, spec, initial=(jnp.ones(4), jnp.ones(5)))
    assert solution.status == Status.NON_FINITE
    assert not np.concatenate(solution.log_scales).any()
    for number in (solution.objective, solution.gradient_norm, solution.suboptimality):
        assert np.isnan(number)


def test_every_criterion_needs_a_neuron(criterion):
    lonely = pathcond.trace_spec(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, jnp.ones((1, 2)))
    with pytest.raises(pathcond.SpecError, match="no neuron to rescale"):
        pathcond.condition({"w": jnp.ones((2, 2))}, lonely, criterion)


@pytest.mark.parametrize("sum_with", [None, "norm"])
def test_a_gradient_of_zero_moves_nothing(sum_with):
    criterion = criteria.steepest(zeros, 0.5)
    if sum_with is not None:
        criterion = KINDS[sum_with] + criterion
    alone = KINDS["norm"].solve(params, spec, max_log_scale=0.5)
    solution = criterion.solve(params, spec)
    assert solution.status in (Status.CONVERGED, Status.CLIPPED)
    wanted = np.zeros(9) if sum_with is None else np.concatenate(alone.log_scales)
    np.testing.assert_allclose(np.concatenate(solution.log_scales), wanted, atol=1e-5)


def lazy(problem, spec, z, max_steps, tol):
    """A method that stays where it starts."""
    del spec, max_steps, tol
    nothing = jnp.zeros((), z.dtype)
    return Run(z, jnp.int32(3), jnp.int32(7), jnp.array(True), nothing, nothing, nothing)


def lost(problem, spec, z, max_steps, tol):
    """A method that divides by zero."""
    return lazy(problem, spec, z, max_steps, tol)._replace(z=z.at[0].set(jnp.nan))


class TestOneEntry:
    """A method of one's own is one entry of the table."""

    @pytest.fixture(autouse=True)
    def entries(self, monkeypatch):
        for name, run in (("lazy", lazy), ("lost", lost)):
            entry = Method(
                Objective, flat_objective.make, flat_objective.value, run, 5, {32: 0.1, 64: 0.1}
            )
            monkeypatch.setitem(METHODS, name, entry)

    def test_it_gets_what_all_get(self):
        initial = (jnp.full(4, 0.2), jnp.full(5, 9.0))
        solution = KINDS["norm"].solve(
            params, spec, method="lazy", initial=initial, max_log_scale=0.5
        )
        np.testing.assert_array_equal(solution.log_scales[0], np.float32(0.2))
        np.testing.assert_array_equal(solution.log_scales[1], 0.5)
        assert solution.status == Status.CLIPPED
        assert (int(solution.num_steps), int(solution.num_products)) == (3, 7)

    def test_it_is_named_in_errors(self):
        with pytest.raises(pathcond.SpecError, match="'coordinate', 'lazy', 'lost'"):
            KINDS["norm"].solve(params, spec, method="bfgs")

    def test_its_mistakes_spoil_no_parameters(self):
        moved, solution = pathcond.condition(params, spec, "enorm", method="lost")
        assert solution.status == Status.NON_FINITE
        assert not np.concatenate(solution.log_scales).any()
        assert np.isnan(solution.objective)
        jax.tree.map(np.testing.assert_array_equal, moved, params)


def test_options_are_spelled_out_alike():
    def options(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    solve = options(pathcond.solve)
    assert set(solve) == {"method", "max_steps", "tol", "max_log_scale", "initial"}
    assert options(criteria.Criterion.solve) == solve
    assert options(pathcond.condition) == solve | {"norm_weight": 0.0, "rounding": None}
    kinds = [p.kind for p in inspect.signature(pathcond.condition).parameters.values()]
    assert all(kind is not inspect.Parameter.VAR_KEYWORD for kind in kinds)
    assert [k for k, _ in itertools.groupby(kinds)] == [
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    ]


@pytest.mark.parametrize("option", ["tol", "max_steps", "max_log_scale"])
def test_traced_options_name_the_fix(option):
    condition = jax.jit(lambda value: pathcond.condition(params, spec, **{option: value}))
    with pytest.raises(pathcond.SpecError, match=rf"{option} is traced.*functools\.partial"):
        condition(1.0)


def test_concave_terms_need_a_box():
    goal = KINDS["steepest"].goal(params, spec)._replace(limit=None)
    with pytest.raises(pathcond.SpecError, match="concave terms needs a box: pass max_log_scale"):
        pathcond.solve(goal, spec)
    boxed = pathcond.solve(goal, spec, max_log_scale=0.5)
    expected = KINDS["steepest"].solve(params, spec)
    np.testing.assert_array_equal(boxed.log_scales[0], expected.log_scales[0])
