"""A traced program on many parameters and inputs at once, in numpy and without compiling it.

Every value has a leading axis of samples, of size 1 if it is the same for all of them. Frequent
primitives are numpy; the others run in JAX, compiled once for all programs that use them alike.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from fuzzing import references
from fuzzing.numpy_operations import RULES
from fuzzing.references import CannotEvaluateError, Reference

# Samples that one call of a compiled primitive takes: one size, so that it is compiled once.
_CHUNK = 64


def evaluate(closed, arguments):
    """The results of a closed jaxpr; each argument and result has a leading axis of samples."""
    with np.errstate(all="ignore"):
        return _run(closed.jaxpr, [_one(c) for c in closed.consts], list(arguments))


def primitives_of(closed):
    """The names of all primitives in a program, inner programs included."""
    names = set()
    pending = [closed]
    while pending:
        item = pending.pop()
        # Of the newest JAX, a closed jaxpr is a jaxpr and its own inside.
        jaxpr = getattr(item, "jaxpr", item)
        if isinstance(jaxpr, jex_core.Jaxpr):
            for eqn in jaxpr.eqns:
                names.add(eqn.primitive.name)
                pending += eqn.params.values()
        elif isinstance(item, (tuple, list)):
            pending += item
    return names


def forget_compiled():
    """Drops what is compiled: a process may hold only so many programs."""
    _compiled.cache_clear()
    jax.clear_caches()


def _one(value):
    return _host(value)[None]


def _host(value):
    """A numpy array, but for random keys, which only JAX holds."""
    return value if _is_key(value) else np.asarray(value)


def _is_key(value):
    return jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.extended)


def _joined(parts):
    return jnp.concatenate(parts) if _is_key(parts[0]) else np.concatenate(parts)


def _run(jaxpr, constants, arguments):
    env = dict(zip(jaxpr.constvars, constants, strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return _one(atom.val) if isinstance(atom, jex_core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _apply(eqn, [read(a) for a in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn, values):
    name, params = eqn.primitive.name, eqn.params
    if name in CONTROL:
        return CONTROL[name](eqn, values)
    inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params), None)
    if name in _CALLS and inner is not None:
        constants = [_one(c) for c in getattr(inner, "consts", ())]
        return _run(getattr(inner, "jaxpr", inner), constants, values)
    if any(isinstance(value, Reference) for value in values):
        raise CannotEvaluateError(name)
    rule = RULES.get(name)
    if rule is not None and not any(map(_is_key, values)):
        result = rule(eqn, *values)
        if result is not None:
            return [np.asarray(result, dtype=eqn.outvars[0].aval.dtype)]
    return _in_jax(eqn, values)


_CALLS = frozenset(
    {
        *("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
        *("closed_call", "core_call", "call", "remat", "remat2", "checkpoint", "composite"),
    }
)


@functools.cache
def _compiled(primitive, params, batched):
    params = dict(params)

    def apply(*values):
        results = primitive.bind(*values, **params)
        return results if primitive.multiple_results else [results]

    axes = [0 if is_batched else None for is_batched in batched]
    return jax.jit(jax.vmap(apply, axes, axis_size=_CHUNK) if any(batched) else apply)


def _in_jax(eqn, values):
    count = max((len(value) for value in values), default=1)
    batched = tuple(len(value) > 1 for value in values)
    try:
        function = _compiled(eqn.primitive, tuple(sorted(eqn.params.items())), batched)
    except TypeError:  # A parameter has no hash.
        function = _compiled.__wrapped__(eqn.primitive, tuple(sorted(eqn.params.items())), batched)
    chunks = []
    for start in range(0, count, _CHUNK):
        part = [
            _padded(value[start : start + _CHUNK]) if is_batched else value[0]
            for value, is_batched in zip(values, batched, strict=True)
        ]
        try:
            chunks.append([_host(result) for result in function(*part)])
        except NotImplementedError:
            raise CannotEvaluateError(eqn.primitive.name) from None
    if not any(batched):
        return [result[None] for result in chunks[0]]
    return [_joined(parts)[:count] for parts in zip(*chunks, strict=True)]


def _padded(value):
    missing = _CHUNK - len(value)
    return _joined([value] + [value[-1:]] * missing) if missing else value


def _body(closed):
    return functools.partial(
        _run, getattr(closed, "jaxpr", closed), [_one(c) for c in getattr(closed, "consts", ())]
    )


def _taken(values, where):
    return [value[where] if len(value) > 1 else value for value in values]


def _refuse_references(values):
    if any(isinstance(value, Reference) for value in values):
        raise CannotEvaluateError("a reference in a branch")


def _cond(eqn, values):
    _refuse_references(values)
    which, *operands = values
    branches = eqn.params["branches"]
    which = np.clip(which.astype(int), 0, len(branches) - 1)
    if len(which) == 1:
        return _body(branches[which[0]])(operands)
    results = None
    for number in np.unique(which):
        where = np.flatnonzero(which == number)
        some = _body(branches[number])(_taken(operands, where))
        if results is None:
            results = [np.zeros((len(which), *r.shape[1:]), r.dtype) for r in some]
        for whole, part in zip(results, some, strict=True):
            whole[where] = part
    return results


def _while(eqn, values):
    _refuse_references(values)
    condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    carried = len(eqn.outvars)
    first = len(condition.jaxpr.invars) - carried
    last = first + len(body.jaxpr.invars) - carried
    read, used, carry = values[:first], values[first:last], values[last:]
    count = max(len(value) for value in values)
    carry = [np.broadcast_to(c, (count, *c.shape[1:])).copy() for c in carry]
    running = np.arange(count)
    for _ in range(1000):
        here = _taken(carry, running) if count > 1 else carry
        (goes_on,) = _body(condition)([*_taken(read, running), *here])
        goes_on = np.broadcast_to(goes_on, (len(running), *goes_on.shape[1:]))
        some = goes_on.reshape(len(running), -1).any(1)
        running, goes_on = running[some], goes_on[some]
        if not running.size:
            return carry
        here = _taken(carry, running) if count > 1 else carry
        after = _body(body)([*_taken(used, running), *here])
        for whole, part in zip(carry, after, strict=True):
            # Of a loop under vmap, each element goes on for as long as it wants.
            chosen = goes_on.reshape(*goes_on.shape, *(1,) * (whole.ndim - goes_on.ndim))
            whole[running] = np.where(chosen, part, whole[running])
    raise CannotEvaluateError("a loop that does not end")


def _scan(eqn, values):
    body = eqn.params["jaxpr"]
    inside = body.jaxpr
    stacked = sum(
        len(o.aval.shape) > len(i.aval.shape)
        for o, i in zip(eqn.invars, inside.invars, strict=True)
    )
    carried = sum(
        len(o.aval.shape) == len(i.aval.shape)
        for o, i in zip(eqn.outvars, inside.outvars, strict=True)
    )
    first = len(values) - stacked - carried
    constants, carry = values[:first], values[first : first + carried]
    xs = values[first + carried :]
    steps = range(eqn.params["length"])
    outputs = []
    for step in reversed(steps) if eqn.params["reverse"] else steps:
        results = _body(body)([*constants, *carry, *(x[:, step] for x in xs)])
        carry = results[:carried]
        outputs.append(results[carried:])
    if not outputs:
        ys = [np.zeros((1, *v.aval.shape), v.aval.dtype) for v in eqn.outvars[carried:]]
        return [*carry, *ys]
    outputs = outputs[::-1] if eqn.params["reverse"] else outputs
    return [*carry, *(_stack(each) for each in zip(*outputs, strict=True))]


def _stack(values):
    count = max(len(value) for value in values)
    return np.stack([np.broadcast_to(v, (count, *v.shape[1:])) for v in values], 1)


def _nothing(eqn, values):
    return []


def _callback(eqn, values):
    """A function on the host, elementwise as all of this fuzzer's are."""
    return [np.asarray(result) for result in eqn.params["callback"](*values)]


CONTROL = {
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "debug_callback": _nothing,
    "debug_print": _nothing,
    "pure_callback": _callback,
    "io_callback": _callback,
    **references.RULES,
}


def memory_maps():
    """How many memory maps the process holds, of which Linux allows 65530."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return 0


def size(shape):
    """The number of entries of an array."""
    return math.prod(shape)
