"""Pruning: what is cut by magnitude depends on the representative, by path norm it does not."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing, models, sources, training
from pathcond_jax.experiments.measuring import logits_of
from pathcond_jax.experiments.own import Own
from pathcond_jax.experiments.study import (
    Context,
    Options,
    Report,
    Result,
    Table,
    Task,
    mean_interval,
)
from pathcond_jax.quantization import PruningWarning, magnitude_saliency, path_saliency, prune

SUMMARY = "pruning by magnitude depends on the representative, by path norm it does not"
DATASETS = ("digits", "fashion_mnist")

NETWORKS = {
    "MLP": models.MLP((128, 128, 128)),
    "CNN": models.CNN((16, 32, 32)),
}
ORDERS = (1, 2)
# Log-scales of the unlucky representative have this standard deviation.
UNLUCKY = 1.0


def tasks(options: Options) -> list[Task]:
    """One task for each network and seed."""
    sparsities, seeds, epochs, steps = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98], 3, 60, 20
    if options.dataset == "fashion_mnist":
        epochs = 6
    if options.quick:
        sparsities, seeds, epochs, steps = [0.5, 0.8, 0.95], 1, 10, 3
    networks = {name: {"dataset": options.dataset, "num_epochs": epochs} for name in NETWORKS}
    if "weights" in options.sizes:
        # Only what is unlucky would differ from seed to seed.
        networks, seeds = {options.sizes["weights"]: dict(options.sizes)}, 1
    return [
        Task(
            f"{name}, seed {seed}",
            {"network": name, "seed": options.seed + seed, **settings}
            | {"sparsities": sparsities, "steps": steps},
        )
        for name, settings in networks.items()
        for seed in range(seeds)
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Prunes a network in every way: accuracies without any training afterwards."""
    network = context.own or _trained(settings, context)
    context.advance(0.5)
    ways = _ways(network, settings)
    found = {
        name: [
            _right(network, _pruned(tree, network.spec, sparsity, options))
            for sparsity in settings["sparsities"]
        ]
        for name, (tree, options) in ways.items()
    }
    return {"measure": network.measure, "float": _right(network, network.params)} | {
        name: np.array(row, float) for name, row in found.items()
    }


def report(results: list[Result]) -> Report:
    """Mean accuracies by network, way and sparsity; the spread over representatives."""
    tables, findings = [], []
    for network, sparsities, rows in _by_network(results):
        heads = ("way to prune", *(f"{100 * s:g} %" for s in sparsities))
        shown = [
            (name, *(f"{100 * v:.1f}" for v in values.mean(axis=1)))
            for name, values in rows.items()
        ]
        chosen = [r.values for r in results if r.settings["network"] == network]
        measure, whole = chosen[0]["measure"], np.mean([values["float"] for values in chosen])
        title = f"{network}: {measure} in % by sparsity (unpruned {100 * whole:.1f})"
        tables.append(Table(title, heads, shown))
        magnitudes = [v.mean(axis=1) for name, v in rows.items() if name.startswith("magnitude")]
        gap = np.ptp(magnitudes, axis=0).max()
        findings.append(
            f"{network}: by magnitude, representatives of one function differ by up to "
            f"{100 * gap:.0f} points; {_by_path_norm(rows)}."
        )
    return Report(tables, {"": plot(results)}, findings)


def plot(results: list[Result]) -> Figure:
    """Accuracy by sparsity, one panel for each network."""
    found = list(_by_network(results))
    figure, axes = drawing.panels(1, len(found))
    for panel, (network, sparsities, rows) in zip(axes[0], found, strict=True):
        drawn = {name: values for name, values in rows.items() if not name.endswith("from unlucky")}
        for k, (name, values) in enumerate(drawn.items()):
            mean, _ = mean_interval(values)
            style = ":" if name.startswith("path") else "-"
            panel.plot(
                100 * np.array(sparsities),
                100 * mean,
                style,
                marker=drawing.MARKERS[k],
                color=drawing.COLORS[k],
                label=name,
            )
        measure = results[0].values["measure"]
        panel.set(title=network, xlabel="weights cut, %", ylabel=f"{measure}, %")
    drawing.legend_below(figure, axes[0], columns=4)
    return figure


