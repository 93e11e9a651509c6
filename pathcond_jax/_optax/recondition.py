"""Conditioning inside optax: every k updates, with the optimizer's state, and Path-SGD."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pathcond_jax._optax.schedule import Outcome, ReconditionState, Rule
from pathcond_jax._optax.transport import followed, transport
from pathcond_jax._solve.solution import Status
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.criteria._base import Criterion


class ReconditionedState(NamedTuple):
    """State of :func:`reconditioned`.

    Attributes:
      inner_state: the state of the wrapped optimizer.
      recondition: when and what was reconditioned.
    """

    inner_state: optax.OptState
    recondition: ReconditionState


def recondition(
    spec: ArchSpec,
    every: int,
    start: int = 0,
    *,
    criterion: Criterion | str = "path",
    method: str | None = None,
    max_steps: int | None = None,
    tol: float | None = None,
    max_log_scale: float | None = 1.0,
    norm_weight: float | jax.Array = 0.0,
    rounding: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Conditions the parameters every k updates; the last element of a chain.

    On a due update, the emitted update takes the parameters to the conditioned representative of
    where they were going; any other update is passed on as it is. The network's
    function is the same as without this element up to that moment. The state of the optimizer
    stays in the old coordinates: :func:`reconditioned` takes it along.

    The update is added to the parameters by ``optax.apply_updates``, and the sum ``p + (q - p)``
    is q only up to the precision of p. An entry that shrinks more than 128-fold in float32
    (2^36-fold in float64) would lose digits, so in that case all log-scales are multiplied by the
    same number below 1, the status is ``CLIPPED``, and the next due update goes on from there.

    A layer that has hardly begun to train, such as a residual branch whose last scale was 0 a few
    steps ago, has a tiny Gram diagonal, and the optimum lies where scales of a thousand make up for
    it; at the next due update it lies elsewhere. So each due update moves a log-scale by
    ``max_log_scale`` at most, 1 by default; the status is then ``CLIPPED``. To begin at the
    optimum, condition the parameters before training. With due updates every few steps, a
    ``norm_weight`` of 0.1 to 1 also bounds what they add up to.

    An element after this one that changes the update would change the network's function. The next
    call finds it, counts it in ``num_altered`` of the state and, outside of ``jit``, warns.

    The parameters may be a part of what the spec was built from, in any containers: leaves are
    matched by path. What the criterion reads besides, such as the running variances of batch
    normalization, is handed over under any name, ``update(updates, state, params,
    batch_stats=batch_stats)``; elements around this one pass it through.

    A due update with a NaN or an infinity in it, or in the parameters, is passed on as it is. Put
    the whole chain inside ``optax.apply_if_finite`` to drop such updates; they then do not count.

    Args:
      spec: the architecture, traced from the parameters that the optimizer updates, or from a tree
        that has them inside.
      every: k; the k-th, 2k-th, ... update is due.
      start: n; the n-th update is due as well. 0: none is.
      criterion: what to balance, as in ``condition``; so are the options that follow.
      method: how to solve it.
      max_steps: at most so many steps or sweeps.
      tol: when to stop.
      max_log_scale: by how much each due update may move a log-scale: by default a factor of e, and
        the next one goes on from there. None: all the way.
      norm_weight: μ ≥ 0, weighs the norm of the parameters beside the criterion.
      rounding: None, or ``"power_of_two"`` for scales that are powers of two. Parameters of low
        precision need it; their updates are emitted in float32, and the result is exact.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state :class:`ReconditionState`. Its
      update requires ``params``. Under ``vmap`` over its state every update costs as if due.

    Raises:
      SpecError: an argument cannot be used, or, at init or update, the parameters are missing, are
        not the spec's, lack what moves with a neuron, are masked, or have low precision; or, at
        update, the state is of another spec, or a value that the criterion reads is not given.
      NotPathLiftableError: the path criterion needs a network that is a sum over paths.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> optimizer = optax.chain(optax.sgd(0.1), pathcond.recondition(spec, every=100, start=1))
      >>> state = optimizer.init(params)
      >>> gradients = {"a": {"w": jnp.zeros((1, 2))}, "b": {"w": jnp.zeros((2, 1))}}
      >>> updates, state = optimizer.update(gradients, state, params)
      >>> jnp.round(optax.apply_updates(params, updates)["a"]["w"], 3).tolist()
      [[4.0, 4.0]]

    References:
      Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026, arXiv 2602.19799.
    """
    rule = Rule(
        "recondition",
        spec,
        every,
        start,
        rounding,
        criterion=criterion,
        method=method,
        max_steps=max_steps,
        tol=tol,
        max_log_scale=max_log_scale,
        norm_weight=norm_weight,
    )

    def init(params: PyTree) -> ReconditionState:
        rule.check_init(params)
        return rule.init()

    def update(
        updates: PyTree, state: ReconditionState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, ReconditionState]:
        others, num_altered = rule.begin(params, state, extra)
        rule.check_updates(updates, params)
        count = optax.safe_increment(state.num_updates)
        due = rule.due_after_reading(count, num_altered)
        outcome = lax.cond(due, rule.move, rule.stay, updates, params, others, state)
        return outcome.updates, outcome.state(count, num_altered)

    return optax.GradientTransformationExtraArgs(init, update)


