"""Leaves are matched by path: whatever the containers, in one place of the spec's tree."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pathcond_jax as pathcond
from pathcond_jax._spec.trees import leaf_positions


def layer():
    return {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}


def traced(tree, trainable=None):
    return pathcond.trace_spec(
        lambda tree, x: x * sum(leaf.sum() for leaf in jax.tree.leaves(tree)),
        tree,
        jnp.ones((1, 2)),
        trainable=trainable,
    )


def paths(spec, tree):
    return [spec.leaves[k].path for k in leaf_positions(spec, tree)]


def test_containers_do_not_matter():
    spec = traced({"one": layer(), "two": [layer()]})
    tree = collections.OrderedDict(two=(layer(),), one=layer())
    assert paths(spec, tree) == ["two/0/b", "two/0/w", "one/b", "one/w"]
    state = nnx.State({"one": jax.tree.map(nnx.Param, layer())})
    assert paths(spec, state) == ["one/b", "one/w"]
    assert paths(spec, {}) == []


def test_a_subtree_and_a_tree_around():
    spec = traced({"params": {"one": layer(), "two": layer()}})
    assert paths(spec, {"one": layer()}) == ["params/one/b", "params/one/w"]
    assert paths(spec, {"model": {"params": {"two": layer()}}}) == ["params/two/b", "params/two/w"]


def test_what_is_trained_goes_before_a_copy_of_it():
    tree = {"average": {"one": layer()}, "params": {"one": layer()}}
    assert paths(traced(tree), {"one": layer()}) == ["params/one/b", "params/one/w"]
    ambiguous = traced(tree, trainable=lambda path: True)
    with pytest.raises(pathcond.SpecError) as caught:
        leaf_positions(ambiguous, {"one": layer()}, "params")
    assert str(caught.value) == (
        "params: 'one/b' could be 'average/one/b' or 'params/one/b' of the tree the spec was built "
        "from; pass a tree that has more of the path"
    )
    assert "PyTreeDef" not in str(caught.value)


def test_other_trees_are_described_by_their_paths():
    spec = traced({"params": {"one": layer(), "two": layer()}})
    with pytest.raises(pathcond.SpecError, match=r"unexpected 'params/three'$"):
        leaf_positions(spec, {"one": layer(), "two": layer(), "three": np.ones(2)})
    with pytest.raises(pathcond.SpecError, match=r"updates has another structure.*unexpected 'x'"):
        leaf_positions(spec, {"x": np.ones(2)}, "updates")
