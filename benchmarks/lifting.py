"""What the Gram diagonal costs: its time over that of jax.grad of the summed output at batch 1.

Run as ``python benchmarks/lifting.py [--repeats 15] [--models mlp conv ...]``. Both programs are
compiled, then timed in turns, so that a busy machine slows both. A last table compares an
ensemble under ``vmap`` with a loop over its members.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import pathcond_jax as pathcond


class MLP(nn.Module):
    widths: Sequence[int] = (*(500,) * 8, 10)

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class PlainConv(nn.Module):
    """The plain convolutional net of the reference, at full size."""

    @nn.compact
    def __call__(self, x):
        def conv(x, features, size):
            return nn.relu(nn.Conv(features, (size, size), padding=size // 2)(x))

        for features in ((128, 128, 128), (256, 256, 256)):
            for width in features:
                x = conv(x, width, 3)
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for width, size in ((320, 3), (320, 1), (10, 1)):
            x = conv(x, width, size)
        return nn.avg_pool(x, (8, 8), (8, 8)).reshape(x.shape[0], -1)


class Block(nn.Module):
    """A basic block (two 3×3 convolutions) or a bottleneck (1×1, 3×3, 1×1)."""

    width: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x):
        def normalized(x, features, size, stride=1):
            x = nn.Conv(features, (size, size), (stride, stride), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        w, s = self.width, self.stride
        out = 4 * w if self.bottleneck else w
        layers = [(w, 1, 1), (w, 3, s), (out, 1, 1)] if self.bottleneck else [(w, 3, s), (w, 3, 1)]
        y = x
        for k, layer in enumerate(layers):
            y = normalized(y if k == 0 else nn.relu(y), *layer)
        if x.shape != y.shape:
            x = normalized(x, out, 1, s)
        return nn.relu(x + y)


class ResNet(nn.Module):
    depths: Sequence[int]
    bottleneck: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            for k in range(depth):
                x = Block(64 << stage, 2 if stage and not k else 1, self.bottleneck)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (MLP(), (1, 3072)),
    "conv": (PlainConv(), (1, 32, 32, 3)),
    "resnet18": (ResNet((2, 2, 2, 2), False), (1, 224, 224, 3)),
    "resnet50": (ResNet((3, 4, 6, 3), True), (1, 224, 224, 3)),
}


def prepared(model: nn.Module, shape: tuple[int, ...]) -> tuple[Any, Any, Callable, Callable]:
    """Variables, spec, and the two programs."""
    x = jnp.ones(shape)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    spec = pathcond.trace_spec(model.apply, variables, x)

    def summed(params: Any, rest: Any) -> jax.Array:
        return model.apply({**rest, "params": params}, x).sum()

    gradient = jax.jit(jax.grad(summed))
    lifted = jax.jit(lambda v: pathcond.scaled_gram_diagonal(v, spec))
    return variables, spec, lambda v: gradient(v["params"], v), lifted


def compiled(run: Callable, *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def in_turns(repeats: int, *runs: Callable[[], Any]) -> list[float]:
    """The median time of each, in seconds."""
    times = np.zeros((repeats, len(runs)))
    for row in times:
        for k, run in enumerate(runs):
            start = time.perf_counter()
            jax.block_until_ready(run())
            row[k] = time.perf_counter() - start
    return np.median(times, axis=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--members", type=int, default=8, help="of the ensemble; 0: none")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, median of {options.repeats}")
    print(
        f"{'model':10}{'entries':>12}{'grad ms':>10}{'lifting ms':>12}{'ratio':>7}{'compile s':>11}"
    )
    for name in options.models:
        variables, spec, gradient, lifted = prepared(*MODELS[name])
        jax.block_until_ready(gradient(variables))
        seconds = compiled(lifted, variables)
        one, two = in_turns(
            options.repeats,
            lambda g=gradient, v=variables: g(v),
            lambda g=lifted, v=variables: g(v),
        )
        print(
            f"{name:10}{spec.num_parameters:12,}{1e3 * one:10.2f}{1e3 * two:12.2f}{two / one:7.2f}"
            f"{seconds:11.1f}"
        )
        figures[name] = {"gradient": one, "lifting": two, "ratio": two / one, "compile": seconds}
    if options.members:
        figures["ensemble"] = ensemble(options.members, options.repeats)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


def ensemble(members: int, repeats: int) -> dict[str, float]:
    """MLPs 64-128×6-10 lifted together, and one after the other."""
    model, x = MLP((*(128,) * 6, 10)), jnp.ones((1, 64))
    keys = jax.random.split(jax.random.key(0), members)
    together = jax.vmap(lambda key: model.init(key, x))(keys)
    each = [jax.tree.map(lambda leaf, k=k: leaf[k], together) for k in range(members)]
    spec = pathcond.trace_spec(model.apply, each[0], x)
    single = jax.jit(lambda v: pathcond.scaled_gram_diagonal(v, spec))
    batched = jax.jit(jax.vmap(lambda v: pathcond.scaled_gram_diagonal(v, spec)))
    jax.block_until_ready((single(each[0]), batched(together)))
    loop, vmap = in_turns(repeats, lambda: [single(v) for v in each], lambda: batched(together))
    print(f"{members} MLPs 64-128x6-10: loop {1e3 * loop:.2f} ms, vmap {1e3 * vmap:.2f} ms")
    return {"members": members, "loop": loop, "vmap": vmap}


if __name__ == "__main__":
    main()
