"""Wrong calls are errors when tracing, in the user's words; bad numbers change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pathcond_jax as pathcond

HERE = "test_bad_input.py"
x = jnp.ones((2, 4))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x))
        x = nn.relu(nn.Dense(6)(x))
        return nn.Dense(3)(x)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


model = MLP()


@pytest.fixture(scope="module")
def params():
    return model.init(jax.random.key(0), x)


@pytest.fixture(scope="module")
def spec(params):
    return pathcond.trace_spec(model.apply, params, x)


def refusal(call, *args, error=pathcond.SpecError, **kwargs):
    """What the error says."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def assert_says(message, *words):
    for word in words:
        assert word in message


class TestClosures:
    """The apply function computes with parameters of its own."""

    def test_plain(self, params):
        message = refusal(pathcond.trace_spec, lambda _, x: model.apply(params, x), params, x)
        # The line is that of the network which uses them.
        assert_says(message, "closes over its parameters", "dot_general", f"{HERE}:")
        assert_says(message, "'params/Dense_0/kernel'", "compute with the parameters")

    def test_one_layer_only(self, params):
        def apply_fn(given, x):
            kept = {**given["params"], "Dense_1": params["params"]["Dense_1"]}
            return model.apply({"params": kept}, x)

        message = refusal(pathcond.trace_spec, apply_fn, params, x)
        assert_says(message, "closes over its parameters", "'params/Dense_1/kernel'", f"{HERE}:")

    def test_shapes_only(self, params):
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        message = refusal(pathcond.trace_spec, lambda _, x: model.apply(params, x), shapes, x)
        assert_says(message, "closes over its parameters", "'params/Dense_0/", f"{HERE}:")

    def test_within_jit(self, params):
        inner = jax.jit(lambda x: model.apply(params, x))
        message = refusal(pathcond.trace_spec, lambda _, x: inner(x), params, x)
        assert_says(message, "closes over its parameters", "'params/Dense_0/kernel'")

    def test_bound_linen_module(self, params):
        bound = model.bind(params)
        message = refusal(pathcond.trace_spec, lambda _, x: bound(x), params, x)
        assert_says(message, "closes over its parameters", "'params/Dense_0/kernel'", f"{HERE}:")

    def test_nnx_module(self):
        module = NnxMLP(nnx.Rngs(0))
        message = refusal(pathcond.trace_spec, lambda _, x: module(x), nnx.state(module), x)
        assert_says(message, "closes over its parameters", "'first/kernel", f"{HERE}:")
        assert_says(message, "nnx.merge(graphdef, params)")

    def test_changed_before_use(self, params):
        def apply_fn(_, x):
            flat = params["params"]
            hidden = jax.nn.relu(x @ (2 * flat["Dense_0"]["kernel"].T).T)
            return hidden @ (2 * flat["Dense_1"]["kernel"])

        message = refusal(pathcond.trace_spec, apply_fn, params, x)
        line = apply_fn.__code__.co_firstlineno
        assert_says(message, f"apply_fn at {HERE}:{line}", "uses none of", "'params/Dense_0/bias'")
        assert_says(message, "compute with the parameters")

    def test_parameters_of_an_outer_trace(self, params):
        def outer(params):
            return pathcond.trace_spec(lambda p, x: model.apply(params, x), params, x).num_neurons

        message = refusal(jax.jit(outer), params)
        assert_says(message, "closes over values that are being traced", "outside of jit")

    def test_a_constant_of_the_same_shape_is_no_closure(self, params):
        """Another array of a parameter's shape, beside a parameter that the network leaves idle."""
        mask = np.arange(24.0, dtype=np.float32).reshape(4, 6)
        tree = {**params["params"], "idle": jnp.ones((4, 6))}

        def apply_fn(tree, x):
            net = {name: layer for name, layer in tree.items() if name != "idle"}
            return model.apply({"params": net}, x) + (x @ mask)[:, :3]

        assert pathcond.trace_spec(apply_fn, tree, x).num_neurons == 14


