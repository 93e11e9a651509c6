"""What test_sharding runs in processes of its own; prints one JSON object per check."""

import itertools
import json
import os
import re
import sys

DEVICES, PROCESSES = int(sys.argv[1]), int(sys.argv[2])
flags = f"--xla_force_host_platform_device_count={DEVICES // PROCESSES}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import pathcond_jax as pathcond  # noqa: E402

SIZES = (32, 64, 64, 32)
RNG = np.random.default_rng(0)


def draw(sizes, key=None):
    keys = jax.random.split(jax.random.key(0) if key is None else key, 2 * len(sizes))
    return {
        f"layer_{k}": {
            "kernel": jax.random.normal(keys[2 * k], (fan_in, fan_out)) * 2.0**k,
            "bias": jax.random.normal(keys[2 * k + 1], (fan_out,)),
        }
        for k, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes))
    }


def apply(params, x):
    *hidden, last = (params[name] for name in sorted(params))
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None]


def shard(params, mesh, kernels):
    """Kernels as given, one specification for each layer; biases with the columns."""
    specs = {
        name: {"kernel": spec, "bias": P(*spec[1:])}
        for name, spec in zip(sorted(params), kernels, strict=True)
    }
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def report(name, result, expected, like, compiled=None, **more):
    """The largest deviation on this process, whether shardings were kept, what was gathered."""
    deviation, kept = 0.0, True
    for out, reference, given in zip(*map(jax.tree.leaves, (result, expected, like)), strict=True):
        reference = np.asarray(reference)
        kept &= out.sharding.is_equivalent_to(given, out.ndim)
        for part in out.addressable_shards:
            difference = np.abs(np.asarray(part.data) - reference[part.index]).max()
            deviation = max(deviation, float(difference / np.abs(reference).max()))
    gathered = 0
    for line in compiled.as_text().splitlines() if compiled else ():
        found = re.search(r"= (.*?) (?:all-gather|all-to-all|collective-permute)[\w-]*\(", line)
        for shape in re.findall(r"\w+\[([\d,]*)\]", found[1]) if found else ():
            gathered = max(gathered, int(np.prod([int(n) for n in shape.split(",") if n])))
    print(
        json.dumps(
            {"name": name, "deviation": deviation, "kept": kept, "gathered": gathered, **more}
        )
    )


def fully_sharded():
    """condition with its defaults, every array split along its first axis."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params = draw(SIZES)
    spec = pathcond.chain_spec(params, sorted(params))
    shardings = shard(params, mesh, [P("data", None)] * 3)
    shardings = jax.tree.map(
        lambda s, p: s if p.ndim == 2 else NamedSharding(mesh, P("data")), shardings, params
    )
    condition = jax.jit(lambda p: pathcond.condition(p, spec)[0])
    placed = jax.tree.map(jax.device_put, params, shardings)
    compiled = condition.lower(placed).compile()
    report("condition", compiled(placed), condition(params), shardings, compiled)


def trained():
    """A step of Path-SGD with momentum, reconditioned: data and tensor parallel."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "model"))
    params = draw(SIZES[1:])
    spec = pathcond.chain_spec(params, sorted(params))
    optimizer = pathcond.reconditioned(
        optax.chain(pathcond.scale_by_path(spec, every=2), optax.scale(-1e-3), optax.trace(0.5)),
        spec,
        every=2,
        start=1,
        method="block",
    )

    def step(params, state, x):
        gradients = jax.grad(lambda p: jnp.mean(apply(p, x) ** 2))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    x = jnp.asarray(RNG.normal(size=(16, SIZES[1])), jnp.float32)
    shardings = shard(params, mesh, [P(None, "model"), P("model", None)])
    placed = jax.tree.map(jax.device_put, params, shardings)
    step = jax.jit(step)
    state = jax.jit(optimizer.init)(placed)
    batch = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    compiled = step.lower(placed, state, batch).compile()
    new, new_state = compiled(placed, state, batch)
    expected, expected_state = step(params, optimizer.init(params), x)
    trace, expected_trace = (s.inner_state[2].trace for s in (new_state, expected_state))
    report("step", (new, trace), (expected, expected_trace), (shardings, shardings), compiled)


