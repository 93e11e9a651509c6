"""The training loops that people have, with one line added: the real packages, small networks."""

import functools
from typing import Any

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from zoo.network import lenient, vector

import pathcond_jax as pathcond
from pathcond_jax import linen

X, Y = vector(16, 6, 6, 1), vector(16, 3, seed=2)
EVERY = 3


def squared_error(outputs):
    return jnp.mean((outputs - Y) ** 2)


def assert_same_function(before, after):
    """To what rounding in float32 makes of a few layers."""
    np.testing.assert_allclose(after, before, rtol=0, atol=5e-6 * float(jnp.abs(before).max()))


def recipe(spec, **options):
    """The optimizer of a transformer, conditioned every third update."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    return pathcond.reconditioned(inner, spec, every=EVERY, method="block", **options)


def expect_moves(state, number):
    """What the state of an optimizer says after an update."""
    state = state.recondition
    assert int(state.num_updates) == number
    assert int(state.status) == pathcond.Status.CONVERGED
    assert int(state.num_altered) == 0
    assert any(np.any(np.asarray(z)) for z in state.log_scales) == (number % EVERY == 0)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.wide = nnx.Linear(5, 7, rngs=rngs)
        self.narrow = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        return x + self.narrow(nnx.relu(self.wide(x)))


class CNN(nnx.Module):
    """The network of Flax's MNIST example, small, with blocks that are scanned and remat'ed."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dense = nnx.Linear(36, 5, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(Block))(rngs)
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        x = self.drop(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def forward(block, x):
            return block(x)

        return self.out(forward(self.blocks, x))


def evaluated(model):
    """Its outputs in evaluation mode."""
    still = nnx.clone(model)
    still.eval()
    return still(X)


@lenient
def test_nnx_optimizer():
    """MNIST with nnx.Optimizer: one compilation, and the function stays at each due step."""
    model = CNN(nnx.Rngs(0))
    spec = pathcond.nnx_spec(model, X)
    optimizer = nnx.Optimizer(model, recipe(spec), wrt=nnx.Param)
    plain = nnx.Optimizer(
        model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), wrt=nnx.Param
    )
    traces = []

    def step(model, optimizer, batch_stats):
        traces.append(optimizer.tx)
        gradients = nnx.grad(lambda model: squared_error(model(X)))(model)
        statistics = {"batch_stats": nnx.state(model, nnx.BatchStat)} if batch_stats else {}
        optimizer.update(model, gradients, **statistics)

    train = nnx.jit(step, static_argnames="batch_stats")
    twin = nnx.clone(model)
    for number in range(1, 2 * EVERY + 2):
        # The same step from the same parameters, with the optimizer's state but no conditioning.
        nnx.update(twin, nnx.state(model))
        nnx.update(plain.opt_state, nnx.state(optimizer.opt_state.inner_state))
        train(twin, plain, batch_stats=False)
        train(model, optimizer, batch_stats=True)
        expect_moves(optimizer.opt_state, number)
        assert_same_function(evaluated(twin), evaluated(model))
        moved = not np.allclose(model.out.kernel[...], twin.out.kernel[...], rtol=1e-4)
        assert moved == (number % EVERY == 0)
    assert len(traces) == 2


class Adapted(nnx.Module):
    """Frozen layers with low-rank adapters between which there are ranks to rescale."""

    def __init__(self, rngs):
        frozen = [nnx.Linear(36, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)]
        self.one = nnx.LoRA(36, 2, 5, base_module=frozen[0], rngs=rngs)
        self.two = nnx.LoRA(5, 2, 3, base_module=frozen[1], rngs=rngs)
        for layer in (self.one, self.two):
            layer.lora_b[...] = 0.1 + layer.lora_a[...].sum() * jnp.ones_like(layer.lora_b[...])

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x.reshape(x.shape[0], -1))))


@lenient
def test_nnx_optimizer_of_adapters():
    """A filter: the frozen parameters are handed over, and what they touch is pinned."""
    model = Adapted(nnx.Rngs(0))
    spec = pathcond.nnx_spec(model, X, wrt=nnx.LoRAParam)
    assert spec.num_neurons == 2 + 2
    assert {path.rpartition("/")[2] for path in spec.rescaled_paths} == {"lora_a", "lora_b"}
    optimizer = nnx.Optimizer(model, recipe(spec), wrt=nnx.LoRAParam)
    only_adapters = nnx.DiffState(0, nnx.LoRAParam)
    before = evaluated(model)
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.LoRAParam))
    gradient = nnx.grad(lambda model: squared_error(model(X)), argnums=only_adapters)
    for number in range(1, EVERY + 1):
        optimizer.update(model, gradient(model), frozen=nnx.state(model, nnx.Param))
        expect_moves(optimizer.opt_state, number)
    with pytest.raises(pathcond.SpecError, match=r"not hold, of .*kernel'.*hand the current ones"):
        optimizer.update(model, zeros)
    assert not np.allclose(before, evaluated(model))


