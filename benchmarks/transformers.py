"""What conditioning a transformer costs, in passes over its parameters and in training steps.

    python benchmarks/transformers.py [--networks blocks-12x256 ...] [--quick]
                                      [--repeats 7] [--json FILE]

A *copy* reads and writes every entry once: a compiled ``tree.map(lambda a: a * 1.0001)``. All run
times are given in copies, all compile times in those of a training step (gradient and Adam), both
measured in the same process, run times in turns. Tracing, lowering, compiling and first calls are
given in processor time, which other processes disturb less; what runs and compiles take by the
clock stands beside. Bytes are those of XLA's cost analysis
over those of the parameters; a loop's body counts once there. Memory is what XLA needs beyond the
parameters, over the parameters: temporaries alone, and, for a call that is given its parameters to
keep, temporaries and those outputs that take no parameter's place. Each network has a process of
its own.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import pathcond_jax as pathcond

CRITERIA = ("enorm", "equalize")
VOCABULARY = 1000


class Block(nn.Module):
    """A pre-LayerNorm block: attention, then a ReLU feed-forward, biases everywhere."""

    heads: int

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        hidden = nn.relu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden)


class CausalBlock(nn.Module):
    """The same, where no token sees those after it, and GELU."""

    heads: int

    @nn.compact
    def __call__(self, x):
        y, mask = nn.LayerNorm()(x), nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden)


class BareBlock(nn.Module):
    """The same with RMSNorm and without biases."""

    heads: int

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False)
        x = x + attention(nn.RMSNorm()(x))
        hidden = nn.relu(nn.Dense(4 * x.shape[-1], use_bias=False)(nn.RMSNorm()(x)))
        return x + nn.Dense(x.shape[-1], use_bias=False)(hidden)


class LlamaBlock(nn.Module):
    """RMSNorm, rotary positions, two query heads for each key head, SwiGLU."""

    heads: int

    @nn.compact
    def __call__(self, x):
        width, time = x.shape[-1], x.shape[-2]
        size = width // self.heads
        project = functools.partial(nn.DenseGeneral, use_bias=False)
        y = nn.RMSNorm()(x)
        q = project((self.heads, size))(y)
        k, v = (project((self.heads // 2, size))(y) for _ in range(2))
        angle = jnp.arange(time)[:, None, None] / 10000 ** (jnp.arange(size // 2) / (size // 2))
        cos, sin = jnp.cos(angle), jnp.sin(angle)

        def rotated(z):
            a, b = jnp.split(z, 2, -1)
            return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

        k, v = (jnp.repeat(z, 2, -2) for z in (rotated(k), v))
        y = nn.dot_product_attention(rotated(q), k, v)
        x = x + project(width, axis=(-2, -1))(y)
        y = nn.RMSNorm()(x)
        hidden = nn.silu(project(3 * width)(y)) * project(3 * width)(y)
        return x + project(width)(hidden)


class ExpertBlock(nn.Module):
    """Attention, then eight stacked experts weighted by a softmax."""

    heads: int

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        y = nn.LayerNorm()(x)
        experts = nn.vmap(
            Expert,
            in_axes=None,
            axis_size=8,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        weights = nn.softmax(nn.Dense(8)(y))
        return x + jnp.einsum("...e,e...d->...d", weights, experts()(y))


class Expert(nn.Module):
    """A ReLU feed-forward of twice the width."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.relu(nn.Dense(2 * x.shape[-1])(x)))


class LanguageModel(nn.Module):
    """An embedding, blocks, one after the other or scanned, and a dense output."""

    block: Callable[..., nn.Module]
    depth: int
    width: int
    heads: int
    scan: bool = False

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, self.width)(tokens)
        x = _blocks(self, x)
        return nn.Dense(VOCABULARY)(x)


class ViT(nn.Module):
    """Patches of 16 × 16, learned positions, blocks, a LayerNorm, a mean and a dense output."""

    block: Callable[..., nn.Module]
    depth: int
    width: int
    heads: int
    scan: bool = False

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(self.width, (16, 16), 16)(images)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(_blocks(self, x)).mean(1))


