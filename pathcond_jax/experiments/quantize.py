"""Quantization: what rounding costs at each representative of a trained network.

Every network is trained, its batch normalization folded, and its representatives are rounded
alike. In the name of a scheme, t is one step size per kernel and c one per output channel, W the
bits of weights and A those of activations, whose ranges are static, per tensor.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing, recipes, sources, training
from pathcond_jax.experiments.data import Dataset
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
from pathcond_jax.quantization import (
    Scheme,
    Statistics,
    calibrate,
    fold_batch_norm,
    predicted_noise,
    quantization_noise,
    simulate,
)

SUMMARY = "what rounding to 8 to 2 bits costs at each representative of a trained network"
DATASETS = ("digits", "fashion_mnist")
SIZES: dict[str, dict[str, Any]] = {
    "digits": {"num_test": 400, "num_seeds": 3},
    "fashion_mnist": {"num_test": 2000, "num_seeds": 3},
}
SCHEMES = {
    "tW8": Scheme(8),
    "tW6": Scheme(6),
    "tW4": Scheme(4),
    "tW3": Scheme(3),
    "tW2": Scheme(2),
    "cW4A4": Scheme(4, 4, "channel"),
    "tW8A8": Scheme(8, 8),
}
# The schemes that the variants of the criterion are for.
NOISE = {"noise tW": Scheme(4), "noise tWA": Scheme(8, 8), "noise cWA": Scheme(4, 4, "channel")}
CRITERIA = ("equalize", "enorm", "path")
REPRESENTATIVES = ("trained", "unlucky", *CRITERIA, *NOISE)
# Which variant is for a scheme.
OWN = dict.fromkeys(SCHEMES, "noise tW") | {"cW4A4": "noise cWA", "tW8A8": "noise tWA"}
# The bars of the criterion are for these.
BARS = ("tW4", "tW3", "cW4A4", "tW8A8")
# Of log-scales that are drawn at random.
SPREADS = {"trained": 0.0, "unlucky": 1.0}
NUM_CALIBRATION, DRAWS = 32, 32
# Factors of all step sizes, over which accuracies and noises are averaged. Where entries fall
# between grid points is luck: at 4 bits the noise of one rounding is often off by 2 dB.
STRETCHES = tuple(1 + 0.05 * k for k in range(7))


def tasks(options: Options) -> list[Task]:
    """One task for each network and seed."""
    sizes = {
        "dataset": options.dataset,
        "subset": None,
        "networks": list(recipes.NETWORKS),
        "methods": list(REPRESENTATIVES),
        "schemes": list(SCHEMES),
        **SIZES[options.dataset],
    }
    if options.quick:
        sizes |= {"networks": ["CNN"], "schemes": ["tW8A8", "tW3"], "num_seeds": 1}
        sizes |= {"methods": ["trained", "unlucky", "equalize", "noise tW", "noise tWA"]}
        sizes |= {"num_epochs": 8}
    sizes |= options.sizes
    networks = chosen_networks(sizes.pop("networks"), recipes.NETWORKS)
    chosen = chosen_methods(sizes.pop("methods"), REPRESENTATIVES)
    seeds = range(options.seed, options.seed + sizes.pop("num_seeds"))
    return [
        Task(
            f"{name}, seed {seed - options.seed}",
            {"network": name, "seed": seed, "representatives": chosen}
            | {"num_epochs": recipes.NETWORKS[name].num_epochs[options.dataset]}
            | sizes,
        )
        for seed in seeds
        for name in networks
    ]


class Folded(NamedTuple):
    """A network without normalization, and how it is run.

    Attributes:
      apply_fn: the network.
      params: trained.
      spec: of both.
    """

    apply_fn: Callable[..., Any]
    params: Any
    spec: pathcond.ArchSpec


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains one network, and rounds every representative in every way."""
    data = sources.load(settings["dataset"], context.data_dir, subset=settings["subset"])
    trained = recipes.trained(data, **{key: settings[key] for key in _TRAINING})
    context.advance(0.4)
    # The products of some accelerators round more than a change of representative does.
    with jax.default_matmul_precision("highest"):
        return _measurements(data, trained, settings, context)


_TRAINING = ("network", "dataset", "seed", "num_epochs")


