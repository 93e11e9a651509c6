"""What conditioning costs: seconds, steps and memory, on this machine's device.

    python benchmarks/conditioning.py [--networks mlp3 conv ...] [--repeats 7] [--json FILE]
                                      [--reference DIR] [--depths 50 200] [--compile resnet50 ...]

For each network: the Gram diagonal, each solver from that diagonal, the whole ``condition``, one
training step at batch 128, compile time, the objective reached, and how far float32 is from
float64. ``--reference`` also times the authors' PyTorch code from a local checkout on the same
weights, in turns with ours (needs PyTorch and tqdm). ``--depths``, for MLPs, and ``--compile``
tell what compiling takes beside a training step, in processor time, and nothing else.
"""

import argparse
import json
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from networks import MLP, NETWORKS, Network, prepared, train_step

import pathcond_jax as pathcond

SOLVES: dict[str, dict[str, Any]] = {
    "sweeps10": {"method": "coordinate", "max_steps": 10, "tol": 0.0},
    "newton": {"method": "newton"},
    "block": {"method": "block", "max_steps": 200},
}


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median time of a call, after one that does not count."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compiled(fun: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], float]:
    """The compiled function and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    made = jax.jit(fun).lower(*args).compile()
    return made, time.perf_counter() - start


def measure(name: str, repeats: int) -> dict[str, Any]:
    """All figures of one network."""
    network = NETWORKS[name]
    apply, variables = prepared(network)
    start = time.perf_counter()
    spec = pathcond.trace_spec(
        apply, variables, jax.ShapeDtypeStruct((1, *network.shape), jnp.float32)
    )
    row: dict[str, Any] = {
        "neurons": spec.num_neurons,
        "entries": spec.num_parameters,
        "trace": time.perf_counter() - start,
    }
    gram, row["gram compile"] = compiled(
        lambda v: pathcond.scaled_gram_diagonal(v, spec), variables
    )
    diagonal = gram(variables)
    row["gram"] = seconds(lambda: gram(variables), repeats)
    for key, options in SOLVES.items():
        solver, row[f"{key} compile"] = compiled(
            lambda g, options=options: pathcond.solve(g, spec, **options), diagonal
        )
        solution = solver(diagonal)
        row[key] = seconds(lambda solver=solver: solver(diagonal), repeats)
        row[f"{key} F"] = float(solution.objective)
        row[f"{key} steps"] = int(solution.num_steps)
        row[f"{key} products"] = int(solution.num_products)
        row[f"{key} gradient/p"] = float(solution.gradient_norm) / spec.num_parameters
        row[f"{key} status"] = pathcond.Status(int(solution.status)).name
        whole, row[f"condition {key} compile"] = compiled(
            lambda v, options=options: pathcond.condition(v, spec, **options)[0], variables
        )
        row[f"condition {key}"] = seconds(lambda whole=whole: whole(variables), repeats)
        stats = whole.memory_analysis()
        if stats is not None:
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
            row[f"condition {key} memory"] = stats.temp_size_in_bytes / size
    row["change"] = pathcond.check_spec(
        spec, variables, jax.random.normal(jax.random.key(1), (2, *network.shape)), trials=1
    )
    x = jax.random.normal(jax.random.key(0), (128, *network.shape))
    y = jnp.zeros(128, jnp.int32)
    step, row["train compile"] = compiled(train_step(network), variables, x, y)
    row["train step"] = seconds(lambda: step(variables, x, y), 3)
    return row


def precision(name: str) -> dict[str, float]:
    """How far the optimum in float32 is from that in float64."""
    network = NETWORKS[name]
    apply, variables = prepared(network)

    def optimum(dtype: Any) -> pathcond.Solution:
        tree = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
        spec = pathcond.trace_spec(apply, tree, jax.ShapeDtypeStruct((1, *network.shape), dtype))
        solution = jax.jit(lambda v: pathcond.condition(v, spec)[1])(tree)
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), solution)

    single = optimum(jnp.float32)
    jax.config.update("jax_enable_x64", True)
    double = optimum(jnp.float64)
    jax.config.update("jax_enable_x64", False)
    differences = map(np.subtract, single.log_scales, double.log_scales)
    return {
        "log-scales, from float64": float(max(abs(part).max() for part in differences)),
        "F, from float64": float(abs(single.objective / double.objective - 1)),
    }


def reference(name: str, checkout: Path, repeats: int) -> dict[str, float]:
    """Seconds of the authors' code on the same weights: ten sweeps, warm and first call."""
    import torch

    sys.path.insert(0, str(checkout))
    if "torchvision" not in sys.modules:
        # Their modules import torchvision for classes that these networks do not use.
        names = ("torchvision", "torchvision.models", "torchvision.models.resnet")
        stubs = {module: types.ModuleType(module) for module in names}
        stubs[names[0]].models = stubs[names[1]]
        stubs[names[2]].BasicBlock = type("BasicBlock", (), {})
        sys.modules.update(stubs)
    from pathcond import models, rescaling_polyn

    makers = {
        "mlp3": lambda: models.MLP([3072, *(500,) * 3, 10]),
        "mlp8": lambda: models.MLP([3072, *(500,) * 8, 10]),
        "conv": lambda: models.FullyConvolutional_without_bn(bias=True),
        "resnet18c": lambda: models.ResNet18TypeC(num_classes=10),
    }
    if name not in makers:
        return {}
    _, variables = prepared(NETWORKS[name])
    times = []
    for _ in range(repeats + 1):
        model = makers[name]()
        _load(model, variables)
        start = time.perf_counter()
        scales, _z = rescaling_polyn.optimize_rescaling_polynomial(
            model, n_iter=10, tol=1e-2, resnet=name == "resnet18c"
        )
        rescaling_polyn.reweight_model_inplace(model, scales)
        times.append(time.perf_counter() - start)
    del torch
    return {"reference first": times[0], "reference": statistics.median(times[1:])}


