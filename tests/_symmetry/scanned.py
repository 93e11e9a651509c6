"""Stacks of layers: what one step computes, its parameters, and the values that go in.

Each stack is run by ``lax.scan``, or step by step in Python over the same stacked arrays.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WIDTH, HIDDEN, INPUTS = 3, 4, 2
STACKS = {}


def relu(x):
    return jnp.maximum(x, 0.0)


class Stack(NamedTuple):
    """Layers of one kind.

    Attributes:
      step: (shared parameters, carry, slices) -> (carry, slice).
      layers: the shapes of the slices of the stacked parameters.
      shared: the shapes of the parameters that all layers share.
      start: from the first hidden values to the first carry.
      end: from the last carry and the stacked slices to the last hidden values.
      groups: how many groups there are, whatever the number of layers.
      reverse: whether the last layer comes first.
    """

    step: Callable[..., Any]
    layers: dict[str, tuple[int, ...]]
    groups: int
    shared: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    start: Callable[..., Any] = lambda h: h
    end: Callable[..., Any] = lambda carry, made: carry
    reverse: bool = False

    def params(self, length):
        """Positive parameters, so that nothing dies."""
        rng = np.random.default_rng(0)
        shapes = {"in": (INPUTS, WIDTH), "out": (WIDTH, 2), **self.shared}
        shapes |= {name: (length, *shape) for name, shape in self.layers.items()}
        return {name: jnp.asarray(rng.uniform(0.2, 0.8, s)) for name, s in shapes.items()}

    def apply(self, scan):
        """The network, with ``scan`` in place of ``lax.scan``."""

        def apply_fn(params, x):
            stacked = {name: params[name] for name in self.layers}
            carry, made = scan(
                lambda carry, layer: self.step(params, carry, layer),
                self.start(x @ params["in"]),
                stacked,
                reverse=self.reverse,
            )
            return self.end(carry, made) @ params["out"]

        return apply_fn


def unrolled(step, carry, stacked, reverse):
    """``lax.scan`` as a loop in Python."""
    length = len(next(iter(stacked.values())))
    made = {}
    for k in reversed(range(length)) if reverse else range(length):
        carry, made[k] = step(carry, jax.tree.map(lambda x, k=k: x[k], stacked))
    slices = [made[k] for k in range(length)]
    return carry, None if slices[0] is None else jax.tree.map(lambda *x: jnp.stack(x), *slices)


def stack(layers, groups, **options):
    """Enters the step below as a stack."""

    def enter(step):
        STACKS[step.__name__] = Stack(step, layers, groups, **options)
        return step

    return enter


@stack({"w": (WIDTH, WIDTH), "b": (1, WIDTH)}, 2)
def dense(params, h, layer):
    return relu(h @ layer["w"] + layer["b"]), None


@stack({"w": (WIDTH, WIDTH), "b": (1, WIDTH)}, 2, reverse=True)
def dense_last_first(params, h, layer):
    return relu(h @ layer["w"] + layer["b"]), None


@stack({"u": (WIDTH, HIDDEN), "b": (1, HIDDEN), "v": (HIDDEN, WIDTH)}, 2)
def residual(params, h, layer):
    return h + relu(h @ layer["u"] + layer["b"]) @ layer["v"], None


@stack({"u": (WIDTH, HIDDEN), "v": (HIDDEN, WIDTH), "a": (1, 1)}, 3)
def residual_with_gain(params, h, layer):
    return h + layer["a"] * (relu(h @ layer["u"]) @ layer["v"]), None


@stack(
    {"u": (WIDTH, WIDTH), "v": (WIDTH, WIDTH)},
    2,
    end=lambda h, made: h + made.sum(0),
    reverse=True,
)
def puts_out(params, h, layer):
    return h + relu(h @ layer["u"]) @ layer["v"], relu(h)


@stack(
    {"u": (WIDTH, HIDDEN), "v": (HIDDEN, WIDTH)},
    1,
    start=lambda h: (h, jnp.zeros((), h.dtype)),
    end=lambda carry, made: carry[0] + carry[1],
)
def sums_a_loss(params, carry, layer):
    hidden = carry[0] @ layer["u"]
    return (carry[0] + relu(hidden) @ layer["v"], carry[1] + hidden.mean()), None


@stack(
    {"w": (WIDTH, WIDTH)},
    1,
    start=lambda h: (h, jnp.zeros_like(h), jnp.zeros_like(h)),
    end=lambda carry, made: sum(carry),
)
def delays(params, carry, layer):
    return (relu(carry[0] @ layer["w"]), carry[0] + carry[1], carry[1]), None


@stack(
    {"w": (WIDTH, WIDTH)},
    1,
    start=lambda h: jnp.concatenate([jnp.zeros_like(h), h], 1),
    end=lambda carry, made: carry[:, :WIDTH] + carry[:, WIDTH:],
)
def remembers(params, carry, layer):
    late, h = carry[:, :WIDTH], carry[:, WIDTH:]
    return jnp.concatenate([h, relu((h + late) @ layer["w"])], 1), None


@stack({"w": (WIDTH, HIDDEN)}, 2, shared={"s": (HIDDEN, WIDTH), "b": (1, HIDDEN)})
def shares_a_kernel(params, h, layer):
    return h + relu(h @ layer["w"] + params["b"]) @ params["s"], None


@stack({"w": (WIDTH, WIDTH)}, 3, shared={"s": (WIDTH, WIDTH)})
def shares_the_kernel_before(params, h, layer):
    return relu(relu(h @ params["s"]) @ layer["w"]), None


@stack({"u": (2, WIDTH, HIDDEN), "v": (2, HIDDEN, WIDTH), "g": (1, WIDTH)}, 3)
def nested(params, h, layer):
    inner = {name: layer[name] for name in ("u", "v")}
    h = h * layer["g"]
    return lax.scan(lambda h, k: (h + relu(h @ k["u"]) @ k["v"], None), h, inner)
