"""Figure 1 of the paper: u · ReLU(v x + w) learns ReLU(x) from three starts.

Gradient descent on the parameters as they are, on the conditioned ones, and directly on the path
lifting Φ = (uv, uw). In double precision, with the authors' inputs: every number is theirs.
"""

from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing, study
from pathcond_jax.experiments.study import Context, Options, Report, Result, Table, Task

SUMMARY = "one neuron, three starts: losses and trajectories"
DATASETS: tuple[str, ...] = ()

STARTS = {"A": (4.0, 3.0, 1.0), "B": (2.0, 4.0, 1.0), "C": (4.0, -2.0, 1.0)}
PLAIN, CONDITIONED, LIFTED = "plain", "conditioned", "descent on Φ"
LEARNING_RATE, THRESHOLD = 5e-3, 1e-3


class Neuron(NamedTuple):
    """The parameters of u · ReLU(v x + w): arrays (1, 1), (1, 1) and (1,)."""

    u: jax.Array
    v: jax.Array
    w: jax.Array


class Lifting(NamedTuple):
    """The path lifting of a neuron: uv and uw, scalars."""

    uv: jax.Array
    uw: jax.Array


def tasks(options: Options) -> list[Task]:
    """One task for each start; it is quick anyway."""
    return [
        Task(
            f"start {name}", {"start": list(start), "steps": 15000, "learning_rate": LEARNING_RATE}
        )
        for name, start in STARTS.items()
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Descends from one start (v, w, u) in the three ways."""
    with study.double_precision():
        x = jnp.asarray(inputs())
        v, w, u = settings["start"]
        plain = Neuron(jnp.full((1, 1), u), jnp.full((1, 1), v), jnp.full((1,), w))
        spec = pathcond.trace_spec(network, plain, x)
        # One neuron: a single sweep is the exact optimum.
        conditioned, _ = pathcond.condition(plain, spec, method="coordinate", tol=0.0)
        ways = {PLAIN: plain, CONDITIONED: conditioned, LIFTED: lift(plain)}
        return {name: _described(x, params, settings) for name, params in ways.items()}


def report(results: list[Result]) -> Report:
    """Losses and steps to the threshold; the paper's three rows of panels."""
    heads = ("start", "method", "(u, v, w)", f"steps to\n{THRESHOLD:g}", "final\nloss")
    rows = []
    for result in results:
        for number, way in enumerate((PLAIN, CONDITIONED, LIFTED)):
            values = result.values[way]
            start = ", ".join(f"{x:.3f}" for x in values["start"]) if way != LIFTED else ""
            hit = values["hit"]
            rows.append(
                (
                    result.name[-1] if number == 0 else "",
                    way,
                    start,
                    "never" if hit is None else str(hit),
                    f"{values['final_loss']:.3g}",
                )
            )
    return Report([Table("Figure 1", heads, rows)], {"": plot(results)})


def inputs() -> np.ndarray:
    """The authors' 100 standard normal inputs (torch.randn, seed 36)."""
    text = resources.files(__package__).joinpath("figure1_inputs.txt").read_text(encoding="utf-8")
    return np.array([float(line) for line in text.split()])


def network(params: Neuron, x: jax.Array) -> jax.Array:
    """The outputs u · ReLU(v x + w) for inputs (n,)."""
    hidden = jax.nn.relu(x[:, None] @ params.v + params.w[None])
    return (hidden @ params.u)[:, 0]


def lift(params: Neuron) -> Lifting:
    """The path lifting."""
    u, v, w = (leaf.reshape(()) for leaf in params)
    return Lifting(u * v, u * w)


def loss(params: Neuron | Lifting, x: jax.Array) -> jax.Array:
    """The mean squared error to ReLU(x); for u > 0, the network is ReLU(uv x + uw)."""
    if isinstance(params, Lifting):
        outputs = jax.nn.relu(params.uv * x + params.uw)
    else:
        outputs = network(params, x)
    return jnp.mean(jnp.square(outputs - jax.nn.relu(x)))


def descend(
    params: Neuron | Lifting, x: jax.Array, *, steps: int, learning_rate: float
) -> tuple[Neuron | Lifting, jax.Array]:
    """The parameters and the loss before each of the steps of gradient descent."""

    def step(params: Any, _: None) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(loss)(params, x)
        moved = jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)
        return moved, (params, value)

    return jax.lax.scan(step, params, length=steps)[1]


_descend = jax.jit(descend, static_argnames=("steps", "learning_rate"))


def _described(x: jax.Array, params: Neuron | Lifting, settings: dict[str, Any]) -> dict[str, Any]:
    steps, rate = settings["steps"], settings["learning_rate"]
    path, losses = _descend(params, x, steps=steps, learning_rate=rate)
    path, losses = jax.device_get((path, losses))
    below = losses < THRESHOLD
    # The first steps are the large ones.
    kept = np.unique(np.r_[: min(200, steps), :steps:50])
    flat = np.stack([leaf.reshape(steps) for leaf in path], axis=1)
    return {
        "start": flat[0],
        "hit": int(below.argmax()) if below.any() else None,
        "final_loss": losses[-1],
        "steps": kept,
        "path": flat[kept],
        "losses": losses[kept],
    }


def plot(results: list[Result]) -> Figure:
    """A column for each start: loss, path in the lifting, path of the parameters."""
    figure, axes = drawing.panels(3, len(results))
    styles = {
        PLAIN: (drawing.COLORS[0], "-"),
        CONDITIONED: (drawing.COLORS[3], "-"),
        LIFTED: (drawing.COLORS[2], (0, (4, 2))),
    }
    for result, (top, middle, bottom) in zip(results, axes.T, strict=True):
        ways = {way: np.asarray(result.values[way]["path"]) for way in styles}
        for way, (color, dashes) in styles.items():
            losses = result.values[way]["losses"]
            steps = result.values[way]["steps"]
            top.plot(steps, losses, color=color, linestyle=dashes, label=way)
            path = ways[way]
            lifted = path if way == LIFTED else path[:, :1] * path[:, 1:]
            middle.plot(*lifted.T, color=color, linestyle=dashes)
            middle.plot(*lifted[0], "o", color=color, markersize=5)
            if way != LIFTED:
                incoming = np.hypot(path[:, 1], path[:, 2])
                bottom.plot(incoming, path[:, 0], color=color)
                bottom.plot(incoming[0], path[0, 0], "o", color=color, markersize=5)
                bottom.plot(incoming[-1], path[-1, 0], "s", color=color, markersize=5)
        v, w, u = result.settings["start"]
        top.set_title(f"{result.name}: (v, w, u) = ({v:g}, {w:g}, {u:g})", fontsize=10)
        top.set(xlabel="step", yscale="log", ylim=(1e-17, 100))
        middle.plot(1, 0, "*", color="0.4", markersize=12, zorder=1, label="minimum")
        middle.set(xlabel="uv")
        reach = bottom.get_xlim()[1]
        bottom.plot([0, reach], [0, reach], color="0.6", linewidth=0.8, linestyle=":")
        bottom.text(
            0.75 * reach, 0.78 * reach, "u = ‖(v, w)‖", color="0.35", fontsize=8, ha="right"
        )
        bottom.set(xlabel="‖(v, w)‖", xlim=(0, None), ylim=(0, None))
    for row, label in zip(axes, ("loss", "uw", "u"), strict=True):
        row[0].set_ylabel(label)
    drawing.legend_below(figure, axes[:2, 0])
    return figure
