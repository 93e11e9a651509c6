"""What is too large to be followed is pinned, and said to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pathcond_jax as pathcond
from pathcond_jax._symmetry.equations import Equations, Term


def entrywise(params, x):
    hidden = jnp.maximum(x[:, :, None] * params["w"][None], 0.0)
    return hidden.reshape(1, -1) @ params["v"]


@pytest.mark.parametrize(("rows", "found"), [(10, True), (1100, False)])
def test_entries_that_are_too_many_to_be_neurons_are_named(rows, found):
    shapes = {"w": (rows, 1000), "v": (rows * 1000, 1)}
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    spec = pathcond.trace_spec(entrywise, params, jnp.ones((1, rows)), check=False)

    reasons = [pin.reason for pin in spec.pinned if pin.path == "w"]
    assert (spec.num_neurons == rows * 1000) == found
    assert bool(reasons) != found
    assert found or "along axes (0, 1) are too many to be followed one by one" in reasons[0]


def test_equations_beyond_the_limit_demand_more_and_not_less():
    equations = Equations()
    one, two = equations.new((5000, 1)), equations.new((1, 4000))
    equations.require([Term(1.0, one), Term(1.0, two)], 0)
    assert equations.solve().free.size == 0

    equations = Equations()
    single = np.broadcast_to(equations.new((1, 4000)), (5000, 4000))
    equations.require([Term(1.0, single)], 0)
    assert equations.solve().free.size == 0
