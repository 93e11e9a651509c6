"""A user's program: `make wheel` runs it and checks its types against the installed package."""

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

import pathcond_jax as pathcond
from pathcond_jax.criteria import norm, path

Params = dict[str, jax.Array]


def apply(params: Params, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["w"]) @ params["v"]


def conditioned(params: Params, spec: pathcond.ArchSpec) -> tuple[Params, pathcond.Status]:
    criterion: pathcond.Criterion = path() + 0.1 * norm()
    moved, solution = pathcond.condition(params, spec, criterion, max_log_scale=3.0)
    return moved, pathcond.Status(int(solution.status))


def main() -> None:
    params, x = {"w": jnp.ones((3, 8)), "v": jnp.ones((8, 2))}, jnp.ones((4, 3))
    spec = pathcond.trace_spec(apply, params, x)
    moved, status = conditioned(params, spec)
    change = jnp.abs(apply(moved, x) - apply(params, x)).max()
    optimizer = pathcond.reconditioned(optax.adam(1e-2), spec, every=10)
    state = optimizer.init(moved)
    gradients = jax.grad(lambda p: jnp.mean(apply(p, x) ** 2))(moved)
    updates, state = optimizer.update(gradients, state, moved)
    names: list[str] = [group.name for group in spec.groups]
    print(pathcond.__version__, names, status.name, float(change), len(jax.tree.leaves(updates)))


main()
