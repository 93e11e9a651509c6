"""The registry: JAX's primitives by name, and for each analysis a table of rules.

A primitive has one entry in the table of each analysis: a rule, or the reason for which there is
none on purpose. A rule declares the parameters of the primitive that it understands. Whatever it
has not declared, such as a parameter that a newer JAX adds, an unusual value, or an effect, makes
the analysis treat the operation as one without a rule, which is sound.

This is the only file that imports ``jax.extend``.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.extend.core import primitives as jex_primitives

from pathcond_jax._program.failures import warn_of_failure

Literal = jex_core.Literal
Function = TypeVar("Function", bound=Callable[..., Any])

# Parameters that say where or how exactly an operation runs, not what it computes.
_PLACEMENT = frozenset({"accuracy", "out_sharding", "precision", "sharding"})

# Names that some supported versions of JAX lack, and which.
ABSENT = {
    "call": "called eval_jaxpr since JAX 0.12",
    "closed_call": "called eval_jaxpr since JAX 0.12",
    "empty2": "new in JAX 0.8",
    "eval_jaxpr": "called call and closed_call before JAX 0.12",
    "get": "exported since JAX 0.8",
    "log2": "new in JAX 0.12",
    "one_minus_square": "new in JAX 0.12",
    "polynomial": "new in JAX 0.12",
    "stack": "jnp.stack is made of broadcast_in_dim and concatenate before JAX 0.8",
    "swap": "exported since JAX 0.8",
    "tile": "jnp.tile is made of broadcast_in_dim and reshape before JAX 0.8",
    "unstack": "jnp.unstack is made of split and squeeze before JAX 0.8",
    "xla_pmap": "gone since JAX 0.8",
}


def find(name: str) -> Any:
    """The JAX primitive called ``name``, as jaxprs print it; None if this JAX has none."""
    return _by_name().get(name)


def exported() -> dict[str, Any]:
    """The primitives that ``jax.extend.core.primitives`` exports, by name."""
    found = (getattr(jex_primitives, key) for key in dir(jex_primitives) if key.endswith("_p"))
    return {primitive.name: primitive for primitive in found}


@functools.cache
def _by_name() -> dict[str, Any]:
    return {**{p.name: p for p in _traced_primitives()}, **exported()}


def _traced_primitives() -> Iterator[Any]:
    """Primitives that ``jax.extend`` does not export, taken from programs that use them."""
    # An array would start the backend at import, before jax.distributed.initialize.
    x = jax.ShapeDtypeStruct((2,), np.float32)
    programs = (
        lambda x: jax.lax.split(x, (1, 1)),
        jax.jit(lambda x: x + 1),
        lambda x: jax.lax.optimization_barrier(x),
        lambda x: jax.lax.clamp(x, x, x),
        lambda x: jax.lax.square(x),
        jax.lax.stop_gradient,
        jax.checkpoint(lambda x: x + 1),
        lambda x: jax.ad_checkpoint.checkpoint_name(x, "x"),
        lambda x: x.at[0].subtract(x[1]),
        lambda x: jnp.tile(x, 2),
        lambda x: jnp.stack([x, x]),
        jnp.unstack,
        lambda x: jax.random.key_data(jax.random.clone(_key(x))),
        lambda x: jax.lax.ragged_dot(x[None], x[:, None][None], jnp.ones(1, jnp.int32)),
        lambda x: jax.lax.composite(lambda x: x + 1, "added", version=1)(x),
    )
    for program in programs:
        yield from (eqn.primitive for eqn in jax.make_jaxpr(program)(x).jaxpr.eqns)


def _key(x: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(x.astype(np.uint32), impl="threefry2x32")


_CALLS = (
    *("jit", "custom_jvp_call", "custom_vjp_call", "call", "closed_call", "eval_jaxpr", "remat2"),
    "composite",
)


@functools.cache
def calls() -> frozenset[Any]:
    """The primitives that run an inner program once, as it is."""
    return frozenset(p for p in map(find, _CALLS) if p is not None)


def inner_program(eqn: Any) -> Any:
    """The program that a call runs; None for other operations."""
    if eqn.primitive not in calls():
        return None
    keys = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return next((eqn.params[key] for key in keys if key in eqn.params), None)


REFERENCES: dict[Any, Callable[..., Any]] = {}


def reference_program(eqn: Any) -> Any:
    """The program that stands for an operation in every analysis; None: the operation itself.

    A reference that raises, or gives other shapes than the operation, stands for nothing.
    """
    reference = REFERENCES.get(eqn.primitive)
    if reference is None:
        return None
    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars]

    def run(*values: Any) -> Any:
        found = reference(*values, **eqn.params)
        return [] if found is NotImplemented else found

    try:
        program = jax.make_jaxpr(run)(*shapes)
    except Exception as error:
        because = f"has a reference that fails ({type(error).__name__}: {error})"
        warn_of_failure(eqn.primitive.name, "", because)
        return None
    wanted = [(var.aval.shape, var.aval.dtype) for var in eqn.outvars]
    return program if [(aval.shape, aval.dtype) for aval in program.out_avals] == wanted else None


def holds_program(value: Any) -> bool:
    """Whether a primitive's parameter is, or contains, a program."""
    if isinstance(value, (tuple, list)):
        return any(map(holds_program, value))
    return isinstance(value, (jex_core.Jaxpr, jex_core.ClosedJaxpr))


