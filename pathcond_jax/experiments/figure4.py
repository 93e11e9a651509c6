"""Figure 4 of the paper: the more the widths differ, the more conditioning rescales.

Why: Proposition 5.1. With zero biases and independent weights of variance σ_l² in layer l, the
expectation of the Gram diagonal at a weight of layer l is (paths through it) × Π_{k≠l} σ_k². Where
widths and variances are equal, the diagonal is flat already and there is little to rescale.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing
from pathcond_jax.experiments.study import (
    Context,
    Options,
    Report,
    Result,
    Table,
    Task,
    mean_interval,
    with_interval,
)

SUMMARY = "unequal widths and the size of the log-scales"
DATASETS: tuple[str, ...] = ()

DEVIATIONS = {"small": 0.02, "large": 0.5}
RATIOS = (1, 2, 4, 8, 16, 32)
PROPOSITION = {"widths": [4, 6, 3, 5, 2], "deviations": [0.7, 1.0, 1.4, 0.5]}


class Layer(NamedTuple):
    """A dense layer: kernel (in, out); bias (out,), None on the last layer."""

    kernel: jax.Array
    bias: jax.Array | None


def tasks(options: Options) -> list[Task]:
    """A task for each width ratio, and one for the proposition."""
    width, layers, seeds, draws = (32, 3, 3, 1000) if options.quick else (128, 5, 10, 10000)
    grid = [
        Task(
            f"ratio {ratio}",
            {
                "ratio": ratio,
                "width": width,
                "hidden_layers": layers,
                "deviations": DEVIATIONS,
                "seeds": seeds,
                "seed": options.seed,
            },
        )
        for ratio in (RATIOS[::2] if options.quick else RATIOS)
    ]
    proposition = {**PROPOSITION, "seeds": draws, "seed": options.seed}
    return [*grid, Task("Proposition 5.1", proposition)]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Conditions random networks, or averages their Gram diagonals."""
    keys = jax.random.split(jax.random.key(settings["seed"]), settings["seeds"])
    if "ratio" not in settings:
        return check_proposition(settings["widths"], settings["deviations"], keys)
    widths = alternating_widths(settings["width"], settings["ratio"], settings["hidden_layers"])
    return log_scale_sizes(widths, settings["deviations"], keys)


def report(results: list[Result]) -> Report:
    """Sizes of the log-scales by ratio; expected and measured Gram diagonals by layer."""
    *grid, proposition = results
    rows = [
        (
            f"{name}, σ = {deviation:g}",
            str(result.settings["ratio"]),
            *(with_interval(result.values[name][key]) for key in ("mean", "largest", "score")),
        )
        for name, deviation in DEVIATIONS.items()
        for result in grid
    ]
    sizes = Table(
        f"Figure 4: mean ± 95 % over {grid[0].settings['seeds']} seeds",
        ("variance", "width\nratio", "mean |log λ|", "largest |log λ|", "score before"),
        rows,
    )
    values = proposition.values
    layers = Table(
        f"Proposition 5.1: E g in {'-'.join(map(str, proposition.settings['widths']))}, "
        f"{proposition.settings['seeds']} seeds",
        ("entries", "expected", "measured", "standard\nerror", "off by\n(errors)"),
        [
            (name, f"{e:.4g}", f"{m:.4g}", f"{s:.2g}", f"{(m - e) / s:+.1f}")
            for name, e, m, s in zip(
                values["names"],
                values["expected"],
                values["measured"],
                values["standard_error"],
                strict=True,
            )
        ],
    )
    return Report([sizes, layers], {"": plot(grid, proposition)})


