"""The methods that the studies compare, by name, and a fair comparison of them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pathcond_jax as pathcond
from pathcond_jax.experiments import training
from pathcond_jax.experiments.data import Dataset

PyTree = Any


class Method(NamedTuple):
    """A way to prepare parameters.

    Attributes:
      options: of ``pathcond.condition``, as pairs; None: leave the parameters alone.
      every: repeat it after every so many epochs; 0: only at the start.
    """

    options: tuple[tuple[str, Any], ...] | None
    every: int = 0


def conditioning(*, every: int = 0, **options: Any) -> Method:
    """A method from the options of ``pathcond.condition``."""
    return Method(tuple(sorted(options.items())), every)


def sweeps(count: int, *, every: int = 0) -> Method:
    """The paper's algorithm; with 10 sweeps, it stops early as the authors' does."""
    tol = 0.0 if count < 10 else 1e-2
    return conditioning(every=every, method="coordinate", max_steps=count, tol=tol)


NONE, TEN_SWEEPS, OPTIMUM, ENORM = "none", "10 sweeps", "optimum", "enorm"
METHODS = {
    NONE: Method(None),
    "1 sweep": sweeps(1),
    "3 sweeps": sweeps(3),
    TEN_SWEEPS: sweeps(10),
    OPTIMUM: conditioning(),
    "norm 0.1": conditioning(norm_weight=0.1),
    "norm 0.3": conditioning(norm_weight=0.3),
    "norm 1": conditioning(norm_weight=1.0),
    "1 sweep every 5": sweeps(1, every=5),
    "norm 0.3 every 5": conditioning(norm_weight=0.3, every=5),
    ENORM: conditioning(criterion="enorm"),
}


class Problem(NamedTuple):
    """A network and how it is trained.

    Attributes:
      apply_fn: the network; ``trace_spec`` reads it.
      train_fn: the same function in the form that trains fastest.
      init_fn: maps a key to parameters.
      data: the data set.
      num_epochs: passes over it.
      batch_size: examples per step.
      goal: what to minimize.
      train_apply_fn: see ``training.train``.
    """

    apply_fn: Callable[..., Any]
    train_fn: Callable[..., Any]
    init_fn: Callable[[jax.Array], PyTree]
    data: Dataset
    num_epochs: int
    batch_size: int
    goal: training.Goal = training.CLASSIFICATION
    train_apply_fn: Callable[..., Any] | None = None


def problem(
    model: Any,
    data: Dataset,
    *,
    num_epochs: int,
    batch_size: int,
    goal: training.Goal = training.CLASSIFICATION,
    trained_model: Any = None,
) -> Problem:
    """A problem with a Flax linen module without running statistics."""
    example = jnp.asarray(data.train_inputs[:1])
    return Problem(
        model.apply,
        (trained_model or model).apply,
        lambda key: model.init(key, example),
        data,
        num_epochs,
        batch_size,
        goal,
    )


def trace(task: Problem) -> pathcond.ArchSpec:
    """The spec of a problem's network."""
    params = jax.eval_shape(task.init_fn, jax.random.key(0))
    inputs = task.data.train_inputs
    example = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)
    return pathcond.trace_spec(task.apply_fn, params, example)


def unbalanced(key: jax.Array, params: PyTree, spec: pathcond.ArchSpec, spread: float) -> PyTree:
    """The same function from parameters rescaled by log-scales uniform between ± ``spread``."""
    keys = jax.random.split(key, len(spec.groups))
    log_scales = tuple(
        jax.random.uniform(k, (group.size,), minval=-spread, maxval=spread)
        for k, group in zip(keys, spec.groups, strict=True)
    )
    return pathcond.rescale(params, spec, log_scales)


def prepare(
    params: PyTree, spec: pathcond.ArchSpec, method: Method
) -> tuple[PyTree, dict[str, np.ndarray]]:
    """Applies a method to stacked parameters (runs, ...); sizes of its log-scales, (runs,)."""
    runs = jax.tree.leaves(params)[0].shape[0]
    if method.options is None:
        return params, {"largest": np.zeros(runs), "mean": np.zeros(runs)}
    options = dict(method.options)

    def one(params: PyTree) -> tuple[PyTree, tuple[jax.Array, ...]]:
        conditioned, solution = pathcond.condition(params, spec, **options)
        return conditioned, solution.log_scales

    # Not jitted: the solvers are, and then compile once for all numbers of sweeps and weights.
    prepared, log_scales = jax.vmap(one)(params)
    sizes = np.abs(np.concatenate([np.asarray(z) for z in log_scales], axis=1))
    return prepared, {"largest": sizes.max(axis=1), "mean": sizes.mean(axis=1)}


