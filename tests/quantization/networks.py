"""Networks small enough to quantize in a test, and what makes their representatives unlucky."""

import functools

import jax
import jax.numpy as jnp

import pathcond_jax as pathcond

WIDTH, LAYERS = 6, 2
IMAGES = jax.random.normal(jax.random.key(0), (16, 6, 6, 1))
ROWS = jax.random.normal(jax.random.key(1), (12, 5))
_NUMBERS = ("NHWC", "HWIO", "NHWC")


def _convolved(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=_NUMBERS, feature_group_count=groups
    )


def depthwise(params, x):
    """A residual block of an expansion, a depthwise convolution and a projection."""
    x = jax.nn.relu(_convolved(x, params["stem"]))
    inside = jax.nn.relu(_convolved(x, params["expand"]) + params["bias"][None, None, None])
    inside = jax.nn.relu(_convolved(inside, params["depthwise"], groups=WIDTH))
    x = x + _convolved(inside, params["project"])
    return jax.nn.relu(x).mean((1, 2)) @ params["head"]


def scanned(params, x):
    """Two-layer blocks in a loop, stacked, between two layers."""

    def block(x, weights):
        return x + jax.nn.relu(x @ weights["up"]) @ weights["down"], None

    x, _ = jax.lax.scan(block, x @ params["first"], params["blocks"])
    return x @ params["last"]


SHAPES = {
    depthwise: {
        "stem": (3, 3, 1, 4),
        "expand": (1, 1, 4, WIDTH),
        "bias": (WIDTH,),
        "depthwise": (3, 3, 1, WIDTH),
        "project": (1, 1, WIDTH, 4),
        "head": (4, 3),
    },
    scanned: {
        "first": (5, 4),
        "blocks": {"up": (LAYERS, 4, WIDTH), "down": (LAYERS, WIDTH, 4)},
        "last": (4, 2),
    },
}


@functools.cache
def made(network):
    """Parameters, inputs and spec: one spec per network, since what it is used in compiles anew."""
    is_shape = lambda shape: isinstance(shape, tuple)  # noqa: E731
    shapes, treedef = jax.tree.flatten(SHAPES[network], is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(2), len(shapes))
    leaves = [0.7 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    params = jax.tree.unflatten(treedef, leaves)
    x = IMAGES if network is depthwise else ROWS
    return params, x, pathcond.trace_spec(network, params, x)


def unlucky(params, spec, seed, spread=1.0):
    """Another representative, its log-scales normal."""
    keys = jax.random.split(jax.random.key(seed), len(spec.groups))
    groups = zip(spec.groups, keys, strict=True)
    log_scales = tuple(spread * jax.random.normal(key, (g.size,)) for g, key in groups)
    return pathcond.rescale(params, spec, log_scales)


def flat(tree):
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


def difference(one, two):
    """The relative distance of two parameter trees."""
    return float(jnp.linalg.norm(flat(one) - flat(two)) / jnp.linalg.norm(flat(two)))
