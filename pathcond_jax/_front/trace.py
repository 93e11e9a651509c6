"""``trace_spec``: what may be rescaled in a network, inferred from its program and checked."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pathcond_jax._action.verify import WrongSpecError, affordable, verify, verify_paths
from pathcond_jax._program.graph import Graph
from pathcond_jax._spec.modules import instead_of_function
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import NeuronGroup, PyTree, SpecError, listed
from pathcond_jax._symmetry.trace import defined_at, infer_spec


def trace_spec(
    apply_fn: Callable[..., Any],
    params: PyTree,
    *inputs: PyTree,
    trainable: Callable[[str], bool] | PyTree | None = None,
    groups: Sequence[NeuronGroup] | None = None,
    max_pool: str = "paths",
    rescale_state: bool = False,
    check: bool = True,
    **apply_options: Any,
) -> ArchSpec:
    """Finds and proves what may be rescaled in a network, from its program.

    Args:
      apply_fn: ``apply_fn(params, *inputs, **apply_options) -> outputs``; any JAX function.
      params: pytree of arrays or ``jax.ShapeDtypeStruct``; only shapes and dtypes are read.
      *inputs: example inputs, arrays or ``jax.ShapeDtypeStruct``; only shapes and dtypes are read.
      trainable: which leaves may be rescaled. None: the floating ones, and only those under
        ``"params"`` if ``params`` is a mapping with that key, and of Flax nnx variables those of
        ``Param``; or a function of the leaf's path; or a pytree prefix of booleans.
      groups: your own neuron groups; they are checked for shape and trusted (prove them with
        ``check_spec``). None: inferred from the program and proved.
      max_pool: path lifting of max pooling: ``"paths"``, an edge of weight 1 from each pooled
        entry; or ``"max"``, the maximum of the lifted values.
      rescale_state: also rescale floating leaves that are not trainable, such as the running
        means of batch normalization: what inference allows and training does not. They do not
        count in ``p``. To quantize, fold batch normalization first and condition the folded
        network: what is conditioned before folding is not balanced after it.
      check: try the result on numbers before it is returned, so that a mistake of this library
        raises instead of changing your network. The traced program is run in numpy, in float64,
        before and after a random rescaling by powers of two, with the arrays that are given (and
        random numbers for shapes, zeros and NaN); the log of the path norm is compared too, where
        there is one. This takes less time than the trace. Where one run takes more than 300 million
        multiplications, one example is tried, and where that does (a ResNet-18 on images of
        64 × 64), none. What cannot be tried passes: callbacks, effects and collectives, outputs
        that are 0 or not finite, and your own ``groups``.
      **apply_options: keyword arguments of ``apply_fn`` that are the same at every call, such as
        ``train=False``, ``rngs=`` and ``mutable=`` of Flax linen. For one that has the name of an
        argument above, wrap ``apply_fn`` in a function that sets it.

    Returns:
      The spec, which is static, printable and compared by identity.

    Raises:
      SpecError: a leaf is not an array, ``apply_fn`` does not use its parameters or does not take
        the keyword arguments, or ``groups`` do not fit the parameters.
      WrongSpecError: the check failed; please report the message.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> def apply_fn(params, x):
      ...     return jnp.maximum(x @ params["w"] + params["b"], 0.0) @ params["v"]
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros((1, 3)), "v": jnp.ones((3, 1))}
      >>> spec = pathcond.trace_spec(apply_fn, params, jnp.ones((1, 2)))
      >>> spec.num_neurons, spec.num_parameters
      (3, 12)
    """
    if max_pool not in ("paths", "max"):
        raise SpecError(f'max_pool is "paths" or "max", not {max_pool!r}')
    if not callable(apply_fn):
        raise SpecError(
            f"apply_fn must be a function, not of type {type(apply_fn).__name__}; the arguments "
            "are (apply_fn, params, *inputs)"
        )
    if advice := instead_of_function(apply_fn):
        raise SpecError(f"apply_fn must be a function of the parameters, and {advice}")
    if apply_options:
        _check_options(apply_fn, apply_options)
        apply_fn = functools.partial(apply_fn, **apply_options)
    spec, graph = infer_spec(
        apply_fn,
        params,
        inputs,
        trainable=trainable,
        groups=groups,
        max_pool=max_pool,
        rescale_state=rescale_state,
    )
    if check and groups is None:
        _check(graph, spec, jax.tree.leaves((params, inputs)))
    return spec


def _check(graph: Graph, spec: ArchSpec, values: Sequence[Any]) -> None:
    try:
        program = next(filter(affordable, (graph, spec.program)), None)
        if program is not None:
            verify(program, spec, values)
        if affordable(spec.program):
            verify_paths(spec, values)
    except WrongSpecError:
        raise
    except Exception:
        # What cannot be tried passes: a check that fails itself says nothing about the spec.
        return


def _check_options(apply_fn: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """A keyword that neither ``trace_spec`` nor ``apply_fn`` knows is a slip of the pen."""
    known = inspect.signature(apply_fn).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        return
    names = [p.name for p in known if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    own = [
        parameter.name
        for parameter in inspect.signature(trace_spec).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in names:
            raise SpecError(
                f"trace_spec has no argument {option!r}, and apply_fn{defined_at(apply_fn)} takes "
                f"no such keyword; those of trace_spec are {listed(own)}"
            )
