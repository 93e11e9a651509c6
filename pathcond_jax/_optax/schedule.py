"""When an update of an optimizer is due for conditioning, and what it then becomes."""

import functools
import operator
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from pathcond_jax._action.condition import condition
from pathcond_jax._action.rescale import LogScales, rescale, round_to_powers_of_two
from pathcond_jax._optax.announcement import ALTERED_BY, corners, differ, joined, num_remembered
from pathcond_jax._optax.matching import Completion, Values, check_all_held, held, whole
from pathcond_jax._optax.transport import parameter_shapes
from pathcond_jax._solve.solution import Status
from pathcond_jax._spec.arrays import compute_dtype, is_traced
from pathcond_jax._spec.spec import ArchSpec, no_neuron
from pathcond_jax._spec.types import Leaf, PyTree, SpecError, listed


class ReconditionState(NamedTuple):
    """State of :func:`pathcond_jax.recondition`.

    Attributes:
      num_updates: the number of updates so far, int32.
      log_scales: the log-scales that the latest update applied, one ``(group.size,)`` array per
        group; zeros if it was not due. ``rescale(average, spec, state.log_scales)`` takes along
        what is kept outside of the optimizer.
      status: the :class:`Status` of the latest solve, int32.
      announced: a few entries of each rescaled parameter as the latest due update leaves them.
      num_altered: after how many due updates the parameters were others than announced, int32.
        Above 0, something changes the updates on their way and with them the network's function,
        such as an element that follows in the chain.
    """

    num_updates: jax.Array
    log_scales: LogScales
    status: jax.Array
    announced: jax.Array
    num_altered: jax.Array


class Outcome(NamedTuple):
    """What becomes of an update, and what the state remembers of it."""

    updates: PyTree
    log_scales: LogScales
    status: jax.Array
    announced: jax.Array

    def state(self, num_updates: jax.Array, num_altered: jax.Array) -> ReconditionState:
        """The state after the update."""
        return ReconditionState(
            num_updates, self.log_scales, self.status, self.announced, num_altered
        )