class TestOtherTrees:
    """Parameters that the spec was not built for."""

    @pytest.fixture(params=["condition", "rescale", "gram_diagonal", "path_norm", "solve", "check"])
    def use(self, request, spec):
        zeros = tuple(jnp.zeros(group.size) for group in spec.groups)
        return {
            "condition": lambda tree: pathcond.condition(tree, spec),
            "rescale": lambda tree: pathcond.rescale(tree, spec, zeros),
            "gram_diagonal": lambda tree: pathcond.gram_diagonal(tree, spec),
            "path_norm": lambda tree: pathcond.path_norm(tree, spec),
            "solve": lambda tree: pathcond.solve(tree, spec),
            "check": lambda tree: pathcond.check_spec(spec, tree),
        }[request.param]

    def test_missing_and_unexpected(self, params, use):
        tree = {"params": {**params["params"], "Head": params["params"]["Dense_2"]}}
        del tree["params"]["Dense_1"]
        message = refusal(use, tree)
        assert_says(message, "missing 'params/Dense_1/bias', 'params/Dense_1/kernel'")
        assert_says(message, "unexpected 'params/Head/bias', 'params/Head/kernel'")

    def test_other_shape(self, use):
        message = refusal(use, model.init(jax.random.key(0), jnp.ones((2, 5))))
        assert_says(message, "'params/Dense_0/kernel' has shape (5, 8)", "built for (4, 8)")

    def test_integers(self, params, use):
        tree = jax.tree.map(lambda leaf: leaf.astype(jnp.int32), params)
        message = refusal(use, tree)
        assert_says(message, "'params/Dense_0/bias' has dtype int32", "floats are needed")

    def test_ensemble_without_vmap(self, params, use):
        tree = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf, leaf]), params)
        message = refusal(use, tree)
        assert_says(message, "has shape (3, 8)", "leading axis of 3", "jax.vmap")

    def test_under_jit(self, params, spec):
        tree = {"params": {**params["params"], "Dense_0": params["params"]["Dense_1"]}}
        message = refusal(jax.jit(lambda p: pathcond.condition(p, spec)), tree)
        assert_says(message, "'params/Dense_0/bias' has shape (6,)", "built for (8,)")

    def test_unwrapped(self, params, spec):
        message = refusal(pathcond.condition, params["params"], spec)
        assert_says(message, 'the contents of "params"', "pass the whole tree")

    def test_wrapped(self, params):
        bare = params["params"]
        spec = pathcond.trace_spec(lambda p, x: model.apply({"params": p}, x), bare, x)
        message = refusal(pathcond.condition, params, spec)
        assert_says(message, 'wrapped in {"params": ...}', "pass what is inside")

    def test_other_containers(self):
        tree = [jnp.ones((4, 3)), jnp.ones((3, 2))]
        spec = pathcond.trace_spec(lambda p, x: jax.nn.relu(x @ p[0]) @ p[1], tree, x)
        message = refusal(pathcond.condition, tuple(tree), spec)
        assert_says(message, "other containers", "PyTreeDef((*, *)) instead of PyTreeDef([*, *])")

    def test_arguments_in_the_wrong_order(self, params, spec):
        message = refusal(pathcond.condition, spec, params)
        assert_says(message, "spec must be an ArchSpec, not of type dict", "(params, spec)")


