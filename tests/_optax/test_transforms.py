"""recondition, reconditioned and scale_by_path inside optax."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pathcond_jax as pathcond

SIZES = (3, 5, 4, 2)
NAMES = [f"layer_{k}" for k in range(len(SIZES) - 1)]


def draw(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    params = {}
    for name, fan_in, fan_out in zip(NAMES, SIZES[:-1], SIZES[1:], strict=True):
        params[name] = {
            "kernel": jnp.asarray(rng.normal(size=(fan_in, fan_out)), dtype),
            "bias": jnp.asarray(0.3 * rng.normal(size=fan_out), dtype),
        }
    return params


def apply(params, x):
    for name in NAMES[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params[NAMES[-1]]["kernel"] + params[NAMES[-1]]["bias"][None]


X = np.random.default_rng(1).normal(size=(16, SIZES[0])).astype(np.float32)
Y = np.random.default_rng(2).normal(size=(16, SIZES[-1])).astype(np.float32)
PARAMS = draw()
SPEC = pathcond.chain_spec(PARAMS, NAMES)


def loss(params):
    return jnp.mean((apply(params, X) - Y) ** 2)


gradient = jax.jit(jax.grad(loss))


def stepper(optimizer):
    """A jitted update and the new parameters; optax means standard promotion."""

    @jax.jit
    def step(grads, state, params):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, updates

    return step


# Two layers, for what needs no more: solvers compile faster.
SMALL = {"one": PARAMS[NAMES[1]], "two": PARAMS[NAMES[2]]}
SMALL_SPEC = pathcond.chain_spec(SMALL, ["one", "two"])
X_SMALL = np.random.default_rng(3).normal(size=(16, SIZES[1])).astype(np.float32)


@jax.jit
@jax.grad
def small_gradient(params):
    hidden = jax.nn.relu(X_SMALL @ params["one"]["kernel"] + params["one"]["bias"][None])
    return jnp.mean((hidden @ params["two"]["kernel"] + params["two"]["bias"][None] - Y) ** 2)


def small_condition(params):
    conditioned, solution = pathcond.condition(params, SMALL_SPEC, method="block")
    return conditioned, solution.log_scales


def random_scales(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(size * rng.normal(size=g.size), jnp.float32) for g in SPEC.groups)


def function_error(one, two):
    before, after = apply(one, X), apply(two, X)
    return float(jnp.abs(after - before).max() / jnp.abs(before).max())


def test_the_named_updates_are_due_and_no_others():
    element = pathcond.recondition(SPEC, every=3, start=2, max_log_scale=None)
    step, params, state = stepper(element), draw(), element.init(draw())
    initial = state
    for number in range(1, 8):
        plain = jax.tree.map(lambda g: -0.01 * g, gradient(params))
        destination = optax.apply_updates(params, plain)
        params, state, updates = step(plain, state, params)
        assert int(state.num_updates) == number
        assert state.status == pathcond.Status.CONVERGED
        if number in (2, 3, 6):
            expected, solution = pathcond.condition(destination, SPEC)
            chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-6)
            chex.assert_trees_all_close(state.log_scales, solution.log_scales, atol=1e-5)
            assert function_error(destination, params) < 1e-5
        else:
            chex.assert_trees_all_equal(updates, plain)
            assert not any(np.any(z) for z in state.log_scales)
    assert step._cache_size() == 1

    # The same compiled step: what is not finite is passed on, and spreads to no other parameter.
    for bad in (jnp.nan, jnp.inf):
        plain[NAMES[1]]["bias"] = plain[NAMES[1]]["bias"].at[0].set(bad)
        due = state._replace(num_updates=jnp.asarray(8, jnp.int32))
        after, last, updates = step(plain, due, params)
        assert last.status == pathcond.Status.NON_FINITE
        chex.assert_trees_all_equal(updates, plain)
        assert sum(int((~jnp.isfinite(leaf)).sum()) for leaf in jax.tree.leaves(after)) == 1

    # Far from the optimum, and only as far at once as p + (q - p) is precise.
    params = pathcond.rescale(PARAMS, SPEC, random_scales(3, 5.0))
    best = pathcond.condition(params, SPEC)[1]
    assert max(float(jnp.abs(z).max()) for z in best.log_scales) > 7
    statuses = []
    for _ in range(5):
        before, due = params, initial._replace(num_updates=jnp.asarray(1, jnp.int32))
        params, state, _ = step(jax.tree.map(jnp.zeros_like, params), due, params)
        statuses.append(int(state.status))
        assert function_error(before, params) < 1e-5
    assert statuses[0] == pathcond.Status.CLIPPED
    assert statuses[-1] == pathcond.Status.CONVERGED
    assert max(float(jnp.abs(z).max()) for z in state.log_scales) < 1e-3
    assert step._cache_size() == 1


def test_momentum_and_moments_travel():
    """After a rescaling by λ the optimizer goes on from m / λ and v / λ², by definition.

    Biases get SGD with momentum, kernels Adam with ε = 1e-12.
    """
    rate, momentum, b1, b2, eps = 0.01, 0.9, 0.9, 0.999, 1e-12
    inner = optax.partition(
        {"sgd": optax.sgd(rate, momentum=momentum), "adam": optax.adam(rate, b1, b2, eps)},
        jax.tree.map(lambda p: "adam" if p.ndim == 2 else "sgd", PARAMS),
    )
    optimizer = pathcond.reconditioned(inner, SPEC, every=2, max_log_scale=None)
    step, params, state = stepper(optimizer), PARAMS, optimizer.init(PARAMS)
    trace = m = v = jax.tree.map(jnp.zeros_like, PARAMS)
    expected = PARAMS
    for number in range(1, 6):
        grads = gradient(expected)
        trace = jax.tree.map(lambda m, g: momentum * m + g, trace, grads)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, grads)
        expected = jax.tree.map(
            lambda p, d, m, v, t=number: (
                p - rate * d
                if p.ndim == 1
                else p - rate * (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)
            ),
            expected,
            trace,
            m,
            v,
        )
        if number % 2 == 0:
            expected, solution = pathcond.condition(expected, SPEC)
            trace = pathcond.rescale(trace, SPEC, solution.log_scales, power=-1)
            m = pathcond.rescale(m, SPEC, solution.log_scales, power=-1)
            v = pathcond.rescale(v, SPEC, solution.log_scales, power=-2)
        params, state, _ = step(gradient(params), state, params)
        chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)
        adam = state.inner_state.inner_states["adam"].inner_state[0]
        sgd = state.inner_state.inner_states["sgd"].inner_state[0]
        for name in NAMES:
            ours = (sgd.trace[name]["bias"], adam.mu[name]["kernel"], adam.nu[name]["kernel"])
            theirs = (trace[name]["bias"], m[name]["kernel"], v[name]["kernel"])
            chex.assert_trees_all_close(ours, theirs, rtol=3e-4, atol=1e-6)
    assert int(adam.count) == 5
    assert step._cache_size() == 1


def test_path_sgd_has_one_trajectory():
    """100 steps in one scan, with and without reconditioning, and from another representative."""
    inner = optax.chain(pathcond.scale_by_path(SPEC), optax.scale(-0.02), optax.trace(0.5))

    def run(optimizer, params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), apply(params, X)

        return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=100))(
            params
        )

    (last, _), plain = run(inner, PARAMS)
    (_, state), moved = run(pathcond.reconditioned(inner, SPEC, every=7, start=1), PARAMS)
    scale = float(jnp.abs(plain).max())
    assert function_error(PARAMS, last) > 0.1
    assert int(state.recondition.num_updates) == 100
    assert float(jnp.abs(moved - plain).max()) / scale < 1e-4
    _, elsewhere = run(inner, pathcond.rescale(PARAMS, SPEC, random_scales(4, 0.7)))
    assert float(jnp.abs(elsewhere - plain).max()) / scale < 1e-4


def test_path_sgd_divides_by_the_gram_diagonal():
    grads = gradient(PARAMS)
    gram = pathcond.gram_diagonal(PARAMS, SPEC)
    mean = sum(float(leaf.sum()) for leaf in jax.tree.leaves(gram)) / SPEC.num_parameters
    for damping in (0.0, 0.3):
        element = pathcond.scale_by_path(SPEC, damping=damping)
        updates, state = element.update(grads, element.init(PARAMS), PARAMS)
        expected = jax.tree.map(lambda u, g, d=damping: u / (g + d * mean), grads, gram)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)
        assert int(state.num_updates) == 1
    # One step from any representative of the same function leads to the same function.
    element = optax.chain(pathcond.scale_by_path(SPEC), optax.scale(-0.02))
    ends = []
    for scales in (random_scales(5, 0.0), random_scales(5), random_scales(6)):
        start = pathcond.rescale(PARAMS, SPEC, scales)
        updates, _ = element.update(gradient(start), element.init(start), start)
        ends.append(optax.apply_updates(start, updates))
    assert function_error(ends[0], PARAMS) > 1e-2
    assert max(function_error(ends[0], end) for end in ends[1:]) < 1e-5


def test_path_sgd_leaves_entries_without_a_path():
    params = draw()
    # No path leads through a neuron whose outgoing weights are 0.
    params[NAMES[1]]["kernel"] = params[NAMES[1]]["kernel"].at[2].set(0)
    element = pathcond.scale_by_path(SPEC, damping=0.1)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = element.update(ones, element.init(params), params)
    assert np.array_equal(updates[NAMES[0]]["bias"] == 0, np.arange(SIZES[1]) == 2)
    assert np.array_equal((updates[NAMES[0]]["kernel"] == 0).all(0), np.arange(SIZES[1]) == 2)
    assert (updates[NAMES[1]]["kernel"] != 0).all()
    params[NAMES[1]]["kernel"] = params[NAMES[1]]["kernel"].at[0].set(jnp.nan)
    updates, _ = element.update(ones, element.init(params), params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))


def test_path_sgd_keeps_its_diagonal():
    element = pathcond.scale_by_path(SPEC, every=2)
    update = jax.jit(element.update)
    state, grads = element.init(PARAMS), gradient(PARAMS)
    seen = []
    for seed in range(4):
        params = draw(seed)
        updates, state = update(grads, state, params)
        gram = pathcond.gram_diagonal(draw(seed - seed % 2), SPEC)
        chex.assert_trees_all_close(updates, jax.tree.map(jnp.divide, grads, gram), rtol=1e-5)
        seen.append(state.diagonal[NAMES[0]]["bias"])
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[2], seen[3])
    assert not np.array_equal(seen[1], seen[2])
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    _, after = update(grads, state, bad)
    chex.assert_trees_all_equal(after.diagonal, state.diagonal)
    assert update._cache_size() == 1


def test_low_precision_is_refused_or_exact():
    low = draw(dtype=jnp.bfloat16)
    spec = pathcond.chain_spec(low, NAMES)
    with pytest.raises(ValueError, match=r"layer_0/bias.*bfloat16.*condition.*rounding=\"power_of"):
        pathcond.recondition(spec, every=1).init(low)
    element = pathcond.recondition(SPEC, every=1)
    with pytest.raises(ValueError, match="bfloat16"):
        element.update(low, element.init(draw()), low)

    optimizer = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        pathcond.recondition(spec, every=2, rounding="power_of_two"),
    )
    params = pathcond.rescale(low, spec, random_scales(7, 2.0))
    state, step = optimizer.init(params), stepper(optimizer)
    for number in range(1, 5):
        grads = jax.tree.map(lambda p: (0.1 * p).astype(p.dtype), params)
        plain = optax.sgd(0.1, momentum=0.9).update(grads, state[0], params)[0]
        going_to = optax.apply_updates(params, plain)
        params, state, updates = step(grads, state, params)
        assert jax.tree.leaves(updates)[0].dtype == jnp.float32
        assert jax.tree.leaves(params)[0].dtype == jnp.bfloat16
        if number % 2 == 0:
            expected = pathcond.rescale(going_to, spec, state[1].log_scales)
            chex.assert_trees_all_equal(params, expected)
            x = X.astype(jnp.bfloat16)
            assert np.array_equal(apply(params, x), apply(going_to, x))
            assert number > 2 or any(np.any(z) for z in state[1].log_scales)


def test_accumulated_gradients():
    """MultiSteps around: only emitted updates count. apply_if_finite around: bad ones do not."""
    element = pathcond.recondition(SMALL_SPEC, every=2, method="block", max_log_scale=None)
    inner = optax.chain(optax.sgd(0.05), element)
    optimizer = optax.apply_if_finite(optax.MultiSteps(inner, 2).gradient_transformation(), 5)
    params, state, step = SMALL, optimizer.init(SMALL), stepper(optimizer)
    reference = SMALL
    for number in range(1, 5):
        grads = small_gradient(params)
        poisoned = jax.tree.map(lambda g: g * jnp.nan, grads)
        same, state, _ = step(poisoned, state, params)
        chex.assert_trees_all_equal(same, params)
        for half in (0.5, 1.5):
            params, state, _ = step(jax.tree.map(lambda g, h=half: h * g, grads), state, params)
        reference = jax.tree.map(lambda p, g: p - 0.05 * g, reference, small_gradient(reference))
        if number % 2 == 0:
            reference, _ = small_condition(reference)
        chex.assert_trees_all_close(params, reference, rtol=1e-4, atol=1e-5)
    assert int(state.inner_state.inner_opt_state[1].num_updates) == 4


def test_a_due_update_moves_no_scale_further_than_the_bound():
    """A last layer that was 0 three steps ago asks for scales that the next step would not."""
    params = jax.tree.map(jnp.copy, PARAMS)
    last = params[NAMES[-1]]
    last["kernel"] = 1e-3 * last["kernel"]
    far, _ = pathcond.condition(params, SPEC)
    still = jax.tree.map(jnp.zeros_like, params)
    ends = {}
    for limit in (1.0, 0.25, None):
        bound = {} if limit == 1.0 else {"max_log_scale": limit}
        element = pathcond.recondition(SPEC, every=1, **bound)
        updates, state = element.update(still, element.init(params), params)
        moved = optax.apply_updates(params, updates)
        largest = max(float(jnp.abs(z).max()) for z in state.log_scales)
        ends[limit] = (largest, int(state.status))
        assert function_error(params, moved) < 1e-5
    np.testing.assert_allclose([ends[1.0][0], ends[0.25][0]], [1.0, 0.25], rtol=1e-5)
    assert ends[1.0][1] == ends[0.25][1] == pathcond.Status.CLIPPED
    assert ends[None][0] > 1.5
    # One due update after the other comes to the optimum all the same.
    element = pathcond.recondition(SPEC, every=1)
    step, state = stepper(element), element.init(params)
    for _ in range(20):
        params, state, _ = step(still, state, params)
    assert state.status == pathcond.Status.CONVERGED
    chex.assert_trees_all_close(params, far, rtol=1e-3)


def test_lookahead_slow_weights_travel():
    plain = optax.lookahead(optax.sgd(0.05, momentum=0.9), sync_period=3, slow_step_size=0.5)
    optimizer = pathcond.reconditioned(
        plain, SMALL_SPEC, every=2, method="block", max_log_scale=None
    )
    params = expected = optax.LookaheadParams.init_synced(SMALL)
    state, plain_state = optimizer.init(params), plain.init(params)
    step, plain_step = stepper(optimizer), stepper(plain)
    for number in range(1, 5):
        params, state, _ = step(small_gradient(params.fast), state, params)
        expected, plain_state, _ = plain_step(small_gradient(expected.fast), plain_state, expected)
        if number % 2 == 0:
            fast, z = small_condition(expected.fast)
            slow = pathcond.rescale(expected.slow, SMALL_SPEC, z)
            expected = optax.LookaheadParams(fast, slow)
            trace, *rest = plain_state.fast_state
            trace = optax.TraceState(pathcond.rescale(trace.trace, SMALL_SPEC, z, power=-1))
            plain_state = plain_state._replace(fast_state=(trace, *rest))
        chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["reset", "keep"])
def test_state_is_reset_or_kept(what):
    inner = optax.sgd(optax.constant_schedule(0.05), momentum=0.9)
    optimizer = pathcond.reconditioned(inner, SMALL_SPEC, every=2, state=what, method="block")
    step, state, params = stepper(optimizer), optimizer.init(SMALL), SMALL
    for _ in range(2):
        before, params_before = state, params
        params, state, _ = step(small_gradient(params), state, params)
    assert any(np.any(z) for z in state.recondition.log_scales)
    if what == "reset":
        chex.assert_trees_all_equal(state.inner_state, inner.init(params))
    else:
        _, plain = inner.update(small_gradient(params_before), before.inner_state, params_before)
        chex.assert_trees_all_close(state.inner_state, plain, rtol=1e-6)


def test_optax_can_map_over_the_state():
    for optimizer in (
        pathcond.reconditioned(optax.sgd(0.1, momentum=0.9), SPEC, every=2),
        optax.chain(optax.sgd(0.1, momentum=0.9), pathcond.recondition(SPEC, every=2)),
        optax.masked(pathcond.recondition(SPEC, every=2), jax.tree.map(lambda _: True, PARAMS)),
        pathcond.scale_by_path(SPEC, every=2),
    ):
        state = optimizer.init(PARAMS)
        mapped = optax.tree_map_params(optimizer, jnp.zeros_like, state)
        chex.assert_trees_all_equal_shapes(mapped, state)


OPTIMIZERS = {
    "recondition": pathcond.recondition(SPEC, every=2),
    "reconditioned": pathcond.reconditioned(optax.sgd(0.1), SPEC, every=2),
    "scale_by_path": pathcond.scale_by_path(SPEC),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_calls_of_update(name):
    optimizer = OPTIMIZERS[name]
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=rf"{name} needs the parameters: call update\(updates, st"):
        optimizer.update(PARAMS, state)
    other = {**PARAMS, "extra": PARAMS[NAMES[0]]}
    with pytest.raises(pathcond.SpecError, match=r"params has another structure.*extra/bias"):
        optimizer.update(other, state, other)
    if name != "reconditioned":
        with pytest.raises(pathcond.SpecError, match=r"updates has another structure.*extra/bias"):
            optimizer.update(other, state, PARAMS)
    wide = {**PARAMS, NAMES[0]: {**PARAMS[NAMES[0]], "bias": jnp.zeros(7)}}
    with pytest.raises(pathcond.SpecError, match=r"'layer_0/bias' has shape \(7,\)"):
        optimizer.update(PARAMS, state, wide)
    kernels = jax.tree.map(lambda p: p.ndim == 2, PARAMS)
    masked = optax.masked(optimizer, kernels)
    with pytest.raises(pathcond.SpecError, match=r"3 of 6 leaves of params are masked.*after"):
        masked.update(PARAMS, masked.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; it must be an integer of at least 1"),
        ({"every": 2.5}, "every is 2.5; an integer is needed"),
        ({"every": True}, "every is True"),
        ({"every": 2, "start": -1}, "start is -1"),
        ({"every": 2, "rounding": "nearest"}, "rounding is 'nearest'; there are None and"),
        ({"every": 2, "method": "guess"}, "unknown method 'guess'"),
        ({"every": 2, "criterion": "luck"}, "luck"),
    ],
)
@pytest.mark.parametrize(
    "factory", [pathcond.recondition, functools.partial(pathcond.reconditioned, optax.sgd(0.1))]
)
def test_bad_arguments(factory, options, message):
    with pytest.raises(pathcond.SpecError, match=re.escape(message)):
        factory(SPEC, **options)


def test_more_bad_arguments():
    with pytest.raises(pathcond.SpecError, match="every is 0"):
        pathcond.scale_by_path(SPEC, every=0)
    with pytest.raises(pathcond.SpecError, match="damping is -1"):
        pathcond.scale_by_path(SPEC, damping=-1)
    with pytest.raises(pathcond.SpecError, match="spec must be an ArchSpec, not of type dict"):
        pathcond.recondition(PARAMS, every=2)
    with pytest.raises(pathcond.SpecError, match="state is 'move'"):
        pathcond.reconditioned(optax.sgd(0.1), SPEC, every=2, state="move")
    with pytest.raises(pathcond.SpecError, match='for state="transport"'):
        pathcond.reconditioned(optax.sgd(0.1), SPEC, every=2, state="keep", degrees={"trace": 1})
    with pytest.raises(pathcond.SpecError, match="params has another structure"):
        pathcond.recondition(SPEC, every=2).init({"other": jnp.ones(3)})
    tanh = pathcond.trace_spec(
        lambda p, x: jnp.tanh(x @ p["kernel"]) @ p["kernel"].T,
        {"kernel": jnp.ones((2, 3))},
        jnp.ones((1, 2)),
    )
    with pytest.raises(pathcond.SpecError, match=r"no neuron to rescale.*tanh"):
        pathcond.recondition(tanh, every=2)


def altered(optimizer, number=2):
    """The state after some updates under jit, from SMALL, and where the last one led."""
    step, params, state = stepper(optimizer), SMALL, optimizer.init(SMALL)
    for _ in range(number):
        before = params
        params, state, _ = step(small_gradient(params), state, params)
    return state, before, params


def small_error(one, two):
    def outputs(params):
        hidden = jax.nn.relu(X_SMALL @ params["one"]["kernel"] + params["one"]["bias"][None])
        return hidden @ params["two"]["kernel"] + params["two"]["bias"][None]

    before, after = outputs(one), outputs(two)
    return float(jnp.abs(after - before).max() / jnp.abs(before).max())


def test_an_element_after_it_is_noticed():
    """The wrong order changes the function; the next call says so, and warns outside of jit."""
    element = functools.partial(pathcond.recondition, SMALL_SPEC, every=1, method="block")
    wrong = optax.chain(element(), optax.sgd(1.0))
    state, params = wrong.init(SMALL), SMALL
    zeros = jax.tree.map(jnp.zeros_like, SMALL)
    updates, state = wrong.update(zeros, state, params)
    params = optax.apply_updates(params, updates)
    assert small_error(SMALL, params) > 0.1
    assert int(state[0].num_altered) == 0
    with pytest.warns(UserWarning, match=r"recondition must be the last element of the chain"):
        _, state = wrong.update(zeros, state, params)
    assert int(state[0].num_altered) == 1

    for rate, expected in ((1.0, 3), (-0.999, 3), (-1.0, 0)):
        state, *_ = altered(optax.chain(element(), optax.scale(-1.0), optax.scale(rate)), 4)
        assert int(state[0].num_altered) == expected
    right = optax.chain(optax.sgd(0.05), element())
    state, *_ = altered(right, 4)
    assert int(state[1].num_altered) == 0


def test_a_wrapper_inside_of_a_chain_is_noticed():
    inner = pathcond.reconditioned(optax.sgd(0.05), SMALL_SPEC, every=2, method="block")
    state, *_ = altered(optax.chain(inner, optax.scale(0.5)), 3)
    assert int(state[0].recondition.num_altered) == 1
    # Where no update was due nothing is announced, and parameters may change as they like.
    params, state = SMALL, inner.init(SMALL)
    _, state = inner.update(small_gradient(params), state, params)
    doubled = jax.tree.map(lambda p: 2 * p, params)
    _, state = inner.update(small_gradient(params), state, doubled)
    assert int(state.recondition.num_altered) == 0
    with pytest.warns(UserWarning, match=r"wrap the whole chain.*reconditioned\(optax\.chain"):
        inner.update(small_gradient(params), state, doubled)


def test_altered_updates_of_low_precision():
    """What is announced is what bfloat16 can hold, and no rounding is reported."""
    low = draw(dtype=jnp.bfloat16)
    spec = pathcond.chain_spec(low, NAMES)
    element = pathcond.recondition(spec, every=1, rounding="power_of_two")
    optimizer = optax.chain(optax.sgd(0.1), element)
    step, state = stepper(optimizer), optimizer.init(low)
    for _ in range(4):
        low, state, _ = step(jax.tree.map(lambda p: (0.1 * p).astype(p.dtype), low), state, low)
    assert int(state[1].num_altered) == 0


WHOLE = {"params": SMALL, "stats": {"one": {"scale": jnp.ones(SIZES[2])}}}


def scaled(variables, x):
    params, scale = variables["params"], variables["stats"]["one"]["scale"]
    hidden = (x @ params["one"]["kernel"]) * scale[None] + params["one"]["bias"][None]
    return jax.nn.relu(hidden) @ params["two"]["kernel"] + params["two"]["bias"][None]


WHOLE_SPEC = pathcond.trace_spec(scaled, WHOLE, X_SMALL)


def test_the_contents_of_params_with_current_statistics():
    """Path-SGD and conditioning of params alone are those of the whole tree."""
    stats = {"one": {"scale": jnp.linspace(0.5, 2.0, SIZES[2])}}
    whole = {"params": SMALL, "stats": stats}
    grads = small_gradient(SMALL)
    gram = pathcond.gram_diagonal(whole, WHOLE_SPEC)["params"]
    element = pathcond.scale_by_path(WHOLE_SPEC)
    updates, _ = element.update(grads, element.init(SMALL), SMALL, stats=stats)
    chex.assert_trees_all_close(updates, jax.tree.map(jnp.divide, grads, gram), rtol=1e-5)
    known, _ = element.update(grads, element.init(SMALL), SMALL, gram_diagonal=gram)
    chex.assert_trees_all_close(known, updates, rtol=1e-5)
    with pytest.raises(pathcond.SpecError, match=r"scale_by_path reads .*/scale'.*stats="):
        element.update(grads, element.init(SMALL), SMALL)

    inner = optax.chain(pathcond.scale_by_path(WHOLE_SPEC, every=2), optax.sgd(0.01, momentum=0.9))
    optimizer = pathcond.reconditioned(
        inner, WHOLE_SPEC, every=1, method="block", max_log_scale=None
    )
    state = optimizer.init(SMALL)
    updates, state = jax.jit(optimizer.update)(grads, state, SMALL, stats=stats)
    plain, _ = inner.update(grads, inner.init(SMALL), SMALL, stats=stats)
    there = optax.apply_updates(SMALL, plain)
    expected, solution = pathcond.condition(
        {"params": there, "stats": stats}, WHOLE_SPEC, method="block"
    )
    after = optax.apply_updates(SMALL, updates)
    chex.assert_trees_all_close(after, expected["params"], rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(state.recondition.log_scales, solution.log_scales, atol=1e-5)
    trace = {"params": state.inner_state[1][0].trace, "stats": stats}
    assert jax.tree.structure(trace) == jax.tree.structure(whole)


def test_trees_of_other_places_are_refused():
    optimizer = pathcond.reconditioned(optax.sgd(0.1), WHOLE_SPEC, every=1)
    with pytest.raises(pathcond.SpecError, match=r"another structure.*unexpected 'params/three'"):
        optimizer.init({**SMALL, "three": jnp.ones(3)})
    with pytest.raises(pathcond.SpecError, match="'bias' could be 'params/one/bias' or "):
        optimizer.init(SMALL["one"])
    with pytest.raises(pathcond.SpecError, match=r"params lacks 'params/two/kernel'.*group 'one'"):
        optimizer.init({"one": SMALL["one"]})
    fewer = {**SMALL, "two": {"kernel": SMALL["two"]["kernel"]}}
    element = pathcond.recondition(WHOLE_SPEC, every=1)
    with pytest.raises(pathcond.SpecError, match="only one of them has 'params/two/bias'"):
        element.update(fewer, element.init(SMALL), SMALL, stats=WHOLE["stats"])
    wrapped = pathcond.reconditioned(optax.sgd(0.1), SMALL_SPEC, every=1, method="block")
    state = wrapped.init({"model": SMALL})
    updates, _ = wrapped.update({"model": SMALL}, state, {"model": SMALL})
    assert jax.tree.structure(updates) == jax.tree.structure({"model": SMALL})


def test_an_optimizer_that_is_made_anew_goes_on():
    """Rebuilt in the middle, with the old state or with a new one, and with a foreign one."""
    make = functools.partial(pathcond.reconditioned, optax.sgd(0.05, momentum=0.9))
    old, new = (make(SMALL_SPEC, every=2, method="block") for _ in range(2))
    state, _, params = altered(old, 3)
    grads = small_gradient(params)
    chex.assert_trees_all_equal(old.update(grads, state, params), new.update(grads, state, params))
    _, fresh = new.update(grads, new.init(params), params)
    assert int(fresh.recondition.num_updates) == 1
    assert int(fresh.recondition.num_altered) == 0
    foreign = pathcond.reconditioned(optax.sgd(0.05, momentum=0.9), SPEC, every=2).init(PARAMS)
    message = r"state is of another spec.* shapes \[\(5,\), \(4,\)\] instead of \[\(4,\)\]"
    with pytest.raises(pathcond.SpecError, match=message):
        new.update(grads, foreign, params)


def test_donated_parameters_are_not_copied():
    params = {"a": {"w": jnp.ones((37, 41))}, "b": {"w": jnp.ones((41, 3))}}
    spec = pathcond.chain_spec(params, ["a", "b"])
    optimizer = pathcond.reconditioned(optax.sgd(0.1, momentum=0.9), spec, every=7)

    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params)).compile()
    _, _, entry = compiled.as_text().partition("ENTRY")
    assert entry
    assert not re.findall(r"f32\[37,41\]\S* copy\(.*", entry)


def test_a_due_update_holds_few_copies_of_the_parameters():
    """What a step asks for and gives back each time, the C library makes anew if it is much."""
    sizes = itertools.pairwise((192, 256, 256, 256, 10))
    params = {
        f"layer_{k}": {"w": jnp.ones(shape), "b": jnp.ones(shape[1])}
        for k, shape in enumerate(sizes)
    }
    spec = pathcond.chain_spec(params, sorted(params))
    optimizer = optax.chain(optax.sgd(0.1), pathcond.recondition(spec, every=7))

    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params)).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert compiled.memory_analysis().temp_size_in_bytes < 2.8 * size