def _measurements(
    data: Dataset, trained: Any, settings: dict[str, Any], context: Context
) -> dict[str, Any]:
    """Accuracies and noises of all representatives of a trained network."""
    images, labels = (
        jnp.asarray(part[: settings["num_test"]]) for part in (data.test_inputs, data.test_labels)
    )
    folded = _folded(trained, images[:1], settings["network"], settings["dataset"])
    rng = np.random.default_rng(settings["seed"])
    rows = rng.permutation(len(data.train_labels))[:NUM_CALIBRATION]
    batches = [jnp.asarray(data.train_inputs[rows])]
    trained_statistics = calibrate(
        folded.apply_fn, folded.params, folded.spec, batches, draws=DRAWS
    )
    logits = _logits(folded.apply_fn, folded.params, images)
    values: dict[str, Any] = {"float": float(training.accuracy(logits, labels))}
    for name in settings["representatives"]:
        log_scales = _log_scales(name, folded, trained_statistics, settings["seed"])
        if log_scales is None:
            continue
        params, statistics = _moved(folded.spec, folded.params, trained_statistics, log_scales)
        error = jnp.linalg.norm(_logits(folded.apply_fn, params, images) - logits)
        values[f"{name}, changed"] = float(error / jnp.linalg.norm(logits))
        for scheme in settings["schemes"]:
            right, ratio = _measured(folded, scheme, params, statistics, images, labels, logits)
            noise = _predicted(folded.spec, scheme, params, statistics)
            values[f"{name}, {scheme}, accuracy"] = right
            values[f"{name}, {scheme}, dB"] = ratio
            values[f"{name}, {scheme}, predicted dB"] = float(noise)
        context.advance(0.6 / len(settings["representatives"]))
    return values


def report(results: list[Result]) -> Report:
    """Accuracy and signal-to-noise ratio by representative and scheme, for each network."""
    tables, findings = [], []
    networks = list(dict.fromkeys(result.settings["network"] for result in results))
    for network in networks:
        chosen = [result for result in results if result.settings["network"] == network]
        schemes = chosen[0].settings["schemes"]
        rows = [
            (name, *(_cell(chosen, name, scheme) for scheme in schemes))
            for name in chosen[0].settings["representatives"]
            if f"{name}, changed" in chosen[0].values
        ]
        whole = 100 * np.mean([result.values["float"] for result in chosen])
        title = f"{network}: accuracy in % / signal to noise in dB (float {whole:.1f})"
        tables.append(Table(title, ("representative", *schemes), rows))
    for scheme in (s for s in BARS if s in results[0].settings["schemes"]):
        findings.append(_gain(results, networks, scheme))
    gaps = [
        abs(result.values[f"{name}, {scheme}, dB"] - result.values[key])
        for result in results
        for name in result.settings["representatives"]
        for scheme in ("tW8", "tW6", "tW8A8")
        if (key := f"{name}, {scheme}, predicted dB") in result.values and name != "unlucky"
    ]
    findings.append(
        f"Predicted and measured noise at 8 and 6 bits differ by {np.mean(gaps):.1f} dB on "
        f"average, by {np.max(gaps):.1f} at most."
    )
    return Report(tables, {"": plot(results)}, findings)


def plot(results: list[Result]) -> Figure:
    """Accuracy by bits of weights per tensor, one panel for each network."""
    networks = list(dict.fromkeys(result.settings["network"] for result in results))
    figure, axes = drawing.panels(1, len(networks))
    for panel, network in zip(axes[0], networks, strict=True):
        chosen = [result for result in results if result.settings["network"] == network]
        schemes = [s for s in chosen[0].settings["schemes"] if "A" not in s] or ["tW8A8"]
        bits = [SCHEMES[scheme].weight_bits for scheme in schemes]
        for k, name in enumerate(REPRESENTATIVES):
            if f"{name}, changed" not in chosen[0].values:
                continue
            heights = [100 * _mean(chosen, f"{name}, {s}, accuracy") for s in schemes]
            panel.plot(
                bits, heights, marker=drawing.MARKERS[k], color=drawing.COLORS[k], label=name
            )
        panel.set(title=network, xlabel="bits of weights, per tensor", ylabel="accuracy, %")
    drawing.legend_below(figure, axes[0], columns=4)
    return figure


def _mean(results: list[Result], key: str) -> float:
    return float(np.mean([result.values[key] for result in results]))


def _cell(results: list[Result], name: str, scheme: str) -> str:
    right, ratio = (_mean(results, f"{name}, {scheme}, {what}") for what in ("accuracy", "dB"))
    return f"{100 * right:.1f}/{ratio:.1f}"


