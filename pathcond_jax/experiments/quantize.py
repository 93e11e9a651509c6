"""Quantization: what rounding costs at each representative of a trained network.

Networks are trained here, or one is the user's; batch normalization is folded, and all
representatives are rounded alike. In the name of a scheme, t is one step size per kernel and c one
per output channel, W the bits of weights and A those of activations, whose ranges are static, per
tensor.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing, recipes, sources
from pathcond_jax.experiments.measuring import REPRESENTATIVES, SCHEMES, Subject, measurements
from pathcond_jax.experiments.own import Own
from pathcond_jax.experiments.study import (
    Context,
    Options,
    Report,
    Result,
    Table,
    Task,
    chosen_methods,
    chosen_networks,
)
from pathcond_jax.quantization import fold_batch_norm

SUMMARY = "what rounding to 8 to 2 bits costs at each representative of a trained network"
DATASETS = ("digits", "fashion_mnist")
# By data set; of a network that the user has trained, there are only representatives to draw.
SIZES: dict[str, dict[str, Any]] = {
    "digits": {"num_test": 400, "num_seeds": 3},
    "fashion_mnist": {"num_test": 2000, "num_seeds": 3},
    "": {"num_seeds": 1},
}
QUICK: dict[str, Any] = {
    "schemes": ["tW8A8", "tW3"],
    "methods": ["trained", "unlucky", "equalize", "noise tW", "noise tWA"],
    "num_seeds": 1,
}
QUICK_TRAINING: dict[str, Any] = {"networks": ["CNN"], "num_epochs": 8}
# Which variant is for a scheme.
OWN = dict.fromkeys(SCHEMES, "noise tW") | {"cW4A4": "noise cWA", "tW8A8": "noise tWA"}
# The bars of the criterion are for these.
BARS = ("tW4", "tW3", "cW4A4", "tW8A8")
OTHERS = ("trained", "equalize", "enorm")
# Of fewer, the largest activations say little about those of other examples: what exceeds them is
# clipped, at 8 bits with more noise than rounding has.
NUM_CALIBRATION = 256


def tasks(options: Options) -> list[Task]:
    """One task for each network and seed."""
    sizes = {"methods": list(REPRESENTATIVES), "schemes": list(SCHEMES)} | SIZES[options.dataset]
    sizes |= QUICK if options.quick else {}
    by_network = _of_own if "weights" in options.sizes else _of_training
    networks = by_network(options, sizes)
    return [
        Task(f"{name}, seed {seed}", {"network": name, "seed": options.seed + seed} | settings)
        for seed in range((sizes | {**options.sizes})["num_seeds"])
        for name, settings in networks.items()
    ]


def _of_own(options: Options, sizes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of the user's network."""
    return {options.sizes["weights"]: _settings(sizes | {**options.sizes})}


