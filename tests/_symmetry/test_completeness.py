"""Completeness: in a ReLU network the neurons found are all that leave the path products fixed.

Near a generic θ the parameters with the same path products Φ(θ) form a manifold of dimension
p − rank ∂Φ(θ), and it is the orbit of θ under neuron rescaling (Gribonval et al., *A path-norm
toolkit for modern networks*, ICLR 2024).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import pathcond_jax as pathcond


class Architecture:
    """A random directed graph of dense layers, sums and concatenations."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.inputs = int(rng.integers(1, 4))
        self.steps, widths, unused = [], [self.inputs], {0}
        for _ in range(rng.integers(2, 6)):
            source = int(rng.integers(len(widths)))
            alike = [k for k in range(len(widths)) if widths[k] == widths[source] and k != source]
            kind = rng.choice(["dense", "dense", "add", "concatenate"])
            if kind == "add" and alike:
                used, width = (source, int(rng.choice(alike))), widths[source]
            elif kind == "concatenate" and len(widths) > 1:
                used = (source, int(rng.integers(len(widths))))
                width = widths[used[0]] + widths[used[1]]
            else:
                kind, used, width = "dense", (len(widths) - 1,), int(rng.integers(1, 5))
            self.steps.append((kind, used, width, bool(rng.integers(2)), bool(rng.integers(4))))
            unused = (unused | {len(widths)}) - set(used)
            widths.append(width)
        self.last = tuple(sorted(unused - {0})) or (len(widths) - 1,)
        total = sum(widths[k] for k in self.last)
        self.steps.append(
            ("output", self.last, int(rng.integers(1, 3)), bool(rng.integers(2)), False)
        )
        self.widths = [*widths, total]
        self.params = {}
        for k, (kind, used, width, bias, _) in enumerate(self.steps):
            if kind in ("dense", "output"):
                fan_in = sum(widths[j] for j in used)
                self.params[f"w{k}"] = jnp.asarray(rng.normal(size=(fan_in, width)))
                if bias:
                    self.params[f"b{k}"] = jnp.asarray(rng.normal(size=width))

    def run(self, params, x, dense, join, add, relu):
        values = [x]
        for k, (kind, used, _, bias, activated) in enumerate(self.steps):
            operands = [values[j] for j in used]
            if kind == "add":
                y = add(*operands)
            else:
                y = operands[0]
                for other in operands[1:]:
                    y = join(y, other)
            if kind in ("dense", "output"):
                y = dense(y, params[f"w{k}"], params[f"b{k}"] if bias else None)
            values.append(relu(y) if activated else y)
        return values[-1]

    def apply(self, params, x):
        def dense(x, kernel, bias):
            return x @ kernel if bias is None else x @ kernel + bias[None]

        def join(x, y):
            return jnp.concatenate([x, y], -1)

        return self.run(params, x, dense, join, jnp.add, jax.nn.relu)

    def paths(self):
        """Every path from an input or a bias to an output, as the positions of its entries."""
        flat, unravel = ravel_pytree(self.params)
        positions = jax.tree.map(np.asarray, unravel(jnp.arange(flat.size, dtype=flat.dtype)))

        def dense(units, kernel, bias):
            ends = range(kernel.shape[1])
            through = [
                [(*path, kernel[i, j]) for i, paths in enumerate(units) for path in paths]
                for j in ends
            ]
            return through if bias is None else [[*through[j], (bias[j],)] for j in ends]

        def add(x, y):
            return [[*one, *two] for one, two in zip(x, y, strict=True)]

        start = [[()] for _ in range(self.inputs)]
        units = self.run(positions, start, dense, lambda x, y: x + y, add, lambda units: units)
        return [np.array(path, int) for unit in units for path in unit]


def lost_dimensions(network):
    """p − rank ∂Φ(θ), with Φ the explicit list of path products."""
    theta = np.asarray(ravel_pytree(network.params)[0])
    paths = network.paths()
    jacobian = np.zeros((len(paths), theta.size))
    for row, path in zip(jacobian, paths, strict=True):
        for entry in path:
            row[entry] = np.prod(theta[path[path != entry]])
    return theta.size - np.linalg.matrix_rank(jacobian)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(30))
def test_neurons_are_the_dimensions_that_path_products_lose(seed):
    network = Architecture(seed)

    spec = pathcond.trace_spec(network.apply, network.params, jnp.ones((2, network.inputs)))

    assert spec.num_neurons == lost_dimensions(network), f"{network.steps}\n{spec}"


@pytest.mark.usefixtures("x64")
def test_the_example_2_3_4_2_2_has_39_entries_and_rank_30():
    network = Architecture(0)
    network.inputs, widths = 2, (2, 3, 4, 2, 2)
    network.steps = [("dense", (k,), n, k < 3, k < 3) for k, n in enumerate(widths[1:])]
    rng = np.random.default_rng(0)
    network.params = {f"w{k}": rng.normal(size=widths[k : k + 2]) for k in range(4)}
    network.params |= {f"b{k}": rng.normal(size=n) for k, n in enumerate(widths[1:4])}

    spec = pathcond.trace_spec(network.apply, network.params, jnp.ones((1, 2)))

    assert spec.num_parameters == 39
    assert lost_dimensions(network) == 39 - 30
    assert spec.num_neurons == 9
