"""The report: representatives of one function side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import NETWORKS

import pathcond_jax as pathcond
from pathcond_jax import criteria


def traced(name):
    found = NETWORKS[name]()
    return found.params, pathcond.trace_spec(found.apply_fn, found.params, found.x)


def test_every_column_describes_what_its_criterion_chooses():
    params, spec = traced("plain-jax")
    chosen = [*criteria.CRITERIA, criteria.path() + 0.5 * criteria.norm()]
    found = pathcond.report(params, spec, chosen)
    assert [c.name for c in found.columns] == ["as is", *map(str, chosen)]
    for column, criterion in zip(found.columns, [None, *chosen], strict=True):
        moved = params if criterion is None else pathcond.condition(params, spec, criterion)[0]
        leaves = jax.tree.leaves(moved)
        assert column.norm == pytest.approx(
            float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves))), rel=1e-5
        )
        assert list(column.norms) == [leaf.path for leaf in spec.leaves]
        np.testing.assert_allclose(
            list(column.ranges.values()), [np.abs(leaf).max() for leaf in leaves], rtol=1e-6
        )
        for group, c in zip(spec.groups, pathcond.conserved_quantities(moved, spec), strict=True):
            assert column.conserved[group.name] == (float(c.min()), float(c.max()))
        assert column.conditioning_score == pytest.approx(
            float(pathcond.conditioning_score(moved, spec)), abs=1e-6
        )
    as_is, path, enorm, equal, _ = found.columns
    assert (as_is.status, path.status) == ("", "CONVERGED")
    assert path.conditioning_score < as_is.conditioning_score
    assert enorm.norm < min(as_is.norm, path.norm, equal.norm)
    assert max(abs(c) for pair in enorm.conserved.values() for c in pair) < 1e-3


def test_the_table_has_a_line_for_each_group_and_leaf():
    params, spec = traced("lenet")
    lines = str(pathcond.report(params, spec, ["enorm"])).splitlines()
    assert len(lines) == 7 + len(spec.groups) + len(spec.leaves)
    assert lines[0].split() == ["as", "is", "enorm"]
    for name in (*(g.name for g in spec.groups), *(leaf.path for leaf in spec.leaves)):
        assert any(line.startswith(f"  {name} ") for line in lines)


def test_a_network_without_path_lifting_has_no_path_column():
    def apply_fn(params, x):
        x = jax.nn.relu(x @ params["first"]) @ params["second"]
        return jnp.tanh(x) @ params["third"]

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"first": (3, 4), "second": (4, 2), "third": (2, 1)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    spec = pathcond.trace_spec(apply_fn, params, jnp.ones((2, 3)))
    found = pathcond.report(params, spec)
    assert [c.name for c in found.columns] == ["as is", "enorm", "equalize"]
    assert found.columns[0].conditioning_score is None
    assert "none" in str(found)


def test_a_network_without_neurons_is_named():
    params = {"w": jnp.ones((2, 2))}
    spec = pathcond.trace_spec(lambda p, x: jnp.tanh(x @ p["w"]), params, jnp.ones((1, 2)))
    with pytest.raises(pathcond.SpecError, match="no neuron to rescale"):
        pathcond.report(params, spec)


def test_arguments_in_the_wrong_order_are_named():
    params, spec = traced("plain-jax")
    with pytest.raises(pathcond.SpecError, match=r"spec must be an ArchSpec.*\(params, spec\)"):
        pathcond.report(spec, params)