def reconditioned(
    inner: optax.GradientTransformation,
    spec: ArchSpec,
    every: int,
    start: int = 0,
    *,
    state: str = "transport",
    degrees: Mapping[str, int] | None = None,
    probe_args: Mapping[str, Any] | None = None,
    criterion: Criterion | str = "path",
    method: str | None = None,
    max_steps: int | None = None,
    tol: float | None = None,
    max_log_scale: float | None = 1.0,
    norm_weight: float | jax.Array = 0.0,
    rounding: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose parameters are conditioned every k updates, and its state with them.

    The same as ``chain(inner, recondition(spec, every))``, but the buffers of ``inner`` that
    belong to parameters are multiplied by powers of the parameters' factors: momentum by the −1st,
    second moments by the −2nd, copies of the parameters by the first. ``inner`` then goes on as if
    it had seen the gradients of the new parameters all along.

    The powers are measured when this function is called, or at ``init`` if the spec has more than
    what is trained: ``inner`` runs a few steps on small stand-ins of the parameters, twice, the
    second time with each entry w multiplied and its gradient divided by a power of two. Gradients
    are small there, so that clipping is inactive: it does not commute with rescaling, and buffers
    keep what it left. Initial accumulators, weight decay before the momentum, the momentum of
    RMSProp and factored or layer-wise second moments follow no power of the scale and raise.

    It wraps ``chain``, ``masked``, ``partition``, ``inject_hyperparams``, ``MultiSteps``,
    ``apply_if_finite``, ``lookahead`` and ``schedule_free``, and may itself be inside
    ``MultiSteps`` or ``apply_if_finite``, where only the updates that are emitted count.
    ``docs/optimizers.md`` lists what happens to each buffer of each optimizer of optax.

    Args:
      inner: the optimizer.
      spec: the architecture, traced from the parameters that the optimizer updates.
      every: k; the k-th, 2k-th, ... update is due.
      start: n; the n-th update is due as well. 0: none is.
      state: ``"transport"``; ``"reset"``, which calls ``inner.init`` with the new parameters, so
        that counters and schedules start anew too; or ``"keep"``, which changes nothing.
      degrees: powers by buffer name, as in ``{"0/trace": -1}``, instead of measured ones. The end
        of a name, ``"trace"``, stands for all buffers whose name ends so; 0 leaves a buffer alone.
      probe_args: extra arguments of ``inner.update`` for the measurement, besides ``value=1.0``.
      criterion: what to balance, as in :func:`recondition`; so are the options that follow.
      method: how to solve it.
      max_steps: at most so many steps or sweeps.
      tol: when to stop.
      max_log_scale: by how much each due update may move a log-scale.
      norm_weight: μ ≥ 0, weighs the norm of the parameters beside the criterion.
      rounding: ``"power_of_two"`` for scales that are powers of two.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state :class:`ReconditionedState`. What
      :func:`recondition` says about precision, NaNs and infinities holds here too.

    Raises:
      SpecError: as :func:`recondition`; or a buffer has no degree, and the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> optimizer = pathcond.reconditioned(optax.sgd(0.0, momentum=0.9), spec, every=1)
      >>> state = optimizer.init(params)
      >>> gradients = {"a": {"w": jnp.ones((1, 2))}, "b": {"w": jnp.ones((2, 1))}}
      >>> updates, state = optimizer.update(gradients, state, params)
      >>> jnp.round(state.inner_state[0].trace["a"]["w"], 3).tolist()  # a was divided by 2
      [[2.0, 2.0]]
    """
    rule = Rule(
        "reconditioned",
        spec,
        every,
        start,
        rounding,
        criterion=criterion,
        method=method,
        max_steps=max_steps,
        tol=tol,
        max_log_scale=max_log_scale,
        norm_weight=norm_weight,
    )
    if state not in ("transport", "reset", "keep"):
        raise SpecError(f"state is {state!r}; there are 'transport', 'reset' and 'keep'")
    if state != "transport" and (degrees or probe_args):
        raise SpecError(f'degrees and probe_args are for state="transport", not {state!r}')
    inner = optax.with_extra_args_support(inner)
    buffers_of = followed(inner, spec, degrees, probe_args) if state == "transport" else None

    def init(params: PyTree) -> ReconditionedState:
        rule.check_init(params)
        if buffers_of is not None and jax.tree.leaves(params):
            buffers_of(params)
        return ReconditionedState(inner.init(params), rule.init())

    def carried(inner_state: PyTree, params: PyTree, outcome: Outcome) -> PyTree:
        """The state of the wrapped optimizer at the new parameters."""
        if buffers_of is not None:
            return transport(inner_state, spec, outcome.log_scales, buffers_of(params))
        if state == "keep":
            return inner_state
        fresh = inner.init(rule.added(params, outcome.updates))
        keep = outcome.status == Status.NON_FINITE
        return jax.tree.map(
            lambda old, new: jnp.where(keep, old, new.astype(jnp.result_type(old))),
            inner_state,
            fresh,
        )

    def move(
        inner_state: PyTree, updates: PyTree, params: PyTree, *rest: Any
    ) -> tuple[Outcome, PyTree]:
        outcome = rule.move(updates, params, *rest)
        return outcome, carried(inner_state, params, outcome)

    def stay(
        inner_state: PyTree, updates: PyTree, params: PyTree, *rest: Any
    ) -> tuple[Outcome, PyTree]:
        return rule.stay(updates, params, *rest), inner_state

    def update(
        updates: PyTree, state: ReconditionedState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, ReconditionedState]:
        others, num_altered = rule.begin(params, state.recondition, extra)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        rule.check_updates(updates, params)
        count = optax.safe_increment(state.recondition.num_updates)
        due = rule.due_after_reading(count, num_altered)
        outcome, inner_state = lax.cond(
            due, move, stay, inner_state, updates, params, others, state.recondition
        )
        return outcome.updates, ReconditionedState(inner_state, outcome.state(count, num_altered))

    return optax.GradientTransformationExtraArgs(init, update)
