"""Mutable arrays as the fuzzer's evaluation follows them: static indices only."""

import jax
import numpy as np


class CannotEvaluateError(Exception):
    """The program has a primitive that only JAX itself can run, such as a reference."""


class Reference:
    """A mutable array: the value that was written last, with its axis of samples."""

    def __init__(self, value):
        self.value = value

    def read(self, index):
        return self.value[(slice(None), *index)]

    def write(self, index, value):
        count = max(len(self.value), len(value))
        whole = np.broadcast_to(self.value, (count, *self.value.shape[1:])).copy()
        whole[(slice(None), *index)] = value
        self.value = whole


def _new_reference(eqn, values):
    return [Reference(values[0])]


def _position(eqn, values):
    """The static index of a ``get`` or a ``swap``."""
    transforms = jax.tree.unflatten(eqn.params["tree"], values)
    if not transforms:
        return ()
    if len(transforms) > 1 or not hasattr(transforms[0], "indices"):
        raise CannotEvaluateError("a reference's transform")
    return tuple(_static_index(index) for index in transforms[0].indices)


def _static_index(index):
    if hasattr(index, "size") and hasattr(index, "start"):
        start = _static_index(index.start)
        return slice(start, start + index.size * index.stride, index.stride)
    index = np.asarray(index)
    if index.size != 1:
        raise CannotEvaluateError("an index of a reference that depends on the sample")
    return int(index.reshape(()))


def _get(eqn, values):
    return [values[0].read(_position(eqn, values[1:]))]


def _swap(eqn, values):
    index = _position(eqn, values[2:])
    before = values[0].read(index)
    values[0].write(index, values[1])
    return [before]


def _add_to(eqn, values):
    index = _position(eqn, values[2:])
    values[0].write(index, values[0].read(index) + values[1])
    return []


RULES = {
    **dict.fromkeys(("new_ref", "ref", "mutable_array", "array_ref"), _new_reference),
    **dict.fromkeys(("freeze", "freeze_p"), lambda eqn, values: [values[0].value]),
    "get": _get,
    "swap": _swap,
    "addupdate": _add_to,
}
