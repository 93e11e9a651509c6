"""Optimizer states that travel with rescaled parameters: measured degrees, by definition."""

import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pathcond_jax as pathcond
from pathcond_jax._optax.transport import find_buffers, transport

RNG = np.random.default_rng(0)
# The names of the biases are those of Adam's hyperparameters.
SHAPES = {"w1": (3, 5), "b1": (5,), "w2": (5, 4), "b2": (4,), "w3": (4, 2)}


def mlp(params, x):
    for k in (1, 2):
        x = jax.nn.relu(x @ params[f"w{k}"] + params[f"b{k}"][None])
    return x @ params["w3"]


def draw():
    return {
        name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()
    }


SPEC = pathcond.trace_spec(mlp, draw(), jnp.ones((1, 3)))
KERNELS = {name: len(shape) == 2 for name, shape in SHAPES.items()}
HISTORY = [(draw(), draw()) for _ in range(7)]
SCALES = tuple(jnp.asarray(RNG.normal(size=group.size), jnp.float32) for group in SPEC.groups)


class AverageState(NamedTuple):
    average: dict
    inner_state: tuple


def averaged(inner, decay=0.9):
    """Keeps an average of the parameters that starts from the first ones."""

    def init(params):
        return AverageState(params, inner.init(params))

    def update(updates, state, params=None):
        updates, inner_state = inner.update(updates, state.inner_state, params)
        new = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, new)
        return updates, AverageState(average, inner_state)

    return optax.GradientTransformation(init, update)


def by_kind():
    return optax.partition({True: optax.adam(0.1), False: optax.sgd(0.1, momentum=0.9)}, KERNELS)


FOLLOWED = {
    "sgd": (lambda: optax.sgd(0.1), {}),
    "momentum": (lambda: optax.sgd(0.1, momentum=0.9), {"0/trace": -1}),
    "nesterov": (lambda: optax.sgd(0.1, 0.9, nesterov=True), {"0/trace": -1}),
    "adam": (lambda: optax.adam(0.1), {"0/mu": -1, "0/nu": -2}),
    "adamax": (lambda: optax.adamax(0.1), {"0/mu": -1, "0/nu": -1}),
    "amsgrad": (lambda: optax.amsgrad(0.1), {"0/mu": -1, "0/nu": -2, "0/nu_max": -2}),
    "adamw": (lambda: optax.adamw(0.1), {"0/mu": -1, "0/nu": -2}),
    "lion": (lambda: optax.lion(0.1), {"0/mu": -1}),
    # The momentum of rmsprop is of normalized gradients.
    "rmsprop": (lambda: optax.rmsprop(0.1, momentum=0.9, eps=1e-20), {"0/nu": -2, "1/trace": 0}),
    "adadelta": (lambda: optax.adadelta(0.1, eps=1e-18), {"1/e_g": -2, "1/e_x": 0}),
    "adan": (lambda: optax.adan(0.1), {"0/g": -1, "0/m": -1, "0/n": -2, "0/v": -1}),
    "adafactor": (lambda: optax.adafactor(0.1), {"0/v": -2}),
    "low precision": (lambda: optax.adam(0.1, mu_dtype=jnp.bfloat16), {"0/mu": -1, "0/nu": -2}),
    "average of updates": (lambda: optax.chain(optax.scale(-0.1), optax.ema(0.9)), {"1/ema": -1}),
    "average": (
        lambda: averaged(optax.sgd(0.1, momentum=0.9)),
        {"average": 1, "inner_state/0/trace": -1},
    ),
    "schedule_free": (
        lambda: optax.contrib.schedule_free_adamw(0.1),
        {"z": 1, "base_optimizer_state/0/nu": -2},
    ),
    "inject_hyperparams": (
        lambda: optax.inject_hyperparams(optax.adam)(0.1),
        {"inner_state/0/mu": -1, "inner_state/0/nu": -2},
    ),
    "named_chain": (
        lambda: optax.named_chain(("a", optax.trace(0.9)), ("b", optax.scale(-0.1))),
        {"a/trace": -1},
    ),
    "masked": (
        lambda: optax.masked(optax.sgd(0.1, momentum=0.9), KERNELS),
        {"inner_state/0/trace": -1},
    ),
    "partition": (
        by_kind,
        {
            "inner_states/True/inner_state/0/mu": -1,
            "inner_states/True/inner_state/0/nu": -2,
            "inner_states/False/inner_state/0/trace": -1,
        },
    ),
    # The moments are zero until the 20th step.
    "MultiSteps": (
        lambda: optax.MultiSteps(optax.adam(0.1), 20),
        {"acc_grads": -1, "inner_opt_state/0/mu": -1, "inner_opt_state/0/nu": -2},
    ),
    "apply_if_finite": (
        lambda: optax.apply_if_finite(optax.adam(0.1), 3),
        {"inner_state/0/mu": -1, "inner_state/0/nu": -2},
    ),
    "reduce_on_plateau": (
        lambda: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
        {"0/0/mu": -1, "0/0/nu": -2},
    ),
    "path": (
        lambda: optax.chain(
            optax.trace(0.5), pathcond.scale_by_path(SPEC, every=2), optax.trace(0.9)
        ),
        {"0/trace": -1, "1/diagonal": -2, "2/trace": 1},
    ),
}
# What depends on how far the parameters moved, besides on where they are.
MOVING = {"average", "schedule_free"}