def has_effect(eqn: Any) -> bool:
    """Whether an operation does more than return its outputs; printing for debugging is nothing."""
    return any(type(effect) not in _debugging_effects() for effect in eqn.effects)


@functools.cache
def _debugging_effects() -> frozenset[type]:
    x = jax.ShapeDtypeStruct((2,), np.float32)
    programs = [
        functools.partial(jax.debug.callback, lambda x: None, ordered=ordered)
        for ordered in (True, False)
    ]
    eqns = [eqn for program in programs for eqn in jax.make_jaxpr(program)(x).jaxpr.eqns]
    return frozenset(type(effect) for eqn in eqns for effect in eqn.effects)


class Entry(NamedTuple, Generic[Function]):
    """What an analysis does with a primitive.

    Attributes:
      function: the rule.
      reads: the parameters that it takes account of, whatever their values; None: all.
      requires: parameters with a test that their value must pass for the rule to be right.
    """

    function: Function
    reads: frozenset[str] | None
    requires: Mapping[str, Callable[[Any], bool]]

    def objection(self, params: Mapping[str, Any]) -> str:
        """Why the rule does not hold for these parameters; "" if it does."""
        if self.reads is None:
            return ""
        for name, value in params.items():
            test = self.requires.get(name)
            if name in self.reads or name in _PLACEMENT or (test is not None and test(value)):
                continue
            if test is None and not holds_program(value):
                return f"has a parameter {name!r} that its rule does not know"
            shown = "" if holds_program(value) else f" of {value!r}"
            return f"has an unusual {name!r}{shown}"
        return ""


class RuleTable(Generic[Function]):
    """The rules of one analysis, by primitive.

    Attributes:
      analysis: what the rules are for.
      without: primitives that have no rule on purpose, and why.
      unresolved: the names in this table that this version of JAX does not have.
    """

    def __init__(self, analysis: str) -> None:
        self.analysis = analysis
        self.without: dict[Any, str] = {}
        self.unresolved: set[str] = set()
        self._entries: dict[Any, Entry[Function]] = {}

    def rule(
        self,
        *names: str,
        reads: Collection[str] = (),
        requires: Mapping[str, Any] | None = None,
    ) -> Callable[[Function], Function]:
        """Enters the function below it as the rule of the primitives called ``names``.

        Args:
          *names: names of primitives, as jaxprs print them.
          reads: the parameters that the rule takes account of, or that do not matter to it.
          requires: for other parameters, the value that they must have, or a test of it.
        """
        tests = {
            name: wanted if callable(wanted) else functools.partial(_is, wanted)
            for name, wanted in (requires or {}).items()
        }

        def enter(function: Function) -> Function:
            for primitive in self._resolved(names):
                self._entries[primitive] = Entry(function, frozenset(reads), tests)
            return function

        return enter

    def no_rule(self, reason: str, *names: str) -> None:
        """Notes that the primitives called ``names`` have no rule on purpose."""
        self.without.update(dict.fromkeys(self._resolved(names), reason))

    def register(self, primitive: Any, function: Function) -> None:
        """Enters a rule that takes account of all parameters, in place of an earlier one."""
        self._entries[primitive] = Entry(function, None, {})

    def get(self, primitive: Any) -> Entry[Function] | None:
        """The rule of a primitive, if it has one."""
        return self._entries.get(primitive)

    def __contains__(self, primitive: Any) -> bool:
        return primitive in self._entries

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def _resolved(self, names: Collection[str]) -> list[Any]:
        found = {name: find(name) for name in names}
        # A version of JAX that drops a primitive must not keep the library from being imported:
        # the tests look at what is left over here.
        self.unresolved.update(name for name, primitive in found.items() if primitive is None)
        return [primitive for primitive in found.values() if primitive is not None]


def _is(wanted: Any, value: Any) -> bool:
    return bool(value is wanted or value == wanted)


# Entries are written at the given places or, out of bounds, nowhere: so does every mode.
SCATTER_PARAMETERS = (
    *("dimension_numbers", "indices_are_sorted", "mode", "unique_indices", "update_consts"),
)


def runs_only(*names: str) -> Callable[[Any], bool]:
    """A test of an operation's inner program: one operation, of ``names``, of its arguments."""

    def test(program: Any) -> bool:
        jaxpr = getattr(program, "jaxpr", program)
        return (
            program is not None
            and len(jaxpr.eqns) == 1
            and jaxpr.eqns[0].primitive in map(find, names)
            and list(jaxpr.eqns[0].invars) == list(jaxpr.invars)
            and list(jaxpr.eqns[0].outvars) == list(jaxpr.outvars)
        )

    return test