def compare(
    task: Problem,
    starts: Mapping[str, PyTree],
    spec: pathcond.ArchSpec,
    keys: jax.Array,
    learning_rate: float,
    *,
    again: Mapping[str, Method] | None = None,
    make_optimizer: training.MakeOptimizer = optax.sgd,
    advance: Callable[[float], None] = lambda _: None,
) -> dict[str, training.Curves]:
    """Trains every start of every seed, all with the same batches, by the same function.

    Args:
      task: the problem.
      starts: name to stacked parameters (seeds, ...).
      spec: for methods that are repeated.
      keys: (seeds,): the batches of each seed.
      learning_rate: of all.
      again: the methods of those starts that are repeated while training.
      make_optimizer: maps a learning rate to an optimizer.
      advance: called with the fraction just done.

    Returns:
      Name to curves (seeds, epochs).
    """
    again = {name: method for name, method in (again or {}).items() if method.every}
    groups: dict[Method | None, list[str]] = {}
    for name in starts:
        groups.setdefault(again.get(name), []).append(name)
    curves = {}
    for method, names in groups.items():
        share = len(names) / len(starts) / task.num_epochs
        _, trained = training.train(
            task.train_fn,
            make_optimizer,
            task.data,
            jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(starts[n] for n in names)),
            jnp.concatenate([keys] * len(names)),
            jnp.full(len(names) * len(keys), learning_rate),
            num_epochs=task.num_epochs,
            batch_size=task.batch_size,
            epochs_per_call=method.every if method else 1,
            on_epochs=functools.partial(_advance, advance, share),
            goal=task.goal,
            train_apply_fn=task.train_apply_fn,
            between=None if method is None else functools.partial(_repeat, spec, method),
        )
        for number, name in enumerate(names):
            rows = slice(number * len(keys), (number + 1) * len(keys))
            curves[name] = training.Curves(*(part[rows] for part in trained))
    return curves


def _repeat(spec: pathcond.ArchSpec, method: Method, params: PyTree, _: int) -> PyTree:
    return prepare(params, spec, method)[0]


def _advance(advance: Callable[[float], None], share: float, count: int) -> None:
    advance(share * count)


def run_methods(
    task: Problem,
    names: Sequence[str],
    *,
    num_seeds: int,
    seed: int,
    learning_rate: float,
    threshold: float,
    advance: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """One point of a grid: the named methods from the same initializations.

    Args:
      task: the problem.
      names: of ``METHODS``.
      num_seeds: how many initializations.
      seed: of all of them.
      learning_rate: of plain SGD.
      threshold: of the training score, for ``epochs_to``.
      advance: called with the fraction just done.

    Returns:
      For each name: thinned curves with the epoch of each point, the epochs to the threshold, and
      the sizes of the log-scales, all by seed.
    """
    spec = trace(task)
    init_keys, train_keys = jax.random.split(jax.random.key(seed), (2, num_seeds))
    params = jax.jit(jax.vmap(task.init_fn))(init_keys)
    prepared = {name: prepare(params, spec, METHODS[name]) for name in names}
    curves = compare(
        task,
        {name: start for name, (start, _) in prepared.items()},
        spec,
        train_keys,
        learning_rate,
        again={name: METHODS[name] for name in names},
        advance=advance,
    )
    return {
        name: described(curves[name], threshold) | {"log_scales": prepared[name][1]}
        for name in names
    }


def described(curves: training.Curves, threshold: float, points: int = 200) -> dict[str, Any]:
    """Curves (seeds, epochs) for the store: at most about ``points`` epochs, the last one kept."""
    num_epochs = curves.train_loss.shape[1]
    kept = np.unique(np.r_[: num_epochs : -(-num_epochs // points), num_epochs - 1])
    thinned = {name: part[:, kept] for name, part in curves._asdict().items()}
    reached = training.epochs_to(curves.train_accuracy, threshold)
    epochs = np.broadcast_to(kept + 1, thinned["train_loss"].shape)
    return {"epoch": epochs, "epochs_to": reached, **thinned}


def largest_stable(
    learning_rates: Sequence[float], final_losses: np.ndarray, initial_losses: np.ndarray
) -> np.ndarray:
    """The largest learning rate up to which every smaller one too has lowered the loss.

    Args:
      learning_rates: ascending, (rates,).
      final_losses: (rates, seeds); what is not finite is a failure.
      initial_losses: (seeds,).

    Returns:
      (seeds,); 0 where already the smallest failed.
    """
    # A comparison with nan is false, as it should be.
    stable = np.cumprod(np.asarray(final_losses) < initial_losses, axis=0).sum(axis=0)
    return np.concatenate([[0.0], learning_rates])[stable]
