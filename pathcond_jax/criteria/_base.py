"""What a criterion is: something that chooses log-scales, and sums of such things."""

import abc
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pathcond_jax._program import roles
from pathcond_jax._solve import equal_ranges
from pathcond_jax._solve.difference import solve_difference
from pathcond_jax._solve.objective import MAX, LogSum, Objective, reduce_masses
from pathcond_jax._solve.solution import Solution
from pathcond_jax._solve.solve import solve
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError


class Criterion(abc.ABC):
    """What ``condition`` balances.

    Attributes:
      name: for people.
    """

    name: str

    @abc.abstractmethod
    def solve(self, params: PyTree, spec: ArchSpec, **options: Any) -> Solution:
        """The log-scales that this criterion chooses.

        Args:
          params: the parameters the spec was built for.
          spec: the architecture.
          **options: of :func:`pathcond_jax.solve`.

        Returns:
          The solution; log-scales 0 and a status where a parameter is not finite.
        """

    def __add__(self, other: Any) -> "Criterion":
        if not isinstance(self, Balance) or not isinstance(other, Balance):
            names = " and ".join(getattr(c, "name", repr(c)) for c in (self, other))
            raise SpecError(f"{names} do not add up: only functions of the log-scales do")
        one, two = self.objective, other.objective
        return Balance(
            f"{self.name} + {other.name}",
            lambda params, spec: _added(one(params, spec), two(params, spec)),
        )

    def __mul__(self, factor: float | jax.Array) -> "Criterion":
        if not isinstance(self, Balance):
            raise SpecError(f"{self.name} is no function of the log-scales: it has no multiples")
        if isinstance(factor, (int, float)) and not factor >= 0:
            raise SpecError(f"{self.name} times {factor} is not convex: the factor is negative")
        objective = self.objective
        shown = f"({self.name})" if " + " in self.name else self.name
        number = f"{factor:g}" if isinstance(factor, (int, float)) else "w"
        return Balance(
            f"{number} * {shown}", lambda params, spec: _scaled(factor, objective(params, spec))
        )

    __rmul__ = __mul__

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True, eq=False)
class Balance(Criterion):
    """A criterion that minimizes a function of the log-scales.

    Attributes:
      name: for people.
      objective: from parameters and spec to the function.
    """

    name: str
    objective: Callable[[PyTree, ArchSpec], Objective]

    def solve(self, params: PyTree, spec: ArchSpec, **options: Any) -> Solution:
        """Minimizes the function; see :class:`Criterion`."""
        goal = _poisoned_unless_finite(self.objective(params, spec), spec, params)
        return (
            solve_difference(goal, spec, **options)
            if goal.concave
            else solve(goal, spec, **options)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RangeBalance(Criterion):
    """A criterion that equates logarithms of ranges, neuron by neuron.

    Attributes:
      name: for people.
      incoming: the logarithm of the range that enters each neuron, one array per group; None: the
        largest incoming weight.
      alpha: the weight of the incoming range; the outgoing one has 1 − α.
    """

    name: str
    incoming: Callable[[ArchSpec], tuple[jax.Array, ...]] | None = None
    alpha: float = 0.5

    def solve(self, params: PyTree, spec: ArchSpec, **options: Any) -> Solution:
        """Finds the fixed point; see :class:`Criterion`."""
        values = match_leaves(spec, params)
        biases = roles.biases(spec)
        sizes = [
            jnp.zeros_like(value) if leaf.path in biases else jnp.abs(value)
            for leaf, value in zip(spec.leaves, values, strict=True)
        ]
        masses, logs = reduce_masses(spec, jax.tree.unflatten(spec.treedef, sizes), MAX)
        finite = _all_finite(params, spec.symmetry)
        masses = tuple(jnp.where(finite, mass, jnp.nan) for mass in masses)
        term = LogSum(1.0, -1.0, masses, logs)
        given = None if self.incoming is None else self.incoming(spec)
        return equal_ranges.balance_ranges(term, spec, given, self.alpha, **options)


def _added(one: Objective, two: Objective) -> Objective:
    limits = [goal.limit for goal in (one, two) if goal.limit is not None]
    return Objective(
        (*one.terms, *two.terms),
        tuple(jnp.asarray(a) + jnp.asarray(b) for a, b in zip(one.linear, two.linear, strict=True)),
        (*one.smooth, *two.smooth),
        (*one.concave, *two.concave),
        min(limits, default=None),
    )


def _scaled(factor: float | jax.Array, goal: Objective) -> Objective:
    def scale(terms: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(term._replace(weight=factor * term.weight) for term in terms)

    return goal._replace(
        terms=scale(goal.terms),
        linear=tuple(factor * part for part in goal.linear),
        smooth=scale(goal.smooth),
        concave=scale(goal.concave),
    )


def _poisoned_unless_finite(goal: Objective, spec: ArchSpec, params: PyTree) -> Objective:
    """A parameter that is not finite makes the objective NaN, which solvers report."""
    first, *others = goal.linear
    poisoned = jnp.where(_all_finite(params, spec.symmetry), jnp.asarray(first), jnp.nan)
    return goal._replace(linear=(poisoned, *others))


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(params: PyTree, spec: ArchSpec) -> jax.Array:
    values = match_leaves(spec, params)
    trained = [
        jnp.asarray(value)
        for value, leaf in zip(values, spec.leaves, strict=True)
        if leaf.trainable and leaf.size
    ]
    # The path lifting takes the same maxima, and XLA computes them once.
    finite = [jnp.isfinite(abs(value).max()) for value in trained]
    return functools.reduce(operator.and_, finite)
