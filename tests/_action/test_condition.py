"""Rescaling and conditioning whole networks: what may change, and what may not."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import monitoring

import pathcond_jax as pathcond
from pathcond_jax._action.check import random_log_scales
from pathcond_jax._solve.path import path_objective


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 12):
            x = nn.relu(nn.Dense(width, bias_init=nn.initializers.normal())(x))
        return nn.Dense(5)(x)


class LinenCNN(nn.Module):
    """Two convolutions, batch normalization, both kinds of pooling, a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3), padding="VALID")(x))
        x = nn.relu(x)
        with jax.numpy_dtype_promotion("standard"):
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(10)(x.reshape(x.shape[0], -1)))
        return nn.Dense(5)(x)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(7, 16, rngs=rngs)
        self.second = nnx.Linear(16, 12, rngs=rngs)
        self.last = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.dense = nnx.Linear(6 * 4 * 4, 9, rngs=rngs)
        self.last = nnx.Linear(9, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        x = self.dropout(x.reshape(x.shape[0], -1))
        return self.last(nnx.relu(self.dense(x)))


class Network(NamedTuple):
    apply_fn: Callable
    params: Any
    x: jax.Array
    num_neurons: int
    spec: pathcond.ArchSpec


def shaken(params, seed=1):
    """Every floating leaf a little off its initial value, so that no bias or mean is 0."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray((np.asarray(leaf) + 0.1 * rng.random(leaf.shape)).astype(leaf.dtype))

    return jax.tree.map(moved, params)


def of_linen(module, x):
    return module.apply, jax.jit(module.init)(jax.random.key(0), x)


def of_nnx(module, x):
    graphdef, state = nnx.split(module(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graphdef, state)(x), state


FACTORIES = {
    "linen_mlp": (of_linen, LinenMLP(), (7,), 28),
    "linen_cnn": (of_linen, LinenCNN(), (8, 8, 3), 24),
    "nnx_mlp": (of_nnx, NnxMLP, (7,), 28),
    "nnx_cnn": (of_nnx, NnxCNN, (8, 8, 3), 15),
}


@functools.cache
def made(name):
    """A network with its spec: one per name, since a spec compiles anew what it is used in."""
    make, module, shape, num_neurons = FACTORIES[name]
    x = jax.random.normal(jax.random.key(2), (4, *shape))
    apply_fn, params = make(module, x)
    params = shaken(params)
    return Network(apply_fn, params, x, num_neurons, pathcond.trace_spec(apply_fn, params, x))


@pytest.fixture(params=FACTORIES, scope="module")
def network(request):
    return made(request.param)


@pytest.fixture(scope="module")
def mlp():
    return made("linen_mlp")


def change(apply_fn, before, after, x):
    """The largest change of an output, relative to the largest output."""
    one, two = (np.asarray(apply_fn(params, x), np.float64) for params in (before, after))
    return abs(two - one).max() / abs(one).max()


def leaves_with_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.number)
    }


def assert_same_bits(one, two):
    found, expected = leaves_with_path(one), leaves_with_path(two)
    assert found.keys() == expected.keys()
    for path, value in found.items():
        assert value.dtype == expected[path].dtype, path
        assert value.tobytes() == expected[path].tobytes(), path


def assert_close(one, two, rtol):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-30)


class TestTheFunctionStays:
    def test_condition(self, network):
        apply_fn, params, x, num_neurons, spec = network
        assert spec.num_neurons == num_neurons
        conditioned, solution = pathcond.condition(params, spec)
        assert change(apply_fn, params, conditioned, x) <= 1e-6
        assert max(float(abs(z).max()) for z in solution.log_scales) > 0.1
        before, after = (pathcond.conditioning_score(p, spec) for p in (params, conditioned))
        assert after < 0.99 * before

    def test_any_rescaling(self, network):
        apply_fn, params, x, _, spec = network
        rescaled = pathcond.rescale(params, spec, random_log_scales(jax.random.key(3), spec))
        assert change(apply_fn, params, rescaled, x) <= 1e-6
        assert pathcond.check_spec(spec, params, x) <= 1e-6
        assert pathcond.check_spec(spec, params) <= 1e-6

    def test_powers_of_two_bit_for_bit(self, network):
        apply_fn, params, x, _, spec = network
        scales = random_log_scales(jax.random.key(3), spec)
        scales = pathcond.round_to_powers_of_two([3 * z for z in scales])
        rescaled = pathcond.rescale(params, spec, scales)
        moved = leaves_with_path(rescaled)
        for path, value in leaves_with_path(params).items():
            # frexp's mantissa lies in [1/2, 1): equal ones differ by a power of two.
            np.testing.assert_array_equal(np.frexp(moved[path])[0], np.frexp(value)[0])
        assert change(apply_fn, params, rescaled, x) == 0
        back = pathcond.rescale(rescaled, spec, jax.tree.map(jnp.negative, scales))
        assert_same_bits(back, params)

    def test_check_spec_finds_a_wrong_group(self, mlp):
        apply_fn, params, x = mlp.apply_fn, mlp.params, mlp.x
        incoming = pathcond.Incidence("params/Dense_0/kernel", 1, np.arange(16))
        outgoing = pathcond.Incidence("params/Dense_1/kernel", 0, np.arange(16))
        # Without the bias, the scale of the neurons does change the function.
        group = pathcond.NeuronGroup("no bias", 16, [incoming], [outgoing])
        spec = pathcond.trace_spec(apply_fn, params, x, groups=[group])
        assert pathcond.check_spec(spec, params, x) > 1e-3

    def test_check_spec_does_not_hide_nan(self, mlp):
        params, x, spec = mlp.params, mlp.x, mlp.spec
        assert np.isnan(pathcond.check_spec(spec, params, x.at[0, 0].set(jnp.nan)))


class TestSolutions:
    def test_rescale_takes_a_solution(self, mlp):
        conditioned, solution = pathcond.condition(mlp.params, mlp.spec)
        rescaled = pathcond.rescale(mlp.params, mlp.spec, solution)
        assert_same_bits(rescaled, pathcond.rescale(mlp.params, mlp.spec, solution.log_scales))
        assert_close(rescaled, conditioned, rtol=1e-6)
        short = solution._replace(log_scales=solution.log_scales[:1])
        with pytest.raises(pathcond.SpecError, match="1 arrays of log-scales for 2 groups"):
            pathcond.rescale(mlp.params, mlp.spec, short)

    def test_condition_goes_on_from_a_solution(self, mlp):
        _, solution = pathcond.condition(mlp.params, mlp.spec)
        _, again = pathcond.condition(mlp.params, mlp.spec, initial=solution)
        assert int(again.num_steps) <= 2


class TestTransformations:
    def test_jit_gives_the_same_and_compiles_once(self, mlp):
        traces = []

        @jax.jit
        def condition(params):
            traces.append(1)
            return pathcond.condition(params, mlp.spec)

        for factor in (1.0, 2.0, 3.0):
            params = jax.tree.map(lambda leaf, f=factor: f * leaf, mlp.params)
            eager, compiled = pathcond.condition(params, mlp.spec), condition(params)
            assert_close(compiled[0], eager[0], rtol=1e-4)
            for one, two in zip(eager[1].log_scales, compiled[1].log_scales, strict=True):
                np.testing.assert_allclose(one, two, atol=1e-4)
        assert len(traces) == 1

    def test_ensemble_by_vmap_equals_a_loop(self, mlp):
        seeds = jax.random.split(jax.random.key(5), 3)
        ensemble = jax.vmap(LinenMLP().init, in_axes=(0, None))(seeds, mlp.x)
        condition = functools.partial(pathcond.condition, spec=mlp.spec)
        together, solutions = jax.jit(jax.vmap(condition))(ensemble)
        for member in range(3):
            pick = functools.partial(jax.tree.map, lambda leaf, k=member: leaf[k])
            alone, solution = condition(pick(ensemble))
            assert pathcond.Status(int(solution.status)) is pathcond.Status.CONVERGED
            assert solutions.status[member] == solution.status
            np.testing.assert_allclose(solutions.objective[member], solution.objective, rtol=1e-6)
            assert_close(pick(together), alone, rtol=1e-3)

    def test_spec_is_a_static_argument(self, mlp):
        params, spec = mlp.params, mlp.spec
        score = jax.jit(pathcond.conditioning_score, static_argnums=1)
        score(params, spec)
        score(jax.tree.map(lambda leaf: 2 * leaf, params), spec)
        assert score._cache_size() == 1

    def test_repeated_eager_calls_compile_nothing(self, mlp):
        apply_fn, params, x, _, spec = mlp
        compilations = []

        def count(event, duration, **_):
            if event == "/jax/core/compile/backend_compile_duration":
                compilations.append(duration)

        other = jax.block_until_ready(jax.tree.map(lambda leaf: 2 * leaf, params))
        monitoring.register_event_duration_secs_listener(count)
        try:
            pathcond.condition(params, spec)
            compilations.clear()
            pathcond.condition(other, spec)
            assert not compilations
            again = pathcond.trace_spec(apply_fn, params, x)
            compilations.clear()
            pathcond.condition(other, again)
            assert not compilations
        finally:
            monitoring.clear_event_listeners()

    def test_gradient_through_rescaling(self, mlp):
        apply_fn, params, x, _, spec = mlp
        scales = random_log_scales(jax.random.key(4), spec)
        loss = lambda params: jnp.mean(apply_fn(params, x) ** 2)  # noqa: E731
        # The gradient is a covector: it moves by the inverse factor.
        there = jax.grad(loss)(pathcond.rescale(params, spec, scales))
        here = pathcond.rescale(jax.grad(loss)(params), spec, scales, power=-1)
        for one, two in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("z", [0.0, float(np.log(2.0)), 0.3])
    def test_gradient_by_log_scales(self, mlp, z):
        params, spec = mlp.params, mlp.spec
        scales = tuple(jnp.full(group.size, z) for group in spec.groups)

        def incoming(scales):
            return (
                pathcond.rescale(params, spec, scales)["params"]["Dense_0"]["kernel"].sum(0).sum()
            )

        kernel = params["params"]["Dense_0"]["kernel"]
        gradient = jax.grad(incoming)(scales)
        np.testing.assert_allclose(gradient[0], np.exp(z) * kernel.sum(0), rtol=1e-5)
        np.testing.assert_array_equal(gradient[1], 0)


class TestTrees:
    def test_statistics_are_untouched(self):
        _, params, _, _, spec = made("linen_cnn")
        assert {leaf.path.split("/")[0] for leaf in spec.leaves if leaf.trainable} == {"params"}
        conditioned, _ = pathcond.condition(params, spec)
        assert jax.tree.structure(conditioned) == jax.tree.structure(params)
        assert_same_bits(conditioned["batch_stats"], params["batch_stats"])
        gram = pathcond.gram_diagonal(params, spec)
        assert all(not leaf.any() for leaf in jax.tree.leaves(gram["batch_stats"]))

    def test_nnx_statistics_and_generators_are_untouched(self):
        _, params, _, _, spec = made("nnx_cnn")
        kept = {leaf.path for leaf in spec.leaves if not leaf.trainable}
        assert {path.split("/")[0] for path in kept} == {"norm", "dropout"}
        assert sum(path.startswith(("norm/mean", "norm/var")) for path in kept) == 2
        assert not any(path.startswith(("norm/scale", "norm/bias")) for path in kept)
        conditioned, _ = pathcond.condition(params, spec)
        assert isinstance(conditioned, nnx.State)
        assert jax.tree.structure(conditioned) == jax.tree.structure(params)
        for name in ("mean", "var"):
            assert_same_bits(conditioned["norm"][name], params["norm"][name])
        generators = conditioned["dropout"]["rngs"], params["dropout"]["rngs"]
        assert jax.random.key_data(generators[0]["key"][...]).tolist() == (
            jax.random.key_data(generators[1]["key"][...]).tolist()
        )

    def test_leaves_that_are_no_floats_pass_through(self, mlp):
        params = {"net": mlp.params, "step": np.int32(7), "key": jax.random.key(0)}
        spec = pathcond.trace_spec(lambda p, x: mlp.apply_fn(p["net"], x), params, mlp.x)
        assert spec.num_parameters == mlp.spec.num_parameters
        scales = random_log_scales(jax.random.key(3), spec)
        rescaled = pathcond.rescale(params, spec, scales)
        assert rescaled["step"] is params["step"]
        assert rescaled["key"] is params["key"]
        assert_same_bits(rescaled["net"], pathcond.rescale(mlp.params, mlp.spec, scales))

    def test_whole_or_bare(self, mlp):
        bare = mlp.params["params"]
        spec = pathcond.trace_spec(lambda p, x: mlp.apply_fn({"params": p}, x), bare, mlp.x)
        assert [g.size for g in spec.groups] == [g.size for g in mlp.spec.groups]
        assert spec.num_parameters == mlp.spec.num_parameters
        gram = pathcond.gram_diagonal(bare, spec)
        assert_same_bits(gram, pathcond.gram_diagonal(mlp.params, mlp.spec)["params"])
        scales = random_log_scales(jax.random.key(3), spec)
        whole = pathcond.rescale(mlp.params, mlp.spec, scales)
        assert_same_bits(pathcond.rescale(bare, spec, scales), whole["params"])

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_dtypes_are_kept(self, mlp, dtype):
        apply_fn, params, x, _, spec = mlp
        low = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        conditioned, solution = pathcond.condition(low, spec)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(conditioned)} == {dtype}
        assert all(z.dtype == jnp.float32 for z in solution.log_scales)
        # Computed on in float32, the log-scales are those of the rounded parameters.
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
        _, expected = pathcond.condition(wide, spec)
        for one, two in zip(solution.log_scales, expected.log_scales, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)
        back = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), conditioned)
        assert change(apply_fn, wide, back, x) <= 4 * float(jnp.finfo(dtype).eps)

    def test_mixed_dtypes_are_kept(self, mlp):
        params, spec = mlp.params, mlp.spec
        mixed = jax.tree.map(lambda leaf: leaf, params)
        mixed["params"]["Dense_1"]["kernel"] = params["params"]["Dense_1"]["kernel"].astype(
            "bfloat16"
        )
        conditioned, _ = pathcond.condition(mixed, spec)
        assert jax.tree.map(lambda leaf: leaf.dtype, conditioned) == jax.tree.map(
            lambda leaf: leaf.dtype, mixed
        )

    def test_float64_is_kept_and_used(self, mlp, x64):
        apply_fn, params, x, _, spec = mlp
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        conditioned, solution = pathcond.condition(params, spec)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(conditioned)} == {"float64"}
        assert solution.log_scales[0].dtype == jnp.float64
        assert change(apply_fn, params, conditioned, x.astype(jnp.float64)) <= 1e-14


class TestChain:
    @pytest.mark.parametrize(
        ("name", "layers"),
        [
            ("linen_mlp", ["Dense_0", "Dense_1", "Dense_2"]),
            ("nnx_mlp", ["first", "second", "last"]),
        ],
    )
    def test_equals_the_traced_spec(self, name, layers):
        network = made(name)
        traced = network.spec
        chain = pathcond.chain_spec(network.params, layers)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), network.params)
        for spec in (chain, pathcond.chain_spec(shapes, layers)):
            assert [g.name for g in spec.groups] == [g.name for g in traced.groups]
            for one, two in zip(spec.groups, traced.groups, strict=True):
                for side in ("incoming", "outgoing"):
                    found, expected = getattr(one, side), getattr(two, side)
                    assert {str(i) for i in found} == {str(i) for i in expected}
                    for incidence in found:
                        np.testing.assert_array_equal(incidence.index, np.arange(one.size))
        assert_same_bits(
            pathcond.gram_diagonal(network.params, chain),
            pathcond.gram_diagonal(network.params, traced),
        )
        assert pathcond.check_spec(chain, network.params) <= 1e-6


log_scales = st.lists(st.floats(-4, 4, width=32), min_size=28, max_size=28).map(
    lambda z: (jnp.array(z[:16], jnp.float32), jnp.array(z[16:], jnp.float32))
)
few = settings(max_examples=25)


class TestGroupAction:
    @few
    @given(log_scales, log_scales)
    def test_scales_add_up(self, mlp, first, second):
        params, spec = mlp.params, mlp.spec
        rescale = functools.partial(pathcond.rescale, spec=spec)
        in_turn = rescale(rescale(params, log_scales=first), log_scales=second)
        at_once = rescale(params, log_scales=tuple(map(jnp.add, first, second)))
        assert_close(in_turn, at_once, 5e-6)

    @few
    @given(log_scales)
    def test_inverse(self, mlp, scales):
        params, spec = mlp.params, mlp.spec
        moved = pathcond.rescale(params, spec, scales)
        back = pathcond.rescale(moved, spec, jax.tree.map(jnp.negative, scales))
        assert_close(back, params, 2e-6)

    def test_identity(self, mlp):
        params, spec = mlp.params, mlp.spec
        zeros = tuple(jnp.zeros(group.size) for group in spec.groups)
        assert_same_bits(pathcond.rescale(params, spec, zeros), params)

    @few
    @given(log_scales)
    def test_gram_diagonal_moves_by_the_inverse_square(self, mlp, scales):
        params, spec = mlp.params, mlp.spec
        gram = jax.jit(pathcond.gram_diagonal, static_argnums=1)
        there = gram(pathcond.rescale(params, spec, scales), spec)
        here = pathcond.rescale(gram(params, spec), spec, scales, power=-2)
        assert_close(there, here, 2e-5)

    @few
    @given(log_scales)
    def test_path_norm_is_invariant(self, mlp, scales):
        params, spec = mlp.params, mlp.spec
        norm = jax.jit(pathcond.path_norm, static_argnums=(1, 2))
        moved = pathcond.rescale(params, spec, scales)
        for order in (1, 2):
            np.testing.assert_allclose(
                norm(moved, spec, order), norm(params, spec, order), rtol=1e-5
            )

    def test_factors_beyond_float32_that_meet(self, mlp):
        scales = tuple(jnp.full(group.size, 100.0) for group in mlp.spec.groups)
        moved = pathcond.rescale(mlp.params, mlp.spec, scales)["params"]
        kernel = mlp.params["params"]["Dense_1"]["kernel"]
        np.testing.assert_allclose(moved["Dense_1"]["kernel"], kernel, rtol=1e-6)
        assert jnp.isinf(moved["Dense_0"]["kernel"]).all()


class TestOptimum:
    @settings(max_examples=10)
    @given(log_scales)
    def test_does_not_depend_on_the_representative(self, mlp, scales):
        here, solution = pathcond.condition(mlp.params, mlp.spec)
        moved = pathcond.rescale(mlp.params, mlp.spec, scales)
        there, from_there = pathcond.condition(moved, mlp.spec)
        # F changes by the linear term of the shift.
        linear = path_objective(mlp.spec, pathcond.gram_diagonal(mlp.params, mlp.spec)).linear
        shift = float(linear @ np.concatenate(scales))
        objective = from_there.objective - shift
        np.testing.assert_allclose(objective, solution.objective, rtol=1e-6)
        assert_close(there, here, rtol=1e-2)

    def test_objective_is_the_divergence(self, mlp):
        """F(z) = p log Σ g e^{2Bz} − Σ 2Bz, and no scales nearby do better."""
        conditioned, solution = pathcond.condition(mlp.params, mlp.spec)
        gram = pathcond.gram_diagonal(mlp.params, mlp.spec)
        linear = path_objective(mlp.spec, gram).linear

        def objective(log_scales):
            moved = pathcond.rescale(gram, mlp.spec, log_scales, power=-2)
            total = sum(leaf.sum() for leaf in jax.tree.leaves(moved))
            tilt = float(linear @ np.concatenate(log_scales))
            return mlp.spec.num_parameters * float(jnp.log(total)) - tilt

        best = objective(solution.log_scales)
        np.testing.assert_allclose(solution.objective, best, rtol=1e-6)
        score = pathcond.conditioning_score(conditioned, mlp.spec)
        logs = [np.log(leaf) for leaf in jax.tree.leaves(gram)]
        count = mlp.spec.num_parameters
        divergence = best / count - np.log(count) - sum(log.sum() for log in logs) / count
        np.testing.assert_allclose(score, divergence, atol=1e-5)
        for seed in range(3):
            noise = random_log_scales(jax.random.key(seed), mlp.spec)
            near = tuple(z + 0.1 * e for z, e in zip(solution.log_scales, noise, strict=True))
            assert objective(near) > best
