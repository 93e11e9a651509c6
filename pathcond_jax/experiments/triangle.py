"""Compelling initialization: a network that begins with 2^d linear pieces, and keeps them.

Four neurons in each of five layers approximate x³. The positions of the triangles' peaks are
trained first, then the weights themselves; against the same network from Kaiming initialization,
and against the triangle network conditioned before its weights are trained.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing, study
from pathcond_jax.experiments.study import Context, Options, Report, Result, Table, Task

SUMMARY = "triangle networks: exponentially many pieces at initialization, for x³"
DATASETS: tuple[str, ...] = ()

WIDTH, DEPTH, POINTS = 4, 5, 500
TRIANGLE, CONDITIONED, KAIMING = "triangle", "triangle, conditioned", "Kaiming"
WAYS = (TRIANGLE, CONDITIONED, KAIMING)


def tasks(options: Options) -> list[Task]:
    """One task for each way to begin and each seed."""
    seeds, steps = (2, 2000) if options.quick else (20, 10_000)
    return [
        Task(f"{way}, seed {seed}", {"way": way, "seed": options.seed + seed, "steps": steps})
        for way in WAYS
        for seed in range(seeds)
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Begins in one way and trains the weights by Adam."""
    with study.double_precision():
        steps, way = settings["steps"], settings["way"]
        key = jax.random.key(settings["seed"])
        x = jnp.linspace(0.0, 1.0, POINTS)[:, None]
        y = x[:, 0] ** 3
        peaks_loss: list[float] = []
        if way == KAIMING:
            params = _kaiming(key)
        else:
            peaks = jax.random.uniform(key, (DEPTH,), minval=0.3, maxval=0.7)
            shape = {"peaks": peaks, "s0": jnp.asarray(-0.25), "slope": jnp.asarray(1.0)}
            shape, losses = _train(lambda s: _loss(_triangle(s), x, y), shape, steps, 1e-2)
            peaks_loss = _thinned(losses)
            params = _triangle(shape)
        spec = pathcond.chain_spec(params, list(params))
        if way == CONDITIONED:
            params = pathcond.condition(params, spec)[0]
        pieces = [_pieces(spec, params)]
        context.advance(0.4)
        params, losses = _train(lambda p: _loss(p, x, y), params, steps, 1e-3)
        pieces.append(_pieces(spec, params))
        error = np.asarray(_network(params, x) - y)
        return {
            "before": peaks_loss,
            "losses": _thinned(losses),
            "mse": float(np.mean(error**2)),
            "pieces": pieces,
            "error": error,
        }


def report(results: list[Result]) -> Report:
    """Mean squared errors and numbers of pieces."""
    heads = ("begins as", "mean", "median", "least", "pieces\nbefore", "pieces\nafter")
    rows = []
    for way in WAYS:
        chosen = [r.values for r in results if r.settings["way"] == way]
        errors = np.array([values["mse"] for values in chosen])
        pieces = np.array([values["pieces"] for values in chosen])
        rows.append(
            (
                way,
                *(f"{f(errors):.2g}" for f in (np.mean, np.median, np.min)),
                *(f"{k:.0f}" for k in np.median(pieces, axis=0)),
            )
        )
    title = f"Mean squared error for x³, {results[0].settings['steps']} steps of Adam"
    return Report([Table(title, heads, rows)], {"": plot(results)})


def plot(results: list[Result]) -> Figure:
    """Losses while training the peaks and the weights; the error at the end of the best run."""
    figure, axes = drawing.panels(1, 3)
    first, second, third = axes[0]
    for way, color in zip(WAYS, drawing.COLORS, strict=False):
        chosen = [r.values for r in results if r.settings["way"] == way]
        for values in chosen:
            first.plot(values["before"], color=color, linewidth=0.8)
            second.plot(values["losses"], color=color, linewidth=0.8, label=way)
        best = min(chosen, key=lambda values: values["mse"])
        error = np.abs(np.ravel(best["error"])) + 1e-12
        third.plot(np.linspace(0, 1, POINTS), error, color=color, linewidth=0.8, label=way)
    first.set(title="training the peaks", ylabel="mean squared error")
    second.set(title="training the weights")
    third.set(title="best run", xlabel="x", ylabel="error")
    for panel in axes[0]:
        panel.set_yscale("log")
    for panel in (first, second):
        panel.set_xlabel("1/200 of the steps")
    drawing.legend_below(figure, axes[0])
    return figure


def _triangle(shape: dict[str, jax.Array]) -> Any:
    # Peaks stay away from the ends, where slopes become infinite.
    return pathcond.triangle_mlp(
        jnp.clip(shape["peaks"], 0.05, 0.95), shape["s0"], jnp.maximum(shape["slope"], 0)
    )


def _kaiming(key: jax.Array) -> Any:
    sizes = [1, *[WIDTH] * DEPTH, 1]
    params = {}
    for k, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        key, own = jax.random.split(key)
        kernel = jax.random.normal(own, (inputs, outputs)) * np.sqrt(2 / inputs)
        params[f"layer_{k}"] = {"kernel": kernel, "bias": jnp.zeros(outputs)}
    return params


def _network(params: Any, x: jax.Array) -> jax.Array:
    layers = list(params.values())
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer.get("bias", jnp.zeros(WIDTH))[None])
    last = layers[-1]
    return (x @ last["kernel"] + last.get("bias", jnp.zeros(1))[None])[:, 0]


def _loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(_network(params, x) - y))


def _train(loss: Any, params: Any, steps: int, rate: float) -> tuple[Any, np.ndarray]:
    """Adam with a cosine schedule; the last parameters and the loss before every step."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps, 1e-2))

    def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], jax.Array]:
        params, memory = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, memory = optimizer.update(grads, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=steps))
    (trained, _), losses = run(params)
    return trained, np.asarray(losses)


def _pieces(spec: pathcond.ArchSpec, params: Any) -> int:
    apply_fn = spec.apply_fn
    assert apply_fn is not None
    return pathcond.count_linear_pieces_1d(lambda x: apply_fn(params, x[None, None])[0, 0], 0, 1)


def _thinned(losses: np.ndarray) -> list[float]:
    return losses[:: max(1, len(losses) // 200)].tolist()
