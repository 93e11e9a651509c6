"""Networks that start out conditioned: plain functions, Flax linen and Flax nnx."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pathcond_jax as pathcond

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(5)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(2)(x)


LINEN = LinenNet()
VARIABLES = jax.eval_shape(LINEN.init, jax.random.key(0), X)
SPEC = pathcond.trace_spec(LINEN.apply, VARIABLES, X)


class NnxNet(nnx.Module):
    def __init__(self, width, *, rngs, dropout=0.5, gain=1.0):
        self.hidden = nnx.Linear(3, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        normal = nnx.initializers.normal(gain)
        self.out = nnx.Linear(width, 2, kernel_init=normal, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def test_linen():
    """Under jit and vmap over keys: the function of each member, its collections, its optimum."""
    keys = jax.random.split(jax.random.key(1), 3)
    init = pathcond.conditioned_init(LINEN.init, SPEC)
    conditioned = jax.jit(jax.vmap(init, in_axes=(0, None)))(keys, X)
    plain = jax.jit(jax.vmap(LINEN.init, in_axes=(0, None)))(keys, X)
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, conditioned)
    chex.assert_trees_all_equal(plain["batch_stats"], conditioned["batch_stats"])
    score = jax.jit(jax.vmap(lambda v: pathcond.conditioning_score(v, SPEC)))
    assert (score(conditioned) < score(plain) - 0.01).all()
    for train in (False, True):
        evaluate = jax.jit(
            jax.vmap(lambda v, t=train: LINEN.apply(v, X, t, mutable=["batch_stats"])[0])
        )
        outputs = [evaluate(variables) for variables in (plain, conditioned)]
        np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_a_spec_of_the_parameters_alone():
    def apply(params, x):
        stats = {"BatchNorm_0": {"mean": jnp.zeros(5), "var": jnp.ones(5)}}
        return LINEN.apply({"params": params, "batch_stats": stats}, x)

    spec = pathcond.trace_spec(apply, VARIABLES["params"], X)
    init = pathcond.conditioned_init(LINEN.init, spec, method="block")
    variables, plain = init(jax.random.key(2), X), LINEN.init(jax.random.key(2), X)
    assert jax.tree.structure(variables) == jax.tree.structure(plain)
    np.testing.assert_allclose(LINEN.apply(variables, X), LINEN.apply(plain, X), rtol=1e-5)
    z = pathcond.condition(variables["params"], spec, method="block")[1].log_scales
    assert max(float(jnp.abs(part).max()) for part in z) < 1e-3


def test_nnx():
    model = pathcond.conditioned_nnx(NnxNet, 5, rngs=nnx.Rngs(0, dropout=1), example=X)
    plain = NnxNet(5, rngs=nnx.Rngs(0, dropout=1))
    assert not model.dropout.deterministic
    assert not model.norm.use_running_average
    changed = [
        not np.allclose(a, b)
        for a, b in zip(
            jax.tree.leaves(nnx.state(model, nnx.Param)),
            jax.tree.leaves(nnx.state(plain, nnx.Param)),
            strict=True,
        )
    ]
    assert any(changed)
    # In training mode, with the same mask, and in evaluation mode with the updated statistics.
    np.testing.assert_allclose(model(X), plain(X), rtol=1e-5, atol=1e-5)
    model.eval(), plain.eval()
    np.testing.assert_allclose(model(X), plain(X), rtol=1e-5, atol=1e-5)


def test_nnx_under_jit():
    @nnx.jit
    def make(rngs):
        options = {"method": "block", "rounding": "power_of_two"}
        return pathcond.conditioned_nnx(
            NnxNet, 4, rngs=rngs, gain=8.0, example=(X,), options=options
        )

    model, plain = make(nnx.Rngs(0, dropout=1)), NnxNet(4, rngs=nnx.Rngs(0, dropout=1), gain=8.0)
    ratio = model.norm.scale / plain.norm.scale
    assert (ratio != 1).any()
    assert np.array_equal(np.exp2(np.round(np.log2(ratio))), ratio)
    model.eval(), plain.eval()
    np.testing.assert_allclose(model(X), plain(X), rtol=1e-6, atol=1e-6)


def test_parameters_that_are_not_finite_stay_as_drawn():
    def init(key):
        del key
        return {"a": {"w": jnp.ones((1, 2)).at[0, 0].set(jnp.nan)}, "b": {"w": jnp.ones((2, 1))}}

    spec = pathcond.chain_spec(jax.eval_shape(init, jax.random.key(0)), ["a", "b"])
    params = pathcond.conditioned_init(init, spec, method="block")(jax.random.key(0))
    np.testing.assert_array_equal(params["a"]["w"], [[np.nan, 1]])
    np.testing.assert_array_equal(params["b"]["w"], [[1], [1]])


def test_bad_calls():
    with pytest.raises(pathcond.SpecError, match="init_fn is of type dict"):
        pathcond.conditioned_init({}, SPEC)
    with pytest.raises(pathcond.SpecError, match="spec must be an ArchSpec, not of type method"):
        pathcond.conditioned_init(LINEN.init, LINEN.init)
    wrong = pathcond.conditioned_init(nn.Dense(2).init, SPEC)
    with pytest.raises(pathcond.SpecError, match="another structure"):
        wrong(jax.random.key(0), X)
    with pytest.raises(pathcond.SpecError, match="no neuron to rescale"):
        pathcond.conditioned_nnx(
            lambda rngs: nnx.Linear(3, 2, rngs=rngs), rngs=nnx.Rngs(0), example=X
        )
