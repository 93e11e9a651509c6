"""What training keeps: ‖out‖² − ‖in‖² of every neuron, up to the square of the step.

A small ReLU network is trained by gradient descent for the same time η · steps at several learning
rates, from three points of one rescaling orbit. The conserved quantities drift in proportion to η,
and by exactly the sum of η² (‖∇out‖² − ‖∇in‖²).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing, study
from pathcond_jax.experiments.study import Context, Options, Report, Result, Table, Task

SUMMARY = "conserved quantities: what rescaling chooses and training keeps"
DATASETS: tuple[str, ...] = ()

STARTS = ("random", "balanced", "output-heavy")
LAYERS = ("first", "second", "last")
SIZES = ((2, 8), (8, 8), (8, 1))
TARGET = 4.0


def tasks(options: Options) -> list[Task]:
    """One task for each start and learning rate."""
    rates, time = ((0.1, 0.01), 20.0) if options.quick else ((0.1, 0.03, 0.01, 0.003), 60.0)
    return [
        Task(
            f"{start}, learning rate {rate:g}",
            {"start": start, "learning_rate": rate, "time": time, "seed": options.seed},
        )
        for start in STARTS
        for rate in rates
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains from one start and compares the drift with its prediction."""
    with study.double_precision():
        keys = jax.random.split(jax.random.key(settings["seed"]), 3)
        params = _network(keys[0])
        spec = pathcond.chain_spec(params, LAYERS)
        x = jax.random.normal(keys[1], (40, 2))
        y = jnp.sin(2 * x[:, :1]) * x[:, 1:]
        params = _start(settings["start"], params, spec)
        rate = settings["learning_rate"]
        steps = round(settings["time"] / rate)
        trace = jax.device_get(_train(params, x, y, rate, spec=spec, steps=steps))
        losses, quantities, predicted = trace
        kept = np.unique(np.linspace(0, steps - 1, 200).astype(int))
        drift = quantities - quantities[:1]
        return {
            "time": rate * kept,
            "losses": losses[kept],
            "quantities": quantities[kept],
            "drift": np.abs(drift).max(),
            "error": np.abs(drift[1:] - np.cumsum(predicted, axis=0)[:-1]).max(),
        }


def report(results: list[Result]) -> Report:
    """The drift against the learning rate, and the trajectories."""
    heads = (
        "start",
        "learning\nrate",
        "final\nloss",
        "drift",
        "drift\n/ rate",
        "off the\nprediction",
    )
    rows = []
    for result in results:
        rate, values = result.settings["learning_rate"], result.values
        rows.append(
            (
                result.settings["start"],
                f"{rate:g}",
                f"{values['losses'][-1]:.3g}",
                f"{values['drift']:.3g}",
                f"{values['drift'] / rate:.3g}",
                f"{values['error']:.1e}",
            )
        )
    finding = (
        "Each quantity moves by exactly the sum of η² (‖∇out‖² − ‖∇in‖²) over the steps: the "
        f"largest difference is {max(r.values['error'] for r in results):.1e}."
    )
    return Report([Table("Conserved quantities", heads, rows)], {"": plot(results)}, [finding])


def plot(results: list[Result]) -> Figure:
    """A panel for each start with the quantities over time, and one with drift against rate."""
    figure, axes = drawing.panels(1, len(STARTS) + 1)
    for start, panel in zip(STARTS, axes[0], strict=False):
        chosen = [r for r in results if r.settings["start"] == start]
        for result, dashes in zip((chosen[0], chosen[-1]), ("-", ":"), strict=True):
            label = f"learning rate {result.settings['learning_rate']:g}"
            for k, line in enumerate(np.asarray(result.values["quantities"]).T):
                color = drawing.COLORS[2 if k < SIZES[0][1] else 1]
                panel.plot(
                    result.values["time"],
                    line,
                    color=color,
                    linestyle=dashes,
                    linewidth=0.9,
                    label=f"layer {1 + k // SIZES[0][1]}, {label}",
                )
        panel.set(title=start, xlabel="time (rate × steps)", ylabel="‖out‖² − ‖in‖²")
    last = axes[0, -1]
    for start, marker in zip(STARTS, drawing.MARKERS, strict=False):
        chosen = [r for r in results if r.settings["start"] == start]
        last.plot(
            [r.settings["learning_rate"] for r in chosen],
            [r.values["drift"] for r in chosen],
            marker=marker,
            color="0.3",
            label=f"drift from {start}",
        )
    last.set(title="largest drift", xlabel="learning rate", xscale="log", yscale="log")
    drawing.legend_below(figure, axes[0])
    return figure


def _network(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    keys = jax.random.split(key, len(SIZES))
    params = {
        name: {
            "kernel": jax.random.normal(k, size) * np.sqrt(2 / size[0]),
            "bias": 0.1 * jnp.ones(size[1]),
        }
        for name, k, size in zip(LAYERS, keys, SIZES, strict=True)
    }
    del params["last"]["bias"]
    return params


def _start(name: str, params: Any, spec: pathcond.ArchSpec) -> Any:
    """A point of the orbit."""
    if name == "random":
        return params
    level = 0.0 if name == "balanced" else TARGET
    target = tuple(jnp.full(group.size, level) for group in spec.groups)
    return pathcond.rescale_to(params, spec, target)[0]


def _train(
    params: Any, x: jax.Array, y: jax.Array, rate: float, *, spec: pathcond.ArchSpec, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss, quantities, and predicted change of the quantities, at each step."""
    assert spec.apply_fn is not None
    network = spec.apply_fn

    def loss(params: Any) -> jax.Array:
        return jnp.mean(jnp.square(network(params, x) - y))

    def step(params: Any, _: None) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(loss)(params)
        quantities, change = (
            jnp.concatenate(pathcond.conserved_quantities(tree, spec)) for tree in (params, grads)
        )
        moved = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        return moved, (value, quantities, rate**2 * change)

    return jax.jit(lambda params: jax.lax.scan(step, params, length=steps)[1])(params)