def alternating_widths(width: int, ratio: int, hidden_layers: int) -> list[int]:
    """Widths from input to output: ``width`` and ``width // ratio`` in turn."""
    return [width if layer % 2 == 0 else width // ratio for layer in range(hidden_layers + 2)]


def init(key: jax.Array, widths: Sequence[int], deviations: Sequence[Any]) -> list[Layer]:
    """Normal weights with a standard deviation for each layer; biases zero, none at the end."""
    keys = jax.random.split(key, len(widths) - 1)
    kernels = [
        deviation * jax.random.normal(k, (fan_in, fan_out))
        for k, deviation, fan_in, fan_out in zip(
            keys, deviations, widths[:-1], widths[1:], strict=True
        )
    ]
    biases = [jnp.zeros(fan_out) for fan_out in widths[1:-1]] + [None]
    return [Layer(*layer) for layer in zip(kernels, biases, strict=True)]


def network(params: list[Layer], x: jax.Array) -> jax.Array:
    """Dense layers (batch, widths[0]) to (batch, widths[-1]), ReLU between them."""
    *hidden, last = params
    for kernel, bias in hidden:
        assert bias is not None
        x = jax.nn.relu(x @ kernel + bias[None])
    return x @ last.kernel


def trace(widths: Sequence[int]) -> pathcond.ArchSpec:
    """The spec of :func:`network`."""
    deviations = [1.0] * (len(widths) - 1)
    params = jax.eval_shape(lambda key: init(key, widths, deviations), jax.random.key(0))
    return pathcond.trace_spec(network, params, jax.ShapeDtypeStruct((1, widths[0]), jnp.float32))


def expected_gram(widths: Sequence[int], deviations: Sequence[float]) -> list[Layer]:
    """Proposition 5.1, and the same for biases: one expectation for each leaf, scalars.

    The paths through a weight of layer l take any neuron of every layer but its two ends; the
    paths through a bias start there.
    """
    paths, variances = np.asarray(widths, float), np.square(deviations)
    layers = []
    for layer in range(len(widths) - 1):
        others = np.prod(paths[:layer]) * np.prod(paths[layer + 2 :])
        behind = np.prod(variances[layer + 1 :])
        weight = others * np.prod(variances[:layer]) * behind
        last = layer == len(widths) - 2
        layers.append(Layer(weight, None if last else np.prod(paths[layer + 2 :]) * behind))
    return layers


def check_proposition(
    widths: Sequence[int], deviations: Sequence[float], keys: jax.Array
) -> dict[str, Any]:
    """Means over seeds and over the entries of each leaf, beside their expectations."""
    spec = trace(widths)

    @jax.jit
    @jax.vmap
    def leaf_means(key: jax.Array) -> list[Layer]:
        gram = pathcond.gram_diagonal(init(key, widths, deviations), spec)
        return jax.tree.map(jnp.mean, gram)

    # Entries of one network depend on each other, so only its mean counts as one observation.
    means = np.array(jax.tree.leaves(jax.device_get(leaf_means(keys))), np.float64)
    names = [leaf.path.replace("kernel", "weight") for leaf in spec.leaves]
    return {
        "names": [_layer_name(name) for name in names],
        "expected": np.array(jax.tree.leaves(expected_gram(widths, deviations))),
        "measured": means.mean(axis=1),
        "standard_error": means.std(axis=1, ddof=1) / np.sqrt(len(keys)),
    }


def log_scale_sizes(
    widths: Sequence[int], deviations: Mapping[str, float], keys: jax.Array
) -> dict[str, Any]:
    """For each deviation, sizes of the log-scales of networks of each key: arrays (seeds,)."""
    spec = trace(widths)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def sizes(key: jax.Array, deviation: jax.Array) -> dict[str, jax.Array]:
        params = init(key, widths, [deviation] * (len(widths) - 1))
        _, solution = pathcond.condition(params, spec)
        z = jnp.abs(jnp.concatenate(solution.log_scales))
        score = pathcond.conditioning_score(params, spec)
        return {"mean": z.mean(), "largest": z.max(), "score": score, "status": solution.status}

    return {name: sizes(keys, jnp.float32(value)) for name, value in deviations.items()}


def plot(grid: list[Result], proposition: Result) -> Figure:
    """Sizes of the log-scales against the ratio; measured over expected by layer."""
    figure, axes = drawing.panels(1, 3)
    mean, largest, checked = axes[0]
    for number, (variance, deviation) in enumerate(DEVIATIONS.items()):
        ratios = [r.settings["ratio"] for r in grid]
        for panel, name in ((mean, "mean"), (largest, "largest")):
            middle, half = mean_interval([r.values[variance][name] for r in grid])
            panel.errorbar(
                ratios,
                middle,
                half,
                marker=drawing.MARKERS[number],
                color=drawing.COLORS[2 + number],
                capsize=2,
                label=f"{variance} variance (σ = {deviation:g})",
            )
    for panel, name in ((mean, "mean"), (largest, "largest")):
        panel.set(xlabel="ratio of neighbouring widths", ylabel=f"{name} |log λ|", ylim=(0, None))
        panel.set_xscale("log", base=2)
        panel.set_xticks(RATIOS, map(str, RATIOS))
        panel.minorticks_off()
    values = {k: v for k, v in proposition.values.items() if k != "names"}
    expected, measured, error = (
        np.asarray(values[k]) for k in ("expected", "measured", "standard_error")
    )
    places = np.arange(len(expected))
    checked.axhline(1, color="0.6", linewidth=0.8)
    checked.errorbar(
        places,
        measured / expected,
        3 * error / expected,
        fmt="o",
        color=drawing.COLORS[3],
        capsize=2,
        label="measured / expected, ± 3 standard errors",
    )
    checked.set_xticks(places, proposition.values["names"], rotation=40, ha="right", fontsize=8)
    checked.set(ylabel="mean of g / Proposition 5.1")
    drawing.legend_below(figure, [mean, checked])
    return figure


def _layer_name(path: str) -> str:
    layer, _, what = path.partition("/")
    return f"{what} {int(layer) + 1}"
