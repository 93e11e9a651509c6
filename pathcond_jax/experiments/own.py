"""A trained network of the user's, ready to be compressed, and the examples to measure it on."""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pathcond_jax as pathcond
from pathcond_jax.experiments.doors import Network, UserError, in_their_file, opened
from pathcond_jax.experiments.measuring import logits_of
from pathcond_jax.quantization import caps_as_parameters, fold_batch_norm

# The array of a file that is no input.
LABELS = "labels"
_LOGITS = "it must return one array of logits, (examples, ..., classes)"


class Own(NamedTuple):
    """A network, batch normalization folded and clipped activations rescalable.

    Attributes:
      apply_fn: the network, of a batch of examples.
      params: its parameters.
      spec: of both.
      inputs: what the network takes, arrays (examples, ...).
      labels: the classes that count as right, (examples, ...).
      measure: what the share of right classes is: ``"accuracy"``, or ``"agreement"`` with the
        classes of the network itself, where no others are given.
    """

    apply_fn: Callable[..., Any]
    params: Any
    spec: pathcond.ArchSpec
    inputs: tuple[Any, ...]
    labels: Any
    measure: str


def load(
    weights: str, inputs: Path, checkpoint: Path | None = None, subset: int | None = None
) -> Own:
    """Opens a network and the examples that it is measured on.

    Args:
      weights: ``FILE:FACTORY``, as :func:`~pathcond_jax.experiments.doors.opened` takes it.
      inputs: an array of examples (``.npy``); or several arrays (``.npz``), ``labels`` and, in
        their order, what the network takes.
      checkpoint: a folder written by Orbax, for the parameters.
      subset: how many examples to take, the first; None: all.

    Returns:
      The network and its examples.

    Raises:
      UserError: something cannot be opened, or does not fit; the message says what.
    """
    try:
        found = opened(weights, checkpoint)
        arrays, labels = examples(inputs, subset)
        apply_fn, arrays = _of_batches(found, arrays, inputs)
        return _ready(apply_fn, found.params, arrays, labels, inputs)
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None
    except pathcond.SpecError as error:
        raise UserError(f"{weights}: {error}") from error
    except Exception as error:
        raise UserError(f"{weights} fails:\n{in_their_file(error, weights)}") from error


def examples(path: Path, subset: int | None = None) -> tuple[tuple[np.ndarray, ...], Any]:
    """The arrays of a file that are inputs, and its labels, None if it has none.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        content = np.load(path, allow_pickle=False)
        arrays = dict(content) if isinstance(content, Mapping) else {"inputs": content}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is no .npy or .npz file of numbers, as numpy.save and numpy.savez write them"
        ) from error
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len({*counts.values()}) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"the arrays of {path} have different numbers of examples: {listed}")
    if not {*counts} - {LABELS} or min(counts.values()) < 2:
        raise UserError(f"{path} needs at least 2 examples of inputs: some to calibrate on")
    taken = {name: array[:subset] for name, array in arrays.items()}
    labels = taken.pop(LABELS, None)
    return tuple(taken.values()), labels


def _of_batches(
    found: Network, arrays: Sequence[np.ndarray], path: Path
) -> tuple[Callable[..., Any], tuple[np.ndarray, ...]]:
    """The network as a function of arrays of examples, and these in the types that it takes."""
    wanted, treedef = jax.tree.flatten(found.inputs)
    if len(wanted) != len(arrays):
        raise UserError(f"the network takes {len(wanted)} inputs, and {path} has {len(arrays)}")
    apply_fn = found.spec.apply_fn
    assert apply_fn is not None  # It was traced.

    def structured(params: Any, *arrays: Any) -> Any:
        outputs = jax.tree.leaves(apply_fn(params, *jax.tree.unflatten(treedef, arrays)))
        if len(outputs) != 1:
            raise UserError(f"the network returns {len(outputs)} arrays; {_LOGITS}")
        return outputs[0]

    shapes = [np.shape(example) for example in wanted]
    converted = tuple(map(_converted, arrays, wanted, [path] * len(wanted)))
    if all(array.shape[1:] == shape[1:] for array, shape in zip(arrays, shapes, strict=True)):
        return structured, converted
    if all(array.shape[1:] == shape for array, shape in zip(arrays, shapes, strict=True)):
        return jax.vmap(structured, (None, *(0 for _ in arrays))), converted
    raise UserError(
        f"the example input has shape {_listed(shapes)}, which is one example or a batch, and "
        f"the arrays of {path} have {_listed([array.shape for array in arrays])}, (examples, ...)"
    )


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def _converted(array: np.ndarray, example: Any, path: Path) -> np.ndarray:
    """An array in the precision of the example; not integers as fractions, or the reverse."""
    dtype = jnp.result_type(example)
    kinds = [np.issubdtype(kind, np.integer) for kind in (array.dtype, dtype)]
    if kinds[0] != kinds[1] or array.dtype.kind not in "iuf":
        raise UserError(
            f"{path} has inputs of type {array.dtype}, the example input is {dtype}; save them as "
            "the network takes them, normalized as in training"
        )
    return array.astype(dtype)


def _ready(
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: tuple[np.ndarray, ...],
    labels: np.ndarray | None,
    path: Path,
) -> Own:
    """The network without what keeps scales from being used, and the classes of its examples."""
    shape = jax.eval_shape(apply_fn, params, *inputs).shape
    if len(shape) < 2 or shape[0] != len(inputs[0]):
        raise UserError(f"of {len(inputs[0])} examples the network returns {shape}; {_LOGITS}")
    one = tuple(array[:1] for array in inputs)
    apply_fn, params = fold_batch_norm(apply_fn, params, *one)
    apply_fn, params = caps_as_parameters(apply_fn, params, *one)
    spec = pathcond.trace_spec(apply_fn, params, *one, rescale_state=True)
    if not spec.num_neurons:
        raise UserError(
            "no neuron of the network can be rescaled, so it has no other representative; "
            "pathcond inspect says why"
        )
    logits = logits_of(apply_fn, params, inputs)
    if not np.isfinite(logits).all():
        raise UserError(f"the outputs of the network are not finite on the inputs of {path}")
    if labels is None:
        return Own(apply_fn, params, spec, inputs, np.argmax(logits, -1), "agreement")
    return Own(apply_fn, params, spec, inputs, _checked(labels, shape, path), "accuracy")


def _checked(labels: np.ndarray, shape: tuple[int, ...], path: Path) -> np.ndarray:
    """The labels, if they are classes of logits of this shape."""
    if labels.shape != shape[:-1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{LABELS} of {path} must be integers {shape[:-1]}, as the logits are {shape}; they "
            f"are {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= shape[-1]:
        raise UserError(
            f"{LABELS} of {path} run from {labels.min()} to {labels.max()}, and the network has "
            f"classes 0 to {shape[-1] - 1}"
        )
    return labels
