"""The spec as plain data: what it prints, what it answers, and what it is to JAX."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pathcond_jax as pathcond

HERE = "test_spec.py"
x = jnp.ones((2, 4))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x))
        x = nn.relu(nn.Dense(6, use_bias=False)(x))
        return nn.Dense(3)(x)


model = MLP()
shapes = jax.eval_shape(model.init, jax.random.key(0), x)


@pytest.fixture(scope="module")
def spec():
    return pathcond.trace_spec(model.apply, shapes, x)


def pin(spec, path, axis):
    (found,) = [p for p in spec.pinned if (p.path, p.axis) == (path, axis)]
    return found


class TestTable:
    def test_columns(self, spec):
        lines = str(spec).splitlines()
        assert lines[:5] == [
            "group    size  incoming [axis]                                   outgoing [axis]",
            "-------  ----  ------------------------------------------------  "
            "------------------------",
            "Dense_0  8     params/Dense_0/bias[0], params/Dense_0/kernel[1]  "
            "params/Dense_1/kernel[0]",
            "Dense_1  6     params/Dense_1/kernel[1]                          "
            "params/Dense_2/kernel[0]",
            "14 neurons in 2 groups; 109 trainable entries",
        ]
        assert repr(spec) == str(spec)

    def test_pinned(self, spec):
        _, _, below = str(spec).partition("\npinned:\n")
        assert below.splitlines() == [
            "  params/Dense_0/kernel[0]: the network's input is fixed",
            "  params/Dense_2/bias[0], params/Dense_2/kernel[1]: "
            "the network's output must not change",
        ]
        assert {(entry.path, entry.axis) for entry in spec.pinned} == {
            ("params/Dense_0/kernel", 0),
            ("params/Dense_2/kernel", 1),
            ("params/Dense_2/bias", 0),
        }

    def test_one_group(self):
        tree = {"a": {"w": jnp.ones((2, 3))}, "b": {"w": jnp.ones((3, 1))}}
        assert "3 neurons in 1 group; 9 trainable" in str(pathcond.chain_spec(tree, ["a", "b"]))

    def test_names_are_the_layers(self):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
                self.head = nnx.Linear(4, 2, rngs=rngs)

            def __call__(self, x):
                for block in self.blocks:
                    x = nnx.relu(block(x))
                return self.head(x)

        graphdef, state = nnx.split(Net(nnx.Rngs(0)))
        spec = pathcond.trace_spec(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
        assert [group.name for group in spec.groups] == ["blocks/0", "blocks/1"]


class TestPinned:
    def test_output(self, spec):
        found = pin(spec, "params/Dense_2/bias", 0)
        assert found.source == ""
        assert "output must not change" in found.reason

    def test_operation_and_line(self):
        def tanh_net(params, x):
            return jnp.tanh(x @ params["w"]) @ params["v"]

        params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}
        found = pin(pathcond.trace_spec(tanh_net, params, x), "w", 1)
        assert found.operation == "tanh"
        line = tanh_net.__code__.co_firstlineno + 1
        assert found.source.startswith(f"{HERE}:{line} (")
        assert "tanh_net" in found.source
        assert str(found) == f"w axis 1: {found.reason} at {found.source}"

    def test_function_that_the_operation_is_part_of(self):
        params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}
        spec = pathcond.trace_spec(lambda p, x: jax.nn.relu6(x @ p["w"]) @ p["v"], params, x)
        found = pin(spec, "w", 1)
        assert found.operation == "min in relu6"
        assert found.source.startswith(f"{HERE}:")

    def test_lines_are_the_users_not_the_librarys(self):
        network = eqx.nn.MLP(4, 2, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
        arrays, static = eqx.partition(network, eqx.is_array)

        def apply_fn(arrays, x):
            return jax.vmap(eqx.combine(arrays, static))(x)

        spec = pathcond.trace_spec(apply_fn, arrays, x)
        line = apply_fn.__code__.co_firstlineno + 1
        assert pin(spec, "layers/0/weight", 0).source.startswith(f"{HERE}:{line} (")

    def test_leaf_that_is_not_used(self):
        params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2)), "idle": jnp.ones(5)}
        spec = pathcond.trace_spec(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], params, x)
        assert spec.num_neurons == 3
        assert pin(spec, "idle", 0).operation == ""


class TestQuestions:
    def test_counts(self, spec):
        assert spec.num_neurons == 14
        assert spec.num_parameters == (4 * 8 + 8) + 8 * 6 + (6 * 3 + 3)

    def test_group_of(self, spec):
        first, second = spec.groups
        assert spec.group_of("params/Dense_0/kernel") == (first,)
        assert spec.group_of("params/Dense_0/bias") == (first,)
        assert spec.group_of("params/Dense_1/kernel") == (first, second)
        assert spec.group_of("params/Dense_2/bias") == ()

    def test_both_ways(self, spec):
        """Group to axes, and axes back to the group."""
        for group in spec.groups:
            for incidence in (*group.incoming, *group.outgoing):
                assert group in spec.group_of(incidence.path)
                leaf = spec.leaf(incidence.path)
                assert incidence.index.shape == tuple(leaf.shape[a] for a in incidence.axes)
                np.testing.assert_array_equal(incidence.index, np.arange(group.size))

    def test_leaf(self, spec):
        leaf = spec.leaf("params/Dense_1/kernel")
        assert (leaf.shape, leaf.dtype, leaf.size) == ((8, 6), jnp.float32, 48)
        assert leaf.trainable
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        assert [leaf.path for leaf in spec.leaves] == [
            jax.tree_util.keystr(path, simple=True, separator="/") for path in paths
        ]

    def test_data_cannot_be_changed(self, spec):
        incidence = spec.groups[0].incoming[0]
        with pytest.raises(ValueError, match="read-only"):
            incidence.index[0] = 1
        mine = np.arange(8)
        incidence = pathcond.Incidence("a", 0, mine)
        mine[0] = 5
        assert incidence.index[0] == 0
        with pytest.raises(AttributeError):
            spec.max_pool = "max"


class TestTrainable:
    @pytest.mark.parametrize(
        "trainable",
        [
            lambda path: "Dense_2" not in path,
            {"params": {"Dense_0": True, "Dense_1": True, "Dense_2": False}},
            {
                "params": {
                    "Dense_0": {"kernel": True, "bias": True},
                    "Dense_1": True,
                    "Dense_2": False,
                }
            },
        ],
    )
    def test_chosen(self, trainable):
        spec = pathcond.trace_spec(model.apply, shapes, x, trainable=trainable)
        assert spec.num_parameters == 4 * 8 + 8 + 8 * 6
        # Without trainable weights behind them, the second layer's units are no neurons.
        assert [group.name for group in spec.groups] == ["Dense_0"]

    def test_under_params_by_default(self):
        tree = {**shapes, "batch_stats": {"mean": jax.ShapeDtypeStruct((8,), jnp.float32)}}
        spec = pathcond.trace_spec(lambda p, x: model.apply({"params": p["params"]}, x), tree, x)
        assert not spec.leaf("batch_stats/mean").trainable
        assert spec.num_parameters == 109

    def test_everything_if_asked(self):
        tree = {**shapes, "extra": jax.ShapeDtypeStruct((5,), jnp.float32)}
        spec = pathcond.trace_spec(
            lambda p, x: model.apply({"params": p["params"]}, x), tree, x, trainable=True
        )
        assert spec.num_parameters == 114


class TestInJax:
    def test_identity(self, spec):
        other = pathcond.trace_spec(model.apply, shapes, x)
        assert spec == spec
        assert spec != other
        assert {spec: 1, other: 2}[spec] == 1

    def test_traces_of_one_network_share_their_symmetry(self, spec):
        other = pathcond.trace_spec(model.apply, shapes, x)
        assert other.symmetry is spec.symmetry is spec.symmetry.symmetry
        assert spec.symmetry.program is None
        first, *rest = spec.groups
        flipped = [
            dataclasses.replace(i, index=np.flip(i.index))
            for i in (*first.incoming, *first.outgoing)
        ]
        entering = len(first.incoming)
        first = dataclasses.replace(first, incoming=flipped[:entering], outgoing=flipped[entering:])
        permuted = dataclasses.replace(spec, groups=(first, *rest))
        assert permuted.symmetry is not spec.symmetry

    def test_static_argument(self, spec):
        traces = []

        @functools.partial(jax.jit, static_argnames="spec")
        def norm(params, spec):
            traces.append(spec)
            return pathcond.path_norm(params, spec)

        params = model.init(jax.random.key(0), x)
        norm(params, spec=spec)
        norm(jax.tree.map(lambda leaf: 2 * leaf, params), spec=spec)
        assert traces == [spec]
        norm(params, spec=pathcond.trace_spec(model.apply, shapes, x))
        assert len(traces) == 2

    def test_shapes_or_arrays(self, spec):
        params = model.init(jax.random.key(0), x)
        for other in (
            pathcond.trace_spec(model.apply, params, x),
            pathcond.trace_spec(model.apply, shapes, jax.ShapeDtypeStruct(x.shape, x.dtype)),
            pathcond.trace_spec(model.apply, jax.tree.map(np.asarray, params), np.asarray(x)),
        ):
            assert str(other) == str(spec)

    def test_within_a_transformation(self, spec):
        found = []

        @jax.jit
        def step(params):
            inner = pathcond.trace_spec(model.apply, params, x)
            found.append(inner)
            return pathcond.path_norm(params, inner)

        params = model.init(jax.random.key(0), x)
        np.testing.assert_allclose(step(params), pathcond.path_norm(params, spec), rtol=1e-6)
        assert [group.size for group in found[0].groups] == [8, 6]

    def test_promotion_is_the_users(self):
        params = {"w": jnp.ones((4, 3), jnp.bfloat16), "v": jnp.ones((3, 2))}

        def mixed(params, x):
            return jax.nn.relu(x * params["w"][:, 0][None]) @ (params["w"] + 1.0) @ params["v"]

        with pytest.raises(ValueError, match="promotion"):
            pathcond.trace_spec(mixed, params, x)
        with jax.numpy_dtype_promotion("standard"):
            assert pathcond.trace_spec(mixed, params, x).num_parameters == 18


def test_two_leaves_whose_paths_read_alike():
    params = {"a": {"b": jnp.ones((2, 3))}, "a/b": jnp.ones((3, 2))}
    with pytest.raises(
        pathcond.SpecError, match=r"read 'a/b', params\['a'\]\['b'\] and params\['a/b'\]"
    ):
        pathcond.trace_spec(lambda p, x: x @ p["a"]["b"] @ p["a/b"], params, jnp.ones((1, 2)))