class Rule:
    """When updates are due, and what a due update becomes."""

    def __init__(
        self,
        name: str,
        spec: ArchSpec,
        every: int,
        start: int,
        rounding: str | None,
        **options: Any,
    ) -> None:
        check_is_spec(spec)
        if not spec.groups:
            raise SpecError(no_neuron(spec))
        if rounding not in (None, "power_of_two"):
            raise SpecError(f"rounding is {rounding!r}; there are None and 'power_of_two'")
        self._name, self._spec, self._rounding = name, spec, rounding
        self._every = integer("every", every, 1)
        self._start = integer("start", start, 0)
        self._solve = lambda params: condition(params, spec, **options)[1]
        self._dtype = widest_dtype(spec)
        self._complete = Completion(name, spec, lambda params: self._solve(params).log_scales)
        # Options and networks that cannot be used raise here instead of at the first update.
        jax.eval_shape(self._solve, parameter_shapes(spec))

    def init(self) -> ReconditionState:
        """The state before the first update."""
        # Each a buffer of its own: jax.jit donates no buffer twice.
        num_updates, status, num_altered = (jnp.zeros((), jnp.int32) for _ in range(3))
        announced = jnp.zeros((num_remembered(list(self._rescaled.values())),), self._dtype)
        return ReconditionState(num_updates, self._no_scales(), status, announced, num_altered)

    def check_init(self, params: PyTree) -> None:
        """Raises SpecError if the optimizer cannot be used for ``params``."""
        # optax.tree_map_params calls init with a placeholder, which has no leaves.
        if jax.tree.leaves(params):
            self._check_params(params)

    def begin(
        self, params: PyTree, state: ReconditionState, extra: Mapping[str, Any]
    ) -> tuple[Values, jax.Array]:
        """What an update starts from.

        Returns:
          The values that the criterion reads and the optimizer does not hold, and the new
          ``num_altered``.

        Raises:
          SpecError: the parameters, the state or the extra arguments do not fit the spec.
        """
        if params is None:
            raise missing_params(self._name)
        self._check_params(params)
        self._check_state(state)
        first = _copies(params)[0]
        others = self._complete(held(self._spec, first, "params"), first, extra)
        here = joined(corners(self._movable(params, "params")), self._dtype)
        altered = self.due(state.num_updates) & differ(state.announced, here)
        if not is_traced(altered) and altered:
            warnings.warn(
                f"the parameters are not those that the last due update of {self._name} leads to, "
                "so the network's function has changed: " + ALTERED_BY[self._name],
                stacklevel=3,
            )
        return others, state.num_altered + altered.astype(jnp.int32)

    def due(self, count: jax.Array) -> jax.Array:
        """Whether the update of this number is due, counted from 1."""
        named = (count % self._every == 0) | (count == self._start)
        return named & (count > 0)

    def due_after_reading(self, count: jax.Array, num_altered: jax.Array) -> jax.Array:
        """As ``due``, and known no sooner than what ``begin`` reads of the parameters.

        Donated parameters are overwritten by the sum that the update leads to. If something might
        read them later, XLA copies all of them first, at every step.
        """
        # Never negative, which XLA does not know.
        return self.due(count) & (num_altered >= 0)

    def stay(
        self, updates: PyTree, params: PyTree, others: Values, state: ReconditionState
    ) -> Outcome:
        """An update that is not due."""
        del others
        kept = [
            jnp.asarray(u, self._emitted_dtype(k, u, p))
            for _, k, u, p in self._pairs(updates, params)
        ]
        updates = jax.tree.unflatten(jax.tree.structure(updates), kept)
        return Outcome(updates, self._no_scales(), state.status, state.announced)

    def move(
        self, updates: PyTree, params: PyTree, others: Values, state: ReconditionState
    ) -> Outcome:
        """A due update: to the conditioned representative of where it was going."""
        del state
        going_to = self._laid(self.added(params, updates), "params")
        solution = self._solve(whole(self._spec, {**others, **going_to[0]}))
        log_scales, shortened = self._representable(solution.log_scales)
        if self._rounding is not None:
            log_scales = round_to_powers_of_two(log_scales)
        # Added anew: kept beside what the solver needs, the sum would be one more copy in memory.
        anew = self._laid(self.added(*lax.optimization_barrier((params, updates))), "params")
        ends = [
            jax.tree.leaves(rescale(whole(self._spec, {**others, **copy}), self._spec, log_scales))
            for copy in anew
        ]
        finite = solution.status != Status.NON_FINITE

        def emitted(copy: int, k: int, u: Any, p: Any) -> jax.Array:
            dtype = self._emitted_dtype(k, u, p)
            kept = jnp.asarray(u, dtype)
            if k not in self._rescaled:
                return kept
            return jnp.where(finite, ends[copy][k].astype(dtype) - jnp.asarray(p, dtype), kept)

        moved = jax.tree.unflatten(
            jax.tree.structure(updates), [emitted(*pair) for pair in self._pairs(updates, params)]
        )
        clipped = jnp.asarray(Status.CLIPPED, jnp.int32)
        status = jnp.where(
            shortened & (solution.status == Status.CONVERGED), clipped, solution.status
        )
        log_scales = tuple(z.astype(self._dtype) for z in log_scales)
        return Outcome(moved, log_scales, status, self._announced(params, moved))

    def added(self, params: PyTree, updates: PyTree) -> PyTree:
        """What optax.apply_updates does, also under strict promotion."""
        sums = [
            _sum(p, u, self._emitted_dtype(k, u, p)) for _, k, u, p in self._pairs(updates, params)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), sums)

    def check_updates(self, updates: PyTree, params: PyTree) -> None:
        """Raises SpecError if the updates are not those of the parameters."""
        self._pairs(updates, params)

    @functools.cached_property
    def _rescaled(self) -> dict[int, Leaf]:
        """The leaves that a neuron meets, by position."""
        met = self._spec.rescaled_paths
        return {k: leaf for k, leaf in enumerate(self._spec.leaves) if leaf.path in met}

    def _no_scales(self) -> LogScales:
        return tuple(jnp.zeros((group.size,), self._dtype) for group in self._spec.groups)

    def _laid(self, tree: PyTree, what: str) -> list[dict[int, Any]]:
        """The leaves of each copy of the parameters by position, in flattening order."""
        return [
            dict(zip(held(self._spec, copy, what), jax.tree.leaves(copy), strict=True))
            for copy in _copies(tree)
        ]

    def _pairs(self, updates: PyTree, params: PyTree) -> list[tuple[int, int, Any, Any]]:
        """Each leaf's copy, position, update and value."""
        pairs = []
        both = zip(self._laid(updates, "updates"), self._laid(params, "params"), strict=True)
        for copy, (us, ps) in enumerate(both):
            # optax.apply_updates adds them in this order.
            if list(us) != list(ps):
                apart = sorted(self._spec.leaves[k].path for k in us.keys() ^ ps.keys())
                raise SpecError(
                    f"{self._name}: updates and params differ"
                    + (f": only one of them has {listed(apart)}" if apart else " in their order")
                )
            pairs += [(copy, k, us[k], ps[k]) for k in us]
        return pairs

    def _check_params(self, params: PyTree) -> None:
        for copy, laid in zip(_copies(params), self._laid(params, "params"), strict=True):
            check_all_held(self._spec, tuple(laid), copy, "params")
            for k in laid.keys() & self._rescaled.keys():
                dtype = jnp.result_type(laid[k])
                if self._rounding is None and _is_low(dtype):
                    raise SpecError(
                        f"{self._name}: {self._spec.leaves[k].path!r} has dtype {dtype}, in which "
                        "an update that rescales is not exact; call condition between steps "
                        'instead, or pass rounding="power_of_two"'
                    )

    def _check_state(self, state: ReconditionState) -> None:
        sizes = [np.shape(z) for z in state.log_scales]
        expected = [(group.size,) for group in self._spec.groups]
        if sizes != expected:
            raise SpecError(
                f"{self._name}: the state is of another spec, with log-scales of shapes {sizes} "
                f"instead of {expected}; make one with init, or restore one of this spec"
            )

    def _movable(self, tree: PyTree, what: str) -> list[Any]:
        """The leaves that a neuron meets, of the first copy, in the spec's order."""
        laid = self._laid(tree, what)[0]
        return [laid[k] for k in self._rescaled]

    def _announced(self, params: PyTree, updates: PyTree) -> jax.Array:
        """What is remembered of where an update leads."""
        us, ps = self._movable(updates, "updates"), self._movable(params, "params")
        dtypes = map(self._emitted_dtype, self._rescaled, us, ps)
        return joined(list(map(_sum, corners(ps), corners(us), dtypes)), self._dtype)

    def _emitted_dtype(self, position: int, u: Any, p: Any) -> Any:
        """Wide enough for q - p, the same whether due or not; leaves of no neuron keep theirs."""
        here, there = jnp.result_type(u), jnp.result_type(p)
        return compute_dtype(here, there) if position in self._rescaled else here

    def _representable(self, log_scales: LogScales) -> tuple[LogScales, jax.Array]:
        """Shortens log-scales so that p + (q - p) keeps the digits of q.

        The criterion is convex: on the way to its minimum it decreases.
        """
        bounds = []
        shrink: dict[str, jax.Array] = {}
        for group, z in zip(self._spec.groups, log_scales, strict=True):
            for sign, side in ((-1, group.incoming), (1, group.outgoing)):
                for incidence in side:
                    taken = sign * incidence.power * z[np.maximum(incidence.index, 0)]
                    most = jnp.where(incidence.index >= 0, taken, 0).max(initial=0)
                    shrink[incidence.path] = shrink.get(incidence.path, jnp.zeros_like(most)) + most
        for path, most in shrink.items():
            bounds.append(most / _largest_shrink(self._spec.leaf(path).dtype))
        worst = functools.reduce(jnp.maximum, bounds)
        short = worst > 1
        factor = jnp.where(short, 1 / jnp.maximum(worst, 1), 1)
        return tuple(z * factor for z in log_scales), short


