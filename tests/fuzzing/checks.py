"""What must hold for every program: the checks of the fuzzer."""

import functools
import inspect
import warnings
from typing import NamedTuple

import jax
import numpy as np

import pathcond_jax as pathcond
from fuzzing import evaluation
from pathcond_jax._program import kinds, primitives
from pathcond_jax._symmetry.values import RULES

# Scales of which all roots and powers are powers of two, so that nothing is rounded.
_EXACT = np.log(64.0)
_CHANGED = 1e-9
# Parameters and inputs are of size one: outputs below this may have cancelled.
_SMALL = 1e-6
_STEP = 2e-5
_RANK, _AMBIGUOUS = 1e-6, 1e-9
_MAX_SAMPLES = 6000


class Failure(NamedTuple):
    """What went wrong: ``kind`` names the check, ``detail`` the numbers or the message."""

    kind: str
    detail: str


class Dimensions(NamedTuple):
    """How many dimensions of diagonal rescalings a program has.

    Attributes:
      found: the neurons of the spec, those of dead parameters aside, whatever powers entries take.
      one_sided: directions in which entries only grow.
      missed: the other directions that the spec lacks.
      local: those that hold for what is drawn only, not for other, small or large parameters.
      operations: those that pin what moves in these, by name.
      supported: whether all operations of the program have a rule, or no scale to pass.
    """

    found: int
    one_sided: int
    missed: int
    local: int = 0
    operations: tuple[str, ...] = ()
    supported: bool = True


class Subject:
    """A program, traced once, with its spec.

    Raises:
      Whatever ``trace_spec`` raises.
    """

    def __init__(self, program):
        self.program = program
        self.closed = program.jaxpr()
        self.primitives = evaluation.primitives_of(self.closed)
        params, *inputs = program.abstract()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.spec = pathcond.trace_spec(_named(program), params, *inputs, **_unchecked())
        # A rule that fails pins and warns: sound, and yet to be mended.
        self.warnings = [str(w.message) for w in said if w.category.__name__ == "RuleFailedWarning"]
        self.directions = directions(self.spec)
        self.names = sorted(program.shapes)
        self._compiled = None

    def outputs(self, params, x, n):
        """The outputs of all samples, (samples, entries)."""
        arguments = [params[name] for name in self.names] + [x, n]
        try:
            results = evaluation.evaluate(self.closed, arguments)
        except evaluation.CannotEvaluateError:
            return self.outputs_in_jax(params, x, n)
        return _flat(results, len(x))

    def outputs_in_jax(self, params, x, n):
        """The same, by JAX alone."""
        self._compiled = self._compiled or jax.jit(lambda *arguments: self.program(*arguments))
        samples = [
            ({name: params[name][k] for name in self.names}, x[k], n[k]) for k in range(len(x))
        ]
        try:
            rows = [self._compiled(*sample) for sample in samples]
        except (NotImplementedError, TypeError, ValueError):
            # Some programs of references run, but cannot be compiled.
            rows = [self.program(*sample) for sample in samples]
        columns = [np.stack([np.asarray(row[j]) for row in rows]) for j in range(len(rows[0]))]
        return _flat(columns, len(x))

    def moved(self, params, log_factors):
        """Parameters whose entries are multiplied by e^log_factors, (samples, entries)."""
        start, result = 0, {}
        for name in self.names:
            size = evaluation.size(self.program.shapes[name])
            part = log_factors[:, start : start + size]
            result[name] = params[name] * _exp(part).reshape(-1, *self.program.shapes[name])
            start += size
        return result


def _exp(logs):
    """e^logs, exact where it is a power of two."""
    powers = logs / np.log(2.0)
    nearest = np.round(powers)
    return np.where(abs(powers - nearest) < 1e-9, np.exp2(nearest), np.exp(logs))


def _flat(results, count):
    wide = [np.broadcast_to(r, (count, *r.shape[1:])).reshape(count, -1) for r in results]
    return np.concatenate(wide, 1).astype(np.float64)


def _named(program):
    """Each program is a function of its own to JAX, which remembers what it has traced."""
    return lambda params, x, n: program(params, x, n)


@functools.cache
def _unchecked():
    """The analysis is fuzzed; its own numeric check, where it has one, would hide its errors."""
    known = inspect.signature(pathcond.trace_spec).parameters
    return {"check": False} if "check" in known else {}


def directions(spec):
    """The matrix (entries, neurons) of what unit log-scales do to the logarithms of entries."""
    starts, total = {}, 0
    for leaf in spec.leaves:
        starts[leaf.path] = total, leaf.shape
        total += leaf.size
    matrix = np.zeros((total, spec.num_neurons))
    first = 0
    for group in spec.groups:
        for sign, side in ((1, group.incoming), (-1, group.outgoing)):
            for incidence in side:
                start, shape = starts[incidence.path]
                index = np.transpose(incidence.index, np.argsort(incidence.axes))
                laid = [n if a in incidence.axes else 1 for a, n in enumerate(shape)]
                neuron = np.broadcast_to(index.reshape(laid), shape).reshape(-1)
                entries = np.flatnonzero(neuron >= 0)
                matrix[start + entries, first + neuron[entries]] += sign * incidence.power
        first += group.size
    return matrix


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
        change = _change(
            before, evaluate(subject.moved(params, scales @ subject.directions.T), x, n)
        )
        if change > _CHANGED and not np.isfinite(change):
            # An overflow vanishes with smaller scales.
            small = subject.moved(params, scales @ subject.directions.T / 64)
            change = _change(before, evaluate(small, x, n))
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
        worst = max(worst, _change(before, evaluate(subject.moved(params, logs), x, n)))
    return 1e3 * worst


