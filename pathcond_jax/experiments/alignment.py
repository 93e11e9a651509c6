"""Early alignment: three points that a two-layer network fits or not, by its initial scale.

From a small initialization all active neurons turn to the extremal direction before they grow;
the network stays linear on the data and training ends at least squares. From a large one it fits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing
from pathcond_jax.experiments.study import Context, Options, Report, Result, Table, Task

SUMMARY = "early alignment: a small initialization that never fits three points"
DATASETS: tuple[str, ...] = ()

INPUTS, TARGETS = ((-0.75,), (-0.5,), (0.125,)), (1.1, 0.1, 0.8)
LEARNING_RATE, WIDTH = 0.01, 200
SNAPSHOTS = 60


def tasks(options: Options) -> list[Task]:
    """One task for each scale of the initialization."""
    steps = 20_000 if options.quick else 150_000
    return [
        Task(f"scale {scale:g}", {"scale": scale, "steps": steps, "seed": options.seed})
        for scale in (1e-4, 1e-3, 1e-1, 1.0)
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains from one scale; keeps the loss, the directions and the alignment at some steps."""
    x, y = jnp.asarray(INPUTS), jnp.asarray(TARGETS)
    params = pathcond.two_layer_init(
        jax.random.key(settings["seed"]), 1, WIDTH, scale=settings["scale"]
    )
    network = pathcond.chain_spec(params, ["hidden", "output"]).apply_fn
    assert network is not None

    def loss(params: Any) -> jax.Array:
        return jnp.mean(jnp.square(network(params, x)[:, 0] - y))

    def step(_: Any, params: Any) -> Any:
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, jax.grad(loss)(params))

    advance = jax.jit(lambda params, count: jax.lax.fori_loop(0, count, step, params))
    marks = np.unique(np.geomspace(1, settings["steps"], SNAPSHOTS).astype(int))
    losses, angles, cosines, done = [], [], [], 0
    for mark in marks:
        params = advance(params, mark - done)
        done = mark
        kernel, bias = params["hidden"]["kernel"][0], params["hidden"]["bias"]
        losses.append(float(loss(params)))
        angles.append(np.degrees(np.arctan2(bias, kernel)))
        cosines.append(pathcond.alignment(params, x, y))
        context.advance(0.9 / len(marks))
    grid = np.linspace(-1, 0.5, 151, dtype=np.float32)
    return {
        "steps": marks,
        "losses": losses,
        "angles": np.array(angles),
        "positive": np.asarray(params["output"]["kernel"][:, 0] > 0),
        "cosines": np.array(cosines),
        "grid": grid,
        "outputs": np.asarray(network(params, grid[:, None])[:, 0]),
    }


def report(results: list[Result]) -> Report:
    """Where training ended from each scale."""
    (extremal,) = pathcond.extremal_vectors(np.array(INPUTS), np.array(TARGETS))
    design = np.hstack([np.array(INPUTS), np.ones((3, 1))])
    best = np.linalg.lstsq(design, np.array(TARGETS))[0]
    least = np.mean((design @ best - np.array(TARGETS)) ** 2)
    heads = ("scale", "steps", "final loss", "largest angle between\nneighbours after alignment")
    rows = []
    for result in results:
        rows.append(
            (
                f"{result.settings['scale']:g}",
                str(result.settings["steps"]),
                f"{result.values['losses'][-1]:.7f}",
                f"{_spread(result):.2f}°",
            )
        )
    angle = np.degrees(np.arctan2(extremal[1], extremal[0]))
    findings = [
        f"Least squares has loss {least:.7f}; the one extremal vector points at {angle:.2f}°.",
    ]
    return Report([Table("Three points", heads, rows)], {"": plot(results, angle)}, findings)


def plot(results: list[Result], angle: float) -> Figure:
    """Losses, the functions at the end, and the directions from the smallest scale."""
    figure, axes = drawing.panels(1, 3)
    losses, functions, directions = axes[0]
    for result, color in zip(results, drawing.COLORS, strict=False):
        label = f"scale {result.settings['scale']:g}"
        losses.plot(result.values["steps"], result.values["losses"], color=color, label=label)
        functions.plot(result.values["grid"], result.values["outputs"], color=color, label=label)
    functions.plot(np.array(INPUTS)[:, 0], TARGETS, "o", color="0.3", label="data")
    first = results[0].values
    active = np.array(first["cosines"])[-1] != 0
    directions.plot(
        first["steps"], np.array(first["angles"])[:, active], color=drawing.COLORS[0], linewidth=0.4
    )
    directions.axhline(angle, color="0.5", linestyle=":", label="extremal vector")
    losses.set(xlabel="step", ylabel="loss", xscale="log", yscale="log", ylim=(1e-9, 2))
    functions.set(xlabel="x", ylabel="output at the end")
    directions.set(
        xlabel="step",
        ylabel="direction (degrees)",
        xscale="log",
        title="active neurons, scale 1e-4",
    )
    drawing.legend_below(figure, axes[0])
    return figure


def _spread(result: Result) -> float:
    """The range of directions of the active positive neurons when they agree most."""
    values = result.values
    chosen = (np.array(values["cosines"])[-1] != 0) & np.array(values["positive"])
    angles = np.array(values["angles"])[:, chosen]
    return float(np.ptp(angles, axis=1).min())
