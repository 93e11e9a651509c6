"""What engines of inference make of the representatives of one network: signal-to-noise, accuracy.

A depthwise-separable network is trained on scikit-learn's digits, moved to several representatives,
and quantized to 8 bits by Qwix (dynamic activations) and by ONNX Runtime (static ranges from 128
images; one scale per kernel, and one per output channel), both with weights and activations of 8
bits, and run there. The exported function takes its weights as constants. In an environment of its
own:

    python -m venv engines && engines/bin/pip install pathcond-jax[experiments] qwix jax2onnx \
        onnxruntime && engines/bin/python benchmarks/engines.py
"""

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
from flax import linen as nn
from onnxruntime import quantization

import pathcond_jax as pathcond
from pathcond_jax.experiments import data
from pathcond_jax.quantization import calibrate, quantization_noise

STEPS, UNLUCKY = 600, 1.0


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


def trained(digits, seed=0):
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


def representatives(params, x, calibration):
    """Parameters that compute the same function, by name."""
    spec = pathcond.trace_spec(MODEL.apply, params, x)
    rng = np.random.default_rng(0)
    scales = [jnp.asarray(rng.normal(scale=UNLUCKY, size=g.size), jnp.float32) for g in spec.groups]
    unlucky = pathcond.rescale(params, spec, tuple(scales))
    statistics = calibrate(MODEL.apply, unlucky, spec, [calibration])
    criteria = {"equalize": "equalize", "enorm": "enorm", "path": "path"} | {
        scheme: quantization_noise(statistics, scheme)
        for scheme in ("onnxruntime_static", "qwix_int8")
    }
    conditioned = {
        name: pathcond.condition(unlucky, spec, criterion)[0]
        for name, criterion in criteria.items()
    }
    return {"trained": params, "unlucky": unlucky, **conditioned}


def by_qwix(params, x, calibration):
    """Logits of Qwix's int8 program: weights per channel, activations with dynamic ranges."""
    del calibration
    rule = qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)
    quantized = qwix.quantize_model(MODEL, qwix.PtqProvider([rule]))
    shapes = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    weights = qwix.quantize_params(params["params"], shapes)
    return quantized.apply({"params": weights}, x)


class Images(quantization.CalibrationDataReader):
    """Calibration images one by one."""

    def __init__(self, name, images):
        self.rows = iter([{name: image[None]} for image in images])

    def get_next(self):
        """The next image, None after the last."""
        return next(self.rows, None)


def by_onnx_runtime(params, x, calibration, *, per_channel):
    """Logits of ONNX Runtime's static int8 program."""
    with tempfile.TemporaryDirectory() as folder:
        plain, static = (str(pathlib.Path(folder) / name) for name in ("plain.onnx", "int8.onnx"))
        model = jax2onnx.to_onnx(lambda x: MODEL.apply(params, x), [("B", *x.shape[1:])])
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


ENGINES = {
    "Qwix int8": by_qwix,
    "ONNX Runtime static, per tensor": functools.partial(by_onnx_runtime, per_channel=False),
    "ONNX Runtime static, per channel": functools.partial(by_onnx_runtime, per_channel=True),
}


def main():
    """Prints one line for each engine and representative."""
    digits = jax.tree.map(jnp.asarray, data.load_digits())
    x, calibration = digits.test_inputs, digits.train_inputs[:128]
    params = trained(digits)
    wanted = np.asarray(MODEL.apply(params, x))
    accuracy = (wanted.argmax(1) == digits.test_labels).mean()
    print(f"float: {100 * accuracy:.1f} % right\n")
    print(f"{'engine':34}{'parameters':20}{'dB':>6}{'agree, %':>10}{'right, %':>10}")
    for name, representative in representatives(params, x[:1], calibration).items():
        for engine, run in ENGINES.items():
            found = np.asarray(run(representative, x, calibration))
            noise = np.square(found - wanted).mean() / np.square(wanted).mean()
            agree = (found.argmax(1) == wanted.argmax(1)).mean()
            right = (found.argmax(1) == digits.test_labels).mean()
            print(
                f"{engine:34}{name:20}{-10 * np.log10(noise):6.1f}"
                f"{100 * agree:10.1f}{100 * right:10.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
