"""What a zoo network is, and how its parameters are drawn."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pathcond_jax as pathcond
from pathcond_jax._spec.trees import leaf_path


class Network(NamedTuple):
    """A network and what must be found in it.

    Attributes:
      apply_fn: ``apply_fn(params, x)``.
      params: the parameter tree: arrays, or shapes in ``FULL_SIZE``.
      x: the example input.
      neurons: H.
      pinned_by: operations that must be among the reasons of ``spec.pinned``.
    """

    apply_fn: Callable[..., Any]
    params: Any
    x: Any
    neurons: int
    pinned_by: tuple[str, ...] = ()


NETWORKS: dict[str, Callable[[], Network]] = {}
FULL_SIZE: dict[str, Callable[[], Network]] = {}


def network(table: dict[str, Callable[[], Network]], name: str, **options: Any) -> Callable:
    """Enters ``factory(**options)`` into a table."""

    def enter(factory: Callable[..., Network]) -> Callable[..., Network]:
        table[name] = functools.partial(factory, **options)
        return factory

    return enter


def lenient(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Libraries of networks rely on the promotion that the tests forbid."""

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return fun(*args, **kwargs)

    return wrapped


def _dtype() -> Any:
    """The default float dtype."""
    return jnp.zeros(()).dtype


def draw(shapes: Any, seed: int = 0) -> Any:
    """Random parameters of the default float dtype: no zero biases, positive variances."""
    rng = np.random.default_rng(seed)
    dtype = _dtype()

    def leaf(key: Any, value: Any) -> Any:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return jnp.zeros(value.shape, value.dtype)
        path, shape = leaf_path(key), value.shape
        if path.endswith("var"):
            drawn = rng.uniform(0.5, 2.0, shape)
        elif len(shape) < 2:
            drawn = rng.uniform(0.5, 1.0, shape) * rng.choice([-1, 1], shape)
        else:
            drawn = rng.normal(size=shape) * np.sqrt(2.0 / max(np.prod(shape[:-1]), 1))
        # A cast by JAX would be compiled for each shape.
        return jnp.asarray(np.asarray(drawn, dtype))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def relative_change(network: Network, spec: pathcond.ArchSpec, seed: int = 0) -> float:
    """The largest change of an output under log-scales from N(0, 1), relative to its largest entry.

    The outputs are computed in one program, compiled for speed of compilation.
    """
    rng = np.random.default_rng(seed)
    dtype = _dtype()
    log_scales = tuple(np.asarray(rng.normal(size=g.size), dtype) for g in spec.groups)
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    outputs = jax.jit(network.apply_fn, compiler_options=options)
    before = jax.tree.leaves(outputs(network.params, network.x))
    after = jax.tree.leaves(outputs(pathcond.rescale(network.params, spec, log_scales), network.x))
    changes = [
        np.max(abs(np.asarray(b, np.float64) - np.asarray(a, np.float64)))
        / np.max(abs(np.asarray(b, np.float64)))
        for b, a in zip(before, after, strict=True)
    ]
    return float(max(changes))


def image(size: int, channels: int = 3, batch: int = 2, seed: int = 1) -> jax.Array:
    """A random batch of images."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.asarray(rng.normal(size=(batch, size, size, channels)), _dtype()))


def vector(*shape: int, seed: int = 1) -> jax.Array:
    """A random array."""
    return jnp.asarray(np.asarray(np.random.default_rng(seed).normal(size=shape), _dtype()))


def linen(
    module: Any, x: Any, neurons: int, *, shapes_only: bool = False, **options: Any
) -> Network:
    """A Flax linen module as a network; ``options`` go to ``apply`` and ``init``."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(lenient(lambda x: module.init(rngs, x)), x)
    params = shapes if shapes_only else draw(shapes)
    return Network(lenient(functools.partial(module.apply, **options)), params, x, neurons)