def _blocks(model: Any, x: jax.Array) -> jax.Array:
    if not model.scan:
        for _ in range(model.depth):
            x = model.block(model.heads)(x)
        return x
    layers = nn.scan(
        lambda block, x, _: (block(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=model.depth,
    )
    return layers(model.block(model.heads), x, None)[0]


class Network(NamedTuple):
    """A model and an input."""

    model: nn.Module
    shape: tuple[int, ...]
    dtype: Any = jnp.int32


def _language(block: Any, depth: int, width: int, scan: bool = False) -> Network:
    return Network(LanguageModel(block, depth, width, max(width // 64, 2), scan), (1, 16))


NETWORKS: dict[str, Network] = {
    "blocks-12x256": _language(Block, 12, 256),
    "blocks-12x256-scan": _language(Block, 12, 256, scan=True),
    "blocks-48x256": _language(Block, 48, 256),
    "blocks-48x256-scan": _language(Block, 48, 256, scan=True),
    "blocks-12x768": _language(Block, 12, 768),
    "blocks-12x768-scan": _language(Block, 12, 768, scan=True),
    "bare-12x768": _language(BareBlock, 12, 768),
    "blocks-24x64": _language(Block, 24, 64),
    "llama-12x768": _language(LlamaBlock, 12, 768),
    "vit-12x768": Network(ViT(Block, 12, 768, 12), (1, 224, 224, 3), jnp.float32),
    "experts-6x512": _language(ExpertBlock, 6, 512),
}
QUICK: dict[str, Network] = {
    "blocks-3x512": _language(Block, 3, 512),
    "blocks-3x512-scan": _language(Block, 3, 512, scan=True),
    "bare-3x512": _language(BareBlock, 3, 512),
    "llama-3x512": _language(LlamaBlock, 3, 512),
    "experts-3x256": _language(ExpertBlock, 3, 256),
}


def in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The median seconds of each call, in turns, after one round that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            taken.append(timed(call)[1])
    return [statistics.median(taken[1:]) for taken in times]


def timed(
    run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> tuple[Any, float]:
    """What a call returns and the seconds that it takes."""
    start = clock()
    result = jax.block_until_ready(run())
    return result, clock() - start


def built(fun: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, dict[str, float]]:
    """The compiled function; seconds to lower and to compile it, bytes it moves and needs."""
    lowered, lower = timed(lambda: jax.jit(fun, **options).lower(*args), time.process_time)
    start = time.perf_counter()
    compiled, compile_ = timed(lowered.compile, time.process_time)
    costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return compiled, {
        "lower": lower,
        "compile": compile_,
        "compile by the clock": time.perf_counter() - start,
        "bytes": costs.get("bytes accessed", float("nan")),
        "temporary": memory.temp_size_in_bytes if memory else float("nan"),
        "beyond": _beyond(memory) if memory else float("nan"),
        "kernels": sum(
            compiled.as_text().count(f" {kind}(") for kind in ("fusion", "dot", "custom-call")
        ),
    }


def _beyond(memory: Any) -> int:
    """Bytes that a call needs in addition to its arguments."""
    outputs: int = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return outputs + memory.temp_size_in_bytes


def measure(network: Network, repeats: int, eager: bool = True) -> dict[str, Any]:
    """All figures of one network."""
    example = jnp.ones(network.shape, network.dtype)
    params = jax.block_until_ready(jax.jit(network.model.init)(jax.random.key(0), example))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    spec, trace = timed(
        lambda: pathcond.trace_spec(network.model.apply, params, example), time.process_time
    )
    row: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "entries": spec.num_parameters,
        "neurons": spec.num_neurons,
        "groups": len(spec.groups),
        "trace, s": trace,
    }
    copy, _ = built(lambda p: jax.tree.map(lambda a: a * 1.0001, p), params)
    copied = functools.partial(copy, params)
    row["copy, ms"] = 1e3 * in_turns([copied], repeats)[0]
    step, figures = built(*_training_step(network, params, example))
    row["training step compiles, s"] = unit = figures["compile"]
    row["training step compiles, s by the clock"] = figures["compile by the clock"]
    del step

    scales = tuple(0.01 * jnp.ones(group.size) for group in spec.groups)
    calls = {"rescale": lambda p: pathcond.rescale(p, spec, scales)} | {
        name: functools.partial(pathcond.condition, spec=spec, criterion=name) for name in CRITERIA
    }
    for name, call in calls.items():
        if eager:
            first = timed(functools.partial(call, params), time.process_time)
            row[f"{name}: first eager call, s"] = first[1]
        compiled, figures = built(call, params)
        taken, unit_pass = in_turns([functools.partial(compiled, params), copied], repeats)
        row[f"{name}: copies"] = taken / unit_pass
        row[f"{name}: runs, ms"] = 1e3 * taken
        row[f"{name}: lowers, s"] = figures["lower"]
        row[f"{name}: compiles, s"] = figures["compile"]
        row[f"{name}: compiles, s by the clock"] = figures["compile by the clock"]
        row[f"{name}: compiles, training steps"] = figures["compile"] / unit
        row[f"{name}: kernels"] = figures["kernels"]
        row[f"{name}: bytes / parameters"] = figures["bytes"] / size
        row[f"{name}: memory / parameters"] = figures["temporary"] / size
        _, donated = built(call, params, donate_argnums=0)
        row[f"{name}: memory / parameters, donated"] = donated["beyond"] / size
        if name in CRITERIA:
            solution = compiled(params)[1]
            row[f"{name}: steps, products"] = (
                f"{int(solution.num_steps)}, {int(solution.num_products)}"
            )
            row[f"{name}: status"] = pathcond.Status(int(solution.status)).name
            row[f"{name}: objective"] = float(solution.objective)
        del compiled
    return row


def _training_step(network: Network, params: Any, example: jax.Array) -> tuple[Any, ...]:
    optimizer = optax.adam(1e-3)

    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any]:
        gradient = jax.grad(lambda p: jnp.mean(network.model.apply(p, x) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step, params, jax.eval_shape(optimizer.init, params), example


def _measure_named(name: str, repeats: int, results: Any) -> None:
    results.put(measure((NETWORKS | QUICK)[name], repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=[*NETWORKS, *QUICK])
    parser.add_argument("--quick", action="store_true", help="small networks, a minute or two")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, median of {options.repeats}")
    context, rows = multiprocessing.get_context("spawn"), {}
    for name in options.networks or (QUICK if options.quick else NETWORKS):
        results = context.SimpleQueue()
        process = context.Process(target=_measure_named, args=(name, options.repeats, results))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
        rows[name] = results.get()
        print(f"\n{name}")
        for key, value in rows[name].items():
            print(f"  {key:40} {value:.4g}" if isinstance(value, float) else f"  {key:40} {value}")
        sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
