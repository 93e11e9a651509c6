"""Sums of products of sums: log Σ_u exp(o_u + Σ_k w_k log Σ_{i ∈ u} a_i^(k) exp(s_k (Bz)_i)).

Entries i belong to *units* u, such as the weights that share one quantizer, and each factor k is a
log-sum over a unit: convex, and so is the whole. Entries lie in (batch, rows, cols) arrays, whose
rows and columns, the *positions*, carry the neurons, and every column belongs to one unit. Masses
are kept as logarithms and exponentials are taken entry by entry: exponents may be large, and sums
of rows times columns would leave the range of float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pathcond_jax._solve.objective import Model, Smooth


class Factor(NamedTuple):
    """One of the sums that are multiplied.

    Attributes:
      weight: w, the power of the sum.
      exponent: s.
      logs: log a, one (batch, rows, cols) array per stack, −inf where there is no mass.
    """

    weight: jax.Array
    exponent: jax.Array
    logs: tuple[jax.Array, ...]


class Products(NamedTuple):
    """The sum over units of products of sums over their entries.

    Attributes:
      factors: the sums.
      neurons: integer (slots, positions), the neurons of each position among all; their number
        where there is none. Positions are the rows of the first stack, its columns, the rows of
        the second.
      entries: (slots, positions), of B.
      units: integer (columns,), the unit of each column of each batch entry of each stack.
      offsets: (units,), o.
    """

    factors: tuple[Factor, ...]
    neurons: jax.Array
    entries: jax.Array
    units: jax.Array
    offsets: jax.Array


def smooth(products: Products, weight: float | jax.Array = 1.0) -> Smooth:
    """The function as a part of an objective."""
    partial = jax.tree_util.Partial
    return Smooth(weight, partial(value, products), partial(model, products))


def value(products: Products, log_scales: tuple[jax.Array, ...]) -> jax.Array:
    """The function at log-scales, one array per group."""
    total, _, _ = _shares(products, _flat(log_scales))
    return total


def model(products: Products, log_scales: tuple[jax.Array, ...]) -> Model:
    """The function at log-scales and its derivatives there.

    Under the shares P_k of the entries in the total, the Hessian is the covariance of the rows of
    B within units, times w s², plus that of the means of units.
    """
    z = _flat(log_scales)
    total, by_unit, shares = _shares(products, z)
    factors = products.factors
    marginals = [
        [(p.sum(2).reshape(-1), p.sum(1).reshape(-1)) for p in by_stack] for by_stack in shares
    ]
    met = [jnp.concatenate([side for pair in pairs for side in pair]) for pairs in marginals]
    columns = [jnp.concatenate([cols for _, cols in pairs]) for pairs in marginals]

    def combined(power: int) -> jax.Array:
        terms = (f.weight * f.exponent**power * m for f, m in zip(factors, met, strict=True))
        return sum(terms, jnp.zeros_like(met[0]))

    def product(v: jax.Array) -> jax.Array:
        shifts = _split(products, _spread(products, v))
        weighted = [
            _by_column(by_stack, shifts, pairs)
            for by_stack, pairs in zip(shares, marginals, strict=True)
        ]
        means = [_of_units(products, by_unit, image) for image in weighted]
        slopes = [f.weight * f.exponent for f in factors]
        mean = sum((s * m for s, m in zip(slopes, means, strict=True)), jnp.zeros_like(by_unit))
        mean = mean - jnp.dot(by_unit, mean)
        pulled = jnp.zeros_like(met[0])
        for k, factor in enumerate(factors):
            curvature = slopes[k] * factor.exponent
            moved = (slopes[k] * mean - curvature * means[k])[products.units]
            along = curvature * weighted[k] + moved * columns[k]
            across = _by_row(shares[k], shifts, marginals[k], curvature, moved)
            pulled = pulled + _joined(shares[k], across, along)
        return _collected(products, pulled, z.size, products.entries)

    return Model(
        total,
        _collected(products, combined(1), z.size, products.entries),
        _collected(products, combined(2), z.size, jnp.square(products.entries)),
        product,
    )


def _flat(log_scales: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.concatenate(log_scales)


def _spread(products: Products, z: jax.Array) -> jax.Array:
    """What each position adds to (Bz)."""
    extended = jnp.append(z, jnp.zeros((1,), z.dtype))
    return (products.entries * extended[products.neurons]).sum(0)


def _collected(products: Products, values: jax.Array, count: int, entries: jax.Array) -> jax.Array:
    """The sums over the positions of each neuron, (H,), times ``entries``."""
    sums = jnp.zeros((count + 1,), values.dtype)
    return sums.at[products.neurons].add(entries * values[None])[:-1]


def _split(products: Products, values: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Values of positions as (batch, rows) and (batch, cols) per stack."""
    found, start = [], 0
    for logs in products.factors[0].logs:
        batch, rows, cols = logs.shape
        middle, end = start + batch * rows, start + batch * (rows + cols)
        across = values[start:middle].reshape(batch, rows)
        found.append((across, values[middle:end].reshape(batch, cols)))
        start = end
    return found


