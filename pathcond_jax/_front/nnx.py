"""Flax nnx: specs and conditioning of modules that hold their own state."""

from typing import TYPE_CHECKING, Any

import jax

from pathcond_jax._action.condition import condition
from pathcond_jax._front.trace import trace_spec
from pathcond_jax._solve.solution import Solution
from pathcond_jax._spec.log_scales import LogScales
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import leaf_path
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.criteria._base import Criterion

if TYPE_CHECKING:
    from flax import nnx
    from flax.nnx import filterlib


def nnx_variables(model: "nnx.Module") -> dict[str, PyTree]:
    """The parameter tree that ``nnx_spec`` describes.

    Args:
      model: a Flax nnx module.

    Returns:
      A dictionary of states, of its ``nnx.Param`` as "params", of its other variables as "state".
      ``nnx.update(model, variables["params"])`` writes parameters back.

    Example:
      >>> import pathcond_jax as pathcond
      >>> from flax import nnx
      >>> variables = pathcond.nnx_variables(nnx.Linear(2, 5, rngs=nnx.Rngs(0)))
      >>> sorted(variables), sorted(variables["params"])
      (['params', 'state'], ['bias', 'kernel'])
    """
    from flax import nnx

    states = nnx.split(model, nnx.Param, ...)[1:]
    return dict(zip(("params", "state"), states, strict=True))


def nnx_spec(
    model: "nnx.Module", *inputs: PyTree, wrt: "filterlib.Filter" = None, **options: Any
) -> ArchSpec:
    """The spec of a Flax nnx module.

    Args:
      model: the module, with arrays or shapes (``nnx.eval_shape``). It is analysed in evaluation
        mode; in training mode its neurons are the same.
      *inputs: example inputs, arrays or ``jax.ShapeDtypeStruct``.
      wrt: a filter of the variables that are trained, as given to ``nnx.Optimizer``, for instance
        ``nnx.LoRAParam``; None: all ``nnx.Param``. What it leaves out is pinned.
      **options: of ``trace_spec``; keyword arguments that are not go to the module's ``__call__``.

    Returns:
      The spec of ``nnx_variables(model)``; the leaf of a layer's kernel is
      ``"params/conv/kernel"``.

    Raises:
      SpecError: as ``trace_spec``.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from flax import nnx
      >>> class MLP(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.hidden = nnx.Linear(2, 5, rngs=rngs)
      ...         self.out = nnx.Linear(5, 1, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.out(nnx.relu(self.hidden(x)))
      >>> pathcond.nnx_spec(MLP(nnx.Rngs(0)), jnp.ones((1, 2))).num_neurons
      5
    """
    from flax import nnx

    if wrt is not None:
        if "trainable" in options:
            raise SpecError("wrt and trainable both say what is trained; give one of them")
        flat = jax.tree_util.tree_flatten_with_path(nnx.state(model, wrt))[0]
        trained = {leaf_path(key) for key, _ in flat}
        options["trainable"] = lambda path: path.partition("/")[2] in trained
    if not isinstance(model, nnx.Module):
        raise SpecError(
            f"model must be a Flax nnx module, not of type {type(model).__name__}; for any other "
            "network, call trace_spec(apply_fn, params, *inputs)"
        )
    still = nnx.clone(model)
    still.eval()
    graphdef = nnx.split(still, nnx.Param, ...)[0]

    def apply_fn(variables: PyTree, *inputs: PyTree, **keywords: Any) -> Any:
        return nnx.merge(graphdef, variables["params"], variables["state"])(*inputs, **keywords)

    return trace_spec(apply_fn, nnx_variables(model), *inputs, **options)


def condition_nnx(
    model: "nnx.Module",
    *inputs: Any,
    spec: ArchSpec | None = None,
    criterion: Criterion | str | None = None,
    method: str | None = None,
    max_steps: int | None = None,
    tol: float | None = None,
    max_log_scale: float | None = None,
    initial: LogScales | Solution | None = None,
    norm_weight: float | jax.Array = 0.0,
    rounding: str | None = None,
) -> Solution:
    """Moves the parameters of a Flax nnx module to the best representative of its function.

    Two ways to call it: ``condition_nnx(model, *inputs)`` traces the module, and
    ``condition_nnx(model, spec)``, like ``condition(params, spec)``, has it done already.

    Args:
      model: the module; its ``nnx.Param`` variables are updated in place, and of a spec with
        ``rescale_state=True`` the running statistics that it rescales.
      *inputs: example inputs, arrays or ``jax.ShapeDtypeStruct``; or ``nnx_spec(model, *inputs)``
        and, after it, nothing or the criterion.
      spec: the spec, by name.
      criterion: what to balance, as in ``condition``; None: ``"path"``. The options that
        follow are those of ``condition`` too.
      method: how to solve it.
      max_steps: at most so many steps or sweeps.
      tol: when to stop.
      max_log_scale: the box ``|z| ≤ max_log_scale``.
      initial: log-scales to start from, or a solution.
      norm_weight: μ ≥ 0, weighs the norm of the parameters beside the criterion.
      rounding: ``"power_of_two"`` for scales that are powers of two.

    Returns:
      The solution; its status says whether the parameters were finite.

    Raises:
      SpecError: the network has no neuron to rescale, or the spec is of another network.
      NotPathLiftableError: the path criterion needs a network that is a sum over paths.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> from flax import nnx
      >>> class MLP(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.hidden = nnx.Linear(2, 5, rngs=rngs)
      ...         self.out = nnx.Linear(5, 1, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.out(nnx.relu(self.hidden(x)))
      >>> model, x = MLP(nnx.Rngs(0)), jnp.ones((1, 2))
      >>> before = model(x)
      >>> solution = pathcond.condition_nnx(model, x)
      >>> bool(jnp.allclose(model(x), before, atol=1e-5))
      True
      >>> spec = pathcond.nnx_spec(model, x)
      >>> bool(abs(pathcond.condition_nnx(model, spec).log_scales[0]).max() < 1e-3)
      True
    """
    from flax import nnx

    if inputs and isinstance(inputs[0], ArchSpec):
        if spec is not None:
            raise SpecError("condition_nnx got two specs; pass one of them")
        spec, *rest = inputs
        if len(rest) + (criterion is not None) > 1:
            raise SpecError("after a spec, condition_nnx takes one criterion and nothing else")
        criterion = rest[0] if rest else criterion
    spec = nnx_spec(model, *inputs) if spec is None else spec
    conditioned, solution = condition(
        nnx_variables(model),
        spec,
        "path" if criterion is None else criterion,
        method=method,
        max_steps=max_steps,
        tol=tol,
        max_log_scale=max_log_scale,
        initial=initial,
        norm_weight=norm_weight,
        rounding=rounding,
    )
    # State is rescaled by a spec of `rescale_state=True` only; else it is the model's own already.
    moved = {path.partition("/")[0] for path in spec.rescaled_paths}
    nnx.update(model, *(conditioned[part] for part in ("params", "state") if part in moved))
    return solution
