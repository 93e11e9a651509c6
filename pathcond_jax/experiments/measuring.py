"""What rounding does to a network: accuracy and noise of its outputs, measured and predicted."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pathcond_jax as pathcond
from pathcond_jax.experiments import training
from pathcond_jax.quantization import (
    Scheme,
    Statistics,
    calibrate,
    predicted_noise,
    quantization_noise,
    simulate,
)

SCHEMES = {
    "tW8": Scheme(8),
    "tW6": Scheme(6),
    "tW4": Scheme(4),
    "tW3": Scheme(3),
    "tW2": Scheme(2),
    "cW4A4": Scheme(4, 4, "channel"),
    "tW8A8": Scheme(8, 8),
}
# The schemes that the variants of the criterion are for.
NOISE = {"noise tW": Scheme(4), "noise tWA": Scheme(8, 8), "noise cWA": Scheme(4, 4, "channel")}
CRITERIA = ("equalize", "enorm", "path")
REPRESENTATIVES = ("trained", "unlucky", *CRITERIA, *NOISE)
# Of log-scales that are drawn at random.
SPREADS = {"trained": 0.0, "unlucky": 1.0}
# Calibration takes so many examples at once, and so many random combinations of their outputs.
CALIBRATION_BATCH, DRAWS = 32, 8
# Factors of all step sizes, over which accuracies and noises are averaged. Where entries fall
# between grid points is luck: at 4 bits the noise of one rounding is often off by 2 dB.
STRETCHES = tuple(1 + 0.05 * k for k in range(7))
# How many numbers of inputs go through a network at once: activations are many times as large.
AT_ONCE = 2**22


class Subject(NamedTuple):
    """A network without normalization, and the examples that it is measured on.

    Attributes:
      apply_fn: the network.
      params: trained.
      spec: of both.
      inputs: arrays (examples, ...).
      labels: the classes that count as right, (examples, ...).
      calibration: inputs to calibrate on.
    """

    apply_fn: Callable[..., Any]
    params: Any
    spec: pathcond.ArchSpec
    inputs: Sequence[Any]
    labels: Any
    calibration: Sequence[Any]


def measurements(
    subject: Subject,
    representatives: Sequence[str],
    schemes: Sequence[str],
    seed: int,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Accuracies and noises of representatives of a trained network, rounded by schemes.

    Args:
      subject: the network.
      representatives: names in ``REPRESENTATIVES``.
      schemes: names in ``SCHEMES``.
      seed: of the unlucky representative.
      advance: called with the share of the work just done.

    Returns:
      Numbers by name; none of a representative whose criterion the network does not allow.
    """
    apply_fn, params, spec = subject[:3]
    batches = [
        tuple(array[k : k + CALIBRATION_BATCH] for array in subject.calibration)
        for k in range(0, len(subject.calibration[0]), CALIBRATION_BATCH)
    ]
    found = calibrate(apply_fn, params, spec, batches, draws=DRAWS)
    logits = logits_of(apply_fn, params, subject.inputs)
    values = {"float": float(training.accuracy(logits, subject.labels))}
    for name in representatives:
        log_scales = _log_scales(name, subject, found, seed)
        if log_scales is not None:
            moved, statistics = _moved(spec, params, found, log_scales)
            error = jnp.linalg.norm(logits_of(apply_fn, moved, subject.inputs) - logits)
            values[f"{name}, changed"] = float(error / jnp.linalg.norm(logits))
            for scheme in schemes:
                measured = _measured(subject, scheme, moved, statistics, logits)
                noise = float(_predicted(spec, scheme, moved, statistics))
                for what, value in {**measured, "predicted dB": noise}.items():
                    values[f"{name}, {scheme}, {what}"] = value
        advance(1 / len(representatives))
    return values


def logits_of(apply_fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> jax.Array:
    """The outputs (examples, ...) of a network on any number of examples."""
    return _in_batches(functools.partial(_logits, apply_fn, params), inputs)


def _in_batches(run: Callable[..., jax.Array], inputs: Sequence[Any]) -> jax.Array:
    """The outputs of a compiled network that treats examples independently."""
    count = len(inputs[0])
    numbers = sum(math.prod(array.shape[1:]) for array in inputs)
    size = max(1, AT_ONCE // max(1, numbers))
    parts = [run(*(array[k : k + size] for array in inputs)) for k in range(0, count, size)]
    return jnp.concatenate(parts)


def _log_scales(
    name: str, subject: Subject, statistics: Statistics, seed: int
) -> pathcond.LogScales | None:
    """Those of a representative; None where the criterion does not apply."""
    params, spec = subject.params, subject.spec
    if name in SPREADS:
        rng = np.random.default_rng(seed)
        draws = (rng.normal(scale=SPREADS[name], size=g.size) for g in spec.groups)
        return tuple(jnp.asarray(z, jnp.float32) for z in draws)
    criterion: Any = name
    if name in NOISE:
        criterion = quantization_noise(statistics, NOISE[name])
    try:
        return pathcond.condition(params, spec, criterion)[1].log_scales
    except pathcond.NotPathLiftableError:
        return None


@functools.partial(jax.jit, static_argnums=0)
def _moved(
    spec: pathcond.ArchSpec, params: Any, statistics: Statistics, log_scales: pathcond.LogScales
) -> tuple[Any, Statistics]:
    """Another representative and its statistics, for which no data is needed."""
    return pathcond.rescale(params, spec, log_scales), statistics.rescaled(spec, log_scales)


def _measured(
    subject: Subject, scheme: str, params: Any, statistics: Statistics, logits: jax.Array
) -> Mapping[str, float]:
    """Accuracy, and the power of the logits over that of their errors in dB, over stretches."""
    rights, noises = [], []
    for stretch in STRETCHES:
        run = functools.partial(
            _rounded,
            subject.apply_fn,
            subject.spec,
            scheme,
            params,
            statistics,
            jnp.float32(stretch),
        )
        rounded = _in_batches(run, subject.inputs)
        rights.append(float(jnp.mean(jnp.argmax(rounded, -1) == subject.labels)))
        # A step that is stretched makes its square as much larger.
        noises.append(float(jnp.square(rounded - logits).sum()) / stretch**2)
    power = float(jnp.square(logits).sum())
    ratio = 10 * float(np.log10(power / np.mean(noises)))
    return {"accuracy": float(np.mean(rights)), "dB": ratio}


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> jax.Array:
    outputs: jax.Array = apply_fn(params, *inputs)
    return outputs


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predicted(
    spec: pathcond.ArchSpec, scheme: str, params: Any, statistics: Statistics
) -> jax.Array:
    return predicted_noise(params, spec, statistics, SCHEMES[scheme]).decibel


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rounded(
    apply_fn: Callable[..., Any],
    spec: pathcond.ArchSpec,
    scheme: str,
    params: Any,
    statistics: Statistics,
    stretch: jax.Array,
    *inputs: Any,
) -> jax.Array:
    run = simulate(apply_fn, spec, statistics, SCHEMES[scheme], stretch=stretch)
    outputs: jax.Array = run(params, *inputs)
    return outputs