class TestNoNeuron:
    def test_tanh(self):
        params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}

        def tanh_net(params, x):
            return jnp.tanh(x @ params["w"]) @ params["v"]

        spec = pathcond.trace_spec(tanh_net, params, x)
        assert spec.num_neurons == 0
        message = refusal(pathcond.condition, params, spec)
        line = tanh_net.__code__.co_firstlineno + 1
        assert_says(message, "no neuron to rescale", "tanh", f"{HERE}:{line} (", "such as relu")
        assert_says(message, "v[0]")

    def test_under_jit(self):
        params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}
        spec = pathcond.trace_spec(lambda p, x: jax.nn.silu(x @ p["w"]) @ p["v"], params, x)
        message = refusal(jax.jit(lambda p: pathcond.condition(p, spec)), params)
        assert_says(message, "no neuron to rescale", "silu", f"{HERE}:")

    def test_solve(self):
        params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}
        spec = pathcond.trace_spec(lambda p, x: jax.nn.sigmoid(x @ p["w"]) @ p["v"], params, x)
        message = refusal(pathcond.solve, params, spec)
        assert_says(message, "no neuron to rescale", "sigmoid", f"{HERE}:", "such as relu")

    def test_one_layer(self):
        params = {"w": jnp.ones((4, 3))}
        spec = pathcond.trace_spec(lambda p, x: x @ p["w"], params, x)
        message = refusal(pathcond.condition, params, spec)
        assert_says(message, "no neuron to rescale", "w[1]", "between two trainable layers")

    def test_nothing_trainable_behind_the_hidden_layer(self, params):
        spec = pathcond.trace_spec(model.apply, params, x, trainable=lambda path: "Dense_1" in path)
        assert_says(refusal(pathcond.condition, params, spec), "no neuron to rescale")


class TestIntegers:
    def test_parameters(self, params):
        tree = jax.tree.map(lambda leaf: leaf.astype(jnp.int32), params)
        message = refusal(pathcond.trace_spec, model.apply, tree, x)
        assert_says(
            message, "no trainable floating-point leaf", "params/Dense_0/bias: int32", "Cast"
        )

    @pytest.mark.parametrize("use", [pathcond.condition, pathcond.gram_diagonal])
    def test_inputs_of_the_network(self, use):
        params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}

        def apply_fn(params, x):
            x = x.astype(jnp.float32) / 255
            return jax.nn.relu(x @ params["w"]) @ params["v"]

        spec = pathcond.trace_spec(apply_fn, params, jnp.ones((2, 4), jnp.uint8))
        message = refusal(use, params, spec, error=pathcond.NotPathLiftableError)
        line = apply_fn.__code__.co_firstlineno + 2
        assert_says(message, "dot_general", f"{HERE}:{line} (", "needs floats", "integers")
        assert_says(message, "give trace_spec floating inputs")
        shape = jax.ShapeDtypeStruct((2, 4), jnp.float32)
        use(params, pathcond.trace_spec(apply_fn, params, shape))

    def test_declared_trainable(self, params):
        tree = {**params, "step": jnp.zeros((), jnp.int32)}
        message = refusal(pathcond.trace_spec, model.apply, tree, x, trainable=True)
        assert_says(message, "'step' has dtype int32", "only floats can be trainable")

    def test_log_scales(self, params, spec):
        zeros = tuple(jnp.zeros(group.size, jnp.int32) for group in spec.groups)
        message = refusal(pathcond.rescale, params, spec, zeros)
        assert_says(message, "log-scales of group 'Dense_0' have dtype int32", "floats are needed")
        message = refusal(pathcond.round_to_powers_of_two, zeros)
        assert_says(message, "log-scales have dtype int32", "floats are needed")

    def test_chain(self):
        tree = {"a": {"w": jnp.ones((4, 3), int)}, "b": {"w": jnp.ones((3, 2))}}
        message = refusal(pathcond.chain_spec, tree, ["a", "b"])
        assert_says(message, "layer 'a'", "'a/w' has dtype int32", "floats")


