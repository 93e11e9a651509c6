"""A model of 1.6 billion parameters in bfloat16, with the shapes of GPT-2 XL, on this machine.

    python benchmarks/billions.py [--depth 48] [--width 1600] [--scan] [--criteria enorm equalize]
                                   [--json FILE]

Traced from shapes, conditioned with donated parameters, and checked: the outputs before and after
on one batch of tokens. Needs about 14 GB of memory. Peaks are those of this process, and of the
device where it tells.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import transformers

import pathcond_jax as pathcond

transformers.VOCABULARY = 50257


def drawn(shapes: Any, key: jax.Array) -> Any:
    """Normal entries of standard deviation 0.02 around those of an initialization in spirit."""
    leaves, treedef = jax.tree.flatten_with_path(shapes)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    values = []
    for number, (path, leaf) in enumerate(leaves):
        noise = 0.02 * draw(jax.random.fold_in(key, number), leaf.shape, jnp.bfloat16)
        values.append(noise + (getattr(path[-1], "key", "") == "scale"))
    return jax.tree.unflatten(treedef, values)


def peak() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_peak() -> float:
    """The most memory that the device has held, in GB; NaN where it does not tell."""
    stats = jax.devices()[0].memory_stats() or {}
    return float(stats.get("peak_bytes_in_use", float("nan"))) / 2**30


def conditioned(params: Any, spec: pathcond.ArchSpec, criterion: str) -> tuple[Any, dict[str, Any]]:
    """The parameters conditioned, and what compiling and running took."""
    step = jax.jit(lambda params: pathcond.condition(params, spec, criterion), donate_argnums=0)
    start = time.perf_counter()
    compiled = step.lower(params).compile()
    built = time.perf_counter()
    params, solution = jax.block_until_ready(compiled(params))
    return params, {
        "compiles, s": built - start,
        "runs, s": time.perf_counter() - built,
        "steps": int(solution.num_steps),
        "products": int(solution.num_products),
        "status": pathcond.Status(int(solution.status)).name,
        "temporary, GB": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "peak, GB": peak(),
        "peak of the device, GB": device_peak(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=48)
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--criteria", nargs="*", default=["enorm", "equalize"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    heads = options.width // 64
    model = transformers.LanguageModel(
        transformers.Block, options.depth, options.width, heads, options.scan
    )
    tokens = jax.random.randint(jax.random.key(0), (1, 8), 0, transformers.VOCABULARY)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
    start = time.perf_counter()
    spec = pathcond.trace_spec(model.apply, shapes, tokens)
    print(f"{spec.num_parameters / 1e9:.2f} B parameters, {spec.num_neurons} neurons")
    print(f"trace {time.perf_counter() - start:.1f} s, peak {peak():.2f} GB", flush=True)
    apply, rows = jax.jit(model.apply), {}
    for criterion in options.criteria:
        params = drawn(shapes, jax.random.key(1))
        before = apply(params, tokens).astype(jnp.float32)
        params, row = conditioned(params, spec, criterion)
        change = jnp.abs(apply(params, tokens).astype(jnp.float32) - before)
        row["outputs change by"] = float(change.max() / jnp.abs(before).max())
        del params
        rows[criterion] = row
        print(f"\n{criterion} on {jax.devices()[0].device_kind}")
        for key, value in row.items():
            print(f"  {key:24} {value:.4g}" if isinstance(value, float) else f"  {key:24} {value}")
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