def initialized():
    """conditioned_init whose outputs are sharded along the second axis of kernels."""
    mesh = Mesh(np.array(jax.devices()), ("model",))
    sizes = SIZES[1:]
    shapes = jax.eval_shape(lambda: draw(sizes))
    spec = pathcond.chain_spec(shapes, sorted(shapes))
    init = pathcond.conditioned_init(lambda key: draw(sizes, key), spec, method="block")
    shardings = shard(shapes, mesh, [P(None, "model")] * 2)
    compiled = jax.jit(init, out_shardings=shardings).lower(jax.random.key(1)).compile()
    report("init", compiled(jax.random.key(1)), init(jax.random.key(1)), shardings, compiled)


def explicit():
    """The same on a mesh with explicit axes, which recent JAX makes by default."""
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Explicit,))
    params = draw(SIZES[1:])
    spec = pathcond.chain_spec(params, sorted(params))
    shardings = shard(params, mesh, [P("data", None)] * 2)
    element = optax.chain(
        pathcond.scale_by_path(spec), pathcond.recondition(spec, every=1, method="block")
    )

    @jax.jit
    def step(params):
        updates, _ = element.update(params, element.init(params), params)
        return optax.apply_updates(params, updates)

    placed = jax.tree.map(jax.device_put, params, shardings)
    report("explicit", step(placed), step(params), shardings)
    mixed = shard(params, mesh, [P("data", None), P(None, "data")])
    score = jax.jit(lambda params: [pathcond.conditioning_score(params, spec)])
    found = score(jax.tree.map(jax.device_put, params, mixed))
    report("explicit score", found, score(params), [NamedSharding(mesh, P())])


def distributed():
    """condition over the devices of two processes."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params = draw(SIZES[1:])
    spec = pathcond.chain_spec(params, sorted(params))
    shardings = shard(params, mesh, [P("data", None), P(None, "data")])
    condition = jax.jit(lambda p: pathcond.condition(p, spec, method="block")[0])
    local = jax.tree.map(np.asarray, params)
    placed = jax.tree.map(
        lambda p, s: jax.make_array_from_callback(p.shape, s, lambda index: p[index]),
        local,
        shardings,
    )
    compiled = condition.lower(placed).compile()
    result = compiled(placed)
    report("distributed", result, condition(params), shardings, compiled, count=len(jax.devices()))


def scanned():
    """A scan over three stacked pre-norm layers: every array split, then the hidden neurons."""
    shapes = {
        "in": (16, 32),
        "scale": (3, 32),
        "up": (3, 32, 64),
        "bias": (3, 64),
        "down": (3, 64, 32),
        "out": (32, 8),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

    def layer(x, slices):
        normal = x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True))
        hidden = jax.nn.relu(normal * slices["scale"][None] @ slices["up"] + slices["bias"][None])
        return x + hidden @ slices["down"], None

    def network(params, x):
        slices = {name: params[name] for name in ("scale", "up", "bias", "down")}
        return jax.lax.scan(layer, x @ params["in"], slices)[0] @ params["out"]

    spec = pathcond.trace_spec(network, params, jnp.ones((2, 16)))
    condition = jax.jit(lambda p: pathcond.condition(p, spec, "enorm")[0])
    expected = condition(params)
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    split = {
        "fully": {"up": P(None, "devices"), "bias": P(None, "devices"), "down": P(None, "devices")},
        "hidden": {
            "up": P(None, None, "devices"),
            "bias": P(None, "devices"),
            "down": P(None, "devices", None),
        },
    }
    for name, specs in split.items():
        edges = {"in": P("devices"), "out": P("devices"), "scale": P(None, "devices")}
        whole = dict.fromkeys(params, P()) | specs | (edges if name == "fully" else {})
        shardings = {key: NamedSharding(mesh, whole[key]) for key in params}
        placed = jax.tree.map(jax.device_put, params, shardings)
        compiled = condition.lower(placed).compile()
        groups = sorted(group.size for group in spec.groups)
        report(f"scanned {name}", compiled(placed), expected, shardings, compiled, groups=groups)


if PROCESSES > 1:
    jax.distributed.initialize(
        f"127.0.0.1:{sys.argv[4]}", PROCESSES, int(sys.argv[3]), initialization_timeout=60
    )
    distributed()
    jax.distributed.shutdown()
else:
    for check in (fully_sharded, trained, initialized, explicit, scanned):
        check()
