"""What figures 2 and 3 share: networks and ways to start them, and what is said about them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathcond_jax.experiments import comparing, models, published
from pathcond_jax.experiments.sizes import SIZES
from pathcond_jax.experiments.study import Context, Result

WIDTH, SEEDS = 6, 2


@pytest.fixture(scope="module")
def networks():
    """A small MLP without and with BatchNorm, and fresh parameters of each."""
    found = {}
    for normed in (False, True):
        model = models.AuthorsMLP(
            (WIDTH, WIDTH), hidden_bias=not normed, output_bias=normed, batch_norm=normed
        )
        network = published.network(model, model, "Dense_2", "digits", None, 64, 2, 32)
        keys = jax.random.split(jax.random.key(0), SEEDS)
        found[normed] = network, jax.vmap(network.problem.init_fn)(keys)
    return found


def test_the_networks_are_those_of_the_scripts(networks):
    plain, normed = (
        {leaf.path: leaf.shape for leaf in network.spec.leaves if leaf.trainable}
        for network, _ in networks.values()
    )
    assert set(plain) == {f"params/Dense_{k}/kernel" for k in range(3)} | {
        f"params/Dense_{k}/bias" for k in range(2)
    }
    assert set(normed) == {f"params/Dense_{k}/kernel" for k in range(3)} | {
        "params/Dense_2/bias",
        *(f"params/BatchNorm_{k}/{name}" for k in range(2) for name in ("scale", "bias")),
    }
    _, params = networks[False]
    for k, inputs in enumerate((64, WIDTH, WIDTH)):
        kernel = params["params"][f"Dense_{k}"]["kernel"]
        assert 0.8 * inputs**-0.5 < abs(kernel).max() <= inputs**-0.5


def test_convolutions_have_two_normalizations():
    model = models.FullyConvolutional((2, 3, 4), batch_norm=True)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    params = variables["params"]
    sizes = [params[f"Conv_{k}"]["kernel"].shape for k in range(9)]
    assert [s[0] for s in sizes] == [3] * 7 + [1] * 2
    assert [s[-1] for s in sizes] == [2] * 3 + [3] * 3 + [4] * 2 + [10]
    assert all("bias" in params[f"Conv_{k}"] for k in range(9))
    assert [params[f"BatchNorm_{k}"]["scale"].shape for k in range(2)] == [(2,), (3,)]
    assert "BatchNorm_2" not in params


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", [published.TEN_SWEEPS, published.OPTIMUM, published.ENORM])
def test_conditioning_keeps_the_function(networks, normed, name):
    network, params = networks[normed]
    start = published.WAYS[name].start(params, network)
    assert published.change(params, start.params, network.problem).max() < 1e-5
    assert start.log_scales["largest"].min() > 0.01


def test_as_published_changes_a_normalized_network_alone(networks):
    plain, normed = (
        published.change(params, published.as_published(params, network).params, network.problem)
        for network, params in networks.values()
    )
    assert plain.max() < 1e-5
    assert normed.min() > 0.1


@pytest.mark.parametrize("normed", [False, True])
def test_matched_norms_without_a_neuron_apart(networks, normed):
    network, params = networks[normed]
    rescaled = published.PUBLISHED if normed else published.OPTIMUM
    references = {
        published.MATCHED: rescaled,
        published.OUTPUT: rescaled,
        published.MATCHED_OPTIMUM: published.OPTIMUM,
    }
    for name, reference in references.items():
        wanted = published.WAYS[reference].start(params, network).params["params"]
        start = published.WAYS[name].start(params, network).params["params"]
        for layer in ("Dense_0", "Dense_1", "Dense_2"):
            old, new, target = (
                np.asarray(tree[layer]["kernel"]) for tree in (params["params"], start, wanted)
            )
            ratio = new / old
            np.testing.assert_allclose(ratio, ratio[:, :1, :1] + 0 * ratio, rtol=1e-5)
            expected = old if name == published.OUTPUT and layer != "Dense_2" else target
            norms = (np.linalg.norm(x, axis=(1, 2)) for x in (new, expected))
            np.testing.assert_allclose(*norms, rtol=1e-5)


def test_enorm_follows_every_step(networks):
    network, params = networks[False]
    way = published.WAYS[published.ENORM]
    params = jax.tree.map(lambda leaf: leaf[0], params)
    optimizer = way.optimizer(network)(jnp.float32(0.1))
    state = optimizer.init(params)
    still = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(optimizer.update)
    for _ in range(12):
        updates, state = update(still, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    layers = params["params"]
    incoming = jnp.sum(layers["Dense_0"]["kernel"] ** 2, axis=0) + layers["Dense_0"]["bias"] ** 2
    outgoing = jnp.sum(layers["Dense_1"]["kernel"] ** 2, axis=1)
    np.testing.assert_allclose(incoming, outgoing, rtol=1e-3)


def test_a_run_says_what_each_point_is(networks):
    network, _ = networks[True]
    settings = {"method": published.MATCHED, "learning_rates": [0.01, 0.1], "num_seeds": 2}
    with jax.numpy_dtype_promotion("standard"):
        values = published.run({**settings, "threshold": 0.5, "seed": 0}, Context(), network)
    curves = values["curves"]
    assert {part.shape for part in curves.values()} == {(2, 2, 2)}
    assert curves["epoch"][1, 1].tolist() == [1, 2]
    assert curves["learning_rate"][:, 0, 0].tolist() == [0.01, 0.1]
    assert curves["seed"][0, :, 0].tolist() == [0, 1]
    assert (curves["train_loss"][1, :, -1] < curves["train_loss"][0, :, -1]).all()


def test_speed_is_a_ratio_of_epochs():
    epochs = np.arange(1, 11)
    reference = 0.5 ** np.arange(1.0, 11.0)
    # Twice as fast: after five epochs as low as the reference after ten.
    twice = reference**2
    assert comparing.speed(epochs, twice, reference) == pytest.approx(2)
    assert comparing.speed(epochs, reference, twice) == pytest.approx(0.5)
    assert comparing.speed(epochs, reference, reference) == 1
    assert np.isnan(comparing.speed(epochs, twice * np.nan, reference))
    assert comparing.crossing(epochs, reference, 0.5**4.5) == pytest.approx(4.5)
    assert comparing.crossing(epochs, reference, 0.0) == np.inf


def test_the_rate_that_explains_a_loss():
    rates, losses = [0.01, 0.1, 1.0], np.array([1.0, 0.1, 0.2])
    assert comparing.equal_rate(rates, losses, 10**-0.5) == pytest.approx(10**-1.5)
    assert comparing.equal_rate(rates, losses, 2.0) == 0
    assert comparing.equal_rate(rates, losses, 0.05) == np.inf


def test_factors_have_intervals_of_logarithms():
    found = comparing.factor(np.array([1.0, 2.0, 4.0]))
    assert found.mean == pytest.approx(2)
    assert found.mean / found.low == pytest.approx(found.high / found.mean)
    assert str(comparing.factor(np.array([2.0, 2.0]))) == "2.00 (2.00–2.00)"
    assert str(comparing.factor(np.array([2.0, np.nan]))) == "–"


def _result(method, losses):
    losses = np.asarray(losses, float)
    curves = {
        "train_loss": losses,
        "train_accuracy": 1 - losses / 2,
        "test_accuracy": 1 - losses / 2,
        "epoch": np.broadcast_to(np.arange(1, losses.shape[-1] + 1), losses.shape),
    }
    values = {
        "curves": curves,
        "change": [0.0, 0.0],
        "norms": {"Dense_0/kernel": [1.0, 1.0]},
        "log_scales": {"largest": [0.0, 0.0]},
    }
    settings = {"network": "net", "method": method, "learning_rates": [0.1, 1.0]}
    return Result(method, {**settings, "num_epochs": 4, "threshold": 0.99}, values)


def test_report_says_where_a_method_is_faster():
    slow = 0.5 ** np.array([1.0, 2, 3, 4])
    reference = _result(published.NONE, [[slow, slow * 1.1]] * 2)
    faster = _result(published.OPTIMUM, [[slow**2, (slow * 1.1) ** 2], [slow, slow * 1.1]])
    report = comparing.report([reference, faster], "title")
    assert report.tables[0].title.startswith("title")
    rows = {table.title: {row[0]: row[1:] for row in table.rows} for table in report.tables}
    epochs = rows["net: epochs to 99% training accuracy, by seed"]
    assert epochs["none"] == ("> 4", "> 4")
    assert epochs["optimum"] == ("3, 3", "> 4")
    assert report.findings[0] == (
        "net, optimum against none: faster at the learning rates 0.1; no clear difference at 1."
    )
    ticks = [t.get_text() for t in report.figures[""].axes[0].get_yticklabels()]
    assert "> 4" in ticks


def test_every_way_can_be_chosen_on_the_command_line():
    assert SIZES["methods"].read(",".join(published.WAYS)) == list(published.WAYS)
