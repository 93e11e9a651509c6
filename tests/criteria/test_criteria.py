"""Criteria: what each one balances, that they add up, and that one solver minimizes them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from golden_networks import GOLDEN, NETWORKS, conv_net, mlp
from zoo import NETWORKS as ZOO
from zoo.network import lenient

import pathcond_jax as pathcond
from pathcond_jax import criteria
from pathcond_jax._program import roles

CHAIN = ["Dense_0", "Dense_1", "Dense_2", "Dense_3"]


def traced(name):
    """A network of the zoo: parameters, spec and inputs."""
    found = ZOO[name]()
    return found.params, pathcond.trace_spec(found.apply_fn, found.params, found.x), found.x


def sides(params, spec, measure, biases=True):
    """A measure of what enters and of what leaves every neuron, (neurons,) each."""
    paths = [leaf.path for leaf in spec.leaves]
    values = dict(zip(paths, map(np.abs, jax.tree.leaves(params)), strict=True))
    ignored = frozenset() if biases else roles.biases(spec)

    def measured(incidences, neuron):
        parts = []
        for i in incidences:
            if i.path not in ignored:
                first = np.moveaxis(values[i.path], i.axes, range(len(i.axes)))
                parts.append(np.ravel(first[i.index == neuron]))
        return measure(np.concatenate(parts))

    return np.array(
        [
            [
                measured(side, k)
                for group in spec.groups
                for k in range(group.size)
                for side in [getattr(group, name)]
            ]
            for name in ("incoming", "outgoing")
        ]
    )


def largest_change(params, other, spec, x):
    before, after = (
        np.asarray(jax.tree.leaves(spec.apply_fn(p, x))[0], np.float64) for p in (params, other)
    )
    return np.abs(after - before).max() / np.abs(before).max()


@pytest.mark.parametrize("network", NETWORKS)
def test_enorm_is_what_the_authors_code_converges_to(x64, network):
    with np.load(GOLDEN / f"{network}.npz") as file:
        stored = dict(file)
    params = {
        str(name): jnp.asarray(stored[f"param/{name}"], jnp.float64)
        for name in stored["param_names"]
    }
    apply_fn = conv_net if network.startswith("conv") else mlp
    spec = pathcond.trace_spec(apply_fn, params, stored["x"].astype(np.float64))
    _, solution = pathcond.condition(params, spec, "enorm")
    last = max((key for key in stored if key.startswith("enorm_Z_")), key=lambda k: int(k[8:]))
    np.testing.assert_allclose(np.concatenate(solution.log_scales), -stored[last], atol=1e-6)


@pytest.mark.parametrize("network", ["mlp", "lenet", "scan-over-layers", "recurrent-scan"])
def test_every_name_keeps_the_function(network):
    params, spec, x = traced(network)
    names = dict.fromkeys(criteria.CRITERIA)
    if network == "recurrent-scan":
        # Its states are weights of the same parameters at every step.
        del names["path"]
        with pytest.raises(pathcond.NotPathLiftableError, match=r"another|needs no path lifting"):
            pathcond.condition(params, spec)
    for name in names:
        moved, solution = pathcond.condition(params, spec, criterion=name)
        assert int(solution.status) == pathcond.Status.CONVERGED, name
        assert largest_change(params, moved, spec, x) < 2e-5, name
        assert max(float(jnp.abs(z).max()) for z in solution.log_scales) > 0.01, name


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_norms_that_enter_and_leave_agree(p):
    params, spec, _ = traced("lenet")
    moved, _ = pathcond.condition(params, spec, criteria.norm(p))
    into, out = sides(moved, spec, lambda a: np.sum(a**p) ** (1 / p))
    np.testing.assert_allclose(into, out, rtol=2e-4)


def test_depth_penalty_makes_outgoing_norms_larger():
    params, spec, _ = traced("mlp")
    moved, _ = pathcond.condition(params, spec, criteria.norm(3.0, depth_penalty=1.2, biases=False))
    into, out = sides(moved, spec, lambda a: np.sum(a**3) ** (1 / 3), biases=False)
    np.testing.assert_allclose(1.2 * into, out, rtol=2e-4)


def test_equalized_ranges_agree_and_leave_biases_out():
    for network in ("mlp", "lenet", "scan-over-layers", "recurrent-scan"):
        params, spec, _ = traced(network)
        moved, solution = pathcond.condition(params, spec, "equalize")
        into, out = sides(moved, spec, np.max, biases=False)
        np.testing.assert_allclose(into, out, rtol=1e-4)
        assert float(solution.objective) < 1e-4


def test_equalized_depthwise_triples_have_the_cube_root_range(x64):
    def conv(x, kernel, groups=1):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def apply_fn(params, x):
        x = jax.nn.relu(conv(x, params["first"]) + params["bias"][None, None, None])
        x = jax.nn.relu(conv(x, params["depthwise"], 4))
        return conv(x, params["last"])

    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"first": (1, 1, 3, 4), "depthwise": (3, 3, 1, 4), "last": (1, 1, 4, 2), "bias": (4,)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    spec = pathcond.trace_spec(apply_fn, params, jnp.ones((1, 5, 5, 3)))
    ranges = [
        jnp.abs(params["first"]).max((0, 1, 2)),
        jnp.abs(params["depthwise"]).max((0, 1, 2)),
        jnp.abs(params["last"]).max((0, 1, 3)),
    ]
    moved, _ = pathcond.condition(params, spec, "equalize")
    wanted = jnp.cbrt(ranges[0] * ranges[1] * ranges[2])
    for name, axes in (("first", (0, 1, 2)), ("depthwise", (0, 1, 2)), ("last", (0, 1, 3))):
        np.testing.assert_allclose(jnp.abs(moved[name]).max(axes), wanted, rtol=1e-8)


def test_fisher_reads_jacobians_moments_and_adam():
    params, spec, x = traced("plain-jax")
    jacobian = jax.jacrev(lambda p: spec.apply_fn(p, x))
    moments = jax.tree.map(
        lambda j, p: jnp.square(j).reshape(-1, *p.shape).sum(0), jacobian(params), params
    )
    state = optax.adam(1e-3).init(params)
    state = (state[0]._replace(nu=moments), *state[1:])
    scales = [
        np.concatenate(pathcond.condition(params, spec, criteria.fisher(source))[1].log_scales)
        for source in (jacobian, moments, state)
    ]
    for other in scales[1:]:
        np.testing.assert_allclose(other, scales[0], atol=1e-5)
    moved, solution = pathcond.condition(params, spec, criteria.fisher(jacobian, damping=0.0))
    again = criteria.fisher(jax.jacrev(lambda p: spec.apply_fn(p, x)), damping=0.0)
    # On the data, as the path criterion without it: the new squared gradients are balanced.
    assert (
        max(float(jnp.abs(z).max()) for z in pathcond.condition(moved, spec, again)[1].log_scales)
        < 1e-4
    )
    assert int(solution.status) == pathcond.Status.CONVERGED


def loss_and_gradient(spec, x):
    return jax.jit(jax.value_and_grad(lambda p: jnp.mean(jnp.square(spec.apply_fn(p, x) - 1.0))))


def test_steepest_increases_the_gradient_as_predicted():
    params, spec, x = traced("plain-jax")
    loss = loss_and_gradient(spec, x)
    value, grads = loss(params)
    norm = lambda tree: float(optax.tree_utils.tree_norm(tree, squared=True))  # noqa: E731
    last = norm(grads)
    for radius in (0.1, 0.5, 1.0):
        moved, solution = pathcond.condition(params, spec, criteria.steepest(grads, radius))
        scales = np.concatenate(solution.log_scales)
        np.testing.assert_allclose(np.abs(scales), radius, rtol=1e-6)
        after, steeper = loss(moved)
        assert float(after) == pytest.approx(float(value), rel=1e-5)
        assert norm(steeper) > last
        last = norm(steeper)
        predicted = -float(solution.objective) / spec.num_parameters
        assert np.log(last) == pytest.approx(predicted, rel=1e-4)
    smaller = pathcond.condition(params, spec, criteria.steepest(grads, 1.0), max_log_scale=0.5)
    assert float(jnp.abs(jnp.concatenate(smaller[1].log_scales)).max()) == 0.5


def test_steepest_adds_to_convex_criteria():
    params, spec, x = traced("plain-jax")
    _, grads = loss_and_gradient(spec, x)(params)
    both = criteria.norm() + 0.5 * criteria.steepest(grads, 1.0)
    _, solution = pathcond.condition(params, spec, both)
    scales = solution.log_scales

    def value(z):
        masses = [
            sum(
                jnp.sum(jnp.square(leaf))
                for leaf in jax.tree.leaves(pathcond.rescale(t, spec, z, power=k))
            )
            for t, k in ((params, 1), (grads, -1))
        ]
        return spec.num_parameters * (jnp.log(masses[0]) - 0.5 * jnp.log(masses[1]))

    assert float(solution.objective) == pytest.approx(float(value(scales)), rel=1e-5)
    assert float(solution.objective) < float(value(tuple(map(jnp.zeros_like, scales)))) - 1
    slopes, places = np.concatenate(jax.grad(value)(scales)), np.concatenate(scales)
    inside = np.abs(places) < 0.999
    assert inside.any()
    assert np.abs(slopes[inside]).max() < 0.2
    assert (slopes[~inside] * places[~inside] <= 1e-2).all()


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(6)(x))
        return nn.Dense(3)(x)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_activation_migrates_as_smoothquant(alpha):
    model, x = Normalized(), jax.random.normal(jax.random.key(0), (20, 4))
    params = lenient(model.init)(jax.random.key(1), x)
    kernel = params["params"]["Dense_1"]["kernel"].at[:, 0].mul(10.0)
    params["params"]["Dense_1"]["kernel"] = kernel
    apply_fn = lenient(model.apply)
    spec = pathcond.trace_spec(apply_fn, params, x)
    assert [group.size for group in spec.groups] == [6]
    statistics = jnp.array([1.0, 2.0, 40.0, 0.5, 3.0, 7.0])
    (name,) = (group.name for group in spec.groups)
    moved, solution = pathcond.condition(
        params, spec, criteria.activation({name: statistics}, alpha)
    )
    smooth = statistics**alpha / jnp.abs(kernel).max(1) ** (1 - alpha)
    np.testing.assert_allclose(-solution.log_scales[0], jnp.log(smooth), atol=1e-5)
    before, after = apply_fn(params, x), apply_fn(moved, x)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        moved["params"]["LayerNorm_0"]["scale"],
        params["params"]["LayerNorm_0"]["scale"] / smooth,
        rtol=1e-5,
    )


def test_weights_of_ones_own_are_the_built_in_criteria():
    params, spec, _ = traced("mlp")
    pairs = (
        (criteria.weighted(lambda p: pathcond.gram_diagonal(p, spec)), "path"),
        (
            criteria.weighted(lambda p: jax.tree.map(jnp.square, p), exponent=-2.0, tilt=0.0),
            "enorm",
        ),
    )
    for own, name in pairs:
        mine, theirs = (
            np.concatenate(pathcond.condition(params, spec, c)[1].log_scales) for c in (own, name)
        )
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_a_function_of_ones_own_is_minimized_like_the_built_in_ones(x64):
    params, spec, _ = traced("mlp")
    gram = pathcond.gram_diagonal(params, spec)

    def function(log_scales):
        moved = pathcond.rescale(gram, spec, log_scales, power=-2)
        total = sum(map(jnp.sum, jax.tree.leaves(moved)))
        logs = [
            (jnp.sum(jnp.log(b)) - jnp.sum(jnp.log(a)))
            for a, b in zip(jax.tree.leaves(gram), jax.tree.leaves(moved), strict=True)
        ]
        return spec.num_parameters * jnp.log(total) - sum(logs)

    _, native = pathcond.condition(params, spec, "path")
    _, solution = pathcond.condition(params, spec, criteria.convex(function))
    assert int(solution.status) == pathcond.Status.CONVERGED
    for mine, theirs in zip(solution.log_scales, native.log_scales, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-8)
    assert float(solution.objective) == pytest.approx(float(native.objective), rel=1e-12)
    assert 0 <= float(solution.suboptimality) < 1e-6
    _, halves = pathcond.condition(
        params, spec, 0.5 * criteria.path() + 0.5 * criteria.convex(function)
    )
    for mine, theirs in zip(halves.log_scales, native.log_scales, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-8)


def test_without_a_linear_part_no_equation_is_solved_for_the_sum():
    params, spec, _ = traced("mlp")

    def loops(criterion):
        lowered = jax.jit(lambda p: pathcond.condition(p, spec, criterion)).lower(params)
        return lowered.as_text().count("stablehlo.while")

    squares = criteria.weighted(lambda p: jax.tree.map(jnp.square, p), exponent=-2.0)
    assert loops(criteria.norm()) == loops(squares) - 1
    assert loops(0.5 * criteria.norm() + criteria.norm(4)) == loops(criteria.norm())


def test_sums_lie_between_their_parts():
    params, spec, _ = traced("mlp")
    one, two = criteria.path(), criteria.norm()
    _, both = pathcond.condition(params, spec, one + 0.3 * two)
    _, weighted = pathcond.condition(params, spec, norm_weight=0.3)
    for mine, theirs in zip(both.log_scales, weighted.log_scales, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    _, alone = pathcond.condition(params, spec, one)
    size = lambda s: float(jnp.linalg.norm(jnp.concatenate(s.log_scales)))  # noqa: E731
    assert size(both) != pytest.approx(size(alone), rel=1e-3)
    moved = pathcond.rescale(params, spec, both.log_scales)
    _, again = pathcond.condition(moved, spec, one + 0.3 * two)
    assert size(again) < 1e-4
    assert str(one + 0.3 * two) == "path + 0.3 * norm(2)"


def test_equal_ranges_of_one_hidden_layer_are_the_limit_of_norms(x64):
    params = {"a": {"w": jnp.array([[8.0, 1.0]])}, "b": {"w": jnp.array([[0.5], [3.0]])}}
    spec = pathcond.chain_spec(params, ["a", "b"])
    _, limit = pathcond.condition(params, spec, "equalize")
    _, large = pathcond.condition(params, spec, criteria.norm(200.0))
    np.testing.assert_allclose(large.log_scales[0], limit.log_scales[0], atol=1e-2)


@pytest.mark.parametrize("name", list(criteria.CRITERIA))
def test_input_that_is_not_finite_changes_nothing(name):
    params, spec, _ = traced("plain-jax")
    params[0] = (params[0][0].at[0, 0].set(jnp.nan), params[0][1])
    moved, solution = pathcond.condition(params, spec, name)
    assert int(solution.status) == pathcond.Status.NON_FINITE
    assert all((z == 0).all() for z in solution.log_scales)
    assert np.isnan(solution.objective)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(old, new)


def test_neurons_without_weights_stay():
    params, spec, _ = traced("plain-jax")
    params[1] = (params[1][0].at[2].set(0.0), params[1][1])
    for name in criteria.CRITERIA:
        _, solution = pathcond.condition(params, spec, name)
        assert float(solution.log_scales[0][2]) == 0.0
        assert int(solution.status) == pathcond.Status.CONVERGED


def test_criteria_run_under_jit_and_vmap():
    params, spec, _ = traced("plain-jax")
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    for criterion in ("equalize", criteria.path() + criteria.norm()):
        run = jax.jit(jax.vmap(lambda p, c=criterion: pathcond.condition(p, spec, c)[0]))
        alone, _ = pathcond.condition(params, spec, criterion)
        for one, both in zip(jax.tree.leaves(alone), jax.tree.leaves(run(many)), strict=True):
            np.testing.assert_allclose(both[0], one, rtol=1e-4, atol=1e-5)


def test_names_of_criteria_without_arguments_work():
    params, spec, _ = traced("plain-jax")
    _, named = pathcond.condition(params, spec, "norm")
    _, called = pathcond.condition(params, spec, criteria.norm())
    for one, two in zip(named.log_scales, called.log_scales, strict=True):
        np.testing.assert_array_equal(one, two)


def test_bad_calls_are_named():
    params, spec, _ = traced("plain-jax")
    norm, equalize, ones = criteria.norm(), criteria.equalize(), jax.tree.map(jnp.ones_like, params)
    for message, call in (
        (
            "no criterion 'enrom'; there are 'path'",
            lambda: pathcond.condition(params, spec, "enrom"),
        ),
        ("p is 0", lambda: criteria.norm(0)),
        ("equalize and norm.* do not add up", lambda: equalize + norm),
        ("equalize is no function", lambda: 2 * equalize),
        ("the factor is negative", lambda: -1 * norm),
        ("radius is 0", lambda: criteria.steepest(ones, 0)),
        ("alpha is 2", lambda: criteria.activation([], 2)),
        (
            "0 statistics for 2 groups",
            lambda: pathcond.condition(params, spec, criteria.activation([])),
        ),
        ("no group 'x'", lambda: pathcond.condition(params, spec, criteria.activation({"x": 1.0}))),
        (
            "method 'block' does not fit this criterion; there are 'fixed_point'",
            lambda: pathcond.condition(params, spec, equalize, method="block"),
        ),
        (
            r"'activation' needs more than its name: .*criteria\.activation\(statistics\)",
            lambda: pathcond.condition(params, spec, "activation"),
        ),
        (
            r"'steepest' needs more .*steepest\(grads, radius\)",
            lambda: pathcond.condition(params, spec, "steepest"),
        ),
        (
            r"call it: criteria\.norm\(\)",
            lambda: pathcond.condition(params, spec, criteria.norm),
        ),
        ("no criterion 7; there are", lambda: pathcond.condition(params, spec, 7)),
        ("neither a function", lambda: pathcond.condition(params, spec, criteria.fisher((1.0,)))),
        (
            "must return a tree",
            lambda: pathcond.condition(params, spec, criteria.fisher(lambda p: p[0])),
        ),
        (
            "single logarithm",
            lambda: pathcond.condition(params, spec, criteria.path() + norm, method="block"),
        ),
    ):
        with pytest.raises(pathcond.SpecError, match=message):
            call()
