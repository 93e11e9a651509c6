"""Condensation: fifty tanh neurons gather on one line before they learn anything else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing
from pathcond_jax.experiments.study import Context, Options, Report, Result, Table, Task

SUMMARY = "condensation: neurons that gather on few directions, as predicted"
DATASETS: tuple[str, ...] = ()

WIDTH, LEARNING_RATE = 50, 0.01
STEPS = (0, 50, 100, 150, 200, 300, 500, 1000)


def tasks(options: Options) -> list[Task]:
    """One task for each scale of the initialization."""
    scales = (5e-3, 5e-5) if options.quick else (5e-2, 5e-3, 5e-4, 5e-5)
    return [Task(f"scale {scale:g}", {"scale": scale, "seed": options.seed}) for scale in scales]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains on a sum of sines; compares directions with the prediction at some steps."""
    rng = np.random.default_rng(settings["seed"])
    x = rng.uniform(-4, 2, (80, 5)).astype(np.float32)
    y = (3.5 * np.sin(5 * x + 1).sum(axis=1)).astype(np.float32)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(settings["scale"] * rng.normal(size=shape), jnp.float32)

    params = {
        "hidden": {"kernel": draw(5, WIDTH), "bias": draw(WIDTH)},
        "output": {"kernel": draw(WIDTH, 1)},
    }
    # tanh has no rescaling symmetry; a chain describes its neurons all the same.
    spec = pathcond.chain_spec(params, ["hidden", "output"])
    direction = pathcond.condensation_directions(x, y)[0]
    inner = np.vstack([params["hidden"]["kernel"], params["hidden"]["bias"]])
    side = np.sign(np.asarray(params["output"]["kernel"])[:, 0] + direction @ inner)

    def loss(params: Any) -> jax.Array:
        hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        return 0.5 * jnp.mean(jnp.square((hidden @ params["output"]["kernel"])[:, 0] - y))

    def step(_: Any, params: Any) -> Any:
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, jax.grad(loss)(params))

    advance = jax.jit(lambda params, count: jax.lax.fori_loop(0, count, step, params))
    rows: dict[str, list[Any]] = {"loss": [], "cosines": [], "right": [], "groups": [], "top": []}
    matrices, done = [], 0
    order = np.argsort(side)
    for mark in STEPS:
        params = advance(params, mark - done)
        done = mark
        u = np.asarray(pathcond.neuron_orientations(params, spec)[0])
        shares = np.linalg.eigvalsh(u @ u.T)
        cosines = u @ direction
        labels = pathcond.condensed_groups(params, spec, tol=0.3)[0]
        rows["loss"].append(float(loss(params)))
        rows["cosines"].append(cosines)
        rows["right"].append(float(np.mean(np.sign(cosines) == side)))
        rows["groups"].append(int(labels.max()) + 1)
        rows["top"].append(float(shares[-1] / shares.sum()))
        matrices.append((u @ u.T)[order][:, order])
        context.advance(0.9 / len(STEPS))
    return {**rows, "cosines": np.array(rows["cosines"]), "matrices": np.array(matrices)}


def report(results: list[Result]) -> Report:
    """Agreement with the prediction over time."""
    heads = ("scale", "step", "loss", "right\nsign", "mean\n|cosine|", "top\neigenvalue", "groups")
    rows = []
    for result in results:
        values = result.values
        for k, step in enumerate(STEPS):
            rows.append(
                (
                    f"{result.settings['scale']:g}" if k == 0 else "",
                    str(step),
                    f"{values['loss'][k]:.4g}",
                    f"{values['right'][k]:.0%}",
                    f"{np.abs(values['cosines'][k]).mean():.3f}",
                    f"{values['top'][k]:.3f}",
                    str(values["groups"][k]),
                )
            )
    counts = [_largest_count(p) for p in range(1, 6)]
    finding = (
        "On one-dimensional inputs, 20 random data sets have at most "
        f"{', '.join(map(str, counts))} directions for multiplicities 1 to 5; "
        "the bound is twice the multiplicity."
    )
    return Report([Table("Condensation", heads, rows)], {"": plot(results)}, [finding])


def plot(results: list[Result]) -> Figure:
    """For each scale the cosines between neurons, at the start, step 200 and the end."""
    chosen = [0, STEPS.index(200), len(STEPS) - 1]
    figure, axes = drawing.panels(len(results), len(chosen), width=3.0)
    for result, row in zip(results, axes, strict=True):
        for k, panel in zip(chosen, row, strict=True):
            picture = panel.imshow(result.values["matrices"][k], vmin=-1, vmax=1, cmap="RdBu_r")
            panel.set(title=f"scale {result.settings['scale']:g}, step {STEPS[k]}")
            panel.grid(False)
            panel.set_xticks([])
            panel.set_yticks([])
    figure.colorbar(picture, ax=axes, shrink=0.7, label="cosine between two neurons")
    return figure


def _largest_count(multiplicity: int) -> int:
    counts = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, y = rng.uniform(-1, 1, (30, 1)), rng.normal(size=30)
        counts.append(len(pathcond.condensation_directions(x, y, multiplicity)))
    return max(counts)