class TestTraceArguments:
    @pytest.mark.parametrize(
        ("leaf", "kind"), [("relu", "str"), (jax.nn.gelu, "function"), (object(), "object")]
    )
    def test_leaf_that_is_no_array(self, params, leaf, kind):
        message = refusal(pathcond.trace_spec, model.apply, {**params, "extra": leaf}, x)
        assert_says(message, "parameter 'extra' is no array", f"type {kind}", "close over the rest")

    def test_numbers_are_arrays(self):
        params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2)), "gain": 2.0}
        spec = pathcond.trace_spec(
            lambda p, x: p["gain"] * (jax.nn.relu(x @ p["w"]) @ p["v"]), params, x
        )
        assert spec.leaf("gain").shape == ()

    def test_arguments_in_the_wrong_order(self, params):
        message = refusal(pathcond.trace_spec, params, model.apply, x)
        assert_says(message, "apply_fn must be a function", "(apply_fn, params, *inputs)")

    def test_max_pool(self, params):
        message = refusal(pathcond.trace_spec, model.apply, params, x, max_pool="mean")
        assert_says(message, "'mean'", '"paths"', '"max"')

    def test_trainable_is_no_boolean(self, params):
        message = refusal(pathcond.trace_spec, model.apply, params, x, trainable="params")
        assert_says(message, "trainable", "'params'", "booleans")

    def test_trainable_is_no_prefix(self, params):
        flags = {"params": {"Dense_0": True}}
        message = refusal(pathcond.trace_spec, model.apply, params, x, trainable=flags)
        assert_says(message, "no prefix", "Dense_1", "Dense_2")

    def test_trainable_selects_nothing(self, params):
        message = refusal(pathcond.trace_spec, model.apply, params, x, trainable=lambda path: False)
        assert_says(message, "no trainable", "`trainable`")


class TestGroups:
    incoming = pathcond.Incidence("params/Dense_0/kernel", 1, np.arange(8))
    bias = pathcond.Incidence("params/Dense_0/bias", 0, np.arange(8))
    outgoing = pathcond.Incidence("params/Dense_1/kernel", 0, np.arange(8))

    def refused(self, params, *groups):
        return refusal(pathcond.trace_spec, model.apply, params, x, groups=groups)

    def test_right(self, params):
        group = pathcond.NeuronGroup("mine", 8, [self.incoming, self.bias], [self.outgoing])
        spec = pathcond.trace_spec(model.apply, params, x, groups=[group])
        assert spec.groups == (group,)
        assert pathcond.check_spec(spec, params, x) <= 1e-6

    @pytest.mark.parametrize(
        ("path", "axes", "index", "words"),
        [
            ("Dense_0/kernel", 1, range(8), ["no such parameter", "'params/Dense_0/kernel'"]),
            ("params/Dense_0/kernel", 2, range(8), ["[2]", "shape (4, 8)", "0, 1"]),
            ("params/Dense_0/kernel", -1, range(8), ["[-1]", "shape (4, 8)", "0, 1"]),
            ("params/Dense_0/kernel", (1, 1), range(8), ["[1,1]", "each once at most"]),
            ("params/Dense_0/kernel", 0, range(8), ["shape (8,), not (4,)", "(4, 8)"]),
            ("params/Dense_0/kernel", 1, range(1, 9), ["index outside -1..7"]),
            ("params/Dense_0/kernel", 1, range(-2, 6), ["index outside -1..7"]),
        ],
    )
    def test_incidence_that_does_not_fit(self, params, path, axes, index, words):
        wrong = pathcond.Incidence(path, axes, np.array(index))
        group = pathcond.NeuronGroup("mine", 8, [self.bias, wrong], [self.outgoing])
        assert_says(self.refused(params, group), "group 'mine', incoming", *words)

    def test_one_side_only(self, params):
        group = pathcond.NeuronGroup("mine", 8, [self.incoming], [])
        message = self.refused(params, group)
        assert_says(message, "group 'mine' has no outgoing parameter", "changes the function")

    def test_leaf_that_is_not_trainable(self, params):
        group = pathcond.NeuronGroup("mine", 8, [self.incoming, self.bias], [self.outgoing])
        message = refusal(
            pathcond.trace_spec,
            model.apply,
            params,
            x,
            groups=[group],
            trainable=lambda path: "bias" not in path,
        )
        assert_says(message, "params/Dense_0/bias[0]", "not trainable")

    def test_other_types(self, params):
        group = pathcond.NeuronGroup("mine", 8, [self.incoming], [self.outgoing])
        message = refusal(pathcond.trace_spec, model.apply, params, x, groups=group)
        assert_says(message, "groups is a sequence of NeuronGroup, not NeuronGroup(name='mine'")
        assert_says(self.refused(params, "mine"), "groups is a sequence of NeuronGroup", "'mine'")
        message = refusal(pathcond.NeuronGroup, "mine", 8, self.incoming, self.outgoing)
        assert_says(message, "group 'mine': incoming is a sequence of Incidence")
        message = refusal(pathcond.Incidence, "a/w", 0, np.linspace(0, 1, 8))
        assert_says(message, "a/w", "float64", "integers are needed")