def _ways(network: Own, settings: dict[str, Any]) -> dict[str, Any]:
    """From the name of each way to prune to the parameters it starts from and its options."""
    params, spec = network.params, network.spec
    rng = np.random.default_rng(settings["seed"])
    scales = tuple(
        jnp.asarray(rng.normal(scale=UNLUCKY, size=g.size), jnp.float32) for g in spec.groups
    )
    unlucky = pathcond.rescale(params, spec, scales)
    trees = {"trained": params, "unlucky": unlucky}
    trees |= {name: pathcond.condition(unlucky, spec, name)[0] for name in ("enorm", "equalize")}
    try:
        trees["path"] = pathcond.condition(unlucky, spec, "path")[0]
        orders: tuple[int, ...] = ORDERS
    except pathcond.NotPathLiftableError:
        orders = ()
    by_magnitude = {
        f"magnitude, {name}": (tree, {"saliency": magnitude_saliency})
        for name, tree in trees.items()
    }
    by_paths = {
        f"path {order}, {count} step{'s' * (count > 1)}{suffix}": (
            tree,
            {"saliency": functools.partial(path_saliency, order=order), "steps": count},
        )
        for order in orders
        for count in (1, settings["steps"])
        for suffix, tree in (("", params), (", from unlucky", unlucky))
    }
    return by_magnitude | by_paths


def _pruned(params: Any, spec: pathcond.ArchSpec, sparsity: float, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        # That a layer is lost shows in the accuracy.
        warnings.simplefilter("ignore", PruningWarning)
        masks = prune(params, spec, sparsity, **options)
    return jax.tree.map(lambda value, kept: jnp.where(kept, value, 0), params, masks)


def _trained(settings: dict[str, Any], context: Context) -> Own:
    """A network after training."""
    data = sources.load(settings["dataset"], context.data_dir)
    model, key = NETWORKS[settings["network"]], jax.random.key(settings["seed"])
    image = data.test_inputs[:1]
    trained, _ = training.train(
        model.apply,
        _optimizer,
        data,
        jax.tree.map(lambda leaf: leaf[None], model.init(key, image)),
        key[None],
        jnp.array([1e-3]),
        num_epochs=settings["num_epochs"],
        batch_size=128,
        epochs_per_call=settings["num_epochs"],
    )
    params = jax.tree.map(lambda leaf: leaf[0], trained)
    spec = pathcond.trace_spec(model.apply, params, image)
    return Own(model.apply, params, spec, (data.test_inputs,), data.test_labels, "accuracy")


def _optimizer(learning_rate: jax.Array) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, weight_decay=1e-2)


def _right(network: Own, params: Any) -> float:
    logits = logits_of(network.apply_fn, params, network.inputs)
    return float(training.accuracy(logits, network.labels))


def _by_network(results: list[Result]) -> Any:
    """Of each network its name, the sparsities, and (sparsities, seeds) accuracies by way."""
    for network in dict.fromkeys(result.settings["network"] for result in results):
        chosen = [result for result in results if result.settings["network"] == network]
        names = [name for name in chosen[0].values if name not in ("float", "measure")]
        rows = {name: np.array([r.values[name] for r in chosen]).T for name in names}
        yield network, chosen[0].settings["sparsities"], rows


def _by_path_norm(rows: dict[str, np.ndarray]) -> str:
    """How far the representatives of a function differ by path norm."""
    gaps = [
        np.abs(values - rows[f"{name}, from unlucky"]).max()
        for name, values in rows.items()
        if f"{name}, from unlucky" in rows
    ]
    if not gaps:
        return "it is no sum over paths, so there is no path norm to prune by"
    return f"by path norm, by {100 * max(gaps):.1f}"