@lenient
def test_filters_that_leave_out_half_of_a_group():
    model = Adapted(nnx.Rngs(0))
    spec = pathcond.nnx_spec(model, X)
    message = r"params lacks 'params/.*', which has to move with .* of group '.*nnx_spec: wrt="
    with pytest.raises(pathcond.SpecError, match=message):
        nnx.Optimizer(model, recipe(spec), wrt=nnx.LoRAParam)


class ResNet(nn.Module):
    """A batch-normalized network in the way of Flax's ImageNet example."""

    @nn.compact
    def __call__(self, x, train=True):
        for features in (4, 5):
            x = nn.Conv(features, (3, 3), strides=(2, 2), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class TrainState(linen.TrainState):
    batch_stats: Any


RESNET = ResNet()
VARIABLES = lenient(RESNET.init)(jax.random.key(0), X, train=False)
RESNET_SPEC = lenient(pathcond.trace_spec)(RESNET.apply, VARIABLES, X, train=False)


@jax.jit
def resnet_gradient(params, batch_stats, images=X):
    """The gradient of a step of training, and the statistics after it."""

    def loss(params):
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, changed = RESNET.apply(variables, images, mutable=["batch_stats"])
        return squared_error(outputs), changed["batch_stats"]

    return jax.grad(loss, has_aux=True)(params)


@jax.jit
def resnet(params, batch_stats):
    variables = {"params": params, "batch_stats": batch_stats}
    return RESNET.apply(variables, X, train=False)


@lenient
def test_train_state_with_batch_norm():
    """ImageNet-style TrainState: the criterion sees the current statistics at each due step."""
    state = TrainState.create(
        apply_fn=RESNET.apply,
        params=VARIABLES["params"],
        batch_stats=VARIABLES["batch_stats"],
        tx=recipe(RESNET_SPEC),
    )

    traces = []

    @jax.jit
    def train(state):
        traces.append(state)
        gradients, batch_stats = resnet_gradient(state.params, state.batch_stats)
        return state.apply_gradients(grads=gradients, batch_stats=batch_stats)

    update = jax.jit(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)).update)
    for number in range(1, 2 * EVERY + 2):
        before, state = state, train(state)
        expect_moves(state.opt_state, number)
        gradients, _ = resnet_gradient(before.params, before.batch_stats)
        updates, _ = update(gradients, before.opt_state.inner_state, before.params)
        twin = optax.apply_updates(before.params, updates)
        assert_same_function(
            resnet(twin, state.batch_stats), resnet(state.params, state.batch_stats)
        )
        if number % EVERY == 0:
            variables = {"params": twin, "batch_stats": state.batch_stats}
            expected, _ = pathcond.condition(variables, RESNET_SPEC, method="block")
            chex.assert_trees_all_close(state.params, expected["params"], rtol=2e-3, atol=1e-5)
            # From the initial statistics it would be another representative.
            stale, _ = pathcond.condition({**VARIABLES, "params": twin}, RESNET_SPEC)
            kernel = stale["params"]["Dense_0"]["kernel"]
            assert not np.allclose(state.params["Dense_0"]["kernel"], kernel, rtol=1e-2)
    assert len(traces) == 1


@lenient
def test_statistics_that_are_not_given_are_asked_for():
    optimizer = recipe(RESNET_SPEC)
    params = VARIABLES["params"]
    state = optimizer.init(params)
    message = (
        r"reconditioned reads values that the optimizer does not hold, of "
        r"'batch_stats/BatchNorm_0/mean'.*update\(updates, state, params, batch_stats=\.\.\.\)"
    )
    with pytest.raises(pathcond.SpecError, match=message):
        jax.jit(optimizer.update)(params, state, params)
    wrong = jax.tree.map(lambda _: jnp.zeros(7), VARIABLES["batch_stats"])
    with pytest.raises(pathcond.SpecError, match=r"batch_stats='BatchNorm_0/mean'.* shape \(7,\)"):
        optimizer.update(params, state, params, batch_stats=wrong)
    twice = VARIABLES["batch_stats"]
    with pytest.raises(pathcond.SpecError, match=r"could be one='.*mean' or two='.*; give it once"):
        optimizer.update(params, state, params, one=twice, two=twice)
    # ENorm reads parameters only.
    balanced = pathcond.reconditioned(optax.sgd(0.1), RESNET_SPEC, every=1, criterion="enorm")
    balanced.update(params, balanced.init(params), params)