@pytest.mark.parametrize("name", FOLLOWED)
def test_state_is_the_one_of_the_rescaled_history(name):
    """transport(state after (w, g)) = state after (λ w, g / λ), for every buffer."""
    make, degrees = FOLLOWED[name]
    inner = optax.with_extra_args_support(make())
    buffers = find_buffers(inner, SPEC, probe_args={"value": 1.0})
    assert {(b.name, b.degree) for b in buffers.values()} == {
        (buffer, degree) for buffer, degree in degrees.items() if degree
    }

    @jax.jit
    def run(history):
        with jax.numpy_dtype_promotion("standard"):
            state = inner.init(history[0][0])
            for params, grads in history:
                if name in MOVING:
                    grads = jax.tree.map(jnp.zeros_like, grads)
                _, state = inner.update(grads, state, params, value=1.0)
        return state

    if name == "MultiSteps":
        inner = optax.with_extra_args_support(optax.MultiSteps(optax.adam(0.1), 3))
    rescaled = [
        (pathcond.rescale(w, SPEC, SCALES), pathcond.rescale(g, SPEC, SCALES, power=-1))
        for w, g in HISTORY
    ]
    moved, expected = transport(run(HISTORY), SPEC, SCALES, buffers), run(rescaled)
    if name == "path":
        moved, expected = [(state[0], _diagonal(state[1]), state[2]) for state in (moved, expected)]
    tolerance = 0.1 if name == "low precision" else 2e-5
    chex.assert_trees_all_close(moved, expected, rtol=tolerance, atol=1e-6)


def _diagonal(state):
    flat, treedef = jax.tree.flatten(state.diagonal)
    return jax.tree.unflatten(treedef, map(jnp.ldexp, flat, state.exponent))


