"""What a criterion is: something that chooses log-scales, and sums of such things."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._program import roles
from pathcond_jax._solve.objective import MAX, Goal, LogSum, Objective, Ranges, reduce_masses
from pathcond_jax._solve.solution import Solution
from pathcond_jax._solve.solve import solve
from pathcond_jax._spec.arrays import widened
from pathcond_jax._spec.extended_range import largest
from pathcond_jax._spec.log_scales import LogScales
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError


class Criterion(abc.ABC):
    """What ``condition`` balances: it gives a goal, and the solvers do the rest.

    Attributes:
      name: for people.
    """

    name: str

    @abc.abstractmethod
    def goal(self, params: PyTree, spec: ArchSpec) -> Goal:
        """What is to be minimized, or made to agree.

        Args:
          params: the parameters the spec was built for.
          spec: the architecture.

        Returns:
          An objective, or ranges.
        """

    def solve(
        self,
        params: PyTree,
        spec: ArchSpec,
        *,
        method: str | None = None,
        max_steps: int | None = None,
        tol: float | None = None,
        max_log_scale: float | None = None,
        initial: LogScales | Solution | None = None,
    ) -> Solution:
        """The log-scales that this criterion chooses.

        Args:
          params: the parameters the spec was built for.
          spec: the architecture.
          method: as in :func:`pathcond_jax.solve`, and so are the other options.
          max_steps: at most so many steps or sweeps.
          tol: when to stop.
          max_log_scale: the box ``|z| ≤ max_log_scale``; a criterion that has a box of its own
            keeps the smaller one.
          initial: log-scales to start from, or a solution.

        Returns:
          The solution; log-scales 0 and a status where a parameter is not finite.

        Raises:
          SpecError: ``params`` does not fit the spec, the spec has no neuron to rescale, or an
            option cannot be used.

        Example:
          >>> import jax.numpy as jnp
          >>> import pathcond_jax as pathcond
          >>> params = {"a": {"w": jnp.array([[9.0]])}, "b": {"w": jnp.array([[1.0]])}}
          >>> spec = pathcond.chain_spec(params, ["a", "b"])
          >>> solution = pathcond.criteria.norm().solve(params, spec, max_log_scale=0.5)
          >>> solution.log_scales[0].tolist(), pathcond.Status(int(solution.status)).name
          ([-0.5], 'CLIPPED')
        """
        goal = self.goal(params, spec).unless(self.finite(params, spec))
        return solve(
            goal,
            spec,
            method=method,
            max_steps=max_steps,
            tol=tol,
            max_log_scale=max_log_scale,
            initial=initial,
        )

    def finite(self, params: PyTree, spec: ArchSpec) -> bool | jax.Array:
        """Whether all trained entries are, as far as masses of the goal do not tell the solver.

        Args:
          params: the parameters the spec was built for.
          spec: the architecture.

        Returns:
          A scalar boolean.
        """
        return _all_finite(params, spec.symmetry)

    def figures(self, params: PyTree, spec: ArchSpec, log_scales: LogScales) -> Mapping[str, float]:
        """What this criterion can say about a representative, for :func:`pathcond_jax.report`.

        Args:
          params: the parameters that the criterion is for.
          spec: the architecture.
          log_scales: of the representative, as seen from ``params``.

        Returns:
          Numbers, by what they are; none, unless a criterion has some.
        """
        return {}

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

    def goal(self, params: PyTree, spec: ArchSpec) -> Objective:
        """The function; see :class:`Criterion`."""
        return self.objective(params, spec)


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

    def goal(self, params: PyTree, spec: ArchSpec) -> Ranges:
        """The ranges of weights, biases left out; see :class:`Criterion`."""
        values = match_leaves(spec, params)
        # The rest may be keys of random numbers, which have no size.
        weights = {leaf.path for leaf in spec.leaves if leaf.trainable or leaf.state}
        weights -= roles.biases(spec)
        sizes = [
            jnp.abs(value) if leaf.path in weights else np.zeros(leaf.shape, np.float32)
            for leaf, value in zip(spec.leaves, values, strict=True)
        ]
        masses = reduce_masses(spec, jax.tree.unflatten(spec.treedef, sizes), MAX)
        given = None if self.incoming is None else self.incoming(spec)
        return Ranges(LogSum(1.0, -1.0, *masses), given, self.alpha)


def _added(one: Objective, two: Objective) -> Objective:
    limits = [goal.limit for goal in (one, two) if goal.limit is not None]
    linear = [goal.linear for goal in (one, two) if goal.linear is not None]
    return Objective(
        (*one.terms, *two.terms),
        _sum(linear) if linear else None,
        (*one.smooth, *two.smooth),
        (*one.concave, *two.concave),
        min(limits, default=None),
        one.finite & two.finite,
    )


def _sum(parts: Sequence[np.ndarray | jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, map(jnp.asarray, parts))


def _scaled(factor: float | jax.Array, goal: Objective) -> Objective:
    def scale(terms: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(term._replace(weight=factor * term.weight) for term in terms)

    return goal._replace(
        terms=scale(goal.terms),
        linear=None if goal.linear is None else factor * goal.linear,
        smooth=scale(goal.smooth),
        concave=scale(goal.concave),
    )


def _all_finite(params: PyTree, spec: ArchSpec) -> jax.Array:
    values = match_leaves(spec, params)
    trained = [
        widened(value)
        for value, leaf in zip(values, spec.leaves, strict=True)
        if leaf.trainable and leaf.size
    ]
    return jnp.isfinite(largest(trained)).all()