@lenient
def test_an_average_of_the_parameters_goes_along():
    """An EMA outside of the optimizer keeps its function with the log-scales of the state."""
    optimizer = recipe(RESNET_SPEC)
    params, batch_stats = VARIABLES["params"], VARIABLES["batch_stats"]
    state, average = optimizer.init(params), params

    def along(average, state):
        whole = {"params": average, "batch_stats": batch_stats}
        return pathcond.rescale(whole, RESNET_SPEC, state.recondition.log_scales)["params"]

    for number in range(1, EVERY + 1):
        gradients, _ = resnet_gradient(params, batch_stats)
        updates, state = optimizer.update(gradients, state, params, batch_stats=batch_stats)
        params = optax.apply_updates(params, updates)
        before, average = average, along(average, state)
        assert_same_function(resnet(before, batch_stats), resnet(average, batch_stats))
        moved = not np.allclose(before["Dense_0"]["kernel"], average["Dense_0"]["kernel"])
        assert moved == (number == EVERY)
        average = optax.incremental_update(params, average, 0.1)


@lenient
def test_mixed_precision_with_float32_masters():
    """The masters are conditioned; what is computed with in bfloat16 is cast from them."""
    optimizer = recipe(RESNET_SPEC)
    params, batch_stats = VARIABLES["params"], VARIABLES["batch_stats"]
    state = optimizer.init(params)
    low = jnp.bfloat16

    @jax.jit
    def train(params, batch_stats, state):
        gradients, batch_stats = resnet_gradient(
            optax.tree_utils.tree_cast(params, low), batch_stats, X.astype(low)
        )
        batch_stats = optax.tree_utils.tree_cast(batch_stats, jnp.float32)
        updates, state = optimizer.update(gradients, state, params, batch_stats=batch_stats)
        return optax.apply_updates(params, updates), batch_stats, state

    for number in range(1, 2 * EVERY + 1):
        params, batch_stats, state = train(params, batch_stats, state)
        expect_moves(state, number)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert train._cache_size() == 1


@lenient
def test_accumulated_gradients_and_donated_buffers():
    """Emitted updates count; statistics pass through MultiSteps; donated arrays are not kept."""
    inner = optax.MultiSteps(recipe(RESNET_SPEC), every_k_schedule=2)
    params, batch_stats = VARIABLES["params"], VARIABLES["batch_stats"]
    params = jax.tree.map(jnp.copy, params)
    state = inner.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state):
        gradients, _ = resnet_gradient(params, batch_stats)
        updates, state = inner.update(gradients, state, params, batch_stats=batch_stats)
        return optax.apply_updates(params, updates), state

    for number in range(1, 2 * EVERY + 1):
        kernel = params["Dense_0"]["kernel"]
        params, state = train(params, state)
        assert kernel.is_deleted()
        emitted = state.inner_opt_state.recondition
        assert int(emitted.num_updates) == number // 2
        assert int(emitted.num_altered) == 0
    assert any(np.any(z) for z in emitted.log_scales)
    assert train._cache_size() == 1


def train_plainly(optimizer, params, gradient, steps=EVERY, **extra):
    """The parameters before the last update's conditioning and after it, and the state."""

    @jax.jit
    def train(params, state):
        updates, new = optimizer.update(gradient(params), state, params, **extra)
        return optax.apply_updates(params, updates), new

    state = optimizer.init(params)
    for _ in range(steps):
        before, params_before = state, params
        params, state = train(params, state)
    expect_moves(state, steps)
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    updates, _ = plain.update(gradient(params_before), before.inner_state, params_before)
    return optax.apply_updates(params_before, updates), params, state


class Normalized(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 2)
        self.first = eqx.nn.Linear(36, 5, use_bias=False, key=keys[0])
        self.norm = eqx.nn.BatchNorm(5, axis_name="batch", mode="batch")
        self.last = eqx.nn.Linear(5, 3, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.first(x.ravel()), state)
        return self.last(jax.nn.relu(x)), state


