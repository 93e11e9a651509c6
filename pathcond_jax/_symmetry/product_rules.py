"""How positive scales pass through products of the entries of one value.

The scales of all factors add up: a result has one term per factor, which holds the label of that
factor wherever it is met, and 0 elsewhere.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pathcond_jax._symmetry.equations import Term
from pathcond_jax._symmetry.terms import Terms, has_wild, mapped, powered
from pathcond_jax._symmetry.values import MAX_JOINT, RULES, Scale, Scope, pin

# Products of more factors are followed only where all have one scale.
_MAX_FACTORS = 16

rule = RULES.rule


class Met(NamedTuple):
    """Which entry along an axis a factor is, at each position of the result.

    Attributes:
      entry: its index.
      inside: whether there is one; the others are 1.
    """

    entry: np.ndarray
    inside: np.ndarray


@rule("reduce_prod", reads=("axes",))
def _reduce_product(scope: Scope, scale: Scale) -> list[Terms]:
    return product_along(scope, scale, tuple(scope.params["axes"]))


def product_along(scope: Scope, scale: Scale, axes: tuple[int, ...]) -> list[Terms]:
    """Products along axes; of many factors, which have one scale then."""
    sizes = [scope.shape(0)[axis] for axis in axes]
    if has_wild(scale.terms):
        return pin(scope, scale)
    if math.prod(sizes) > _MAX_FACTORS:
        kept = scope.along(scale.terms, axes)
        return [powered(mapped(kept, lambda x: x.squeeze(axes)), float(math.prod(sizes)))]
    one = np.ones(1, bool)
    places = [
        {axis: Met(np.array([at]), one) for axis, at in zip(axes, place, strict=True)}
        for place in np.ndindex(*sizes)
    ]
    return [mapped(_factors(scale.terms, places), lambda x: x.squeeze(axes))]


@rule("cumprod", reads=("axis", "reverse"))
def _cumulative_product(scope: Scope, scale: Scale) -> list[Terms]:
    """Products of the entries so far."""
    axis, size = scope.params["axis"], scope.shape(0)[scope.params["axis"]]
    if has_wild(scale.terms) or size > _MAX_FACTORS:
        return pin(scope, scale)
    positions = np.arange(size)
    so_far = np.less_equal if scope.params["reverse"] else np.greater_equal
    places = [{axis: Met(np.full(size, at), so_far(positions, at))} for at in range(size)]
    return [_factors(scale.terms, places)]


def product_of_windows(scope: Scope, scale: Scale) -> Terms | None:
    """Products of the entries in each window; None if these are too many to be followed."""
    params, ndim = scope.params, len(scope.shape(0))
    windows = params["window_dimensions"]
    too_many = math.prod(windows) > _MAX_FACTORS or math.prod(scope.out_shape()) > MAX_JOINT
    if too_many or has_wild(scale.terms):
        return None
    places = [
        {axis: _met_by_window(scope, axis, offset[axis]) for axis in range(ndim)}
        for offset in np.ndindex(*windows)
    ]
    return _factors(scale.terms, places)


def _met_by_window(scope: Scope, axis: int, offset: int) -> Met:
    """The entries along an axis that are number ``offset`` in their windows."""
    params = scope.params
    gap, (low, _) = params["base_dilation"][axis], params["padding"][axis]
    first = np.arange(scope.out_shape()[axis]) * params["window_strides"][axis] - low
    at = first + offset * params["window_dilation"][axis]
    inside = (at >= 0) & (at % gap == 0) & (at // gap < scope.shape(0)[axis])
    return Met(np.where(inside, at // gap, 0), inside)


def _factors(terms: Terms, places: Sequence[dict[int, Met]]) -> Terms:
    """The terms of a product, whose factors are at ``places``, by axis."""
    return tuple(
        Term(term.coefficient, _at(term.labels, place)) for place in places for term in terms
    )


def _at(labels: np.ndarray, place: dict[int, Met]) -> np.ndarray:
    for axis, met in place.items():
        alike = labels.shape[axis] == 1
        if alike and met.inside.all():
            continue
        taken = labels.take(np.zeros_like(met.entry) if alike else met.entry, axis)
        shape = [len(met.inside) if a == axis else 1 for a in range(labels.ndim)]
        labels = np.where(met.inside.reshape(shape), taken, 0)
    return labels
