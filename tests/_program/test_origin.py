"""Whose line and whose function an operation is said to come from."""

import functools
import importlib
import inspect
import os
import re
import sys
import sysconfig

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from zoo.network import lenient

import pathcond_jax as pathcond

x = jnp.ones((2, 4))
key = jax.random.key(0)


def line_of(function, text):
    lines, start = inspect.getsourcelines(function)
    return start + next(k for k, line in enumerate(lines) if text in line)


def operations(apply_fn, params, *inputs):
    """Operation -> lines, of all that is pinned by an operation."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        spec = pathcond.trace_spec(apply_fn, params, *inputs)
    found = {}
    for pin in spec.pinned:
        if pin.operation:
            found.setdefault(pin.operation, set()).add(pin.source)
    return found


def shapes_of(module):
    return jax.eval_shape(lenient(module.init), key, x)


class Linen(nn.Module):
    function: object

    @nn.compact
    def __call__(self, x):
        body = nn.Sequential([nn.Dense(8), self.function, nn.Dense(3)])
        return body(x)


class Nnx(nnx.Module):
    def __init__(self, function):
        rngs = nnx.Rngs(0)
        first, last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.body = nnx.Sequential(first, function, last)

    def __call__(self, x):
        return self.body(x)


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear
    function: object

    def __init__(self, function):
        self.first, self.last = eqx.nn.Linear(4, 8, key=key), eqx.nn.Linear(8, 3, key=key)
        self.function = function

    def __call__(self, x):
        x = self.first(x)
        x = self.function(x)
        return self.last(x)


def in_linen(function):
    module = Linen(function)
    return module.apply, shapes_of(module), line_of(Linen, "body(x)")


def in_nnx(function):
    graphdef, params = nnx.split(Nnx(function))
    return lambda p, x: nnx.merge(graphdef, p)(x), params, line_of(Nnx, "self.body(x)")


def in_equinox(function):
    params, static = eqx.partition(Equinox(function), eqx.is_inexact_array)

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return apply_fn, params, line_of(Equinox, "self.function(x)")


def in_haiku(function):
    def forward(x):
        body = hk.Sequential([hk.Linear(8), function, hk.Linear(3)])
        return body(x)

    net = hk.without_apply_rng(hk.transform(forward))
    return net.apply, shapes_of(net), line_of(forward, "body(x)")


FRAMEWORKS = [in_linen, in_nnx, in_equinox, in_haiku]
# What the first operation is that lets no scale pass.
ACTIVATIONS = {
    "gelu": "add in gelu",
    "silu": "sigmoid in silu",
    "swish": "sigmoid in silu",
    "softplus": "exp in softplus",
    "mish": "exp in mish",
    "elu": "expm1 in elu",
    "softmax": "exp in softmax",
    "relu6": "min in relu6",
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_named_as_their_user_calls_them(framework, name):
    apply_fn, params, line = framework(getattr(jax.nn, name))
    (found,) = operations(apply_fn, params, x).items()
    operation, (source,) = found
    assert operation == ACTIVATIONS[name]
    assert source.startswith(f"test_origin.py:{line} (")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("function", [jax.nn.sigmoid, jnp.tanh, functools.partial(jax.nn.gelu)])
def test_no_name_of_what_is_inside_jax_appears(framework, function):
    apply_fn, params, _ = framework(function)
    (operation,) = operations(apply_fn, params, x)
    # The layers that the function stands in, and none of what JAX runs around it.
    known = "sigmoid|tanh|add in gelu"
    assert re.fullmatch(f"({known})( in (Sequential|MLP|Linen|Nnx))?", operation)


def test_a_model_of_a_framework_alone_is_named_by_the_line_that_traces_it():
    model = nn.Sequential([nn.Dense(8), nn.gelu, nn.Dense(3)])
    found = operations(model.apply, shapes_of(model), x)
    assert list(found) == ["add in gelu"]
    (source,) = found["add in gelu"]
    assert source == f"test_origin.py:{line_of(operations, 'trace_spec')} (operations)"


def test_the_command_that_traces_is_not_the_users_line():
    command = os.path.join(sysconfig.get_path("scripts"), "pathcond")
    model = nn.Sequential([nn.Dense(8), nn.gelu, nn.Dense(3)])
    names = {"trace_spec": pathcond.trace_spec, "model": model, "params": shapes_of(model), "x": x}
    exec(compile("spec = trace_spec(model.apply, params, x)", command, "exec"), names)
    (source,) = {pin.source for pin in names["spec"].pinned if pin.operation}
    assert source.startswith("test_origin.py:")


PACKAGED = """
import jax
from flax import linen as nn
from helpers_of_packaged import twice

class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return twice(nn.Dense(3), nn.gelu(nn.Dense(8)(x)))

class Model(nn.Module):
    function: object = nn.tanh

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(self.function(nn.Dense(5)(Block()(x))))
"""
HELPERS = """
def twice(layer, x):
    return jax_cos(layer(x))

def jax_cos(x):
    import jax.numpy as jnp
    return jnp.cos(x)
"""


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """An installed package with a model, and one that it uses."""
    folder = tmp_path / "lib" / "site-packages"
    folder.mkdir(parents=True)
    (folder / "packaged_models.py").write_text(PACKAGED, "utf-8")
    (folder / "helpers_of_packaged.py").write_text(HELPERS, "utf-8")
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("packaged_models")
    for name in ("packaged_models", "helpers_of_packaged"):
        sys.modules.pop(name)


def test_a_model_in_a_package_is_named_by_its_line_there(packaged):
    model = packaged.Model()
    found = operations(model.apply, shapes_of(model), x)
    assert found["add in gelu"] == {"packaged_models.py:9 (Block.__call__)"}
    assert found["tanh in Model"] == {"packaged_models.py:16 (Model.__call__)"}


def test_the_users_line_goes_before_that_of_a_package(packaged):
    def mine(x):
        return jnp.cos(x)

    model = packaged.Model(mine)

    def apply_fn(params, x):
        return model.apply(params, x)

    found = operations(apply_fn, shapes_of(model), x)
    called = f"test_origin.py:{line_of(apply_fn, 'model.apply')} "
    ((gelu,), (cos,)) = found["add in gelu"], found["cos"]
    assert gelu.startswith(called)
    assert cos.startswith(f"test_origin.py:{line_of(mine, 'jnp.cos')} ")


def test_keras_is_not_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    keras = importlib.import_module("keras")
    hidden = keras.layers.Dense(8, activation="gelu")
    model = keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(3, "softmax")])

    def apply_fn(variables, x):
        return model.stateless_call(variables, [], x)[0]

    found = operations(apply_fn, [v.value for v in model.trainable_variables], x)
    assert {operation.partition(" in ")[2] for operation in found} == {"gelu", "softmax"}
    line = line_of(apply_fn, "stateless_call")
    assert all(
        source.startswith(f"test_origin.py:{line} (")
        for lines in found.values()
        for source in lines
    )
