"""Initialization: functions and Flax nnx models that start out conditioned."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from pathcond_jax._action.condition import condition
from pathcond_jax._front.nnx import condition_nnx
from pathcond_jax._solve.solution import Solution
from pathcond_jax._spec.log_scales import LogScales
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.criteria._base import Criterion

if TYPE_CHECKING:
    from flax import nnx

Model = TypeVar("Model", bound="nnx.Module")


def conditioned_init(
    init_fn: Callable[..., PyTree],
    spec: ArchSpec,
    *,
    criterion: Criterion | str = "path",
    method: str | None = None,
    max_steps: int | None = None,
    tol: float | None = None,
    max_log_scale: float | None = None,
    initial: LogScales | Solution | None = None,
    norm_weight: float | jax.Array = 0.0,
    rounding: str | None = None,
) -> Callable[..., PyTree]:
    """An init function that returns conditioned parameters of the same network.

    Args:
      init_fn: returns the parameters, such as ``model.init`` of Flax linen.
      spec: the architecture, built for what ``init_fn`` returns, or, if that is a mapping, for
        its ``"params"`` alone. Other collections are returned as they are.
      criterion: what to balance, as in ``condition``; so are the options that follow.
      method: how to solve it.
      max_steps: at most so many steps or sweeps.
      tol: when to stop.
      max_log_scale: the box ``|z| ≤ max_log_scale``.
      initial: log-scales to start from, or a solution.
      norm_weight: μ ≥ 0, weighs the norm of the parameters beside the criterion.
      rounding: ``"power_of_two"`` for scales that are powers of two.

    Returns:
      A function of the arguments of ``init_fn``. It may be jitted, and vmapped over keys. Where
      the drawn parameters cannot be conditioned, because one is not finite, they are as drawn.

    Raises:
      SpecError: the spec has no neuron to rescale; or, at the call, does not fit the parameters.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> def init(key):
      ...     return {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(jax.eval_shape(init, jax.random.key(0)), ["a", "b"])
      >>> params = pathcond.conditioned_init(init, spec)(jax.random.key(0))
      >>> jnp.round(params["a"]["w"], 3).tolist()
      [[4.0, 4.0]]

    References:
      Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026, arXiv 2602.19799.
    """
    if not callable(init_fn):
        raise SpecError(
            f"init_fn is of type {type(init_fn).__name__}; pass a function that returns parameters"
        )
    if not isinstance(spec, ArchSpec):
        raise SpecError(f"spec must be an ArchSpec, not of type {type(spec).__name__}")

    conditioned = functools.partial(
        condition,
        spec=spec,
        criterion=criterion,
        method=method,
        max_steps=max_steps,
        tol=tol,
        max_log_scale=max_log_scale,
        initial=initial,
        norm_weight=norm_weight,
        rounding=rounding,
    )

    @functools.wraps(init_fn)
    def init(*args: Any, **kwargs: Any) -> PyTree:
        variables = init_fn(*args, **kwargs)
        if jax.tree.structure(variables) != spec.treedef and isinstance(variables, Mapping):
            params = variables.get("params")
            if jax.tree.structure(params) == spec.treedef:
                mapping: Callable[..., PyTree] = type(variables)
                return mapping({**variables, "params": conditioned(params)[0]})
        return conditioned(variables)[0]

    return init


def conditioned_nnx(
    model_cls: Callable[..., Model],
    *args: Any,
    rngs: "nnx.Rngs",
    example: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Model:
    """A new Flax nnx model with conditioned parameters.

    Args:
      model_cls: the class of the model, or a function that returns one.
      *args: its arguments.
      rngs: its random streams, ``nnx.Rngs``.
      example: an input of the model, or a tuple of its inputs; arrays or ``jax.ShapeDtypeStruct``.
      options: of ``condition``: ``criterion``, ``method``, ``max_log_scale``, ``rounding``, ...
      **kwargs: further arguments of ``model_cls``.

    Returns:
      ``model_cls(*args, rngs=rngs, **kwargs)`` with its ``nnx.Param`` values rescaled; everything
      else as it was made. The network is analysed in evaluation mode. May be called under
      ``nnx.jit`` and ``nnx.vmap``.

    Raises:
      SpecError: the network has no neuron to rescale.
      NotPathLiftableError: the path criterion needs a network that is a sum over paths.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from flax import nnx
      >>> class MLP(nnx.Module):
      ...     def __init__(self, width, *, rngs):
      ...         self.hidden = nnx.Linear(1, width, rngs=rngs)
      ...         self.out = nnx.Linear(width, 1, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.out(nnx.relu(self.hidden(x)))
      >>> model = pathcond.conditioned_nnx(MLP, 4, rngs=nnx.Rngs(0), example=jnp.ones((2, 1)))
      >>> model.hidden.kernel.shape
      (1, 4)
    """
    model = model_cls(*args, rngs=rngs, **kwargs)
    inputs = example if isinstance(example, tuple) else (example,)
    condition_nnx(model, *inputs, **(options or {}))
    return model