def _of_training(options: Options, sizes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each network that is trained."""
    sizes |= {"dataset": options.dataset, "subset": None, "networks": list(recipes.NETWORKS)}
    sizes |= QUICK_TRAINING if options.quick else {}
    sizes |= options.sizes
    return {
        name: {"num_epochs": recipes.NETWORKS[name].num_epochs[options.dataset]} | _settings(sizes)
        for name in chosen_networks(sizes["networks"], recipes.NETWORKS)
    }


def _settings(sizes: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on, beside the network and the seed."""
    chosen = chosen_methods(sizes["methods"], REPRESENTATIVES)
    grid = ("methods", "networks", "num_seeds")
    fixed = {"representatives": chosen, "num_calibration": NUM_CALIBRATION}
    return fixed | {k: v for k, v in sizes.items() if k not in grid}


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains one network, or takes the user's, and rounds every representative in every way."""
    # The products of some accelerators round more than a change of representative does.
    with jax.default_matmul_precision("highest"):
        if context.own is not None:
            measure, subject = context.own.measure, of_own(context.own, settings["seed"])
        else:
            measure, subject = "accuracy", _of_recipe(settings, context)
        context.advance(0.4)
        found = measurements(
            subject,
            settings["representatives"],
            settings["schemes"],
            settings["seed"],
            lambda part: context.advance(0.6 * part),
        )
    return {"measure": measure} | found


def of_own(own: Own, seed: int) -> Subject:
    """Some of the user's examples to calibrate on, and the others to measure on."""
    count = len(own.labels)
    order = np.random.default_rng(seed).permutation(count)
    few, rest = np.split(order, [min(NUM_CALIBRATION, count // 2)])
    inputs, calibration = (tuple(array[rows] for array in own.inputs) for rows in (rest, few))
    return Subject(own.apply_fn, own.params, own.spec, inputs, own.labels[rest], calibration)


def _of_recipe(settings: dict[str, Any], context: Context) -> Subject:
    """A network after training, and images that it was not trained on."""
    name, dataset = settings["network"], settings["dataset"]
    data = sources.load(dataset, context.data_dir, subset=settings["subset"])
    with jax.default_matmul_precision(None):
        params = recipes.trained(data, **{key: settings[key] for key in _TRAINING})
    images, labels = (
        jnp.asarray(part[: settings["num_test"]]) for part in (data.test_inputs, data.test_labels)
    )
    apply_fn = recipes.model(name, dataset).apply
    if "batch_stats" in params:
        apply_fn, params = fold_batch_norm(apply_fn, params, images[:1])
    # What is folded does not depend on values: one function serves all seeds.
    shared = _FOLDED.setdefault((name, dataset), apply_fn)
    rows = np.random.default_rng(settings["seed"]).permutation(len(data.train_labels))
    calibration = jnp.asarray(data.train_inputs[rows[: settings["num_calibration"]]])
    spec = _spec(name, shared, images[:1].shape, params)
    return Subject(shared, params, spec, [images], labels, [calibration])


_TRAINING = ("network", "dataset", "seed", "num_epochs")
_FOLDED: dict[tuple[str, str], Callable[..., Any]] = {}
_SPECS: dict[tuple[str, tuple[int, ...]], pathcond.ArchSpec] = {}


def _spec(
    name: str, apply_fn: Callable[..., Any], shape: tuple[int, ...], params: Any
) -> pathcond.ArchSpec:
    key = (name, shape)
    if key not in _SPECS:
        image = jax.ShapeDtypeStruct(shape, jnp.float32)
        _SPECS[key] = pathcond.trace_spec(apply_fn, params, image)
    return _SPECS[key]


def report(results: list[Result]) -> Report:
    """Accuracy and signal-to-noise ratio by representative and scheme, for each network."""
    networks = list(dict.fromkeys(result.settings["network"] for result in results))
    tables = [table for network in networks for table in _tables(_of(results, network), network)]
    findings = [
        _gain([_of(results, network) for network in networks], scheme)
        for scheme in BARS
        if all(_known(results, name, scheme) for name in (*OTHERS[:1], OWN[scheme]))
    ]
    for network in networks:
        findings += _left_out(_of(results, network), network)
    gaps = [
        abs(result.values[f"{name}, {scheme}, dB"] - result.values[key])
        for result in results
        for name in result.settings["representatives"]
        for scheme in ("tW8", "tW6", "tW8A8")
        if (key := f"{name}, {scheme}, predicted dB") in result.values and name != "unlucky"
    ]
    if gaps:
        findings.append(
            f"Predicted and measured noise at 8 and 6 bits differ by {np.mean(gaps):.1f} dB on "
            f"average, by {np.max(gaps):.1f} at most."
        )
    return Report(tables, {"": plot(results)}, findings)


def _tables(results: list[Result], network: str) -> list[Table]:
    """Accuracies and ratios of one network: means over seeds, and standard deviations."""
    schemes = results[0].settings["schemes"]
    names = [n for n in results[0].settings["representatives"] if _known(results, n, schemes[0])]
    count = f", {len(results)} seeds" if len(results) > 1 else ""
    measure, whole = results[0].values["measure"], _with_spread(results, "float", 100)
    titles = {
        ("accuracy", 100.0): f"{measure} in % (float {whole})",
        ("dB", 1.0): "signal to noise in dB",
        ("predicted dB", 1.0): "signal to noise in dB, predicted",
    }
    heads, tables = ("scales", *schemes), []
    for (what, unit), title in titles.items():
        keys = {name: [f"{name}, {scheme}, {what}" for scheme in schemes] for name in names}
        rows = [(n, *(_with_spread(results, key, unit) for key in keys[n])) for n in names]
        tables.append(Table(f"{network}{count}: {title}", heads, rows))
    return tables


def _with_spread(results: list[Result], key: str, unit: float) -> str:
    """The mean over seeds, and the standard deviation where there are several."""
    values = [unit * result.values[key] for result in results]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    spread = np.std(values, ddof=1)
    return f"{np.mean(values):.1f}±{spread:.{1 if spread < 10 else 0}f}"


def _of(results: list[Result], network: str) -> list[Result]:
    return [result for result in results if result.settings["network"] == network]


def _known(results: list[Result], name: str, scheme: str) -> bool:
    return all(f"{name}, {scheme}, dB" in result.values for result in results)


def _mean(results: list[Result], key: str) -> float:
    return float(np.mean([result.values[key] for result in results]))


def _gain(by_network: list[list[Result]], scheme: str) -> str:
    """What the criterion gains for its own scheme over the best of three others."""
    others = [name for name in OTHERS if all(_known(r, name, scheme) for r in by_network)]
    gains, ratios = (
        [_over_best(results, scheme, what, others) for results in by_network]
        for what in ("accuracy", "dB")
    )
    worst = f", {100 * np.min(gains):+.1f} points and {np.min(ratios):+.1f} dB at worst"
    return (
        f"{scheme}: {OWN[scheme]} against the best of {', '.join(others)}: "
        f"{100 * np.mean(gains):+.1f} points and {np.mean(ratios):+.1f} dB"
        f"{f' on average over networks{worst}' if len(by_network) > 1 else ''}."
    )


def _over_best(results: list[Result], scheme: str, what: str, others: list[str]) -> float:
    """The mean of the criterion for a scheme less the best of the means of others."""
    best = max(_mean(results, f"{name}, {scheme}, {what}") for name in others)
    return _mean(results, f"{OWN[scheme]}, {scheme}, {what}") - best


def _left_out(results: list[Result], network: str) -> list[str]:
    """A sentence where some criterion does not apply."""
    asked, first = (results[0].settings[name] for name in ("representatives", "schemes"))
    lacking = [name for name in asked if not _known(results, name, first[0])]
    return [f"{network}: no sum over paths, so without {', '.join(lacking)}."] if lacking else []


def plot(results: list[Result]) -> Figure:
    """Accuracy by bits of weights per tensor, one panel for each network."""
    networks = list(dict.fromkeys(result.settings["network"] for result in results))
    figure, axes = drawing.panels(1, len(networks))
    for panel, network in zip(axes[0], networks, strict=True):
        chosen = _of(results, network)
        schemes = [s for s in chosen[0].settings["schemes"] if "A" not in s] or ["tW8A8"]
        bits = [SCHEMES[scheme].weight_bits for scheme in schemes]
        for k, name in enumerate(REPRESENTATIVES):
            if not _known(chosen, name, schemes[0]):
                continue
            heights = [100 * _mean(chosen, f"{name}, {s}, accuracy") for s in schemes]
            panel.plot(
                bits, heights, marker=drawing.MARKERS[k], color=drawing.COLORS[k], label=name
            )
        measure = chosen[0].values["measure"]
        panel.set(title=network, xlabel="bits of weights, per tensor", ylabel=f"{measure}, %")
    drawing.legend_below(figure, axes[0], columns=4)
    return figure