def _gain(results: list[Result], networks: list[str], scheme: str) -> str:
    """What the criterion gains for its own scheme over the best of three others."""
    by_network = [[r for r in results if r.settings["network"] == name] for name in networks]
    gains, ratios = (
        [_over_best(chosen, scheme, what) for chosen in by_network] for what in ("accuracy", "dB")
    )
    return (
        f"{scheme}: {OWN[scheme]} against the best of trained, equalize and enorm: "
        f"{100 * np.mean(gains):+.1f} points and {np.mean(ratios):+.1f} dB on average over "
        f"networks, {100 * np.min(gains):+.1f} points and {np.min(ratios):+.1f} dB at worst."
    )


def _over_best(results: list[Result], scheme: str, what: str) -> float:
    """The mean of the criterion for a scheme less the best of the other means."""
    found = {
        name: _mean(results, key)
        for name in ("trained", "equalize", "enorm", OWN[scheme])
        if (key := f"{name}, {scheme}, {what}") in results[0].values
    }
    own = found.pop(OWN[scheme], np.nan)
    return own - max(found.values())


def _log_scales(
    name: str, folded: Folded, statistics: Statistics, seed: int
) -> pathcond.LogScales | None:
    """Those of a representative; None where the criterion does not apply."""
    params, spec = folded.params, folded.spec
    if name in SPREADS:
        rng = np.random.default_rng(seed)
        draws = (rng.normal(scale=SPREADS[name], size=g.size) for g in spec.groups)
        return tuple(jnp.asarray(z, jnp.float32) for z in draws)
    criterion: Any = name
    if name in NOISE:
        criterion = quantization_noise(statistics, NOISE[name])
    try:
        return pathcond.condition(params, spec, criterion)[1].log_scales
    except pathcond.NotPathLiftableError:
        return None


@functools.partial(jax.jit, static_argnums=0)
def _moved(
    spec: pathcond.ArchSpec, params: Any, statistics: Statistics, log_scales: pathcond.LogScales
) -> tuple[Any, Statistics]:
    """Another representative and its statistics, for which no data is needed."""
    return pathcond.rescale(params, spec, log_scales), statistics.rescaled(spec, log_scales)


def _measured(
    folded: Folded,
    scheme: str,
    params: Any,
    statistics: Statistics,
    images: jax.Array,
    labels: jax.Array,
    logits: jax.Array,
) -> tuple[float, float]:
    """Accuracy, and the power of the logits over that of their errors in dB, over stretches."""
    rights, noises = [], []
    for stretch in STRETCHES:
        rounded = _rounded(
            folded.apply_fn, folded.spec, scheme, params, statistics, images, jnp.float32(stretch)
        )
        rights.append(float(jnp.mean(jnp.argmax(rounded, -1) == labels)))
        # A step that is stretched makes its square as much larger.
        noises.append(float(jnp.square(rounded - logits).sum()) / stretch**2)
    power = float(jnp.square(logits).sum())
    return float(np.mean(rights)), 10 * float(np.log10(power / np.mean(noises)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply_fn: Callable[..., Any], params: Any, images: jax.Array) -> jax.Array:
    outputs: jax.Array = apply_fn(params, images)
    return outputs


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predicted(
    spec: pathcond.ArchSpec, scheme: str, params: Any, statistics: Statistics
) -> jax.Array:
    return predicted_noise(params, spec, statistics, SCHEMES[scheme]).decibel


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rounded(
    apply_fn: Callable[..., Any],
    spec: pathcond.ArchSpec,
    scheme: str,
    params: Any,
    statistics: Statistics,
    images: jax.Array,
    stretch: jax.Array,
) -> jax.Array:
    run = simulate(apply_fn, spec, statistics, SCHEMES[scheme], stretch=stretch)
    outputs: jax.Array = run(params, images)
    return outputs


def _folded(trained: Any, image: jax.Array, network: str, dataset: str) -> Folded:
    apply_fn, params = recipes.model(network, dataset).apply, trained
    if "batch_stats" in trained:
        apply_fn, params = fold_batch_norm(apply_fn, trained, image)
    # What is folded does not depend on values: one function serves all seeds.
    shared = _FOLDED.setdefault((network, dataset), apply_fn)
    return Folded(shared, params, _spec(network, shared, image.shape, params))


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
