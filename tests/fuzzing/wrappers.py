"""Calls, collectives, references, callbacks, random numbers, names."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fuzzing.table import any_axis, relu, unusual


@unusual
def wrapped(program, x, y, r):
    """Further steps inside of a call or of a transformation."""
    inner = program.inner
    parameters = program.taken

    def custom_jvp(x):
        function = jax.custom_jvp(lambda x: inner(x))
        function.defjvps(lambda t, out, x: t * 0 if out.shape != x.shape else t)
        return function(x)

    def custom_vjp(x):
        function = jax.custom_vjp(lambda x: inner(x))
        function.defvjp(lambda x: (inner(x), x), lambda x, g: (x,))
        return function(x)

    explicit = jax.jit(lambda x, parameters: program.inner(x, parameters))
    return r.choice(
        [
            lambda: jax.jit(inner)(x),
            lambda: explicit(x, parameters),
            lambda: jax.checkpoint(inner)(x),
            lambda: jax.checkpoint(jax.jit(inner), prevent_cse=False)(x),
            lambda: custom_jvp(x),
            lambda: custom_vjp(x),
            lambda: jax.vmap(inner, in_axes=x.ndim - 1, out_axes=0)(x),
            lambda: jax.vmap(inner, out_axes=-1)(x),
            lambda: jax.vmap(inner)(jnp.stack([x, 2 * x])),
            lambda: lax.map(inner, x),
            lambda: lax.cond(program.n > 1, inner, inner, x),
            lambda: jax.named_call(inner, name="block")(x),
            lambda: jax.jvp(inner, (x,), (x,))[1],
            lambda: jax.jvp(inner, (x,), (jnp.ones_like(x),))[1],
            lambda: jax.vjp(inner, x)[1](inner(x))[0],
            lambda: jax.grad(lambda x: inner(x).sum())(x) + x,
            lambda: jax.linearize(inner, x)[1](x),
            lambda: lax.stop_gradient(inner(x)),
            lambda: lax.composite(lambda x, parameters: program.inner(x, parameters), "my.block")(
                x, parameters
            ),
            lambda: lax.scan(lambda c, row: (c, inner(row)), 0, x)[1],
            lambda: jax.jacfwd(inner)(x[..., 0].reshape(-1)[:2]),
        ]
    )()


@unusual
def collective(program, x, y, r):
    """Collectives over the axis of a vmap."""
    if x.ndim < 2:
        return None
    each = r.choice(
        [
            lambda v: lax.psum(v, "i"),
            lambda v: lax.pmean(v, "i"),
            lambda v: v - lax.pmax(v, "i"),
            lambda v: lax.pmin(v, "i"),
            lambda v: lax.all_gather(v, "i")[0],
            lambda v: lax.ppermute(v, "i", [(0, 0)]) if x.shape[0] == 1 else v,
            lambda v: v * (lax.axis_index("i") + 1),
            lambda v: v + lax.axis_index("i"),
            lambda v: lax.psum(1, "i") * v,
        ]
    )
    return jax.vmap(each, axis_name="i")(x)


@unusual
def reference(program, x, y, r):
    """Mutable array references."""
    make = getattr(jax, "new_ref", None) or getattr(jax, "array_ref", None)
    if make is None or x.ndim < 1:
        return None
    kind = r.randrange(7)

    def body(x):
        ref = make(x)
        if kind == 0:
            ref[...] = 2 * ref[...]
        elif kind == 1:
            ref[0] = ref[0] * 0 + 1.0
        elif kind == 2:
            ref[0] += 1.0
        elif kind == 3:
            other = make(jnp.zeros_like(x))
            other[...] = relu(ref[...])
            return other[...]
        elif kind == 4:
            lax.fori_loop(0, 2, lambda i, _: ref.__setitem__(Ellipsis, relu(ref[...])), None)
        elif kind == 5:
            ref[...] = jnp.tanh(ref[...])
        return ref[...]

    return jax.jit(body)(x) if r.random() < 0.4 else body(x)


@unusual
def callback(program, x, y, r):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def observed(function):
        function()
        return x

    return r.choice(
        [
            lambda: observed(lambda: jax.debug.callback(_ignore, x)),
            lambda: observed(lambda: jax.debug.callback(_ignore, x, ordered=True)),
            lambda: jax.pure_callback(_tanh, shape, x, vmap_method="expand_dims"),
            lambda: jax.pure_callback(_double, shape, x, vmap_method="expand_dims"),
            lambda: jax.experimental.io_callback(_double, shape, x),
            lambda: jax.experimental.io_callback(_double, shape, x, ordered=True),
        ]
    )()


def _ignore(x):
    return None


def _tanh(x):
    return np.tanh(x)


def _double(x):
    return 2 * np.asarray(x)


@unusual
def drawn(program, x, y, r):
    if not x.ndim:
        return None
    key = jax.random.key(r.randrange(3))
    return r.choice(
        [
            lambda: x + jax.random.normal(key, x.shape, x.dtype),
            lambda: x * jax.random.bernoulli(key, 0.5, x.shape),
            lambda: x * jax.random.uniform(jax.random.fold_in(key, program.n), x.shape, x.dtype),
            lambda: jax.random.permutation(key, x, axis=any_axis(x, r)),
            lambda: jax.random.gamma(key, jnp.abs(x) + 1.0),
            lambda: x * jax.random.categorical(key, x).astype(x.dtype)[..., None],
            lambda: x + lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), x.shape)[1].astype(x.dtype),
            lambda: x * jax.random.randint(key, x.shape, 0, 2).astype(x.dtype),
        ]
    )()


@unusual
def named(program, x, y, r):
    """Operations that change nothing."""
    return r.choice(
        [
            lambda: jnp.copy(x),
            lambda: lax.stop_gradient(x),
            lambda: lax.optimization_barrier((x, y))[0],
            lambda: checkpoint_name(x, "x"),
            lambda: jax.device_put(x),
            lambda: lax.with_sharding_constraint(
                x, jax.sharding.SingleDeviceSharding(jax.devices()[0])
            ),
            lambda: jnp.asarray(x, x.dtype),
            lambda: lax.expand_dims(x, (0,)),
            lambda: x + jnp.zeros_like(x),
            lambda: x * jnp.ones_like(x),
            lambda: jax.lax.convert_element_type(x, x.dtype),
            lambda: lax.reduce_and(x > 0, (0,)) * x,
        ]
    )()
