"""Arithmetic on terms: a log-scale is a sum of label arrays with coefficients.

Label arrays broadcast against the value, with size 1 on axes along which the scale is constant.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from pathcond_jax._symmetry.equations import WILD, Term

Terms = tuple[Term, ...]


def varies(terms: Iterable[Term], axes: Iterable[int]) -> bool:
    """Whether a scale varies along any of ``axes``."""
    return not axes_of(terms).isdisjoint(axes)


def support(term: Term) -> frozenset[int]:
    """The axes along which a term varies."""
    return frozenset(a for a, n in enumerate(term.labels.shape) if n > 1)


def axes_of(terms: Iterable[Term]) -> frozenset[int]:
    """The axes along which a scale varies."""
    return frozenset[int]().union(*map(support, terms))


def connected(terms: Iterable[Term]) -> list[list[Term]]:
    """Terms that share an axis belong together; constant terms join the first group."""
    groups: list[tuple[frozenset[int], list[Term]]] = []
    constant: list[Term] = []
    for term in terms:
        joined, members = support(term), [term]
        if not joined:
            constant.append(term)
            continue
        apart = []
        for other_support, other in groups:
            if other_support & joined:
                joined, members = joined | other_support, other + members
            else:
                apart.append((other_support, other))
        groups = [*apart, (joined, members)]
    found = [members for _, members in groups] or [[]]
    return [part for part in ([*found[0], *constant], *found[1:]) if part]


def is_wild(terms: Sequence[Term]) -> bool:
    """Whether the value is zero (or infinite) everywhere."""
    return any((term.labels == WILD).all() for term in terms)


def has_wild(terms: Iterable[Term]) -> bool:
    """Whether the value is known to be zero (or infinite) somewhere."""
    return any((term.labels == WILD).any() for term in terms)


def is_wild_somewhere(terms: Iterable[Term]) -> np.ndarray:
    return functools.reduce(np.logical_or, (term.labels == WILD for term in terms))


def powered(terms: Iterable[Term], power: float) -> Terms:
    """The scale of a power."""
    return tuple(Term(power * term.coefficient, term.labels) for term in terms)


def mapped(terms: Iterable[Term], move: Callable[[np.ndarray], np.ndarray]) -> Terms:
    """The scale after an operation that only moves entries."""
    return tuple(Term(term.coefficient, move(term.labels)) for term in terms)
