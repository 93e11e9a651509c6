"""What is asked of every model: its neurons, the change by a rescaling, the time of the trace."""

import itertools
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from fuzzing.subject import directions
from zoo.network import draw

import pathcond_jax as pathcond
from real_models.model import MODELS, Model

# Entries of networks whose Jacobian is decomposed.
MOST_ENTRIES = 1000
# Singular values of a Jacobian with columns of length one. An ε that is added to a variance leaves
# more than this of a scale that it breaks.
_RANK = 1e-10
# Of one draw of the parameters.
_ROWS = 8


class Measurement(NamedTuple):
    """Of one model.

    Attributes:
      parameters: trainable entries.
      neurons: those of the spec.
      change: the largest relative change of an output under log-scales from N(0, 1).
      precision: the machine epsilon of the lowest precision that the model computes in.
      seconds: how long ``trace_spec`` takes.
      failed: the rules that raised.
      live: neurons of the spec that the outputs depend on; None for large models.
      dimension: of all diagonal rescalings that keep the outputs; None for large models.
    """

    parameters: int
    neurons: int
    change: float
    precision: float
    seconds: float
    failed: list[str]
    live: int | None = None
    dimension: int | None = None


def measure(name: str) -> Measurement:
    """Builds the model and measures it."""
    built = MODELS[name]()
    model = built._replace(apply_fn=jax.jit(built.apply_fn))
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        spec = pathcond.trace_spec(model.apply_fn, model.params, *model.inputs)
    seconds = time.perf_counter() - start
    measured = Measurement(
        parameters=spec.num_parameters,
        neurons=spec.num_neurons,
        change=pathcond.check_spec(spec, model.params, *model.inputs, trials=1),
        precision=_precision(model),
        seconds=seconds,
        failed=[str(w.message) for w in said if w.category.__name__ == "RuleFailedWarning"],
    )
    if spec.num_parameters > MOST_ENTRIES:
        return measured
    live, dimension = _dimensions(model, spec)
    return measured._replace(live=live, dimension=dimension)


def _precision(model: Model) -> float:
    """The largest machine epsilon of parameters and of what is computed from them."""
    closed = jax.make_jaxpr(model.apply_fn)(model.params, *model.inputs)
    kept = {jnp.result_type(leaf) for leaf in jax.tree.leaves(model.params)}
    computed = {*kept, *_dtypes(closed.jaxpr)}
    floating = {dtype for dtype in computed if jnp.issubdtype(dtype, jnp.floating)}
    return max(float(jnp.finfo(dtype).eps) for dtype in floating)


def _dtypes(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        # A number's logarithm or a random mask in float32 is constant, a parameter is not.
        yield from (v.aval.dtype for v in eqn.outvars if hasattr(v.aval, "dtype"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _dtypes(getattr(inner, "jaxpr", inner))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _dimensions(model: Model, spec: pathcond.ArchSpec) -> tuple[int, int]:
    """Of the spec's rescalings, and of all that keep the outputs, on entries that matter."""
    trainable = np.concatenate([np.full(leaf.size, leaf.trainable) for leaf in spec.leaves])
    drawn = _rows(model)
    before, rank, rows = -1, 0, np.zeros((0, len(trainable)))
    # Outputs may depend on each other, so that as many rows as entries need not suffice.
    while rank > before:
        more = itertools.islice(drawn, 1 + trainable.sum() // _ROWS)
        rows = np.concatenate([rows, *more])
        lengths = np.linalg.norm(rows, axis=0)
        live = np.flatnonzero(trainable & (lengths > 1e-9 * lengths.max(initial=0.0)))
        values = np.linalg.svd(rows[:, live] / lengths[live], compute_uv=False)
        before, rank = rank, int((values > _RANK * values.max(initial=0.0)).sum())
    found = directions(spec)[live]
    return int(np.linalg.matrix_rank(found)) if found.size else 0, len(live) - rank


def _rows(model: Model) -> Iterator[np.ndarray]:
    """Derivatives of a few mixtures of the outputs with respect to log |θ|, of length one.

    Each time at other parameters and inputs.
    """

    @jax.jit
    def derivatives(params: Any, inputs: list[jax.Array], key: jax.Array) -> jax.Array:
        leaves, treedef = jax.tree.flatten(params)
        floating = _floating(leaves)

        def outputs(moving: list[jax.Array]) -> jax.Array:
            for k, leaf in zip(floating, moving, strict=True):
                leaves[k] = leaf
            results = jax.tree.leaves(model.apply_fn(treedef.unflatten(leaves), *inputs))
            return jnp.concatenate([results[k].reshape(-1) for k in _floating(results)])

        moving = [leaves[k] for k in floating]
        value, pull_back = jax.vjp(outputs, moving)
        mixtures = jax.random.normal(key, (_ROWS, value.size), value.dtype)
        (gradients,) = jax.vmap(pull_back)(mixtures)
        blocks = [jnp.zeros((_ROWS, leaf.size)) for leaf in jax.tree.leaves(params)]
        for k, value, gradient in zip(floating, moving, gradients, strict=True):
            blocks[k] = (gradient * value).reshape(_ROWS, -1)
        rows = jnp.concatenate(blocks, axis=1)
        return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-300)

    for seed in itertools.count():
        rng = np.random.default_rng(seed)
        inputs = [_redrawn(rng, x) for x in model.inputs]
        yield np.nan_to_num(derivatives(draw(model.params, seed), inputs, jax.random.key(seed)))


def _floating(leaves: list[jax.Array]) -> list[int]:
    return [k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _redrawn(rng: np.random.Generator, value: jax.Array) -> jax.Array:
    """Random numbers of the same kind: integers are ids, of which others are as valid."""
    if jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.asarray(rng.normal(size=value.shape), value.dtype)
    return jnp.asarray(rng.permutation(np.asarray(value).reshape(-1)).reshape(value.shape))
