"""What the criterion of quantization noise costs on the 3.5 million entries of a MobileNetV2.

Run as ``python benchmarks/quantization.py [--json FILE]``, a few minutes on two cores. Weights,
sensitivities and ranges are random. The first solution compiles, the second
does not, and the third starts from log-scales N(0, 1). Times are on the wall, and of the processor,
which other programs on the machine change less. Last, what calibration takes, in gradients.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import pathcond_jax as pathcond
from pathcond_jax.quantization import Channels, Statistics, calibrate, quantization_noise
from pathcond_jax.quantization._program import program

# Expansion, width, repetitions and stride of the stages (Sandler et al., 2018, table 2).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
INPUTS = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
CALIBRATION, DRAWS = (8, 96, 96, 3), 4


class MobileNetV2(nn.Module):
    """With ReLU, as batch normalization leaves it once folded."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), (2, 2))(x))
        for expansion, width, repetitions, stride in STAGES:
            for k in range(repetitions):
                y, hidden = x, x.shape[-1] * expansion
                strides = (stride, stride) if k == 0 else (1, 1)
                if expansion > 1:
                    y = nn.relu(nn.Conv(hidden, (1, 1))(y))
                y = nn.relu(nn.Conv(hidden, (3, 3), strides, feature_group_count=hidden)(y))
                y = nn.Conv(width, (1, 1))(y)
                x = x + y if x.shape == y.shape else y
        return nn.Dense(1000)(nn.relu(nn.Conv(1280, (1, 1))(x)).mean((1, 2)))


def network() -> tuple[Any, pathcond.ArchSpec, Statistics]:
    """Random parameters, their spec, and random statistics."""
    model, rng = MobileNetV2(), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), INPUTS)

    def normal(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(rng.normal(size=leaf.shape) * (2 / fan_in) ** 0.5, jnp.float32)

    def exponential(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.exponential(size=shape), jnp.float32)

    params = jax.tree.map(normal, shapes)
    spec = pathcond.trace_spec(model.apply, params, INPUTS)
    sites = program(model.apply, spec, (INPUTS,)).sites
    channels = []
    for site in sites:
        largest, sensitivity = (exponential((site.num_channels,)) for _ in range(2))
        one = jnp.ones_like(largest)
        channels.append(Channels(0 * one, largest + 0.1, one, one, sensitivity))
    sensitivity = jax.tree.map(lambda leaf: exponential(leaf.shape), params)
    one = jnp.float32(1)
    return params, spec, Statistics(sites, tuple(channels), sensitivity, {}, one, one)


def timed(params: Any, spec: pathcond.ArchSpec, statistics: Statistics, initial: Any) -> tuple:
    """Conditioned parameters and what they took."""
    wall, processor = time.perf_counter(), time.process_time()
    noise = quantization_noise(statistics, weight_bits=8, activation_bits=8)
    better, solution = pathcond.condition(params, spec, noise, initial=initial)
    jax.block_until_ready(better)
    return better, {
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "steps": int(solution.num_steps),
        "products": int(solution.num_products),
        "objective": float(solution.objective),
    }


def calibration(params: Any, spec: pathcond.ArchSpec) -> dict[str, float]:
    """Seconds of processor time of a gradient and of a calibration, of the same images."""
    images, apply_fn = jax.random.normal(jax.random.key(0), CALIBRATION), MobileNetV2().apply
    gradient = jax.jit(jax.grad(lambda params: jnp.square(apply_fn(params, images)).sum()))
    runs = {
        "gradient": lambda: gradient(params),
        "calibration": lambda: calibrate(apply_fn, params, spec, [images], draws=DRAWS).sensitivity,
    }
    found = {}
    for name, run in runs.items():
        jax.block_until_ready(run())
        start = time.process_time()
        jax.block_until_ready(run())
        found[name] = time.process_time() - start
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    params, spec, statistics = network()
    rng = np.random.default_rng(1)
    zero = tuple(jnp.zeros(group.size) for group in spec.groups)
    unlucky = tuple(jnp.asarray(rng.normal(size=z.shape), jnp.float32) for z in zero)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {spec.num_parameters:,} entries")
    print(f"{'':10}{'wall s':>8}{'processor s':>13}{'steps':>7}{'products':>10}{'objective':>11}")
    figures: dict[str, dict[str, float]] = {}
    found = {}
    for name, initial in {"first": zero, "second": zero, "unlucky": unlucky}.items():
        found[name], row = timed(params, spec, statistics, initial)
        figures[name] = row
        print(
            f"{name:10}{row['wall']:8.1f}{row['processor']:13.1f}{row['steps']:7d}"
            f"{row['products']:10d}{row['objective']:11.4f}",
            flush=True,
        )
    flat = {
        name: np.concatenate([x.ravel() for x in jax.tree.leaves(found[name])]) for name in found
    }
    difference = np.linalg.norm(flat["unlucky"] - flat["second"]) / np.linalg.norm(flat["second"])
    print(f"parameters from N(0, 1) differ by {difference:.1e}")
    figures["unlucky"]["difference"] = float(difference)
    figures["calibration"] = calibration(params, spec)
    taken, gradient = (figures["calibration"][name] for name in ("calibration", "gradient"))
    print(
        f"calibration on {CALIBRATION[0]} images, {DRAWS} draws: {taken:.1f} s of processor time, "
        f"{taken / gradient:.1f} gradients"
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
