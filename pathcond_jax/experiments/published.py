"""Networks as the authors' public scripts train them, and the ways to start them.

With BatchNorm those scripts rescale the layers on both sides of a normalization as if it were not
there. In training mode that starts another function: the way "as published" here. The way
"matched" asks how much of its effect is one number for each layer.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pathcond_jax as pathcond
from pathcond_jax.experiments import methods, sources, training
from pathcond_jax.experiments.study import Context

PyTree = Any

NONE, TEN_SWEEPS, OPTIMUM = methods.NONE, methods.TEN_SWEEPS, methods.OPTIMUM
ENORM, PUBLISHED = "enorm every step", "as published"
MATCHED, OUTPUT = "matched", "output matched"
MATCHED_OPTIMUM = "matched to optimum"


class Network(NamedTuple):
    """A network and two views of its symmetry.

    Attributes:
      problem: the network and how it is trained.
      spec: what may be rescaled.
      bare: the spec of the same layers without BatchNorm, over a part of the parameters.
      output: the name of the last layer.
      normalized: whether it has BatchNorm.
    """

    problem: methods.Problem
    spec: pathcond.ArchSpec
    bare: pathcond.ArchSpec
    output: str
    normalized: bool


class Start(NamedTuple):
    """Parameters to train from, stacked over seeds, and sizes of the log-scales by seed."""

    params: PyTree
    log_scales: dict[str, np.ndarray]


class Way(NamedTuple):
    """A way to train.

    Attributes:
      start: from fresh parameters, stacked over seeds, to those to train from.
      optimizer: for a network, from a learning rate to an optimizer.
    """

    start: Callable[[PyTree, Network], Start]
    optimizer: Callable[[Network], training.MakeOptimizer]


def sgd(network: Network) -> training.MakeOptimizer:
    """Plain SGD."""
    del network
    return optax.sgd


def sgd_with_enorm(network: Network) -> training.MakeOptimizer:
    """SGD, and one cycle of ENorm over the layers after every step."""
    return functools.partial(_sgd_with_enorm, network.spec)


def _sgd_with_enorm(
    spec: pathcond.ArchSpec, learning_rate: jax.Array
) -> optax.GradientTransformation:
    cycle = pathcond.recondition(
        spec,
        every=1,
        criterion="enorm",
        method="block",
        max_steps=1,
        tol=0.0,
        max_log_scale=None,
    )
    return optax.chain(optax.sgd(learning_rate), cycle)


def conditioned(params: PyTree, network: Network, *, method: str) -> Start:
    """A method of ``methods.METHODS``; the function stays."""
    return Start(*methods.prepare(params, network.spec, methods.METHODS[method]))


def as_published(params: PyTree, network: Network) -> Start:
    """Ten sweeps on the layers alone, BatchNorm left out of account."""
    names = {leaf.path.split("/")[1] for leaf in network.bare.leaves}
    layers = {"params": {name: params["params"][name] for name in sorted(names)}}
    moved, sizes = methods.prepare(layers, network.bare, methods.METHODS[TEN_SWEEPS])
    return Start({**params, "params": {**params["params"], **moved["params"]}}, sizes)


def matched(params: PyTree, network: Network) -> Start:
    """Every leaf times one number, so that its norm is that of the rescaled network.

    That is the network as published with BatchNorm, and the optimum without.
    """
    reference = as_published if network.normalized else WAYS[OPTIMUM].start
    return _matched_to(reference, params, network)


def matched_to_optimum(params: PyTree, network: Network) -> Start:
    """As ``matched``, with the norms of the optimum, which keeps the function."""
    return _matched_to(WAYS[OPTIMUM].start, params, network)


def _matched_to(
    reference: Callable[[PyTree, Network], Start], params: PyTree, network: Network
) -> Start:
    ratios = norm_ratios(params, reference(params, network).params)
    scaled = jax.tree.map(
        lambda leaf, ratio: leaf * ratio.reshape(-1, *[1] * (leaf.ndim - 1)),
        params["params"],
        ratios["params"],
    )
    return Start({**params, "params": scaled}, _no_scales(params))


def output_matched(params: PyTree, network: Network) -> Start:
    """As ``matched``, the last layer only."""
    layer = matched(params, network).params["params"][network.output]
    changed = {**params["params"], network.output: layer}
    return Start({**params, "params": changed}, _no_scales(params))


WAYS = {
    NONE: Way(functools.partial(conditioned, method=NONE), sgd),
    TEN_SWEEPS: Way(functools.partial(conditioned, method=TEN_SWEEPS), sgd),
    OPTIMUM: Way(functools.partial(conditioned, method=OPTIMUM), sgd),
    ENORM: Way(functools.partial(conditioned, method=methods.ENORM), sgd_with_enorm),
    PUBLISHED: Way(as_published, sgd),
    MATCHED: Way(matched, sgd),
    OUTPUT: Way(output_matched, sgd),
    MATCHED_OPTIMUM: Way(matched_to_optimum, sgd),
}


@functools.lru_cache(maxsize=8)
def network(
    model: Any,
    fast: Any,
    output: str,
    dataset: str,
    data_dir: Path | None,
    subset: int | None,
    num_epochs: int,
    batch_size: int,
) -> Network:
    """A network of ``models`` on a data set; equal arguments share compiled programs.

    Args:
      model: the module, with a field ``batch_norm``.
      fast: the same function, in the form that trains fastest.
      output: the name of its last layer.
      dataset: as for ``sources.load``, and so are the next two.
      data_dir: where it lies.
      subset: how many of its first images.
      num_epochs: passes over it.
      batch_size: examples per step.

    Returns:
      The network.
    """
    data = sources.load(dataset, data_dir, subset=subset)
    size = min(batch_size, len(data.train_labels))
    make = functools.partial(
        methods.problem, data=data, num_epochs=num_epochs, batch_size=size, trained_model=fast
    )
    problem, bare = make(model), make(model.clone(batch_norm=False))
    if model.batch_norm:
        problem = problem._replace(train_apply_fn=functools.partial(_train_apply, fast))
    return Network(problem, methods.trace(problem), methods.trace(bare), output, model.batch_norm)


def _train_apply(model: Any, params: PyTree, inputs: jax.Array) -> tuple[jax.Array, PyTree]:
    outputs, updated = model.apply(params, inputs, train=True, mutable=["batch_stats"])
    return outputs, {**params, **updated}


def run(settings: dict[str, Any], context: Context, network: Network) -> dict[str, Any]:
    """Trains one way at all learning rates from all seeds, in one program.

    Args:
      settings: with ``method``, ``learning_rates``, ``num_seeds``, ``threshold`` and ``seed``.
      context: of the study.
      network: what to train.

    Returns:
      Curves (rates, seeds, points) with the learning rate, the seed and the epoch of each point;
      the epochs to the threshold (rates, seeds); by seed, the change of the function at the start
      in training mode, the norm of each leaf relative to before, and sizes of the log-scales.
    """
    way, problem = WAYS[settings["method"]], network.problem
    rates, seeds = settings["learning_rates"], settings["num_seeds"]
    init_keys, train_keys = jax.random.split(jax.random.key(settings["seed"]), (2, seeds))
    fresh = jax.jit(jax.vmap(problem.init_fn))(init_keys)
    start = way.start(fresh, network)
    _, curves = training.train(
        problem.train_fn,
        way.optimizer(network),
        problem.data,
        jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(rates)), start.params),
        jnp.concatenate([train_keys] * len(rates)),
        jnp.repeat(jnp.asarray(rates, jnp.float32), seeds),
        num_epochs=problem.num_epochs,
        batch_size=problem.batch_size,
        on_epochs=lambda count: context.advance(count / problem.num_epochs),
        train_apply_fn=problem.train_apply_fn,
    )
    described = methods.described(curves, settings["threshold"])
    by_rate = {
        key: np.reshape(part, (len(rates), seeds, *np.shape(part)[1:]))
        for key, part in described.items()
    }
    shape = by_rate["train_loss"].shape
    return {
        "curves": {
            "learning_rate": np.broadcast_to(np.reshape(rates, (-1, 1, 1)), shape),
            "seed": np.broadcast_to(np.arange(seeds)[:, None], shape),
            **{key: part for key, part in by_rate.items() if key != "epochs_to"},
        },
        "epochs_to": by_rate["epochs_to"],
        "change": change(fresh, start.params, problem),
        "norms": flat(norm_ratios(fresh, start.params)["params"]),
        "log_scales": start.log_scales,
    }


def change(before: PyTree, after: PyTree, problem: methods.Problem) -> np.ndarray:
    """How far the outputs in training mode move on the first batch, relative to their norm."""
    inputs = jnp.asarray(problem.data.train_inputs[: problem.batch_size])

    @jax.jit
    @jax.vmap
    def distance(before: PyTree, after: PyTree) -> jax.Array:
        if problem.train_apply_fn is None:
            old, new = (problem.train_fn(params, inputs) for params in (before, after))
        else:
            old, new = (problem.train_apply_fn(params, inputs)[0] for params in (before, after))
        return jnp.linalg.norm(new - old) / jnp.linalg.norm(old)

    # The default of accelerators would show their rounding of products.
    with jax.default_matmul_precision("highest"):
        return np.asarray(distance(before, after))


def norm_ratios(before: PyTree, after: PyTree) -> PyTree:
    """For each leaf stacked over seeds, the norm after over that before; 1 where it was 0."""

    def ratio(before: jax.Array, after: jax.Array) -> jax.Array:
        old, new = (
            jnp.linalg.norm(leaf.reshape(len(leaf), -1), axis=1) for leaf in (before, after)
        )
        return jnp.where(old > 0, new / jnp.where(old > 0, old, 1), 1)

    return jax.tree.map(ratio, before, after)


def flat(tree: PyTree) -> dict[str, Any]:
    """The leaves of nested dictionaries by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _no_scales(params: PyTree) -> dict[str, np.ndarray]:
    seeds = len(jax.tree.leaves(params)[0])
    return {"largest": np.zeros(seeds), "mean": np.zeros(seeds)}
