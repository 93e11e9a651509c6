"""What must hold for every program: the checks of the fuzzer."""

import functools
import warnings
from typing import NamedTuple

import numpy as np

import pathcond_jax as pathcond
from fuzzing.subject import relative_change

# Scales of which all roots and powers are powers of two, so that nothing is rounded.
_EXACT = np.log(64.0)
_CHANGED = 1e-9


class Failure(NamedTuple):
    """What went wrong: ``kind`` names the check, ``detail`` the numbers or the message."""

    kind: str
    detail: str


def check_symmetries(subject, rng):
    """A failure if a rescaling changes an output, else None."""
    change, detail = _largest_change(subject, rng, subject.outputs)
    if change <= _tolerance(subject):
        return None
    # Once more without this fuzzer's own evaluation.
    change, detail = _largest_change(subject, rng, subject.outputs_in_jax)
    if change <= _tolerance(subject):
        return None
    return Failure("WRONG", f"outputs change by {change:.2g}{detail}")


def _tolerance(subject):
    """Programs that compute in lower precision round, and so do their sums."""
    dtypes = {str(eqn_dtype) for eqn_dtype in _dtypes(subject.closed)}
    for name, tolerance in (("bfloat16", 0.3), ("float16", 0.05), ("float32", 1e-4)):
        if name in dtypes or (name == "bfloat16" and "reduce_precision" in subject.primitives):
            return tolerance
    return 1e-4 if "complex64" in dtypes else _CHANGED


def _dtypes(closed):
    found, pending = set(), [closed]
    while pending:
        item = pending.pop()
        jaxpr = getattr(item, "jaxpr", item)
        if hasattr(jaxpr, "eqns"):
            for eqn in jaxpr.eqns:
                found |= {getattr(v.aval, "dtype", None) for v in eqn.outvars}
                pending += eqn.params.values()
        elif isinstance(item, (tuple, list)):
            pending += item
    return found


def _largest_change(subject, rng, evaluate):
    """The largest relative change of an output that neither rounding nor overflow explains."""
    samples = 3
    params, x, n = subject.program.draw(rng, samples)
    before = evaluate(params, x, n)
    count = subject.spec.num_neurons
    worst, which = 0.0, ""
    for name, draw in (
        ("powers of two", lambda: _EXACT * rng.choice([-1, 1], (samples, count))),
        ("N(0, 1)", lambda: rng.normal(size=(samples, count))),
    ):
        scales = draw()
        change = relative_change(
            before, evaluate(subject.moved(params, scales @ subject.directions.T), x, n)
        )
        if change > _CHANGED and not np.isfinite(change):
            # An overflow vanishes with smaller scales.
            small = subject.moved(params, scales @ subject.directions.T / 64)
            change = relative_change(before, evaluate(small, x, n))
        if change > _CHANGED and name != "powers of two":
            moved = subject.moved(params, scales @ subject.directions.T)
            noise = max(_noise(subject, rng, p, x, n, evaluate) for p in (params, moved))
            change = 0.0 if change < noise else change
        if change > worst:
            worst, which = change, f" under scales of {name}"
    return worst, which


def _noise(subject, rng, params, x, n, evaluate):
    """What rounding may change: the outputs' response to changes in the last places."""
    before, worst = evaluate(params, x, n), 0.0
    for _ in range(12):
        logs = 1e-12 * rng.normal(size=(len(x), len(subject.directions)))
        worst = max(worst, relative_change(before, evaluate(subject.moved(params, logs), x, n)))
    return 1e3 * worst


_EXPLAINED = (pathcond.SpecError, pathcond.NotPathLiftableError, OverflowError)


