"""What conditioning costs, against width and depth, in seconds and in training steps."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing, models, training
from pathcond_jax.experiments.study import Context, Options, Report, Result, Table, Task

SUMMARY = "what conditioning costs"
DATASETS: tuple[str, ...] = ()

WIDTHS: Sequence[int] = (64, 128, 256, 512, 1024, 2048)
DEPTHS: Sequence[int] = (2, 3, 4, 8, 16, 32)
WIDTH, DEPTH, INPUTS, BATCH = 256, 3, 784, 128
PARTS = {
    "lift": "Gram diagonal",
    "sweeps": "10 sweeps, whole",
    "optimum": "optimum, whole",
    "step": f"training step, batch {BATCH}",
}


def tasks(options: Options) -> list[Task]:
    """A task for each width and for each depth of an MLP."""
    widths, depths, repeats = WIDTHS, DEPTHS, 10
    if options.quick:
        widths, depths, repeats = (64, 256), (1,), 3
    shapes = {(width, DEPTH) for width in widths} | {(WIDTH, depth) for depth in depths}
    return [
        Task(
            f"{depth} × {width}",
            {"width": width, "depth": depth, "repeats": repeats}
            | {"seed": options.seed, "device": jax.devices()[0].device_kind},
        )
        for width, depth in sorted(shapes)
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Median seconds of each part once compiled, and seconds to trace and to compile."""
    model = models.MLP((settings["width"],) * settings["depth"])
    example = jnp.zeros((1, INPUTS))
    params = model.init(jax.random.key(settings["seed"]), example)
    start = time.perf_counter()
    spec = pathcond.trace_spec(model.apply, params, example)
    traced = time.perf_counter() - start
    inputs = jax.random.normal(jax.random.key(settings["seed"] + 1), (BATCH, INPUTS))
    labels = jnp.arange(BATCH) % 10

    def step(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits: Any = model.apply(params, inputs)
            return training.cross_entropy(logits, labels)

        return jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params))

    functions = {
        "lift": lambda params: pathcond.gram_diagonal(params, spec),
        "sweeps": lambda params: pathcond.condition(
            params, spec, method="coordinate", max_steps=10, tol=0.0
        ),
        "optimum": lambda params: pathcond.condition(params, spec),
        "step": step,
    }
    measured = {
        name: _measure(function, params, settings["repeats"])
        for name, function in functions.items()
    }
    return {
        "trace": traced,
        "neurons": spec.num_neurons,
        "parameters": spec.num_parameters,
        **{name: seconds for name, (_, seconds) in measured.items()},
        **{f"compile_{name}": seconds for name, (seconds, _) in measured.items()},
    }


def report(results: list[Result]) -> Report:
    """Milliseconds of each part, and how many training steps the optimum costs."""
    rows = [
        (
            result.name,
            str(result.values["parameters"]),
            *(f"{1e3 * result.values[part]:.3g}" for part in PARTS),
            f"{result.values['optimum'] / result.values['step']:.1f}",
            f"{result.values['compile_optimum']:.1f}",
        )
        for result in results
    ]
    heads = (
        "MLP",
        "parameters",
        "lift\nms",
        "10 sweeps\nms",
        "optimum\nms",
        "step\nms",
        "optimum\nin steps",
        "compile\ns",
    )
    title = f"Cost of conditioning on {results[0].settings['device']}, medians"
    return Report([Table(title, heads, rows)], {"": plot(results)})


def plot(results: list[Result]) -> Figure:
    """Seconds against width and against depth."""
    figure, axes = drawing.panels(1, 2)
    for panel, varied, fixed in zip(
        axes[0], ("width", "depth"), ({"depth": DEPTH}, {"width": WIDTH}), strict=True
    ):
        chosen = [result for result in results if fixed.items() <= result.settings.items()]
        at = [result.settings[varied] for result in chosen]
        for number, (part, label) in enumerate(PARTS.items()):
            panel.plot(
                at,
                [1e3 * result.values[part] for result in chosen],
                color=drawing.COLORS[number],
                marker=drawing.MARKERS[number],
                label=label,
            )
        panel.set_xscale("log", base=2)
        panel.set(yscale="log", xlabel=varied, xticks=at)
        panel.set_xticklabels([str(x) for x in at])
        panel.minorticks_off()
    axes[0, 0].set(ylabel="milliseconds", title=f"{DEPTH} hidden layers")
    axes[0, 1].set(title=f"width {WIDTH}")
    drawing.legend_below(figure, axes[0, 0], columns=4)
    return figure


def _measure(function: Callable[[Any], Any], params: Any, repeats: int) -> tuple[float, float]:
    """Seconds to compile, and the median seconds of a call."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(params).compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params))
        times.append(time.perf_counter() - start)
    return compile_seconds, float(np.median(times[1:]))
