"""What engines of inference make of EfficientNet-Lite with public ImageNet weights, by parameters.

Batch normalization is folded and ReLU6 capped; static ranges come from half of the crops of
photographs, the signal-to-noise ratio of the logits and the agreement with them from the other
half. In the environment of ``engines.py``, with what ``imagenet.py`` needs:

    python benchmarks/imagenet_engines.py
"""

import functools

import engines
import imagenet
import jax
import numpy as np

import pathcond_jax as pathcond
from pathcond_jax.quantization import (
    calibrate,
    caps_as_parameters,
    fold_batch_norm,
    quantization_noise,
)

BATCH, DRAWS = 16, 8
SCHEMES = ("onnxruntime_static", "litert_int8")
# jax2onnx puts layers of its own in the place of Flax's while it traces. Of inputs of a shape that
# it has seen before, a folded function is not traced anew.
ENGINES = {
    "ONNX Runtime, per tensor": functools.partial(
        engines.by_onnx_runtime, per_channel=False, batch=imagenet.NUM_CROPS // 2
    ),
    "LiteRT": engines.by_litert,
}


def representatives(apply_fn, params, spec, calibration):
    """Parameters that compute the same function, by name."""
    batches = [calibration[k : k + BATCH] for k in range(0, len(calibration), BATCH)]
    statistics = calibrate(apply_fn, params, spec, batches, draws=DRAWS)
    criteria = {"equalize": "equalize", "enorm": "enorm"} | {
        scheme: quantization_noise(statistics, scheme) for scheme in SCHEMES
    }
    found = {name: pathcond.condition(params, spec, c)[0] for name, c in criteria.items()}
    return {"trained": params, **found}


def main():
    """Prints one line for each engine and representative."""
    model, variables, _ = imagenet.make()
    test, calibration = np.split(imagenet.crops(), 2)
    apply_fn, params = fold_batch_norm(model.apply, variables, test[:1])
    apply_fn, params = caps_as_parameters(apply_fn, params, test[:1])
    spec = pathcond.trace_spec(apply_fn, params, test[:1])
    wanted = np.asarray(jax.jit(apply_fn)(params, test))
    print(f"{'engine':28}{'parameters':32}{'dB':>6}{'agree, %':>10}")
    for name, representative in representatives(apply_fn, params, spec, calibration).items():
        for engine, run in ENGINES.items():
            found = np.asarray(run(apply_fn, representative, test, calibration))
            noise = np.square(found - wanted).sum() / np.square(wanted).sum()
            agree = (found.argmax(1) == wanted.argmax(1)).mean()
            print(
                f"{engine:28}{name:32}{-10 * np.log10(noise):6.1f}{100 * agree:10.1f}", flush=True
            )


if __name__ == "__main__":
    main()
