"""What reconditioning costs on updates that are not due.

Times a training step of an MLP of 3 M parameters at batch 128, with the optimizer alone, wrapped,
on updates that are never due, and with a branch that would only negate them. Steps alternate, and
the time is the processor time of this process, so that other processes disturb little.

    python benchmarks/gating.py [--steps 200] [--optimizer adam] [--clock cpu]
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pathcond_jax as pathcond

SIZES = (784, 1024, 1024, 1024, 10)
BATCH = 128
OPTIMIZERS = {"sgd": lambda: optax.sgd(1e-2, momentum=0.9), "adam": lambda: optax.adam(1e-3)}


def draw() -> dict:
    rng = np.random.default_rng(0)
    return {
        f"layer_{k}": {
            "kernel": jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32),
            "bias": jnp.zeros(shape[1]),
        }
        for k, shape in enumerate(itertools.pairwise(SIZES))
    }


def apply(params: dict, x: jax.Array) -> jax.Array:
    *hidden, last = (params[name] for name in sorted(params))
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def negated_every(k: int) -> optax.GradientTransformation:
    """The least that an update which depends on a branch can cost."""

    def update(updates, count, params=None):
        count = count + 1
        negated = jax.lax.cond(
            count % k == 0, lambda u: jax.tree.map(jnp.negative, u), lambda u: u, updates
        )
        return negated, count

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--rounds", type=int, default=1, help="compile and measure again")
    args = parser.parse_args()
    for _ in range(args.rounds):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    params = draw()
    spec = pathcond.chain_spec(params, sorted(params))
    x = jax.random.normal(jax.random.key(0), (BATCH, SIZES[0]))
    y = jnp.arange(BATCH) % SIZES[-1]
    inner = OPTIMIZERS[args.optimizer]()
    never = 10**9
    optimizers = {
        "alone": inner,
        "alone again": inner,
        "branch of nothing": optax.chain(inner, negated_every(never)),
        "recondition": optax.chain(inner, pathcond.recondition(spec, every=never)),
        "reconditioned": pathcond.reconditioned(inner, spec, every=never),
    }

    def loss(params: dict) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    def stepper(optimizer: optax.GradientTransformation):
        def step(params, state):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=(0, 1))

    steps = {name: stepper(optimizer) for name, optimizer in optimizers.items()}
    carries = {name: (draw(), optimizer.init(params)) for name, optimizer in optimizers.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    rng = np.random.default_rng(0)
    for number in range(args.steps + 3):
        # In changing order: what ran before decides what is in the cache.
        for name in rng.permutation(list(optimizers)):
            start = clock()
            carries[name] = jax.block_until_ready(steps[name](*carries[name]))
            if number >= 3:
                times[name].append(clock() - start)
    assert all(step._cache_size() == 1 for step in steps.values())
    print(
        f"{spec.num_parameters} parameters, {args.optimizer}, {args.steps} steps, {args.clock} time"
    )
    alone = np.array(times["alone"])
    for name, found in times.items():
        # Steps of one round meet the same load of the machine.
        ratios = np.array(found) / alone
        medians = np.median(rng.choice(ratios, (1000, len(ratios))), 1)
        low, high = np.quantile(medians, [0.025, 0.975])
        print(
            f"{name:17s} {1e3 * np.median(found):8.2f} ms  of alone: median × "
            f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f}), of the 10 % quantiles × "
            f"{np.quantile(found, 0.1) / np.quantile(alone, 0.1):.3f}"
        )


if __name__ == "__main__":
    main()
