"""Networks whose activations are homogeneous of another degree than 1."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

import pathcond_jax as pathcond


def relu(x):
    return jnp.maximum(x, 0.0)


def mlp(activation):
    """Two hidden layers with biases."""

    def apply_fn(params, x):
        x = activation(x @ params["a"] + params["b"][None])
        x = activation(x @ params["c"] + params["d"][None])
        return x @ params["e"] + params["f"][None]

    return apply_fn, {"a": (3, 4), "b": (4,), "c": (4, 5), "d": (5,), "e": (5, 2), "f": (2,)}


def gated():
    """relu(a)² * b, of which the two inner kernels scale apart."""

    def apply_fn(params, x):
        gate = relu(x @ params["gate"]) ** 2
        return (gate * (x @ params["value"])) @ params["down"]

    return apply_fn, {"gate": (3, 4), "value": (3, 4), "down": (4, 2)}


def shifted():
    """A bias behind the square, and a second reader of what was not squared."""

    def apply_fn(params, x):
        h = relu(x @ params["a"])
        return (h**2 + params["b"][None]) @ params["c"] + h @ params["d"]

    return apply_fn, {"a": (3, 4), "b": (4,), "c": (4, 2), "d": (4, 2)}


def halves():
    """Half of a layer is squared."""

    def apply_fn(params, x):
        h = relu(x @ params["a"])
        return jnp.concatenate([h[:, :2] ** 2, h[:, 2:]], 1) @ params["b"]

    return apply_fn, {"a": (3, 4), "b": (4, 2)}


NETWORKS = {
    "squared": lambda: mlp(lambda x: relu(x) ** 2),
    "cubed": lambda: mlp(lambda x: relu(x) ** 3),
    "root": lambda: mlp(lambda x: jnp.sqrt(relu(x))),
    "three halves": lambda: mlp(lambda x: relu(x) ** 1.5),
    "irrational": lambda: mlp(lambda x: relu(x) ** np.sqrt(2)),
    "gated": gated,
    "shifted": shifted,
    "halves": halves,
}

GROUPS = {
    "squared": [("a[1], b[0]", "c[0]^2"), ("c[1], d[0]", "e[0]^2")],
    "cubed": [("a[1], b[0]", "c[0]^3"), ("c[1], d[0]", "e[0]^3")],
    "root": [("a[1]^2, b[0]^2", "c[0]"), ("c[1]^2, d[0]^2", "e[0]")],
    "three halves": [("a[1]^2, b[0]^2", "c[0]^3"), ("c[1]^2, d[0]^2", "e[0]^3")],
    "irrational": [("a[1], b[0]", "c[0]^1.41421"), ("c[1], d[0]", "e[0]^1.41421")],
    "gated": [("gate[1]", "down[0]^2"), ("value[1]", "down[0]")],
    "shifted": [("a[1], b[0]^2", "c[0]^2, d[0]")],
    "halves": [("a[1]", "b[0], b[0]^2")],
}


def built(name, dtype=np.float32):
    apply_fn, shapes = NETWORKS[name]()
    rng = np.random.default_rng(0)
    params = {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}
    return apply_fn, params, pathcond.trace_spec(apply_fn, params, np.ones((2, 3), dtype))


def example(dtype=np.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), dtype)


@pytest.fixture(params=NETWORKS)
def network(request):
    return built(request.param)


@pytest.mark.parametrize("name", NETWORKS)
def test_powers_are_simple(name):
    sides = [
        tuple(", ".join(sorted(map(str, side))) for side in (group.incoming, group.outgoing))
        for group in built(name)[2].groups
    ]
    assert sorted(sides) == GROUPS[name]


@pytest.mark.parametrize("criterion", ["enorm", "equalize"])
def test_conditioning_keeps_the_function(network, criterion):
    apply_fn, params, spec = network
    moved, solution = pathcond.condition(params, spec, criterion)

    assert pathcond.Status(int(solution.status)).name == "CONVERGED"
    assert max(float(abs(z).max()) for z in solution.log_scales) > 0.05
    before, after = (apply_fn(p, example()) for p in (params, moved))
    np.testing.assert_allclose(after, before, atol=2e-5 * float(abs(before).max()))


def test_the_spec_is_proved_numerically(network):
    _, params, spec = network
    assert pathcond.check_spec(spec, params) < 1e-5


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"irrational"}))
def test_powers_of_two_change_no_bit(name):
    apply_fn, params, spec = built(name)
    rng = np.random.default_rng(2)
    drawn = tuple(jnp.asarray(rng.normal(size=g.size), jnp.float32) for g in spec.groups)
    rounded = pathcond.round_to_powers_of_two(drawn)
    moved = pathcond.rescale(params, spec, rounded)

    assert any(z.any() for z in rounded)
    for key in params:
        quotients = np.asarray(moved[key]) / params[key]
        assert (np.frexp(quotients)[0] == 0.5).all()
    back = pathcond.rescale(moved, spec, tuple(-z for z in rounded))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    # XLA's power function rounds even what is a power of two.
    if name != "three halves":
        np.testing.assert_array_equal(apply_fn(moved, example()), apply_fn(params, example()))


SCALES = st.lists(st.floats(-2, 2, width=32), min_size=9, max_size=9)


@given(SCALES, SCALES)
def test_scales_add_up(first, second):
    _, params, spec = GATED
    one, two = (
        tuple(jnp.asarray(part[at : at + 4], jnp.float32) for at in (0, 4))
        for part in (first, second)
    )
    both = pathcond.rescale(pathcond.rescale(params, spec, one), spec, two)
    at_once = pathcond.rescale(params, spec, tuple(map(jnp.add, one, two)))
    for key in params:
        np.testing.assert_allclose(both[key], at_once[key], rtol=1e-5)


GATED = built("gated")


def test_factors_are_the_powers_of_the_scales(network):
    _, params, spec = network
    rng = np.random.default_rng(3)
    scales = tuple(jnp.asarray(rng.normal(size=g.size), jnp.float32) for g in spec.groups)
    expected = {key: value.astype(np.float64) for key, value in params.items()}
    for group, z in zip(spec.groups, scales, strict=True):
        for sign, side in ((1, group.incoming), (-1, group.outgoing)):
            for incidence in side:
                taken = np.where(incidence.index >= 0, np.asarray(z)[incidence.index], 0)
                shape = np.ones(expected[incidence.path].ndim, int)
                shape[list(incidence.axes)] = incidence.index.shape
                factor = np.exp(sign * incidence.power * taken.astype(np.float64))
                expected[incidence.path] = expected[incidence.path] * factor.reshape(shape)
    moved = pathcond.rescale(params, spec, scales)
    for key in params:
        np.testing.assert_allclose(moved[key], expected[key], rtol=3e-6)


def test_enorm_is_the_smallest_norm_on_the_orbit(x64):
    apply_fn, params, spec = built("shifted", np.float64)

    def squares(z):
        a, b, c, d = (params[key] for key in "abcd")
        scale = np.exp(z)
        moved = a * scale, b * scale**2, c / scale[:, None] ** 2, d / scale[:, None]
        return sum((part**2).sum() for part in moved)

    found = scipy.optimize.minimize(squares, np.zeros(4), tol=1e-12)
    moved, _ = pathcond.condition(params, spec, "enorm")

    assert sum((leaf**2).sum() for leaf in moved.values()) == pytest.approx(found.fun, rel=1e-9)
    for quantity in pathcond.conserved_quantities(moved, spec):
        np.testing.assert_allclose(quantity, 0, atol=1e-6)
    before, after = (apply_fn(p, np.ones((1, 3))) for p in (params, moved))
    np.testing.assert_allclose(after, before, rtol=1e-10)


def test_gradient_flow_keeps_the_quantities_with_their_powers(x64):
    apply_fn, params, spec = built("squared", np.float64)
    x = example(np.float64)
    grads = jax.grad(lambda p: (apply_fn(p, x) ** 2).sum())(params)

    _, speed = jax.jvp(lambda p: pathcond.conserved_quantities(p, spec), (params,), (grads,))

    size = max(float(abs(g).max()) for g in jax.tree.leaves(grads))
    for part in speed:
        np.testing.assert_allclose(part, 0, atol=1e-12 * size)


def test_a_target_for_the_quantities_is_reached(x64):
    _, params, spec = built("squared", np.float64)
    target = (jnp.linspace(-1.0, 2.0, 4), jnp.linspace(3.0, -1.0, 5))
    moved, _ = pathcond.rescale_to(params, spec, target)
    for found, wanted in zip(pathcond.conserved_quantities(moved, spec), target, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


INNER = {
    "adam": (optax.adam(1e-3), {"mu": -1, "nu": -2}),
    "momentum": (optax.sgd(1e-3, momentum=0.9), {"trace": -1}),
}


@pytest.mark.parametrize("name", INNER)
def test_optimizer_states_travel(name):
    apply_fn, start, spec = built("squared")
    inner, degrees = INNER[name]
    grad = jax.jit(jax.grad(lambda p: (apply_fn(p, example()) ** 2).mean()))

    def trained(optimizer):
        params = jax.tree.map(jnp.asarray, start)
        state = optimizer.init(params)
        for _ in range(2):
            # Optimizers are written for JAX's own promotion.
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grad(params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = trained(
        pathcond.reconditioned(inner, spec, every=2, state="transport", criterion="enorm")
    )
    plain_params, plain_state = trained(inner)

    z = optax.tree_utils.tree_get(state, "log_scales")
    assert max(float(abs(part).max()) for part in z) > 0.05
    expected = pathcond.rescale(plain_params, spec, z)
    for key in params:
        np.testing.assert_allclose(params[key], expected[key], rtol=1e-4, atol=1e-6)
    for buffer, degree in degrees.items():
        found, history = (optax.tree_utils.tree_get(s, buffer) for s in (state, plain_state))
        expected = pathcond.rescale(history, spec, z, power=degree)
        for key in params:
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-4)


def test_conditioning_while_training_keeps_the_function():
    apply_fn, params, spec = built("squared")
    params = jax.tree.map(jnp.asarray, params)
    chain = optax.chain(optax.adam(1e-2), pathcond.recondition(spec, every=1, criterion="enorm"))
    state = chain.init(params)
    plain = optax.adam(1e-2)
    grads = jax.grad(lambda p: (apply_fn(p, example()) ** 2).mean())(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = chain.update(grads, state, params)
        plain_updates, _ = plain.update(grads, plain.init(params), params)
    moved, expected = (optax.apply_updates(params, u) for u in (updates, plain_updates))

    for quantity in pathcond.conserved_quantities(moved, spec):
        np.testing.assert_allclose(quantity, 0, atol=1e-3)
    one, two = (apply_fn(p, example()) for p in (moved, expected))
    np.testing.assert_allclose(one, two, atol=1e-4 * float(abs(two).max()))


def test_updates_are_shortened_to_what_the_powers_leave_of_their_digits():
    apply_fn, params, spec = built("squared")
    small = tuple(jnp.full(group.size, -4.0) for group in spec.groups)
    params = pathcond.rescale(jax.tree.map(jnp.asarray, params), spec, small)
    element = pathcond.recondition(spec, every=1, criterion="enorm", max_log_scale=None)

    still = jax.tree.map(jnp.zeros_like, params)
    updates, state = element.update(still, element.init(params), params)
    moved = optax.apply_updates(params, updates)

    assert state.status == pathcond.Status.CLIPPED
    largest = max(float(abs(z).max()) for z in state.log_scales)
    # Of the 24 bits of a float32 an entry that shrinks by λ² is to keep 16.
    assert largest == pytest.approx(7 * np.log(2.0) / 2, rel=1e-5)
    before, after = (apply_fn(p, example()) for p in (params, moved))
    np.testing.assert_allclose(after, before, atol=1e-5 * float(abs(before).max()))


def test_there_and_back(network):
    _, params, spec = network
    rng = np.random.default_rng(4)
    scales = tuple(jnp.asarray(rng.normal(size=g.size), jnp.float32) for g in spec.groups)
    moved = pathcond.rescale(params, spec, scales)
    back = pathcond.rescale(moved, spec, tuple(-z for z in scales))
    for key in params:
        np.testing.assert_allclose(back[key], params[key], rtol=1e-5)


def test_pickled(network):
    _, params, spec = network
    again = pickle.loads(pickle.dumps(spec))

    assert [str(line) for line in str(again).splitlines()] == str(spec).splitlines()
    one, two = (pathcond.condition(params, s, "enorm")[0] for s in (spec, again))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_specs_of_other_powers_share_nothing_compiled():
    specs = [built(name)[2] for name in ("squared", "cubed", "squared")]
    symmetries = [spec.symmetry for spec in specs]
    assert symmetries[0] is symmetries[2]
    assert symmetries[0] is not symmetries[1]


def test_under_jit_and_vmap():
    _, params, spec = built("squared")
    seeds = [jax.tree.map(lambda a, k=k: jnp.asarray(a) * (1 + k), params) for k in range(3)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    conditioned = jax.jit(lambda p: pathcond.condition(p, spec, "enorm")[0])
    found = jax.vmap(conditioned)(together)
    for k, one in itertools.product(range(3), params):
        np.testing.assert_allclose(found[one][k], conditioned(seeds[k])[one], rtol=2e-4)


def test_the_report_shows_them():
    _, params, spec = built("squared")
    columns = pathcond.report(params, spec, ["enorm", "path"]).columns
    assert [column.name for column in columns] == ["as is", "enorm"]
    for low, high in columns[1].conserved.values():
        assert max(abs(low), abs(high)) < 1e-4
