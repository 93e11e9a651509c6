"""What the Gram diagonal costs: its time over that of jax.grad of the summed output at batch 1.

Run as ``python benchmarks/lifting.py [--repeats 15] [--models mlp conv ...]``. Both programs are
compiled, then timed in turns, so that a busy machine slows both. A last table compares an
ensemble under ``vmap`` with a loop over its members.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from networks import MLP, NETWORKS, Network, ResNet, prepared

import pathcond_jax as pathcond

IMAGE = (224, 224, 3)
MODELS = {
    "mlp": NETWORKS["mlp8"],
    "conv": NETWORKS["conv"],
    "resnet18": Network(ResNet((2, 2, 2, 2), outputs=1000), IMAGE),
    "resnet50": Network(ResNet((3, 4, 6, 3), bottleneck=True, outputs=1000), IMAGE),
}


def programs(network: Network) -> tuple[Any, Any, Callable, Callable]:
    """Variables, spec, and the two programs."""
    model, x = network.model, jnp.ones((1, *network.shape))
    _, variables = prepared(network)
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
        variables, spec, gradient, lifted = programs(MODELS[name])
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
    model, x = MLP((128,) * 6), jnp.ones((1, 64))
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
