"""Every network of the zoo: the neurons found are those expected, and rescaling them is safe."""

import jax
import pytest
from zoo import FULL_SIZE, NETWORKS, relative_change

import pathcond_jax as pathcond


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_all_neurons_are_found_and_preserve_the_function(name):
    network = NETWORKS[name]()

    spec = pathcond.trace_spec(network.apply_fn, network.params, network.x)

    assert spec.num_neurons == network.neurons, str(spec)
    assert {op for op in network.pinned_by if all(op not in str(p) for p in spec.pinned)} == set()
    assert relative_change(network, spec) < 1e-5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_function_is_preserved_to_1e_11_in_float64(name):
    network = NETWORKS[name]()
    leaves = jax.tree.leaves(network.params)
    assert all(leaf.dtype != "float32" for leaf in leaves)

    spec = pathcond.trace_spec(network.apply_fn, network.params, network.x)

    assert spec.num_neurons == network.neurons
    assert relative_change(network, spec) < 1e-11


@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_full_size_networks_are_traced_from_shapes(name):
    network = FULL_SIZE[name]()

    spec = pathcond.trace_spec(network.apply_fn, network.params, network.x)

    assert spec.num_neurons == network.neurons
