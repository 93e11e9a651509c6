"""What engines of inference make of the representatives of one network: signal-to-noise, agreement.

A depthwise-separable network is trained on scikit-learn's digits, moved to several representatives,
quantized to 8 bits, weights and activations, and run by Qwix (ranges of activations as it runs; its
default range of weights, and one whose largest weight is on the grid), by ONNX Runtime (static
ranges from 128 images; one scale per kernel, and one per output channel) and by LiteRT (static
ranges, one scale per output channel). Each entry is the mean over training seeds, with the standard
deviation. The exported functions take their weights as constants. In an environment of its own,
Python 3.11:

    python -m venv engines && engines/bin/pip install pathcond-jax[experiments] qwix jax2onnx \
        onnxruntime ai-edge-litert litert-converter ai-edge-quantizer && \
        engines/bin/python benchmarks/engines.py --seeds 3
"""

import argparse
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnxruntime
import optax
import qwix
from ai_edge_litert import interpreter
from ai_edge_quantizer import quantizer, recipe
from flax import linen as nn
from litert_converter import converter_api_ext
from litert_converter.mlir import ir, passmanager
from onnxruntime import quantization

import pathcond_jax as pathcond
from pathcond_jax.experiments import data
from pathcond_jax.quantization import calibrate, quantization_noise

STEPS, UNLUCKY, SIGNATURE = 600, 1.0, "serving_default"

# Qwix takes the largest weight of a channel to 127.5 steps and rounds it to 127. In this
# range it is on the grid.
WIDENED = f"absmax,{127.5 / 127}"


class Separable(nn.Module):
    """Pointwise expansions, depthwise convolutions and projections, without normalization."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        for width in (24, 32):
            hidden = 3 * x.shape[-1]
            x = nn.relu(nn.Conv(hidden, (1, 1))(x))
            x = nn.relu(nn.Conv(hidden, (3, 3), feature_group_count=hidden)(x))
            x = nn.relu(nn.Conv(width, (1, 1))(x))
        return nn.Dense(10)(x.mean((1, 2)))


MODEL = Separable()


def trained(digits, seed):
    """Parameters after training by AdamW."""
    params = MODEL.init(jax.random.key(seed), digits.test_inputs[:1])
    optimizer = optax.adamw(3e-3, weight_decay=1e-2)

    def loss(params, rows):
        logits = MODEL.apply(params, digits.train_inputs[rows])
        labels = digits.train_labels[rows]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, rows):
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(STEPS):
        params, state = step(params, state, rng.integers(len(digits.train_labels), size=64))
    return params


def representatives(params, spec, calibration):
    """Parameters that compute the same function, by name."""
    rng = np.random.default_rng(0)
    scales = [jnp.asarray(rng.normal(scale=UNLUCKY, size=g.size), jnp.float32) for g in spec.groups]
    unlucky = pathcond.rescale(params, spec, tuple(scales))
    statistics = calibrate(MODEL.apply, unlucky, spec, [calibration])
    criteria = {name: name for name in ("equalize", "enorm")} | {
        scheme: quantization_noise(statistics, scheme)
        for scheme in ("onnxruntime_static", "litert_int8", "qwix_int8")
    }
    conditioned = {
        name: pathcond.condition(unlucky, spec, criterion)[0]
        for name, criterion in criteria.items()
    }
    return {"trained": params, "unlucky": unlucky, **conditioned}


def by_qwix(model, params, x, calibration, *, range_of_weights="absmax"):
    """Logits of Qwix's int8 program: weights per channel, activations with dynamic ranges."""
    del calibration
    rule = qwix.QuantizationRule(
        weight_qtype=jnp.int8, act_qtype=jnp.int8, weight_calibration_method=range_of_weights
    )
    quantized = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    shapes = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    weights = qwix.quantize_params(params["params"], shapes)
    return quantized.apply({"params": weights}, x)


class Images(quantization.CalibrationDataReader):
    """Calibration images in one batch."""

    def __init__(self, name, images):
        self.batches = iter([{name: images}])

    def get_next(self):
        """The next batch, None after the last."""
        return next(self.batches, None)