def check_lifting(subject, rng, thorough):
    """A failure of path norms, Gram diagonals or ``rescale``, else None."""
    params, *_ = subject.program.draw(rng, 1)
    scales = rng.normal(size=(1, subject.spec.num_neurons))
    factors = scales @ subject.directions.T
    one = {name: np.asarray(value[0]) for name, value in params.items()}
    two = {name: np.asarray(value[0]) for name, value in subject.moved(params, factors).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checks = [
            *(functools.partial(_norm_is_invariant, subject, one, two, order) for order in (1, 2)),
            functools.partial(_gram_follows, subject, one, two, factors[0]),
        ]
        if thorough:
            checks += [
                functools.partial(_rescale_agrees, subject, one, two, scales[0]),
                functools.partial(_paths_agree, subject, one),
            ]
        checks.append(functools.partial(_sums_agree, subject, one))
        for check in checks:
            try:
                failure = check()
            except _EXPLAINED:
                continue
            if failure is not None:
                return failure
    return None


def _norm_is_invariant(subject, one, two, order):
    before, after = (
        float(pathcond.path_norm(params, subject.spec, order, log=True)) for params in (one, two)
    )
    # Of a network whose constants are not numbers, neither is the norm.
    if before == after or abs(before - after) < 1e-7 or np.isnan([before, after]).all():
        return None
    return Failure(f"path norm {order}", f"log path norm {before:.6g} becomes {after:.6g}")


def _gram_follows(subject, one, two, log_factors):
    before, after = (
        np.concatenate(
            [np.ravel(pathcond.gram_diagonal(p, subject.spec)[k]) for k in subject.names]
        )
        for p in (one, two)
    )
    expected = before * np.exp(-2 * log_factors)
    if not np.isfinite(before).all():
        return None
    if np.allclose(after, expected, rtol=1e-6, atol=1e-9 * expected.max(initial=0.0)):
        return None
    worst = np.argmax(abs(after - expected))
    return Failure("gram", f"g[{worst}] is {after[worst]:.6g}, not {expected[worst]:.6g}")


def _rescale_agrees(subject, one, two, scales):
    ends = np.cumsum([group.size for group in subject.spec.groups])[:-1].astype(int)
    moved = pathcond.rescale(
        one, subject.spec, tuple(np.split(scales, ends)) if scales.size else ()
    )
    wrong = [k for k in subject.names if not np.allclose(moved[k], two[k], rtol=1e-12)]
    return (
        Failure("rescale", f"rescale moves {wrong} otherwise than the spec says") if wrong else None
    )


def _paths_agree(subject, one):
    """The norm and the Gram diagonal from the list of all paths."""
    paths = np.asarray(pathcond.lifted(one, subject.spec))
    for order in (1, 2):
        norm = float(pathcond.path_norm(one, subject.spec, order))
        listed = np.sum(abs(paths) ** order) ** (1 / order)
        if not np.isclose(norm, listed, rtol=1e-7):
            return Failure("lifted", f"path norm {order} is {norm:.6g}, of the paths {listed:.6g}")
    gram = pathcond.gram_diagonal(one, subject.spec)
    for name in subject.names:
        for place in np.ndindex(one[name].shape):
            ends = []
            for sign in (1, -1):
                value = one[name].copy()
                value[place] += sign * 1e-3
                ends.append(np.asarray(pathcond.lifted(one | {name: value}, subject.spec)))
            listed = np.sum((ends[0] - ends[1]) ** 2) / 4e-6
            if not np.isclose(gram[name][place], listed, rtol=1e-4, atol=1e-9):
                detail = f"g of {name}{list(place)} is {gram[name][place]:.6g}, not {listed:.6g}"
                return Failure("gram of paths", detail)
    return None


# Programs of these alone, and without constants but 0 and 1, are sums over paths of products.
_LINEAR = frozenset(
    {
        *("dot_general", "add", "mul", "max", "broadcast_in_dim", "reshape", "transpose", "jit"),
        *("concatenate", "reduce_sum", "squeeze", "slice", "rev", "conv_general_dilated", "pjit"),
        *("custom_jvp_call", "split", "copy", "expand_dims", "remat", "checkpoint", "abs"),
        *("closed_call", "stack", "unstack", "tile"),
    }
)


def _sums_agree(subject, one):
    """Path norms as the value of the network itself at |θ|^order and inputs of one."""
    if not subject.primitives <= _LINEAR or not _plain_constants(subject.closed):
        return None
    # A function of parameters is one weight, not one per term.
    inputs = [False] * len(subject.names) + [True, True]
    if _adds_parameters(subject.closed.jaxpr, inputs)[0]:
        return None
    shape = _lifted_input_shape(subject)
    if shape != subject.program.recipe.input_shape:
        return None
    for order in (1, 2):
        norm = float(pathcond.path_norm(one, subject.spec, order))
        params = {name: abs(value)[None] ** order for name, value in one.items()}
        value = subject.outputs(params, np.ones((1, *shape)), np.ones(1, np.int32))
        expected = value.sum() ** (1 / order)
        if not np.isclose(norm, expected, rtol=1e-7):
            return Failure(f"path norm {order}", f"is {norm:.6g}, the network says {expected:.6g}")
    return None


def _adds_parameters(jaxpr, depends):
    """Whether parameters are added up before they meet a signal; which outputs are signals.

    Args:
      depends: per input, whether it is a signal.
    """
    signals = dict(zip(map(id, jaxpr.invars), depends, strict=True))
    for eqn in jaxpr.eqns:
        flags = [signals.get(id(v), False) for v in eqn.invars]
        inner = next((v for v in eqn.params.values() if hasattr(v, "jaxpr")), None)
        if inner is not None:
            found, results = _adds_parameters(inner.jaxpr, flags)
            if found:
                return True, ()
        else:
            if not any(flags) and eqn.primitive.name not in _MOVES:
                return True, ()
            results = [any(flags)] * len(eqn.outvars)
        signals.update(zip(map(id, eqn.outvars), results, strict=True))
    return False, [signals.get(id(v), False) for v in jaxpr.outvars]


# What may be done to a parameter, of which each entry remains a weight.
_MOVES = frozenset(
    {
        *("broadcast_in_dim", "reshape", "transpose", "concatenate", "squeeze", "slice", "rev"),
        *("split", "copy", "expand_dims", "stack", "unstack", "tile", "abs"),
    }
)


def _lifted_input_shape(subject):
    graph = subject.spec.program
    return tuple(graph.avals[graph.inputs[len(subject.names)]].shape)


def _plain_constants(closed):
    pending = [closed.jaxpr]
    if any(not np.isin(np.asarray(c), (0, 1)).all() for c in closed.consts):
        return False
    while pending:
        jaxpr = pending.pop()
        for eqn in jaxpr.eqns:
            values = [v.val for v in eqn.invars if hasattr(v, "val")]
            if eqn.primitive.name == "max" and not values:
                # A maximum of two signals is an edge from each, not the larger one.
                return False
            if any(not np.isin(np.asarray(v), (0, 1)).all() for v in values):
                return False
            inner = [getattr(v, "jaxpr", v) for v in eqn.params.values()]
            pending += [v for v in inner if hasattr(v, "eqns")]
    return True
