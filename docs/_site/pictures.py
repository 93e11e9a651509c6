"""Draws the pictures of the README and of docs/mathematics.md: python docs/_site/pictures.py.

Everything in them is measured: a toy u·ReLU(vx), and a small network on scikit-learn's digits.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pathcond_jax as pathcond
from pathcond_jax.experiments import data, drawing, models, training

DOCS = pathlib.Path(__file__).parents[1]
BLACK, _, BLUE, VERMILION, GREEN = drawing.PALETTE
SPREAD, EPOCHS, SEEDS, RATE = 3.0, 20, 3, 0.1


def same_function():
    """One function, two representatives: log-scales, Gram diagonals and training by SGD."""
    digits = data.load_digits()
    model, example = models.MLP((128,) * 6), jnp.asarray(digits.train_inputs[:1])
    seeds = jax.random.split(jax.random.key(0), SEEDS)
    usual = jax.vmap(lambda key: model.init(key, example))(seeds)
    spec = pathcond.trace_spec(model.apply, jax.tree.map(lambda a: a[0], usual), example)
    drawn = [
        jax.random.uniform(key, (SEEDS, group.size), minval=-SPREAD, maxval=SPREAD)
        for key, group in zip(jax.random.split(jax.random.key(1), 6), spec.groups, strict=True)
    ]
    found = jax.vmap(lambda p, z: pathcond.rescale(p, spec, tuple(z)))(usual, drawn)
    conditioned = jax.jit(jax.vmap(lambda p: pathcond.condition(p, spec)[0]))(found)
    starts = {"out of balance": found, "conditioned": conditioned}
    inputs = jnp.asarray(digits.test_inputs)
    outputs = {
        name: np.asarray(jax.vmap(lambda p: model.apply(p, inputs))(start)).ravel()
        for name, start in starts.items()
    }
    rates = jnp.full(SEEDS, RATE)
    losses = {
        name: np.asarray(
            training.train(
                model.apply, optax.sgd, digits, start, seeds, rates,
                num_epochs=EPOCHS, batch_size=32,
            )[1].train_loss
        )
        for name, start in starts.items()
    }  # fmt: skip
    return spec, starts, outputs, losses


def logarithms(spec, params):
    """The logarithms of the Gram diagonal's positive entries, about their mean."""
    first = jax.tree.map(lambda a: a[0], params)
    parts = zip(*map(jax.tree.leaves, pathcond.scaled_gram_diagonal(first, spec)), strict=True)
    logs = [np.log(np.asarray(m)[np.asarray(m) > 0]) + float(s) for m, s in parts]
    flat = np.concatenate(logs)
    return flat - flat.mean()


def rescaling():
    spec, starts, outputs, losses = same_function()
    figure, axes = drawing.panels(1, 3)
    one, two, three = axes[0]
    one.plot(outputs["out of balance"], outputs["conditioned"], ".", color=BLUE, markersize=1.5)
    one.set(xlabel="outputs before", ylabel="outputs after", title="The same function …")
    colors = {"out of balance": VERMILION, "conditioned": BLUE}
    for name, params in starts.items():
        values = logarithms(spec, params) / np.log(10)
        two.hist(values, 60, range=(-8, 8), density=True, color=colors[name], alpha=0.6, label=name)
        finite = np.where(np.isfinite(losses[name]), losses[name], np.nan)
        epochs = np.arange(1, EPOCHS + 1)
        three.plot(epochs, finite.T, color=colors[name], linewidth=0.6, alpha=0.4)
        three.plot(epochs, np.median(finite, 0), color=colors[name], linewidth=2)
    if not np.isfinite(losses["out of balance"]).any(axis=0)[-1]:
        note = {"ha": "right", "va": "top", "color": VERMILION}
        three.text(0.98, 0.97, "out of balance: diverged", transform=three.transAxes, **note)
    two.set(xlabel="log₁₀ of the Gram diagonal", ylabel="density", title="… in other parameters …")
    three.set(xlabel="epoch", ylabel="training loss", yscale="log", title="… that train")
    drawing.legend_below(figure, two)
    figure.savefig(DOCS / "rescaling.png", dpi=130)
    for name, curve in losses.items():
        print(name, "final training loss", np.round(curve[:, -1], 4))
    change = np.abs(outputs["conditioned"] - outputs["out of balance"]).max()
    print("largest relative change of an output", change / np.abs(outputs["conditioned"]).max())
    for name, params in starts.items():
        scores = jax.vmap(lambda p: pathcond.conditioning_score(p, spec))(params)
        print(name, "conditioning scores", np.round(np.asarray(scores), 3))


def orbit():
    """u·ReLU(vx): the orbit of one point, the lifting it keeps, and the criterion along it."""
    figure, axes = drawing.panels(1, 3)
    one, two, three = axes[0]
    v, u = np.float64(3.0), np.float64(0.5)
    z = np.linspace(-2.2, 1.2, 200)
    for product, style in ((0.5, ":"), (u * v, "-"), (4.0, ":")):
        line = np.linspace(0.2, 4.5, 200)
        one.plot(line, product / line, style, color="0.5", linewidth=1)
    best = np.sqrt(u * v)
    one.plot(v, u, "o", color=VERMILION)
    one.plot(best, best, "o", color=BLUE)
    one.annotate("(v, u)", (v, u), (3.05, 0.9), color=VERMILION)
    one.annotate("(λv, u/λ)", (best, best), (1.45, 1.5), color=BLUE)
    one.set(xlim=(0, 4.5), ylim=(0, 4.5), xlabel="incoming v", ylabel="outgoing u")
    one.set_title("Action: a curve of one function")
    xs = np.linspace(-1, 1, 101)
    relu = np.maximum(xs, 0)
    two.plot(xs, u * np.maximum(v * xs, 0), color=VERMILION, linewidth=4, alpha=0.5)
    two.plot(xs, best * np.maximum(best * xs, 0), color=BLUE, linewidth=1.5)
    two.plot(xs, 4.0 * relu, ":", color="0.5", linewidth=1)
    two.plot(xs, 0.5 * relu, ":", color="0.5", linewidth=1)
    two.text(-0.95, 1.2, "Φ = uv = 1.5", fontsize=10)
    two.set(xlabel="x", ylabel="u·ReLU(vx)", title="Lifting: what the curve shares")
    gram_v, gram_u = u**2 * np.exp(-2 * z), v**2 * np.exp(2 * z)
    score = np.log((gram_v + gram_u) / 2) - np.log(gram_v * gram_u) / 2
    three.plot(z, score, color="0.3")
    minimum = np.log(u / v) / 2
    three.plot(0, np.interp(0, z, score), "o", color=VERMILION)
    three.plot(minimum, 0, "o", color=BLUE)
    three.set(xlabel="log-scale z = log λ", ylabel="log(AM / GM)")
    three.set_title("Criterion: convex along it")
    figure.savefig(DOCS / "orbit.png", dpi=130)


if __name__ == "__main__":
    orbit()
    rescaling()