def _change(before, after):
    """Relative to the largest output of the sample; only what was finite is compared."""
    finite = np.isfinite(before)
    size = np.max(abs(before), axis=1, where=finite, initial=_SMALL, keepdims=True)
    with np.errstate(all="ignore"):
        difference = np.where(finite, abs(after - before), 0.0) / size
    return np.inf if np.isnan(difference).any() else float(difference.max(initial=0.0))


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


def count_dimensions(subject, rng):
    """The dimension of all diagonal rescalings that keep the outputs, or None if in doubt."""
    null, live = _null_space(subject, rng)
    if null is None:
        return None
    found = subject.directions[live]
    rank = np.linalg.matrix_rank(found) if found.size else 0
    counts = {"one_sided": 0, "missed": 0}
    operations = set()
    known = found
    for direction in _reduced_rows(null) if len(null) > rank else ():
        more = np.column_stack([known, direction])
        if np.linalg.matrix_rank(more, tol=1e-6) <= np.linalg.matrix_rank(known, tol=1e-6):
            continue
        if not _keeps_outputs(subject, rng, direction, live):
            continue
        known = more
        moving = direction[abs(direction) > 1e-6]
        if (moving > 0).all() or (moving < 0).all():
            counts["one_sided"] += 1
        else:
            counts["missed"] += 1
            operations |= _pinning(subject, live[abs(direction) > 1e-6])
    return Dimensions(
        int(rank),
        **counts,
        local=int(len(null) - np.linalg.matrix_rank(known, tol=1e-6)),
        operations=tuple(sorted(operations)),
        supported=_is_supported(subject),
    )


def _is_supported(subject):
    known = {p.name for p in (*RULES, *primitives.calls())}
    unscaled = {*kinds.ELEMENTWISE, *kinds.BITS, *kinds.RANDOM, "debug_callback", "debug_print"}
    return subject.primitives <= known | unscaled


def _pinning(subject, entries):
    """The operations that ``spec.pinned`` names for the leaves of these entries."""
    sizes = [leaf.size for leaf in subject.spec.leaves]
    ends = np.cumsum(sizes)
    moving = {subject.spec.leaves[k].path for k in np.searchsorted(ends, entries, side="right")}
    pinned = [row for row in subject.spec.pinned if row.path in moving]
    return {(row.operation or row.reason).split(" in ")[0] for row in pinned} or {"nothing pinned"}


def _null_space(subject, rng):
    """A basis (rows) of what leaves the outputs at first order, over entries that matter."""
    entries = len(subject.directions)
    draw = functools.partial(subject.program.draw, rng)
    width = subject.outputs(*draw(1)).shape[1]
    # Rectifiers that are on in few samples say little about their parameters there.
    samples = 4 * max(3, -(-(entries + 8) // width))
    nothing = None, None
    if samples * 2 * entries > _MAX_SAMPLES:
        return nothing
    params, x, n = draw(samples)
    logs = np.concatenate([_STEP * np.eye(entries), -_STEP * np.eye(entries)])
    logs = np.tile(logs, (samples, 1))
    params, x, n = jax.tree.map(lambda a: np.repeat(a, 2 * entries, 0), (params, x, n))
    outputs = subject.outputs(subject.moved(params, logs), x, n)
    outputs = outputs.reshape(samples, 2, entries, width)
    rows = np.moveaxis(outputs[:, 0] - outputs[:, 1], 1, 2).reshape(-1, entries) / (2 * _STEP)
    size = abs(outputs[:, 0]).max(1).reshape(-1)
    rows = rows[np.isfinite(rows).all(1) & np.isfinite(size)]
    size = abs(rows).max(1, initial=0.0)
    rows = rows[size > 0] / size[size > 0, None]
    live = np.flatnonzero(abs(rows).max(0, initial=0.0) > 1e-7)
    if len(rows) < len(live) + 1 or not len(live):
        return nothing
    _, values, vectors = np.linalg.svd(rows[:, live])
    values = values / values[0]
    if ((values < _RANK) & (values > _AMBIGUOUS)).any():
        return nothing
    rank = int((values >= _RANK).sum())
    return vectors[rank:], live


def _reduced_rows(rows):
    """The reduced row echelon form: the directions one at a time, as far as possible."""
    rows, pivot = rows.copy(), 0
    for column in range(rows.shape[1]):
        if pivot == len(rows):
            break
        best = pivot + np.argmax(abs(rows[pivot:, column]))
        if abs(rows[best, column]) < 1e-6:
            continue
        rows[[pivot, best]] = rows[[best, pivot]]
        rows[pivot] /= rows[pivot, column]
        others = np.arange(len(rows)) != pivot
        rows[others] -= np.outer(rows[others, column], rows[pivot])
        pivot += 1
    return rows[:pivot]


def _keeps_outputs(subject, rng, direction, live):
    """Whether outputs stay at usual parameters, and at small and large ones.

    A bound that no usual value meets, or a constant that outweighs all else, would count as a
    symmetry although it holds for some parameters only.
    """
    sizes = np.repeat([1.0, 0.03, 30.0], 6)
    params, x, n = subject.program.draw(rng, len(sizes))
    logs = np.zeros((len(sizes), len(subject.directions)))
    logs[:, live] = np.outer(np.tile([-1, -0.3, 0.1, 0.5, 1, 1.7], 3), direction)
    params = {
        name: value * (sizes ** rng.choice([0, 1], len(sizes))).reshape(-1, *[1] * (value.ndim - 1))
        for name, value in params.items()
    }
    x = x * sizes.reshape(-1, *[1] * (x.ndim - 1))
    before = subject.outputs(params, x, n)
    return _change(before, subject.outputs(subject.moved(params, logs), x, n)) < 1e-6