REFUSED = {
    "initial accumulator": (lambda: optax.adagrad(0.1), "'0/sum_of_squares' is not homogeneous"),
    "factored": (
        lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
        r"'0/v_row' has shape \(4,\), which is not the parameter's",
    ),
    "layer-wise": (lambda: optax.novograd(0.1), r"'0/nu' has shape \(\), which is not"),
    "memory": (lambda: optax.sm3(0.1), r"'0/mu/b1/0' has shape \(5,\)|'0/mu/w1/0' has shape"),
    "history": (lambda: optax.lbfgs(linesearch=None), "'0/diff_params_memory' has shape"),
    "flat": (
        lambda: optax.flatten(optax.adam(0.1)),
        "'0/mu' changes with the scale and belongs to no one parameter",
    ),
    "normalized momentum": (
        lambda: optax.rmsprop(0.1, momentum=0.9),
        "trace'.* the power -1 .* tiny and 0 where they are large.*",
    ),
    "normalized updates": (
        lambda: optax.adadelta(0.1),
        "'1/e_x'.* the power -2 .* tiny and 0 where they are large.*",
    ),
    "weight decay before momentum": (
        lambda: optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9)),
        "'1/0/trace' is not homogeneous",
    ),
    "never written": (
        lambda: optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 10_000),
        "'inner_opt_state/0/trace' is zero for 512 steps",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_travel_is_named(name):
    make, message = REFUSED[name]
    with pytest.raises(pathcond.SpecError, match=f'(?:{message}).*state="reset".*"keep".*degrees='):
        pathcond.reconditioned(make(), SPEC, every=2)
    for state in ("reset", "keep"):
        pathcond.reconditioned(make(), SPEC, every=2, state=state).init(draw())


def test_degrees_can_be_given():
    decayed, _ = REFUSED["weight decay before momentum"]
    pathcond.reconditioned(decayed(), SPEC, every=2, degrees={"trace": -1})
    (degree,) = {b.degree for b in find_buffers(decayed(), SPEC, {"1/0/trace": -3}).values()}
    assert degree == -3
    assert not find_buffers(decayed(), SPEC, {"trace": 0})
    sm3 = REFUSED["memory"][0]()
    names = re.findall(r"'(0/mu/\w+/\d)'", str(_error(sm3, {})))
    assert names
    left_alone = {**dict.fromkeys(names, 0), "0/nu": -1}
    assert {b.name for b in find_buffers(sm3, SPEC, left_alone).values()} == {"0/nu"}
    # Longer names go first.
    mixed = find_buffers(by_kind(), SPEC, {"mu": 0, "inner_states/True/inner_state/0/mu": -1})
    assert -1 in {b.degree for b in mixed.values() if b.name.endswith("mu")}


def _error(inner, degrees):
    with pytest.raises(pathcond.SpecError) as caught:
        find_buffers(inner, SPEC, degrees)
    return caught.value


def test_bad_degrees():
    adam = optax.adam(0.1)
    assert "no buffer 'momentum'; the optimizer has '0/mu', '0/nu'" in str(
        _error(adam, {"momentum": -1})
    )
    assert "degrees['mu'] is 0.5; an integer is needed" in str(_error(adam, {"mu": 0.5}))
    assert "can only be kept, with degree 0" in str(_error(optax.novograd(0.1), {"0/nu": -2}))
    assert "degrees['mu'] is True" in str(_error(adam, {"mu": True}))


def test_optimizers_that_cannot_be_probed():
    def update(updates, state, params=None, *, learning_rate, **extra):
        del extra
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    needs_rate = optax.chain(
        optax.trace(0.9), optax.GradientTransformationExtraArgs(lambda _: (), update)
    )
    with pytest.raises(pathcond.SpecError, match=r"small parameters.*learning_rate.*probe_args="):
        pathcond.reconditioned(needs_rate, SPEC, every=2)
    pathcond.reconditioned(needs_rate, SPEC, every=2, probe_args={"learning_rate": 0.1})
    pathcond.reconditioned(needs_rate, SPEC, every=2, degrees={"trace": -1})

    fixed = jax.tree.map(jnp.ones_like, draw())
    shaped = optax.chain(
        optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, fixed)), optax.trace(0.9)
    )
    with pytest.raises(pathcond.SpecError, match="cannot be run on small parameters"):
        pathcond.reconditioned(shaped, SPEC, every=2)


def test_degrees_are_measured_under_jit():
    @jax.jit
    def moved(state):
        return transport(state, SPEC, SCALES, find_buffers(optax.sgd(0.1, momentum=0.9), SPEC))

    grads = draw()
    trace = moved((optax.TraceState(grads), optax.EmptyState()))[0].trace
    chex.assert_trees_all_close(trace, pathcond.rescale(grads, SPEC, SCALES, power=-1), rtol=1e-6)