class TestChain:
    def test_unknown_layer(self, params):
        message = refusal(pathcond.chain_spec, params, ["Dense_0", "Dense_7"])
        assert_says(message, "no layer 'Dense_7'", "'params/Dense_0', 'params/Dense_1'")

    def test_ambiguous_layer(self, params):
        tree = {"left": params["params"], "right": params["params"]}
        message = refusal(pathcond.chain_spec, tree, ["Dense_0", "Dense_1"])
        assert_says(message, "'left/Dense_0', 'right/Dense_0'", "more of the path")
        assert pathcond.chain_spec(tree, ["left/Dense_0", "left/Dense_1"]).num_neurons == 8

    def test_order(self, params):
        message = refusal(pathcond.chain_spec, params, ["Dense_1", "Dense_0"])
        assert_says(message, "'Dense_1' has 6 outputs", "'Dense_0', 4 inputs", "forward order")
        assert_says(message, "params/Dense_1/kernel (8, 6)", "params/Dense_0/kernel (4, 8)")

    def test_layer_that_is_not_dense(self):
        tree = {"conv": {"kernel": jnp.ones((3, 3, 1, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
        message = refusal(pathcond.chain_spec, tree, ["conv", "head"])
        assert_says(message, "'conv' is not dense", "conv/kernel (3, 3, 1, 2)")

    def test_one_layer(self, params):
        message = refusal(pathcond.chain_spec, params, ["Dense_0"])
        assert_says(message, "two layers at least", "['Dense_0']")

    def test_name_instead_of_names(self, params):
        assert_says(
            refusal(pathcond.chain_spec, params, "Dense_0"), "sequence of names", "'Dense_0'"
        )


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"method": "newtn"}, ["'newtn'", "'newton'", "'coordinate'"]),
            ({"criterion": "pth"}, ["'pth'", "'path'"]),
            ({"max_steps": -1}, ["max_steps is -1", "negative"]),
            ({"tol": -1.0}, ["tol is -1.0", "negative"]),
            ({"max_log_scale": -2.0}, ["max_log_scale is -2.0", "negative"]),
            ({"initial": (jnp.zeros(8),)}, ["initial", "(8,)", "(6,)"]),
            ({"rounding": "nearest"}, ["'nearest'", "'power_of_two'"]),
        ],
    )
    def test_condition(self, params, spec, options, words):
        assert_says(refusal(pathcond.condition, params, spec, **options), *words)

    def test_unknown_option(self, params, spec):
        message = refusal(pathcond.condition, params, spec, max_step=3, error=TypeError)
        assert_says(message, "'max_step'")

    def test_order_of_the_path_norm(self, params, spec):
        assert_says(refusal(pathcond.path_norm, params, spec, order=3), "order is 1 or 2, not 3")

    @pytest.mark.parametrize(
        ("log_scales", "words"),
        [
            ((jnp.zeros(8),), ["1 arrays of log-scales for 2 groups"]),
            ((jnp.zeros(8), jnp.zeros(8)), ["group 'Dense_1' have shape (8,), not (6,)"]),
            (jnp.zeros((2, 8)), ["a tuple with one array per group"]),
            ({"Dense_0": jnp.zeros(8)}, ["a tuple with one array per group", "dict"]),
        ],
    )
    def test_log_scales(self, params, spec, log_scales, words):
        assert_says(refusal(pathcond.rescale, params, spec, log_scales), *words)

    def test_unknown_parameter(self, spec):
        for call in (spec.leaf, spec.group_of):
            assert_says(refusal(call, "Dense_0/kernel"), "'params/Dense_0/kernel'")