def missing_params(name: str) -> SpecError:
    """The error of an update that was called without them."""
    return SpecError(f"{name} needs the parameters: call update(updates, state, params)")


def check_is_spec(spec: Any) -> None:
    """Raises SpecError for anything but an ArchSpec."""
    if not isinstance(spec, ArchSpec):
        raise SpecError(f"spec must be an ArchSpec, not of type {type(spec).__name__}")


def integer(name: str, value: Any, least: int) -> int:
    """``value`` as an int of at least ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise SpecError(f"{name} is {value!r}; an integer is needed") from None
    if isinstance(value, bool) or number < least:
        raise SpecError(f"{name} is {value}; it must be an integer of at least {least}")
    return number


def widest_dtype(spec: ArchSpec) -> Any:
    """The dtype of log-scales and diagonals."""
    return compute_dtype(*(leaf.dtype for leaf in spec.leaves if leaf.trainable))


def _is_low(dtype: Any) -> bool:
    return jnp.finfo(dtype).bits < 32


def _largest_shrink(dtype: Any) -> float:
    """The log of the factor below which a sum of p and q - p would lose digits of q."""
    if _is_low(dtype):
        # float32 holds q - p exactly, up to this ratio; 4 is for what rounding may add.
        return float(np.log(jnp.finfo(dtype).eps / jnp.finfo(jnp.float32).eps / 8))
    return float(np.log(2.0**-16 / jnp.finfo(dtype).eps))


def _copies(params: PyTree) -> tuple[PyTree, ...]:
    """The trees of parameters that are rescaled alike; the first decides how."""
    return tuple(params) if isinstance(params, optax.LookaheadParams) else (params,)


def _sum(p: Any, u: Any, dtype: Any) -> jax.Array:
    p = jnp.asarray(p)
    return (p.astype(dtype) + jnp.asarray(u, dtype)).astype(p.dtype)