def _load(model: Any, variables: Any) -> None:
    """Our weights, layer by layer in forward order, in PyTorch's layout."""
    import torch

    def numbered(item: tuple[str, Any]) -> tuple[str, int]:
        kind, _, number = item[0].rpartition("_")
        return kind, int(number)

    def layers(tree: Any) -> list[Any]:
        found = []
        for _, inner in sorted(tree.items(), key=numbered):
            found += [inner["kernel"]] if "kernel" in inner else []
            found += layers(inner) if not any(hasattr(v, "shape") for v in inner.values()) else []
        return found

    # Within a block both libraries build the convolutions in the same order.
    ours = layers(variables["params"])
    by_shape: dict[tuple[int, ...], list[Any]] = {}
    for kernel in ours:
        moved = np.asarray(kernel)
        moved = moved.T if moved.ndim == 2 else moved.transpose(3, 2, 0, 1)
        by_shape.setdefault(moved.shape, []).append(moved)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                queue = by_shape[tuple(parameter.shape)]
                parameter.copy_(torch.from_numpy(queue.pop(0).copy()))


def deep(depth: int, width: int = 8) -> Network:
    """An MLP of many layers."""
    return Network(MLP((width,) * depth, width), (width,))


def compiling(network: Network) -> str:
    """What compiling ``condition`` takes beside a training step, in processor time."""
    apply, variables = prepared(network)
    spec = pathcond.trace_spec(apply, variables, jnp.ones((1, *network.shape)))
    data = jnp.ones((128, *network.shape)), jnp.zeros(128, jnp.int32)
    calls = {
        "training step": (train_step(network), *data),
        "Gram diagonal": (lambda v: pathcond.scaled_gram_diagonal(v, spec),),
        "condition": (lambda v: pathcond.condition(v, spec),),
    }
    found = []
    for name, (fun, *inputs) in calls.items():
        lowered = jax.jit(fun).lower(variables, *inputs)
        start = time.process_time()
        text = lowered.compile().as_text()
        taken = time.process_time() - start
        kernels = text.count(" fusion(") + text.count(" dot(")
        found.append(f"{name} {taken:.1f} s, {kernels} kernels")
    return "; ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--reference", type=Path, metavar="DIR")
    parser.add_argument("--depths", nargs="*", type=int, default=[], help="of MLPs to compile")
    parser.add_argument("--compile", nargs="*", choices=NETWORKS, default=[])
    options = parser.parse_args()
    compiled_only = {f"an MLP of {depth} layers": deep(depth) for depth in options.depths}
    compiled_only |= {name: NETWORKS[name] for name in options.compile}
    for name, network in compiled_only.items():
        print(f"processor time to compile {name}: {compiling(network)}", flush=True)
    if compiled_only:
        return
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, median of {options.repeats}")
    rows = {}
    for name in options.networks:
        row = measure(name, options.repeats) | precision(name)
        if options.reference:
            row |= reference(name, options.reference, 3)
            if "reference" in row:
                row |= {
                    f"reference / condition {key}": row["reference"] / row[f"condition {key}"]
                    for key in SOLVES
                }
        row["peak memory of the process, MB"] = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        )
        rows[name] = row
        print(f"\n{name}")
        for key, value in row.items():
            shown = (
                f"{value:.6g}"
                if isinstance(value, float)
                else f"{value:,}"
                if isinstance(value, int)
                else value
            )
            print(f"  {key:32} {shown}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
