"""A rule never ends the user's trace: what it does not know, or what goes wrong in it, pins."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

import pathcond_jax as pathcond
from pathcond_jax._lifting.interpreter import RULES as LIFTING
from pathcond_jax._program.failures import RuleFailedWarning
from pathcond_jax._program.primitives import REFERENCES
from pathcond_jax._symmetry.values import RULES as SYMMETRY

PARAMS = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}
X = jnp.ones((1, 2))


@pytest.fixture
def kernel():
    """A primitive of the user's own, forgotten afterwards."""
    primitive = Primitive("my_kernel")
    primitive.def_abstract_eval(lambda x, **params: x)
    yield primitive
    REFERENCES.pop(primitive, None)
    for table in (SYMMETRY, LIFTING):
        table._entries.pop(primitive, None)


def network(kernel):
    def apply_fn(params, x):
        return kernel.bind(x @ params["w"], sharpness=2) @ params["v"]  # the user's line

    return apply_fn


def fails(*_):
    raise RuntimeError("a rule of JAX 99")


def test_a_primitive_of_ones_own_pins(kernel):
    spec = pathcond.trace_spec(network(kernel), PARAMS, X)

    assert spec.num_neurons == 0
    pin = next(pin for pin in spec.pinned if pin.operation == "my_kernel")
    assert "does not let a scale pass" in pin.reason
    assert "apply_fn" in pin.source
    with pytest.raises(pathcond.NotPathLiftableError, match=r"my_kernel at .* is not a sum over"):
        pathcond.path_norm(PARAMS, spec)


def test_a_symmetry_rule_that_fails_pins_and_says_so(kernel):
    pathcond.register_rule(kernel, symmetry=fails)
    said = (
        rf"is not understood under JAX {re.escape(jax.__version__)} "
        r"\(RuntimeError: a rule of JAX 99\); please report this"
    )
    with pytest.warns(RuleFailedWarning, match=r"my_kernel at .*apply_fn.* " + said):
        spec = pathcond.trace_spec(network(kernel), PARAMS, X)

    assert spec.num_neurons == 0
    assert any(re.search(said, pin.reason) and pin.source for pin in spec.pinned)


def test_labels_of_a_wrong_shape_are_a_failure(kernel):
    pathcond.register_rule(
        kernel, symmetry=lambda scope, x: [tuple(t._replace(labels=t.labels.T) for t in x.terms)]
    )
    with pytest.warns(RuleFailedWarning, match=r"labels of shape \(3, 1\)"):
        spec = pathcond.trace_spec(network(kernel), PARAMS, X)
    assert spec.num_neurons == 0


def test_without_being_told_to_go_on_a_failure_is_an_error_here(kernel):
    """Warnings are errors in these tests, so that the next drift of JAX is seen."""
    pathcond.register_rule(kernel, symmetry=fails)
    with pytest.raises(RuleFailedWarning):
        pathcond.trace_spec(network(kernel), PARAMS, X)


def test_a_lifting_rule_that_fails_names_itself(kernel):
    spec = pathcond.trace_spec(network(kernel), PARAMS, X)
    pathcond.register_rule(kernel, lifting=fails)

    error = r"my_kernel at .*apply_fn.* is not understood under JAX .* please report this"
    with (
        pytest.warns(RuleFailedWarning, match="please report"),
        pytest.raises(pathcond.NotPathLiftableError, match=error),
    ):
        pathcond.path_norm(PARAMS, spec)


def test_a_reference_stands_for_the_primitive(kernel):
    pathcond.register_rule(kernel, reference=lambda x, sharpness: jnp.maximum(x, 0.0) * sharpness)

    spec = pathcond.trace_spec(network(kernel), PARAMS, X)

    assert spec.num_neurons == 3
    # Two inputs, three neurons, a factor of 2 on every path.
    assert pathcond.path_norm(PARAMS, spec, order=1) == 12


def test_a_reference_may_know_some_parameters_only(kernel):
    pathcond.register_rule(
        kernel, reference=lambda x, sharpness: x if sharpness == 1 else NotImplemented
    )
    assert pathcond.trace_spec(network(kernel), PARAMS, X).num_neurons == 0


def test_a_reference_of_other_shapes_is_not_taken(kernel):
    pathcond.register_rule(kernel, reference=lambda x, sharpness: x[:, :2])
    assert pathcond.trace_spec(network(kernel), PARAMS, X).num_neurons == 0


def test_a_reference_that_fails_pins_and_says_so(kernel):
    pathcond.register_rule(kernel, reference=lambda x, sharpness: fails())
    with pytest.warns(RuleFailedWarning, match=r"my_kernel has a reference that fails \(Runtime"):
        spec = pathcond.trace_spec(network(kernel), PARAMS, X)
    assert spec.num_neurons == 0


def test_rules_of_ones_own_for_both_analyses(kernel):
    pathcond.register_rule(
        kernel, symmetry=lambda scope, x: [x.terms], lifting=lambda run, node, values: values
    )
    spec = pathcond.trace_spec(network(kernel), PARAMS, X)
    assert spec.num_neurons == 3
    assert pathcond.path_norm(PARAMS, spec, order=1) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("my_kernel", {}), "needs a jax.extend.core.Primitive"),
        ((Primitive("x"), {}), "no rule; give reference"),
        ((Primitive("x"), {"reference": abs, "symmetry": abs}), "other rules would never run"),
    ],
)
def test_wrong_calls(arguments, message):
    primitive, rules = arguments
    with pytest.raises(pathcond.SpecError, match=message):
        pathcond.register_rule(primitive, **rules)


def test_a_constant_that_jax_cannot_compute_has_no_scale(kernel):
    def apply_fn(params, x):
        offset = kernel.bind(jnp.zeros((1, 3)))
        return jax.nn.relu(x @ params["w"] + offset) @ params["v"]

    assert pathcond.trace_spec(apply_fn, PARAMS, X).num_neurons == 0
    scaled = lambda params, x: apply_fn(params, x) @ jnp.ones((1, 4)) @ params["u"]  # noqa: E731
    spec = pathcond.trace_spec(scaled, {**PARAMS, "u": jnp.ones((4, 2))}, X)
    assert [group.size for group in spec.groups] == [1]
