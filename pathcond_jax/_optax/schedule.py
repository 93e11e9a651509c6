"""When an update of an optimizer is due for conditioning, and what it then becomes."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from pathcond_jax._action.condition import condition
from pathcond_jax._action.rescale import LogScales, rescale, round_to_powers_of_two
from pathcond_jax._optax.transport import parameter_shapes
from pathcond_jax._solve.solution import Status
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.spec import ArchSpec, no_neuron
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError

Rescaled = tuple[PyTree, LogScales, jax.Array]


class ReconditionState(NamedTuple):
    """State of :func:`pathcond_jax.recondition`.

    Attributes:
      num_updates: the number of updates so far, int32.
      log_scales: the log-scales that the latest update applied, one ``(group.size,)`` array per
        group; zeros if it was not due. ``rescale(average, spec, state.log_scales)`` takes along
        what is kept outside of the optimizer.
      status: the :class:`Status` of the latest solve, int32.
    """

    num_updates: jax.Array
    log_scales: LogScales
    status: jax.Array


class Rule:
    """When updates are due, and what a due update becomes."""

    def __init__(
        self,
        name: str,
        spec: ArchSpec,
        every: int,
        start: int,
        rounding: str | None,
        options: dict[str, Any],
    ) -> None:
        check_is_spec(spec)
        if not spec.groups:
            raise SpecError(no_neuron(spec))
        if rounding not in (None, "power_of_two"):
            raise SpecError(f"rounding is {rounding!r}; there are None and 'power_of_two'")
        self._name, self._spec, self._rounding = name, spec, rounding
        self._every = integer("every", every, 1)
        self._start = integer("start", start, 0)
        self._solve = lambda params: condition(params, spec, **options)
        self._dtype = widest_dtype(spec)
        # Options and networks that cannot be used raise here instead of at the first update.
        jax.eval_shape(self._solve, parameter_shapes(spec))

    def init(self) -> ReconditionState:
        """The state before the first update."""
        log_scales = tuple(jnp.zeros((group.size,), self._dtype) for group in self._spec.groups)
        return ReconditionState(jnp.zeros((), jnp.int32), log_scales, jnp.zeros((), jnp.int32))

    def check_init(self, params: PyTree) -> None:
        """Raises SpecError if the optimizer cannot be used for ``params``."""
        # optax.tree_map_params calls init with a placeholder, which has no leaves.
        if jax.tree.leaves(params):
            self._check_params(params)

    def check(self, updates: PyTree, params: PyTree) -> None:
        """Raises SpecError if an update cannot be done; ``updates`` may be None."""
        if params is None:
            raise missing_params(self._name)
        self._check_params(params)
        if updates is not None:
            for tree in _copies(updates):
                match(self._spec, tree, "updates")

    def due(self, count: jax.Array) -> jax.Array:
        """Whether the update of this number is due, counted from 1."""
        return (count % self._every == 0) | ((count == self._start) & (self._start > 0))

    def stay(self, updates: PyTree, params: PyTree, status: jax.Array) -> Rescaled:
        """An update that is not due."""
        dtypes = self._emitted_dtypes(updates, params)
        updates = jax.tree.map(lambda u, dtype: jnp.asarray(u, dtype), updates, dtypes)
        return updates, self.init().log_scales, status

    def move(self, updates: PyTree, params: PyTree, status: jax.Array) -> Rescaled:
        """A due update: to the conditioned representative of where it was going."""
        del status
        dtypes = self._emitted_dtypes(updates, params)
        new = self.added(params, updates)
        _, solution = self._solve(_copies(new)[0])
        log_scales, shortened = self._representable(solution.log_scales)
        if self._rounding is not None:
            log_scales = round_to_powers_of_two(log_scales)
        # Added anew: kept beside what the solver needs, the sum would be one more copy in memory.
        new = self.added(*lax.optimization_barrier((params, updates)))
        rescaled = [rescale(tree, self._spec, log_scales) for tree in _copies(new)]
        finite = solution.status != Status.NON_FINITE

        def emitted(p: Any, u: Any, q: Any, n: Any, dtype: Any) -> jax.Array:
            kept = jnp.asarray(u, dtype)
            if q is n:
                return kept
            return jnp.where(finite, q.astype(dtype) - jnp.asarray(p, dtype), kept)

        moved = jax.tree.map(emitted, params, updates, _like(params, rescaled), new, dtypes)
        clipped = jnp.asarray(Status.CLIPPED, jnp.int32)
        status = jnp.where(
            shortened & (solution.status == Status.CONVERGED), clipped, solution.status
        )
        return moved, tuple(z.astype(self._dtype) for z in log_scales), status

    def added(self, params: PyTree, updates: PyTree) -> PyTree:
        """What optax.apply_updates does, also under strict promotion."""

        def add(p: Any, u: Any, dtype: Any) -> jax.Array:
            p = jnp.asarray(p)
            return (p.astype(dtype) + jnp.asarray(u, dtype)).astype(p.dtype)

        return jax.tree.map(add, params, updates, self._emitted_dtypes(updates, params))

    def _check_params(self, params: PyTree) -> None:
        for tree in _copies(params):
            for leaf, value in zip(
                self._spec.leaves, match(self._spec, tree, "params"), strict=True
            ):
                dtype = jnp.result_type(value)
                if self._rounding is None and leaf.path in self._met and _is_low(dtype):
                    raise SpecError(
                        f"{self._name}: {leaf.path!r} has dtype {dtype}, in which an update that "
                        "rescales is not exact; call condition between steps instead, or pass "
                        'rounding="power_of_two"'
                    )

    @property
    def _met(self) -> frozenset[str]:
        return self._spec.rescaled_paths

    def _emitted_dtypes(self, updates: PyTree, params: PyTree) -> PyTree:
        """Wide enough for q - p, the same whether due or not; leaves of no neuron keep theirs."""

        def dtype(leaf: Any, u: Any, p: Any) -> Any:
            here, there = jnp.result_type(u), jnp.result_type(p)
            return compute_dtype(here, there) if leaf.path in self._met else here

        leaves = jax.tree.unflatten(self._spec.treedef, self._spec.leaves)
        return jax.tree.map(dtype, _like(params, [leaves] * len(_copies(params))), updates, params)

    def _representable(self, log_scales: LogScales) -> tuple[LogScales, jax.Array]:
        """Shortens log-scales so that p + (q - p) keeps the digits of q.

        The criterion is convex: on the way to its minimum it decreases.
        """
        bounds = []
        shrink: dict[str, jax.Array] = {}
        for group, z in zip(self._spec.groups, log_scales, strict=True):
            for sign, side in ((-1, group.incoming), (1, group.outgoing)):
                for incidence in side:
                    taken = sign * z[np.maximum(incidence.index, 0)]
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


def match(spec: ArchSpec, tree: PyTree, what: str) -> list[Any]:
    """``match_leaves``, with a word about ``optax.masked``."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    masked = sum(isinstance(node, optax.MaskedNode) for node in nodes)
    if masked:
        raise SpecError(
            f"{masked} of {len(nodes)} leaves of {what} are masked, and conditioning needs all of "
            "them: put this element after optax.masked or optax.partition instead of inside"
        )
    return match_leaves(spec, tree, what)


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


def _like(params: PyTree, copies: list[PyTree]) -> PyTree:
    return (
        optax.LookaheadParams(*copies) if isinstance(params, optax.LookaheadParams) else copies[0]
    )