def test_a_foreign_state_is_refused():
    buffers = find_buffers(optax.adam(0.1), SPEC)
    with pytest.raises(pathcond.SpecError, match="has no '0/mu'; was it made by another optimizer"):
        transport(optax.sgd(0.1, momentum=0.9).init(draw()), SPEC, SCALES, buffers)


def test_gradients_and_tangents_are_rescaled():
    """rescale(power=) maps gradients, moments and tangents to those at the rescaled parameters."""
    params, x = draw(), jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)

    def loss(p):
        return jnp.sum(mlp(p, x) ** 2)

    there = pathcond.rescale(params, SPEC, SCALES)
    here, rescaled = jax.grad(loss)(params), jax.grad(loss)(there)
    moved = pathcond.rescale(here, SPEC, SCALES, power=-1)
    chex.assert_trees_all_close(moved, rescaled, rtol=1e-4, atol=1e-4)
    squares = jax.tree.map(jnp.square, here)
    chex.assert_trees_all_close(
        pathcond.rescale(squares, SPEC, SCALES, power=-2),
        jax.tree.map(jnp.square, rescaled),
        rtol=2e-4,
        atol=1e-3,
    )
    tangent = draw()
    _, slope = jax.jvp(loss, (params,), (tangent,))
    _, same = jax.jvp(loss, (there,), (pathcond.rescale(tangent, SPEC, SCALES),))
    np.testing.assert_allclose(slope, same, rtol=1e-4)


def convolve(x, w):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)


def pooled(x):
    zero = jnp.asarray(-jnp.inf, x.dtype)
    return jax.lax.reduce_window(x, zero, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def cnn(params, x):
    x = pooled(jax.nn.relu(convolve(x, params["conv_1"]) + params["bias_1"][None, None, None]))
    x = jax.nn.relu(convolve(x, params["conv_2"])).reshape(x.shape[0], -1)
    return x @ params["dense"]


def resnet(params, x):
    x = jax.nn.relu(convolve(x, params["stem"]))
    for k in (1, 2):
        inner = jax.nn.relu(convolve(x, params[f"in_{k}"]) + params[f"bias_{k}"][None, None, None])
        x = jax.nn.relu(x + convolve(inner, params[f"out_{k}"]))
    return x.sum((1, 2)) @ params["dense"]


NETWORKS = {
    "mlp": (mlp, SHAPES, (6, 3)),
    "cnn": (
        cnn,
        {"conv_1": (3, 3, 2, 4), "bias_1": (4,), "conv_2": (3, 3, 4, 5), "dense": (45, 3)},
        (2, 6, 6, 2),
    ),
    "resnet": (
        resnet,
        {
            "stem": (3, 3, 2, 4),
            **{f"in_{k}": (3, 3, 4, 5) for k in (1, 2)},
            **{f"bias_{k}": (5,) for k in (1, 2)},
            **{f"out_{k}": (3, 3, 5, 4) for k in (1, 2)},
            "dense": (4, 3),
        },
        (2, 6, 6, 2),
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_powers_of_two_change_no_bit(name, dtype):
    apply, shapes, x_shape = NETWORKS[name]
    rng = np.random.default_rng(3)
    params = {k: jnp.asarray(rng.normal(size=shape), dtype) for k, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=x_shape), dtype)
    spec = pathcond.trace_spec(apply, params, x)
    scales = [jnp.asarray(4 * rng.normal(size=g.size), jnp.float32) for g in spec.groups]
    scales = pathcond.round_to_powers_of_two(tuple(scales))
    rescaled = pathcond.rescale(params, spec, scales)
    assert all(np.ptp(z) > 3 for z in scales)
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(rescaled), strict=True):
        assert leaf.dtype == other.dtype == dtype
    run = jax.jit(apply)
    assert np.asarray(run(rescaled, x)).tobytes() == np.asarray(run(params, x)).tobytes()
