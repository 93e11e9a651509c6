"""A random program, traced once, with its spec; and how the spec moves its parameters."""

import functools
import inspect
import warnings

import jax
import numpy as np

import pathcond_jax as pathcond
from fuzzing import evaluation

# Parameters and inputs are of size one: outputs below this may have cancelled.
_SMALL = 1e-6


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
    """e^logs, exact where it is a power of two up to rounding."""
    powers = logs / np.log(2.0)
    nearest = np.round(powers)
    return np.where(abs(powers - nearest) < 1e-13, np.exp2(nearest), np.exp(logs))


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


def relative_change(before, after):
    """Relative to the largest output of the sample; only what was finite is compared."""
    finite = np.isfinite(before)
    size = np.max(abs(before), axis=1, where=finite, initial=_SMALL, keepdims=True)
    with np.errstate(all="ignore"):
        difference = np.where(finite, abs(after - before), 0.0) / size
    return np.inf if np.isnan(difference).any() else float(difference.max(initial=0.0))
