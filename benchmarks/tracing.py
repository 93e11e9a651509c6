"""Time and memory of tracing networks from shapes: one fresh process per network.

    python benchmarks/tracing.py [NETWORK ...] [--json FILE]

Networks: those of published size in the zoo of the tests, those of ``benchmarks/transformers.py``,
``gpt2-64`` and ``gpt2-1024``, a GPT-2 of 124 M entries that reads as many tokens, and
``llama-32x4096``, which reads 2048 tokens.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import jax
import transformers
from flax import linen as nn

import pathcond_jax as pathcond

NETWORKS = (
    "vgg16",
    "resnet18",
    "resnet50",
    "transformer-1.5b",
    "blocks-12x256",
    "blocks-12x256-scan",
    "blocks-48x256-scan",
    "gpt2-64",
    "gpt2-1024",
    "llama-32x4096",
)


class GPT2(nn.Module):
    """Tokens and positions, twelve causal blocks of width 768, a head tied to the embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50257, 768)
        positions = self.param("positions", nn.initializers.normal(), (1024, 768))
        x = embed(tokens) + positions[: tokens.shape[-1]]
        for _ in range(12):
            x = transformers.CausalBlock(12)(x)
        return embed.attend(nn.LayerNorm()(x))


LARGE = {
    "gpt2-64": transformers.Network(GPT2(), (1, 64)),
    "gpt2-1024": transformers.Network(GPT2(), (1, 1024)),
    "llama-32x4096": transformers.Network(
        transformers.LanguageModel(transformers.LlamaBlock, 32, 4096, 64), (1, 2048)
    ),
}


def of_name(name):
    """An apply function, the shapes of its parameters and an input."""
    flax_networks = transformers.NETWORKS | LARGE
    if name in flax_networks:
        network = flax_networks[name]
        x = jax.ShapeDtypeStruct(network.shape, network.dtype)
        return network.model.apply, jax.eval_shape(network.model.init, jax.random.key(0), x), x
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from zoo import FULL_SIZE

    network = FULL_SIZE[name]()
    return network.apply_fn, network.params, network.x


def measure(name, results):
    apply_fn, params, x = of_name(name)
    wall, cpu = time.perf_counter(), time.process_time()
    spec = pathcond.trace_spec(apply_fn, params, x)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    results.put(
        {
            "parameters": spec.num_parameters,
            "neurons": spec.num_neurons,
            "wall, s": wall,
            "processor time, s": cpu,
            "peak, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        }
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), {}
    print("network               parameters   neurons  wall [s]  CPU [s]  peak RSS [GB]")
    for name in options.networks:
        results = context.SimpleQueue()
        process = context.Process(target=measure, args=(name, results))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
        rows[name] = results.get()
        parameters, neurons, wall, cpu, memory = rows[name].values()
        print(
            f"{name:19} {parameters:13,} {neurons:9,} {wall:9.1f} {cpu:8.1f} {memory:14.2f}",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
