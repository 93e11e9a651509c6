"""Feature reuse in finetuning: a penalty between sparsity and reuse, and what descent finds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy import optimize

import pathcond_jax as pathcond
from pathcond_jax.experiments import drawing, study
from pathcond_jax.experiments.study import Context, Options, Report, Result, Table, Task

SUMMARY = "finetuning: the penalty that gradient descent minimizes, by the size of features"
DATASETS: tuple[str, ...] = ()

FEATURES, POINTS = 10, 4
LISTED = (1e-3, 1.0, 1e3)


def tasks(options: Options) -> list[Task]:
    """One task for each scale of the weights before finetuning."""
    scales = (1.0, 0.25) if options.quick else (2.0, 1.0, 0.5, 0.25, 0.125)
    steps = 20_000 if options.quick else 100_000
    return [
        Task(f"weights × {scale:g}", {"scale": scale, "steps": steps, "seed": options.seed})
        for scale in scales
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Finetunes a diagonal network and compares it with the least penalty that fits."""
    with study.double_precision():
        rng = np.random.default_rng(settings["seed"])
        inputs, aux = rng.normal(size=(POINTS, FEATURES)), np.zeros(FEATURES)
        aux[: FEATURES // 2] = rng.uniform(0.5, 1.5, FEATURES // 2)
        truth = np.zeros(FEATURES)
        truth[[0, FEATURES // 2]] = 1.0, -1.0
        targets, readout = inputs @ truth, 0.2
        # Scaling the weights by γ scales a feature, a product of two, by γ².
        pretrained = {"w": jnp.sqrt(jnp.asarray([aux, aux])), "v": jnp.full((2, FEATURES), readout)}
        start = pathcond.scale_network(pretrained, settings["scale"])
        aux, readout = settings["scale"] ** 2 * aux, settings["scale"] * readout
        found, loss = _descend(start, jnp.asarray(inputs), jnp.asarray(targets), settings["steps"])
        predicted = _least(inputs, targets, aux, readout)
        return {"found": found, "predicted": predicted, "truth": truth, "loss": loss}


def report(results: list[Result]) -> Report:
    """What was found against what was predicted; the exponents of the penalty."""
    heads = ("weights", "final\nloss", "off the least\npenalty by", "share of\nreused features")
    rows = []
    for result in results:
        found, predicted = (np.array(result.values[key]) for key in ("found", "predicted"))
        reused = np.square(found[: FEATURES // 2]).sum() / np.square(found).sum()
        rows.append(
            (
                f"× {result.settings['scale']:g}",
                f"{result.values['loss']:.1e}",
                f"{np.abs(found - predicted).max():.1e}",
                f"{reused:.2f}",
            )
        )
    exponents = Table(
        "The law: order + dependence = 1",
        ("β_aux / β", "order", "dependence", "sum"),
        [
            (f"{size:g}", f"{order:.3f}", f"{dependence:.3f}", f"{order + dependence:.3f}")
            for size in LISTED
            for order, dependence in [_exponents(size)]
        ],
    )
    return Report([Table("Finetuning", heads, rows), exponents], {"": plot(results)})


def plot(results: list[Result]) -> Figure:
    """Exponents by the size of features, and coefficients found against predicted."""
    figure, axes = drawing.panels(1, 2)
    law, fit = axes[0]
    sizes = np.geomspace(1e-4, 1e4, 81)
    pairs = np.array([_exponents(size) for size in sizes])
    for k, label in enumerate(("order, ∂ log ℓ/∂ log β", "dependence, ∂ log ℓ/∂ log β_aux")):
        law.plot(sizes, pairs[:, k], color=drawing.COLORS[k], label=label)
    law.plot(sizes, pairs.sum(axis=1), color="0.5", linestyle=":", label="their sum")
    law.set(xscale="log", xlabel="β_aux / β", ylabel="exponent")
    for result, color, marker in zip(results, drawing.COLORS, drawing.MARKERS, strict=False):
        fit.plot(
            result.values["predicted"],
            result.values["found"],
            marker,
            color=color,
            markersize=4,
            label=result.name,
        )
    fit.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    fit.set(xlabel="coefficient of least penalty", ylabel="coefficient found by descent")
    drawing.legend_below(figure, axes[0], columns=4)
    return figure


def _exponents(size: float) -> tuple[float, float]:
    with study.double_precision():
        order, dependence = pathcond.order_and_dependence(
            pathcond.ptft_penalty, jnp.ones(1), jnp.full(1, size)
        )
    return float(order), float(dependence)


def _descend(
    params: Any, inputs: jax.Array, targets: jax.Array, steps: int
) -> tuple[np.ndarray, float]:
    def coefficients(params: Any) -> jax.Array:
        plus, minus = params["w"] * params["v"]
        return plus - minus

    def loss(params: Any) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(inputs @ coefficients(params) - targets))

    def step(_: Any, params: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(loss)(params))

    trained = jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, p))(params)
    return np.asarray(coefficients(trained)), float(loss(trained))


def _least(inputs: np.ndarray, targets: np.ndarray, aux: np.ndarray, readout: float) -> np.ndarray:
    """The coefficients that fit with the least penalty."""
    particular = np.linalg.lstsq(inputs, targets)[0]
    null = jnp.asarray(np.linalg.svd(inputs)[2][len(inputs) :].T)

    @jax.jit
    def cost(free: jax.Array) -> tuple[jax.Array, jax.Array]:
        def penalty(free: jax.Array) -> jax.Array:
            beta = jnp.asarray(particular) + null @ free
            return pathcond.ptft_penalty(beta, jnp.asarray(aux), readout)

        return jax.value_and_grad(penalty)(free)

    start = np.zeros(null.shape[1])
    found = optimize.minimize(
        lambda free: [np.asarray(part, np.float64) for part in cost(jnp.asarray(free))],
        start,
        jac=True,
        method="BFGS",
        options={"gtol": 1e-10},
    )
    return particular + np.asarray(null) @ found.x