def _shares(products: Products, z: jax.Array) -> tuple[jax.Array, jax.Array, list[list[jax.Array]]]:
    """The function, the share of each unit, and those of entries for each factor and stack."""
    shifts = _split(products, _spread(products, z))
    count, logs = products.offsets.shape[0], products.offsets
    factors: list[tuple[list[jax.Array], jax.Array]] = []
    for factor in products.factors:
        exponents = [
            masses + factor.exponent * (across[:, :, None] + along[:, None, :])
            for masses, (across, along) in zip(factor.logs, shifts, strict=True)
        ]
        tops = jnp.concatenate([x.max(1).reshape(-1) for x in exponents])
        tops = jax.lax.stop_gradient(jax.ops.segment_max(tops, products.units, count))
        tops = jnp.where(tops > -jnp.inf, tops, 0)
        terms = [
            jnp.exp(x - top[:, None])
            for x, top in zip(exponents, _columns(products, tops), strict=True)
        ]
        flat = jnp.concatenate([x.sum(1).reshape(-1) for x in terms])
        sums = jax.ops.segment_sum(flat, products.units, count)
        logs = logs + factor.weight * (_log(sums) + tops)
        factors.append((terms, sums))
    top = jax.lax.stop_gradient(logs.max())
    top = jnp.where(top > -jnp.inf, top, 0)
    parts = jnp.exp(logs - top)
    whole = parts.sum()
    by_unit = parts / jnp.where(whole > 0, whole, 1)
    shares = []
    for terms, sums in factors:
        quotients = by_unit / jnp.where(sums > 0, sums, 1)
        pairs = zip(terms, _columns(products, quotients), strict=True)
        shares.append([x * q[:, None] for x, q in pairs])
    return _log(whole) + top, by_unit, shares


def _columns(products: Products, by_unit: jax.Array) -> list[jax.Array]:
    """Values of units for each column, (batch, cols) per stack."""
    flat, found, start = by_unit[products.units], [], 0
    for logs in products.factors[0].logs:
        batch, _, cols = logs.shape
        found.append(flat[start : start + batch * cols].reshape(batch, cols))
        start += batch * cols
    return found


def _of_units(products: Products, by_unit: jax.Array, columns: jax.Array) -> jax.Array:
    """Means over units of what columns add up to."""
    sums = jax.ops.segment_sum(columns, products.units, by_unit.shape[0])
    return sums / jnp.where(by_unit > 0, by_unit, 1)


_Sides = list[tuple[jax.Array, jax.Array]]


def _by_column(shares: list[jax.Array], shifts: _Sides, marginals: _Sides) -> jax.Array:
    """(columns,), the sums of shares times (Bv)."""
    parts = zip(shares, shifts, marginals, strict=True)
    return jnp.concatenate(
        [
            jnp.einsum("brc,br->bc", p, across).reshape(-1) + cols * along.reshape(-1)
            for p, (across, along), (_, cols) in parts
        ]
    )


def _by_row(
    shares: list[jax.Array],
    shifts: _Sides,
    marginals: _Sides,
    curvature: jax.Array,
    moved: jax.Array,
) -> list[jax.Array]:
    """Per stack, the sums over rows of shares times curvature (Bv) plus what columns add."""
    found, start = [], 0
    for p, (across, along), (rows, _) in zip(shares, shifts, marginals, strict=True):
        batch, _, cols = p.shape
        added = moved[start : start + batch * cols].reshape(batch, cols)
        start += batch * cols
        image = jnp.einsum("brc,bc->br", p, curvature * along + added)
        found.append((image + curvature * across * rows.reshape(across.shape)).reshape(-1))
    return found


def _joined(shares: list[jax.Array], rows: list[jax.Array], columns: jax.Array) -> jax.Array:
    """One value per position."""
    found, start = [], 0
    for p, row in zip(shares, rows, strict=True):
        batch, _, cols = p.shape
        found += [row, columns[start : start + batch * cols]]
        start += batch * cols
    return jnp.concatenate(found)


def _log(sums: jax.Array) -> jax.Array:
    """The logarithm; −inf, and no slope, where there is nothing."""
    return jnp.where(sums > 0, jnp.log(jnp.where(sums > 0, sums, 1)), -jnp.inf)