def by_onnx_runtime(apply_fn, params, x, calibration, *, per_channel, batch="B"):
    """Logits of ONNX Runtime's static int8 program, of any number of examples or of ``batch``."""
    with tempfile.TemporaryDirectory() as folder:
        plain, static = (str(pathlib.Path(folder) / name) for name in ("plain.onnx", "int8.onnx"))
        model = jax2onnx.to_onnx(lambda x: apply_fn(params, x), [(batch, *x.shape[1:])])
        pathlib.Path(plain).write_bytes(model.SerializeToString())
        quantization.quantize_static(
            plain,
            static,
            Images(model.graph.input[0].name, np.asarray(calibration)),
            per_channel=per_channel,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        session = onnxruntime.InferenceSession(static, providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: np.asarray(x)})[0]


def flatbuffer(function, x):
    """LiteRT's program of a function of one array, from its StableHLO."""
    with ir.Context() as context:
        converter_api_ext.prepare_mlir_context(context)
        module = ir.Module.parse(jax.jit(function).lower(x).as_text())
        converter_api_ext.set_signature(module.operation, SIGNATURE, ["x"], ["y"])
        converter_api_ext.run_convert_to_tfl_passes(
            module, passmanager.PassManager(), converter_api_ext.ConvertToTFLConfig()
        )
        return converter_api_ext.export_flatbuffer_to_bytes(module.operation)


def by_litert(apply_fn, params, x, calibration):
    """Logits of LiteRT's static int8 program, float numbers in and out."""
    program = quantizer.Quantizer(
        flatbuffer(lambda x: apply_fn(params, x), x[:1]), recipe.static_wi8_ai8()
    )
    for end in ("INPUT", "OUTPUT"):
        program.update_quantization_recipe(".*", end, algorithm_key="no_quantize")
    # Over several batches the ranges would be moving averages, which clip.
    ranges = program.calibrate({SIGNATURE: [{"x": np.asarray(calibration)}]})
    static = program.quantize(ranges, enable_progress_report=False).quantized_model
    runner = interpreter.Interpreter(model_content=bytes(static)).get_signature_runner()
    return runner(x=np.asarray(x))["y"]


ENGINES = {
    "Qwix": functools.partial(by_qwix, MODEL),
    "Qwix, widened": functools.partial(by_qwix, MODEL, range_of_weights=WIDENED),
    "ONNX Runtime, per tensor": functools.partial(by_onnx_runtime, MODEL.apply, per_channel=False),
    "ONNX Runtime, per channel": functools.partial(by_onnx_runtime, MODEL.apply, per_channel=True),
    "LiteRT": functools.partial(by_litert, MODEL.apply),
}


def measured(digits, seed):
    """Decibel and agreement in %, by engine and representative, of one training seed."""
    x, calibration = digits.test_inputs, digits.train_inputs[:128]
    params = trained(digits, seed)
    spec = pathcond.trace_spec(MODEL.apply, params, x[:1])
    wanted = np.asarray(MODEL.apply(params, x))
    right = (wanted.argmax(1) == digits.test_labels).mean()
    print(f"seed {seed}, float: {100 * right:.1f} % right", flush=True)

    def quality(run, representative):
        found = np.asarray(run(representative, x, calibration))
        noise = np.square(found - wanted).mean() / np.square(wanted).mean()
        return -10 * np.log10(noise), 100 * (found.argmax(1) == wanted.argmax(1)).mean()

    return {
        (engine, name): quality(run, representative)
        for name, representative in representatives(params, spec, calibration).items()
        for engine, run in ENGINES.items()
    }


def main():
    """Prints one line for each engine and representative."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many networks are trained")
    digits = jax.tree.map(jnp.asarray, data.load_digits())
    runs = [measured(digits, seed) for seed in range(parser.parse_args().seeds)]
    print(f"\n{'engine':28}{'parameters':20}{'dB':>14}{'agree, %':>16}")
    for engine, name in sorted(runs[0], key=lambda key: key[0]):
        values = np.array([run[engine, name] for run in runs])
        cells = zip(values.mean(0), values.std(0), strict=True)
        decibel, agree = (f"{mean:.1f} ± {spread:.1f}" for mean, spread in cells)
        print(f"{engine:28}{name:20}{decibel:>14}{agree:>16}")


if __name__ == "__main__":
    main()
