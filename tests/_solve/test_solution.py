"""A solution as people see it: a table, a sentence for each status, never an exception."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond
from pathcond_jax._action.check import random_log_scales
from pathcond_jax._solve.solution import Solution

Status = pathcond.Status


def solved(status=0, sizes=(3, 2), **fields):
    numbers = {
        "log_scales": tuple(
            jnp.linspace(-1.0, 0.5, size) * (k + 1) for k, size in enumerate(sizes)
        ),
        "objective": jnp.float32(12.5),
        "objective_before": jnp.float32(20),
        "gradient_norm": jnp.float32(1e-6),
        "suboptimality": jnp.float32(1e-4),
        "num_steps": jnp.int32(7),
        "num_products": jnp.int32(30),
        "status": jnp.int32(status),
    }
    return Solution(**numbers | fields)


@pytest.mark.parametrize("status", Status)
def test_every_status_has_a_sentence(status):
    assert len(status.sentence.split()) >= 4
    assert f"{status.name}:" in Status.__doc__
    assert str(solved(status)).startswith(f"{status.name}: {status.sentence} (7 steps)")


def test_the_table():
    assert str(solved()).splitlines() == [
        "CONVERGED: the tolerance is met (7 steps)",
        "objective 20 → 12.5, at most 0.0001 above the minimum",
        "group  size  largest |log-scale|",
        "0      3     1",
        "1      2     2",
    ]
    assert "minimum" not in str(solved(suboptimality=jnp.float32(jnp.inf)))


def test_of_many_groups_the_largest_are_shown():
    shown = str(solved(sizes=(2,) * 30)).splitlines()
    assert shown[3].split() == ["20", "2", "21"]
    assert shown[12].split() == ["29", "2", "30"]
    assert shown[13:] == ["and 20 more groups of smaller ones"]


def test_of_many_solutions_the_endings_are_counted():
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), solved(), solved(2), solved())
    assert str(many).splitlines() == [
        "3 solutions: 2 CONVERGED, 1 NON_FINITE",
        "group  size  largest |log-scale|",
        "0      3     1",
        "1      2     2",
    ]


def test_a_code_that_is_no_status():
    assert "status 9 (7 steps)" in str(solved(9))


def test_what_is_not_known_is_shown_as_it_is():
    shown = []

    def traced(solution):
        shown.extend([str(solution), f"{solution}"])
        return solution

    jax.jit(traced)(solved())
    jax.vmap(traced)(jax.tree.map(lambda leaf: leaf[None], solved()))
    shown += [
        str(jax.eval_shape(lambda: solved())),
        str(jax.tree.map(lambda _: None, solved())),
        str(jax.tree.map(lambda _: "data", solved())),
    ]
    deleted = solved(objective=jnp.float32(1.0) + 1)
    deleted.objective.delete()
    shown.append(str(deleted))
    assert all(text.startswith("Solution(") for text in shown)


def test_numpy_arrays_are_shown():
    assert str(jax.tree.map(np.asarray, solved())) == str(solved())


def test_a_solution_is_a_pytree_of_arrays():
    leaves = jax.tree.leaves(solved())
    assert len(leaves) == 9
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert repr(solved()).startswith("Solution(log_scales=(Array(")


@pytest.mark.parametrize("criterion", ["path", "enorm", "equalize"])
def test_the_objective_before_is_that_of_the_parameters_as_they_are(criterion):
    rng = np.random.default_rng(0)
    params = {name: {"w": jnp.asarray(rng.normal(size=(3, 3)), "float32")} for name in "abc"}
    spec = pathcond.chain_spec(params, ["a", "b", "c"])
    moved, first = pathcond.condition(params, spec, criterion)
    _, again = pathcond.condition(moved, spec, criterion)

    np.testing.assert_allclose(again.objective_before, first.objective, rtol=1e-3, atol=1e-4)
    assert first.objective_before > first.objective


def padded(params, x):
    """Of 3 × 3 kernels on one pixel, eight positions see only padding."""
    for name in "abc":
        x = jax.lax.conv_general_dilated(
            x, params[name]["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + params[name]["b"].reshape(1, 1, 1, -1))
    return x


def networks():
    rng = np.random.default_rng(0)
    dense = {name: {"w": jnp.asarray(rng.normal(size=(3, 3)), "float32")} for name in "abc"}
    yield "dense", dense, pathcond.chain_spec(dense, ["a", "b", "c"]), 27
    image = {
        name: {
            "w": jnp.asarray(rng.normal(size=(3, 3, inside, outside)), "float32"),
            "b": jnp.asarray(rng.normal(size=outside), "float32"),
        }
        for name, inside, outside in (("a", 2, 4), ("b", 4, 3), ("c", 3, 2))
    }
    spec = pathcond.trace_spec(padded, image, jnp.ones((1, 1, 1, 2)))
    yield "one pixel", image, spec, 2 * 4 + 4 * 3 + 3 * 2 + 4 + 3 + 2


@pytest.mark.parametrize(("_", "params", "spec", "count"), [*networks()])
def test_the_objective_falls_by_the_score(_, params, spec, count):
    """Entries without a path, on which no scale does anything, count in neither."""
    moved, solution = pathcond.condition(params, spec)
    fall = (solution.objective_before - solution.objective) / count
    score = [pathcond.conditioning_score(tree, spec) for tree in (params, moved)]

    assert (
        sum(int((g > 0).sum()) for g in jax.tree.leaves(pathcond.gram_diagonal(params, spec)))
        == count
    )
    assert score[1] < score[0]
    np.testing.assert_allclose(fall, score[0] - score[1], rtol=1e-4)


@pytest.mark.parametrize("method", ["newton", "block", "coordinate"])
def test_the_score_is_least_at_the_optimum_whatever_has_no_path(method):
    *_, (_, params, spec, _) = networks()
    best, solution = pathcond.condition(params, spec, method=method, max_steps=1000)
    least = pathcond.conditioning_score(best, spec)

    assert solution.status == pathcond.Status.CONVERGED
    for seed in range(4):
        noise = random_log_scales(jax.random.key(seed), spec)
        near = pathcond.rescale(best, spec, tuple(0.1 * z for z in noise))
        assert pathcond.conditioning_score(near, spec) > least
