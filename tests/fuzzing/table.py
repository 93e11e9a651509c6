"""What random programs are made of: tables of operations, and what they have in common.

An operation ``operation(program, x, y, r)`` takes two earlier values and a random.Random, and
returns a new value, or None where it does not apply. Parameters come from ``program.param``, which
must be asked outside of the bodies of loops.
"""

import jax.numpy as jnp

LAYERS = {}
UNUSUAL = {}


def layer(function):
    """Enters an operation that scales pass."""
    LAYERS[function.__name__] = function
    return function


def unusual(function):
    """Enters an operation, or a family of them."""
    UNUSUAL[function.__name__] = function
    return function


def relu(x):
    """The positive part, without the function that JAX wraps around it."""
    return jnp.maximum(x, 0.0)


def laid_along(p, x, axis=-1):
    """A vector laid out along an axis of ``x``."""
    shape = [1] * x.ndim
    shape[axis] = p.shape[0]
    return p.reshape(shape)


def any_width(r):
    return r.choice([1, 2, 3, 3, 4])


def any_axis(x, r):
    return r.randrange(x.ndim)


def of_axis(x, axis, value, other=0):
    return [value if a == axis else other for a in range(x.ndim)]


def positions_below(x, size):
    """Positions below ``size`` that depend on values."""
    return (jnp.floor(jnp.abs(x) * 3.0) % size).astype(jnp.int32)


def any_predicate(program, x, r):
    """A scalar boolean: of a value, of a parameter, of an input."""
    return r.choice(
        [
            lambda: x.sum() > 0,
            lambda: x.reshape(-1)[0] > x.reshape(-1)[-1],
            lambda: program.param() > 0,
            lambda: program.n > 1,
            lambda: jnp.any(x > 1.0),
            lambda: jnp.all(program.param(2) < 2.0),
        ]
    )()