@lenient
def test_equinox_with_state():
    """eqx.partition; the state of the model is handed over at each update."""
    model, state = eqx.nn.make_with_state(Normalized)(jax.random.key(0))

    def run(model, state):
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(X, state)

    _, state = run(model, state)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply_fn(variables, x):
        still = eqx.nn.inference_mode(eqx.combine(variables["params"], static))
        return jax.vmap(still, in_axes=(0, None))(x, variables["state"])[0]

    spec = pathcond.trace_spec(apply_fn, {"params": params, "state": state}, X)
    assert spec.num_neurons == 5
    before, after, _ = train_plainly(
        recipe(spec),
        params,
        jax.grad(lambda p: squared_error(run(eqx.combine(p, static), state)[0])),
        batch_stats=state,
    )
    one, two = (apply_fn({"params": p, "state": state}, X) for p in (before, after))
    assert_same_function(one, two)
    assert not np.allclose(before.last.weight, after.last.weight, rtol=1e-3)


@lenient
def test_haiku_with_state():
    def forward(x, train):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(5, with_bias=False)(hk.Flatten()(x)), train)
        return hk.Linear(3)(jax.nn.relu(x))

    net = hk.transform_with_state(forward)
    params, state = net.init(jax.random.key(0), X, True)
    _, state = net.apply(params, state, None, X, True)

    def apply_fn(variables, x, train):
        return net.apply(variables["params"], variables["state"], None, x, train)[0]

    spec = pathcond.trace_spec(apply_fn, {"params": params, "state": state}, X, train=False)
    assert spec.num_neurons == 5
    before, after, _ = train_plainly(
        recipe(spec),
        params,
        jax.grad(lambda p: squared_error(net.apply(p, state, None, X, True)[0])),
        batch_stats=state,
    )
    one, two = (apply_fn({"params": p, "state": state}, X, False) for p in (before, after))
    assert_same_function(one, two)
    assert not np.allclose(before["linear_1"]["w"], after["linear_1"]["w"], rtol=1e-3)


@lenient
def test_lists_of_arrays():
    """What the stateless interface of Keras hands out: two lists, told apart by what is trained."""
    rng = np.random.default_rng(0)
    trained = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((36, 5), (5,), (5, 3))]
    fixed = [jnp.asarray(rng.uniform(0.5, 2.0, 5), jnp.float32)]

    def apply_fn(variables, x):
        (w, b, v), (var,) = variables["params"], variables["state"]
        x = (x.reshape(x.shape[0], -1) @ w) / jnp.sqrt(var) + b
        return jax.nn.relu(x) @ v

    spec = pathcond.trace_spec(apply_fn, {"params": trained, "state": fixed}, X)
    before, after, _ = train_plainly(
        recipe(spec),
        trained,
        jax.grad(lambda p: squared_error(apply_fn({"params": p, "state": fixed}, X))),
        non_trainable=fixed,
    )
    one, two = (apply_fn({"params": p, "state": fixed}, X) for p in (before, after))
    assert_same_function(one, two)
    assert not np.allclose(before[2], after[2], rtol=1e-3)


@lenient
@pytest.mark.parametrize("how", ["pure dict", "orbax"])
def test_nnx_state_goes_through_a_checkpoint(how, tmp_path):
    """Training resumes bit for bit from the states of the module and the optimizer."""

    class Small(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(36, 5, rngs=rngs)
            self.out = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))

    spec = pathcond.nnx_spec(Small(nnx.Rngs(0)), X)
    tx = recipe(spec)

    def start(seed):
        model = Small(nnx.Rngs(seed))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: squared_error(model(X)))(model))

    model, optimizer = start(0)
    for _ in range(2):
        train(model, optimizer)
    saved = nnx.to_pure_dict(nnx.state((model, optimizer)))
    if how == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", saved)
            checkpointer.wait_until_finished()
            saved = checkpointer.restore(tmp_path / "state", saved)
    else:
        saved = jax.tree.map(np.asarray, saved)
    resumed = start(1)
    state = nnx.state(resumed)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(resumed, state)
    for _ in range(2):
        train(model, optimizer)
        train(*resumed)
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(m)) for m in (model, resumed[0])))
    expect_moves(resumed[1].opt_state, 4)
