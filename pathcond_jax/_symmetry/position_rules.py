"""How scales move where values are taken from, or put at, positions.

Known positions move labels exactly; unknown ones demand one scale along the axes that they run
over, but for those along which each slice has positions of its own.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program.primitives import SCATTER_PARAMETERS, runs_only
from pathcond_jax._symmetry.equations import WILD, Term
from pathcond_jax._symmetry.homogeneous import keeps_scale
from pathcond_jax._symmetry.structural_rules import narrowed
from pathcond_jax._symmetry.terms import Terms, mapped, varies
from pathcond_jax._symmetry.values import MAX_JOINT, RULES, Scale, Scope, pin

rule = RULES.rule


def _places(scope: Scope) -> np.ndarray | None:
    """Where a scatter puts each entry of its update, -1 for nowhere; None if that is not known."""
    indices, shape, full = scope.constant(1), scope.shape(2), scope.shape(0)
    if indices is None or math.prod(full) > MAX_JOINT:
        return None
    numbers = scope.params["dimension_numbers"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    hidden = (*numbers.inserted_window_dims, *batching)
    windows = iter(numbers.update_window_dims)
    sizes = tuple(1 if a in hidden else shape[next(windows)] for a in range(len(full)))
    taken = jax.lax.GatherDimensionNumbers(
        offset_dims=numbers.update_window_dims,
        collapsed_slice_dims=numbers.inserted_window_dims,
        start_index_map=numbers.scatter_dims_to_operand_dims,
        operand_batching_dims=batching,
        start_indices_batching_dims=tuple(getattr(numbers, "scatter_indices_batching_dims", ())),
    )
    modes = jax.lax.GatherScatterMode
    clips = scope.params["mode"] == modes.CLIP
    with jax.ensure_compile_time_eval():
        positions = jnp.arange(math.prod(full), dtype=np.int32).reshape(full)
        mode = modes.CLIP if clips else modes.FILL_OR_DROP
        found = jax.lax.gather(
            positions, jnp.asarray(indices), taken, sizes, mode=mode, fill_value=-1
        )
    places = np.asarray(found).astype(np.int64)
    promised = scope.params["mode"] == modes.PROMISE_IN_BOUNDS and (places < 0).any()
    return None if promised else places


def _put(scope: Scope, scale: Scale, update: Scale, places: np.ndarray) -> Terms:
    """Scales written at known places, those of the update; none where a place is below 0."""
    full = scope.shape(0)
    labels = np.array(np.broadcast_to(scope.single(scale, len(full)), full)).reshape(-1)
    written = places >= 0
    new = np.broadcast_to(scope.single(update, places.ndim), places.shape)
    labels[places[written]] = new[written]
    return (Term(1.0, narrowed(labels.reshape(full))),)


def _are_distinct(places: np.ndarray) -> bool:
    met = places[places >= 0]
    return len(np.unique(met)) == met.size


@rule("dynamic_update_slice")
def dynamic_update_slice(scope: Scope, scale: Scale, update: Scale, *starts: Scale) -> list[Terms]:
    """Part of a value overwritten."""
    full, part = scope.shape(0), scope.shape(1)
    cut = [a for a, n in enumerate(part) if n < full[a]]
    known = [scope.constant(k) for k in range(2, 2 + len(full))]
    if cut and all(known[a] is not None for a in cut) and math.prod(full) <= MAX_JOINT:
        begin = [int(x) if x is not None else 0 for x in known]
        begin = [min(max(x, 0), n - m) for x, n, m in zip(begin, full, part, strict=True)]
        where = tuple(slice(x, x + m) for x, m in zip(begin, part, strict=True))
        return [_put(scope, scale, update, np.arange(math.prod(full)).reshape(full)[where])]
    parts = [Scale(scope.along(s.terms, cut), s.signal) for s in (scale, update)]
    return [scope.equate(parts, len(full), "overwrites values of another scale")]


@rule("scatter", reads=(*SCATTER_PARAMETERS, "update_jaxpr"))
def overwrite(scope: Scope, scale: Scale, indices: Scale, update: Scale) -> list[Terms]:
    """Values written at positions, or what a program makes of those that stand there."""
    places = _places(scope)
    if scope.params["update_jaxpr"] is not None:
        return _remade(scope, scale, update, places)
    if places is None or not _are_distinct(places):
        return scatter(scope, scale, indices, update)
    return [_put(scope, scale, update, places)]


def _remade(scope: Scope, scale: Scale, update: Scale, places: np.ndarray | None) -> list[Terms]:
    """What a program makes of entries: all keep their scale, or only those not met do."""
    because = "has an unusual 'update_jaxpr'"
    scope.pin(update, because=because)
    if keeps_scale(scope.analysis, scope.node.bodies[0], scaled=1):
        return [scale.terms]
    if places is None:
        return pin(scope, scale, because=because)
    full = scope.shape(0)
    labels = np.array(np.broadcast_to(scope.single(scale, len(full)), full)).reshape(-1)
    met = places[places >= 0]
    scope.require([Term(1.0, labels[met])], because)
    labels[met] = 0
    return [(Term(1.0, narrowed(labels.reshape(full))),)]


@rule("scatter-mul", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("mul")})
def multiply_at(scope: Scope, scale: Scale, indices: Scale, update: Scale) -> list[Terms]:
    """Factors at positions: known ones, each met once, or factors of the scale 1."""
    places = _places(scope)
    if places is None or not _are_distinct(places):
        scope.pin(update)
        return [scale.terms]
    return [(*scale.terms, *_put(scope, Scale(), update, places))]


@rule("scatter-add", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("add")})
@rule("scatter-sub", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("sub")})
@rule("scatter-max", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("max")})
@rule("scatter-min", reads=SCATTER_PARAMETERS, requires={"update_jaxpr": runs_only("min")})
def combine_at(scope: Scope, scale: Scale, indices: Scale, update: Scale) -> list[Terms]:
    """Values added or compared at positions: where they meet, they have one scale."""
    places = _places(scope)
    if places is None:
        return scatter(scope, scale, indices, update)
    full, met = scope.shape(0), places[places >= 0]
    labels = np.array(np.broadcast_to(scope.single(scale, len(full)), full)).reshape(-1)
    new = np.broadcast_to(scope.single(update, places.ndim), places.shape)[places >= 0]
    # Where nothing stood, what comes has its own scale; of several, one that is no zero.
    filled = (labels[met] == WILD) & (new != WILD)
    labels[met[filled]] = new[filled]
    scope.require([Term(1.0, labels[met]), Term(-1.0, new)], "joins values of another scale")
    return [(Term(1.0, narrowed(labels.reshape(full))),)]


def scatter(scope: Scope, scale: Scale, indices: Scale, update: Scale) -> list[Terms]:
    """Values written or added at positions that depend on values."""
    numbers, full = scope.params["dimension_numbers"], scope.shape(0)
    hidden = (*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ()))
    windows = [a for a in range(len(full)) if a not in hidden]
    source = dict(zip(windows, numbers.update_window_dims, strict=True))
    whole = {a: b for a, b in source.items() if scope.shape(2)[b] == full[a]}
    kept = scope.along(scale.terms, set(range(len(full))) - set(whole))
    moved = scope.along(update.terms, set(range(len(scope.shape(2)))) - set(whole.values()))

    def laid_out(labels: np.ndarray) -> np.ndarray:
        order = sorted(whole, key=whole.__getitem__)
        labels = labels.reshape([labels.shape[whole[a]] for a in order])
        shape = [labels.shape[order.index(a)] if a in whole else 1 for a in range(len(full))]
        return labels.transpose(np.argsort(order)).reshape(shape)

    parts = [Scale(kept, scale.signal), Scale(mapped(moved, laid_out), update.signal)]
    return [scope.equate(parts, len(full), "joins values of another scale")]


@rule(
    "gather",
    reads=(
        *("dimension_numbers", "slice_sizes", "indices_are_sorted", "mode", "unique_indices"),
        "fill_value",
    ),
)
def gather(scope: Scope, scale: Scale, indices: Scale) -> list[Terms]:
    """Values taken at given positions."""
    numbers = scope.params["dimension_numbers"]
    sizes, full = scope.params["slice_sizes"], scope.shape(0)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    indexed = [a for a, n in enumerate(sizes) if n < full[a] or a in batching]
    known = scope.constant(1)
    if not _fill_fits(scope.params["fill_value"]) and not _inside(scope, known):
        scope.pin(scale, because="fills in a constant that fixes the scale")
        return [()]
    if known is not None and varies(scale.terms, indexed):
        scope.index(scale, indexed if known[..., 0].size == 1 else ())
        return [mapped(scale.terms, lambda x: _gather_labels(scope, x, known, indexed))]
    terms = scope.along(scale.terms, set(indexed) - set(batching))
    offsets = [a for a in range(len(full)) if a not in numbers.collapsed_slice_dims + batching]
    rank = len(scope.out_shape())
    own = [a for a in range(rank) if a not in numbers.offset_dims]
    steps = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    target = dict(zip(offsets, numbers.offset_dims, strict=True))
    target |= {a: own[step] for a, step in zip(batching, steps, strict=True)}
    order = sorted(target, key=target.__getitem__)

    def move(labels: np.ndarray) -> np.ndarray:
        shape = [1] * rank
        for axis in order:
            shape[target[axis]] = labels.shape[axis]
        taken = labels.squeeze(tuple(a for a in range(len(full)) if a not in target))
        kept = sorted(target)
        return taken.transpose([kept.index(a) for a in order]).reshape(shape)

    return [mapped(terms, move)]


def _fill_fits(value: Any) -> bool:
    """Whether what stands in for entries out of bounds has every scale; None is NaN."""
    return value is None or bool(np.asarray(value) == 0) or not np.isfinite(value)


def _inside(scope: Scope, indices: np.ndarray | None) -> bool:
    """Whether indices are known, and none of them is out of bounds."""
    if indices is None:
        return False
    numbers, sizes = scope.params["dimension_numbers"], scope.params["slice_sizes"]
    last = [scope.shape(0)[axis] - sizes[axis] for axis in numbers.start_index_map]
    return bool(((indices >= 0) & (indices <= np.asarray(last))).all())


def _gather_labels(
    scope: Scope, labels: np.ndarray, indices: np.ndarray, indexed: Sequence[int]
) -> np.ndarray:
    """Gathers at known indices, the axes that are not indexed left at their size in ``labels``."""
    full = [n if a in indexed else labels.shape[a] for a, n in enumerate(scope.shape(0))]
    sizes = [
        n if a in indexed else labels.shape[a] for a, n in enumerate(scope.params["slice_sizes"])
    ]
    params = {**scope.params, "fill_value": WILD, "slice_sizes": tuple(sizes)}
    # Label numbers are positions in one list, below 2^31.
    wide = np.broadcast_to(labels, full).astype(np.int32)
    with jax.ensure_compile_time_eval():
        moved = scope.node.primitive.bind(jnp.asarray(wide), jnp.asarray(indices), **params)
    return np.asarray(moved).astype(np.int64)
