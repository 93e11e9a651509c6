"""Operations of one's own: rules for primitives, and what is known about each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pathcond_jax._lifting.interpreter import RULES as LIFTING
from pathcond_jax._lifting.interpreter import PathRule
from pathcond_jax._program import primitives
from pathcond_jax._spec.types import SpecError
from pathcond_jax._symmetry.values import RULES as SYMMETRY
from pathcond_jax._symmetry.values import ScaleRule


def register_rule(
    primitive: Any,
    *,
    reference: Callable[..., Any] | None = None,
    symmetry: ScaleRule | None = None,
    lifting: PathRule | None = None,
) -> None:
    """Tells both analyses what an operation of your own does; without this it pins.

    The best rule is a ``reference``: a function in plain JAX that computes what the primitive
    does. It is traced in the primitive's place and never run, so nothing needs to be proved by
    hand. If a whole network has such a reference, no rule is needed at all: give
    ``trace_spec`` the reference network, which has the same parameters, and use the spec with the
    fast one.

    Register before ``trace_spec``; a spec that exists does not change. The rule holds for the
    whole process, and replaces an earlier one of the same primitive.

    Args:
      primitive: a ``jax.extend.core.Primitive``. Of an operation that JAX makes for you (a Pallas
        kernel, an FFI call) it is found in a trace:
        ``jax.make_jaxpr(f)(x).jaxpr.eqns[0].primitive``; all Pallas kernels share one.
      reference: ``reference(*arrays, **params) -> outputs`` with the shapes and dtypes of the
        primitive's outputs, ``params`` being those of the primitive. It may return
        ``NotImplemented`` for parameters that it does not know: then the operation pins.
      symmetry: ``symmetry(scope, *scales) -> outputs``, one tuple of terms per output. A scale has
        the log-scale of an operand as its ``terms``; ``scope.pin(...)``, ``scope.along(terms,
        axes)`` and ``scope.equate(scales, ndim, because)`` demand what must hold.
        ``lambda scope, x: [x.terms]`` is the rule of a function with f(λx) = λ f(x) for λ > 0,
        entry by entry. Its word is taken: prove it with ``check_spec``.
      lifting: ``lifting(run, node, values) -> outputs``. ``lambda run, node, values: values``
        passes every path, as an activation does.

    Raises:
      SpecError: the primitive is none, or there is no rule, or a reference beside other rules.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.extend.core import Primitive
      >>> import pathcond_jax as pathcond
      >>> kernel = Primitive("my_fast_relu")
      >>> _ = kernel.def_abstract_eval(lambda x: x)
      >>> pathcond.register_rule(kernel, reference=jax.nn.relu)
      >>> params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}
      >>> network = lambda params, x: kernel.bind(x @ params["w"]) @ params["v"]
      >>> pathcond.trace_spec(network, params, jnp.ones((1, 2))).num_neurons
      3
    """
    if not hasattr(primitive, "bind") or not hasattr(primitive, "name"):
        raise SpecError(
            f"register_rule needs a jax.extend.core.Primitive, not {primitive!r}; that of an "
            "operation is in jax.make_jaxpr(f)(x).jaxpr.eqns"
        )
    if reference is None and symmetry is None and lifting is None:
        raise SpecError(f"register_rule({primitive.name}): no rule; give reference=...")
    if reference is not None and (symmetry is not None or lifting is not None):
        raise SpecError(
            f"register_rule({primitive.name}): a reference is traced in the primitive's place, so "
            "that other rules would never run"
        )
    primitives.REFERENCES.pop(primitive, None)
    if reference is not None:
        primitives.REFERENCES[primitive] = reference
    if symmetry is not None:
        SYMMETRY.register(primitive, symmetry)
    if lifting is not None:
        LIFTING.register(primitive, lifting)


class Operation(NamedTuple):
    """What is known about a primitive.

    Attributes:
      name: as jaxprs print it.
      symmetry: ``"rule"``, or why scales do not pass.
      lifting: ``"rule"``, or why paths do not pass.
    """

    name: str
    symmetry: str
    lifting: str


class Operations(NamedTuple):
    """All primitives; prints as a table.

    Attributes:
      rows: one for each, by name.
    """

    rows: tuple[Operation, ...]

    def __str__(self) -> str:
        head = Operation("operation", "rescaling symmetry", "path lifting")
        widths = [max(map(len, column)) for column in zip(head, *self.rows, strict=True)]
        lines = [head, Operation(*("-" * width for width in widths)), *self.rows]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def operations() -> Operations:
    """What each analysis does with each of JAX's primitives.

    Returns:
      A table that prints. A primitive that is not in it pins what it reads, and has no path
      lifting; programs inside of calls (``jit``, ``checkpoint``, ``custom_vjp``) are entered.

    Example:
      >>> import pathcond_jax as pathcond
      >>> found = {row.name: row for row in pathcond.operations().rows}
      >>> found["max"].symmetry, found["tanh"].symmetry
      ('rule', 'no power of a positive scale comes out of it')
    """
    known = {*SYMMETRY, *SYMMETRY.without, *LIFTING, *LIFTING.without, *primitives.REFERENCES}
    return Operations(
        tuple(
            Operation(p.name, _entry(SYMMETRY, p), _entry(LIFTING, p))
            for p in sorted(known, key=lambda p: str(p.name))
        )
    )


def _entry(table: primitives.RuleTable[Any], primitive: Any) -> str:
    if primitive in primitives.REFERENCES:
        return "reference"
    return "rule" if primitive in table else table.without.get(primitive, "no rule")