def test_a_refused_call_changes_nothing(params, spec):
    mine = jax.tree.map(np.array, params)
    kept = jax.tree.map(np.copy, mine)
    refusal(pathcond.condition, mine, spec, method="newtn")
    refusal(pathcond.rescale, mine, spec, (jnp.zeros(8),))
    jax.tree.map(np.testing.assert_array_equal, mine, kept)


@pytest.fixture(scope="module")
def condition(spec):
    return jax.jit(functools.partial(pathcond.condition, spec=spec))


class TestBadNumbers:
    """NaN or infinity among the parameters."""

    def spoilt(self, params, value, layer="Dense_1", leaf="kernel"):
        tree = jax.tree.map(np.array, params)
        tree["params"][layer][leaf].flat[0] = value
        # Multiplying by 1 would flush this one to 0.
        tree["params"]["Dense_0"]["bias"][1] = 1e-40
        return jax.tree.map(jnp.asarray, tree)

    def assert_untouched(self, before, after):
        for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert one.dtype == two.dtype
            assert np.asarray(one).tobytes() == np.asarray(two).tobytes()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize(
        ("layer", "leaf"),
        [("Dense_0", "kernel"), ("Dense_1", "bias"), ("Dense_2", "kernel"), ("Dense_2", "bias")],
    )
    def test_parameters_come_back(self, params, condition, value, layer, leaf):
        tree = self.spoilt(params, value, layer, leaf)
        conditioned, solution = condition(tree)
        assert pathcond.Status(int(solution.status)) is pathcond.Status.NON_FINITE
        assert not any(z.any() for z in solution.log_scales)
        self.assert_untouched(tree, conditioned)

    def test_without_jit(self, params, spec):
        tree = self.spoilt(params, np.nan)
        conditioned, solution = pathcond.condition(tree, spec)
        assert solution.status == pathcond.Status.NON_FINITE
        self.assert_untouched(tree, conditioned)

    def test_bfloat16(self, params, spec):
        tree = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), self.spoilt(params, np.inf))
        conditioned, solution = pathcond.condition(tree, spec)
        assert solution.status == pathcond.Status.NON_FINITE
        self.assert_untouched(tree, conditioned)

    def test_one_member_of_an_ensemble(self, params, condition):
        members = [params, self.spoilt(params, np.nan), self.spoilt(params, 2.0)]
        ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        together, solutions = jax.vmap(condition)(ensemble)
        status = [pathcond.Status(int(s)) for s in solutions.status]
        assert status[1] is pathcond.Status.NON_FINITE
        assert pathcond.Status.NON_FINITE not in (status[0], status[2])
        for k, member in enumerate(members):
            found = jax.tree.map(lambda leaf, k=k: leaf[k], together)
            if k == 1:
                self.assert_untouched(member, found)
                assert not any(z[k].any() for z in solutions.log_scales)
            else:
                alone, _ = condition(member)
                for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(found), strict=True):
                    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-38)
                assert max(float(abs(z[k]).max()) for z in solutions.log_scales) > 0.01

    def test_gram(self, params, spec):
        gram = pathcond.gram_diagonal(params, spec)
        for value in (np.nan, np.inf, -1.0):
            solution = pathcond.solve(self.spoilt(gram, value), spec)
            assert solution.status == pathcond.Status.NON_FINITE
            assert not any(z.any() for z in solution.log_scales)
