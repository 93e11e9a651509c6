"""Path lifting: path norms and the path-lifting Gram matrix, exact for any path-liftable network.

The path lifting Φ lists, for every path from an input, a bias or a constant to an output, the
product of the weights along it. What counts as a path:

* A bias, a BatchNorm shift or a mean that is subtracted starts paths of its own.
* A ReLU, |x|, LeakyReLU or PReLU passes every path; a slope is no weight of a path.
* A maximum has an edge of weight 1 from each of its arguments (``max_pool="paths"``), or follows
  the largest of the lifted values, as the authors' code does (``"max"``).
* Fixed coefficients (an average pool's 1/k, a frozen scale, 1/√(var + ε)) multiply the paths.
* A weight that several paths share, as a convolution's at every position, counts in each. A weight
  that one path meets k times counts k² times, as ∂Φᵀ∂Φ demands.

The diagonal of the Gram matrix G = ∂Φᵀ∂Φ is a derivative of the squared path norm,

    g_i = Σ_{paths p ∋ i} Π_{j ∈ p, j ≠ i} θ_j² = ∂/∂(θ_i²) Σ_p Φ_p²,

so one forward and one backward sweep over squared weights give it.

How to read this file: the public functions come first, then what turns numbers of extended range
into plain ones. Two cases need more than one sweep: entries that a path meets twice
(``_with_repeated``), and the full matrix, which second derivatives give (``_gram_matrix``).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The rules enter themselves into their table when they are imported.
from pathcond_jax._lifting import rules  # noqa: F401
from pathcond_jax._lifting.head import advised
from pathcond_jax._lifting.interpreter import Lifting
from pathcond_jax._lifting.paths import list_paths
from pathcond_jax._lifting.runs import ApartLifting, RolledLifting
from pathcond_jax._lifting.values import (
    NotPathLiftableError,
    RefusedOperationError,
    Signal,
    Value,
)
from pathcond_jax._program.graph import Graph, Node
from pathcond_jax._spec import extended_range
from pathcond_jax._spec.arrays import each, entries_of, is_traced
from pathcond_jax._spec.extended_range import Scaled, ScaledDiagonal, log_of
from pathcond_jax._spec.sharding import automatic
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError

# Second derivatives by this many entries are computed at once.
_CHUNK = 64
_MAX_REPEATED = 4096
_MAX_MATRIX = 1 << 14


def path_norm(params: PyTree, spec: ArchSpec, order: int = 2, *, log: bool = False) -> jax.Array:
    """The norm of the path lifting, (Σ_p |Φ_p|^order)^(1/order).

    It does not change under ``rescale``.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.
      order: 1 or 2.
      log: return the natural logarithm, which holds any magnitude.

    Returns:
      A scalar, float32 at least.

    Raises:
      NotPathLiftableError: an operation of the network is not a sum over paths.
      OverflowError: the norm exceeds the range of its dtype. Under ``jit`` and ``vmap`` it comes
        out as inf or 0 instead.
      SpecError: ``params`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 2.0 * jnp.ones((1, 3))}, "b": {"w": jnp.ones((3, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> float(pathcond.path_norm(params, spec, order=1))
      6.0

    References:
      Gonon, Brisebarre, Riccietti, Gribonval, *A path-norm toolkit for modern networks*, 2024.
    """
    if order not in (1, 2):
        raise SpecError(f"order is 1 or 2, not {order!r}")
    total = extended_range.normalized(*_lifting(params, spec, order, RolledLifting).total())
    if log:
        dtype = total.mantissa.dtype
        exponent = jnp.where(total.mantissa > 0, total.exponent, 0)
        return (jnp.log(total.mantissa) + log_of(exponent, dtype)) / order
    if order == 2:
        # Of an odd exponent, one factor of 2 goes under the root.
        odd = total.exponent % 2
        root = jnp.sqrt(total.mantissa * extended_range.power_of_two(odd, total.mantissa.dtype))
        total = Scaled(root, (total.exponent - odd) // 2)
    norm = extended_range.times_power_of_two(total.mantissa, total.exponent)
    _check_range("path_norm", "path_norm(..., log=True)", [total], [norm])
    return norm


def gram_diagonal(params: PyTree, spec: ArchSpec) -> PyTree:
    """The diagonal g of the path-lifting Gram matrix ∂Φᵀ∂Φ.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.

    Returns:
      A pytree like ``params``, float32 at least; zeros at leaves that are not trainable.

    Raises:
      NotPathLiftableError: an operation of the network is not a sum over paths, or the Gram
        diagonal takes more than one backward sweep (weights whose entries share parameters; a
        large weight that paths meet twice).
      OverflowError: the entries of some leaf exceed the range of the dtype. Under ``jit`` and
        ``vmap`` they come out as inf or 0 instead; ``scaled_gram_diagonal`` keeps them.
      SpecError: ``params`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 2.0 * jnp.ones((1, 3))}, "b": {"w": jnp.ones((3, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> pathcond.gram_diagonal(params, spec)["b"]["w"].ravel().tolist()
      [4.0, 4.0, 4.0]

    References:
      Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026, arXiv 2602.19799.
    """
    found = scaled_gram_diagonal(params, spec)
    plain = jax.tree.map(extended_range.times_power_of_two, found.mantissa, found.exponent)
    parts = map(Scaled, jax.tree.leaves(found.mantissa), jax.tree.leaves(found.exponent))
    _check_range("gram_diagonal", "scaled_gram_diagonal", list(parts), jax.tree.leaves(plain))
    return plain


def scaled_gram_diagonal(params: PyTree, spec: ArchSpec) -> ScaledDiagonal:
    """:func:`gram_diagonal` in a form that holds any magnitude; ``solve`` accepts it.

    Within one leaf, entries below 2^-126 of the largest (float32) come out as 0.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.

    Returns:
      Mantissas like ``params``, float32 at least, and one power of two per leaf.

    Raises:
      NotPathLiftableError: as for ``gram_diagonal``.
      SpecError: ``params`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 1e30 * jnp.ones((1, 1))}, "b": {"w": jnp.ones((1, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> gram = pathcond.scaled_gram_diagonal(params, spec)
      >>> round(float(gram.mantissa["b"]["w"][0, 0]), 3), int(gram.exponent["b"]["w"])
      (1.245, 199)
    """
    found = unrefined_gram_diagonal(params, spec, ApartLifting)
    return found._replace(exponent=jax.tree.map(_shown, found.exponent))


def unrefined_gram_diagonal(
    params: PyTree, spec: ArchSpec, kind: type[Lifting] = RolledLifting
) -> ScaledDiagonal:
    """:func:`scaled_gram_diagonal`, where leaves of zeros have the exponent ``ZERO``."""
    lifting = _lifting(params, spec, 2, kind)
    found = _with_repeated(params, spec, lifting) if lifting.repeated else lifting.derivatives()
    full = [
        _zeros(leaf.shape, lifting.dtype) if part is None else part
        for leaf, part in zip(spec.leaves, found, strict=True)
    ]
    return ScaledDiagonal(
        jax.tree.unflatten(spec.treedef, [part.mantissa for part in full]),
        jax.tree.unflatten(spec.treedef, [part.exponent for part in full]),
    )


def sum_and_derivatives(
    params: PyTree, spec: ArchSpec, order: int
) -> tuple[Scaled, list[Scaled | None]]:
    """Σ_p |Φ_p|^order, and its derivatives by |θ_i|^order, one array or None for each leaf."""
    lifting = _lifting(params, spec, order, ApartLifting)
    return extended_range.normalized(*lifting.total()), lifting.derivatives()


def gram_matrix(params: PyTree, spec: ArchSpec) -> jax.Array:
    """The path-lifting Gram matrix G = ∂Φᵀ∂Φ of a network of up to a few thousand entries.

    Its rank is p − H for generic parameters: moving along the rescalings leaves Φ as it is.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.

    Returns:
      A (p, p) array, float32 at least, of the trainable leaves in flattening order, each row-major.

    Raises:
      NotPathLiftableError: an operation of the network is not a sum over paths.
      OverflowError: entries exceed the range of the dtype; under ``jit`` they are inf.
      SpecError: ``params`` does not fit the spec, or p exceeds 16384.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 2.0 * jnp.ones((1, 1))}, "b": {"w": 3.0 * jnp.ones((1, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> pathcond.gram_matrix(params, spec).tolist()
      [[9.0, 6.0], [6.0, 4.0]]
    """
    if spec.num_parameters > _MAX_MATRIX:
        raise SpecError(
            f"gram_matrix is for {_MAX_MATRIX} entries at most, not {spec.num_parameters}"
        )
    match_leaves(spec, params)
    matrix = _gram_matrix(params, spec)
    if not is_traced(matrix) and jnp.isinf(matrix).any():
        raise OverflowError(f"entries of gram_matrix exceed the range of {matrix.dtype}")
    return matrix


def lifted(params: PyTree, spec: ArchSpec) -> jax.Array:
    """The path lifting Φ itself, for tiny networks: the product of the weights along every path.

    Paths are listed by the output entry they end in (the outputs in order, row-major); those of one
    entry in the order of the entries that the operation before reads, and so on back to the input.
    Fixed coefficients multiply Φ with their sign.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.

    Returns:
      A vector, float32 at least, differentiable by ``params``.

    Raises:
      NotPathLiftableError: an operation of the network is not a sum over paths.
      SpecError: there are more than 100 000 paths; or ``max_pool="max"``, whose paths depend on
        the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[2.0, 3.0]])}, "b": {"w": jnp.array([[5.0], [-7.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> pathcond.lifted(params, spec).tolist()
      [10.0, -21.0]
    """
    if spec.max_pool == "max":
        raise SpecError('lifted needs a spec with max_pool="paths"')
    lifting = _lifting(params, spec, 1)
    lifting.total()
    atoms, paths, signs = list_paths(lifting)
    return jnp.prod(atoms[paths], axis=1) * signs.astype(atoms.dtype)


def conditioning_score(params: PyTree, spec: ArchSpec) -> jax.Array:
    """How far the Gram diagonal is from constant: log(AM/GM) ≥ 0 over its positive entries.

    Args:
      params: the parameters the spec was built for.
      spec: the architecture.

    Returns:
      A scalar; 0 if and only if all positive entries are equal.

    Raises:
      NotPathLiftableError: as for ``gram_diagonal``.
      SpecError: ``params`` does not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.ones((1, 3))}, "b": {"w": jnp.ones((3, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> float(pathcond.conditioning_score(params, spec))
      0.0
    """
    gram = scaled_gram_diagonal(params, spec)
    return automatic(lambda gram: (gram, _score(gram, spec)), gram)[1]


def _score(gram: ScaledDiagonal, spec: ArchSpec) -> jax.Array:
    pairs = zip(
        spec.leaves, jax.tree.leaves(gram.mantissa), jax.tree.leaves(gram.exponent), strict=True
    )
    mantissas, exponents = zip(*((m, e) for leaf, m, e in pairs if leaf.trainable), strict=True)
    # Hidden: XLA would compare all exponents anew in each kernel that reads what the largest is.
    hidden = lax.optimization_barrier(jnp.stack(exponents))
    steps = entries_of(_below_largest(hidden))
    logs = each(_logs, list(zip(mantissas, steps, strict=True)), [()] * len(steps))
    return _log_mean_ratio(jnp.concatenate([x.reshape(-1) for x in logs]))


@jax.jit
def _shown(exponent: jax.Array) -> jax.Array:
    """Zeros carry an exponent below all others; to the caller it says nothing."""
    return jnp.where(exponent > extended_range.ZERO // 2, exponent, 0)


@jax.jit
def _below_largest(exponents: jax.Array) -> jax.Array:
    return exponents - exponents.max()


@jax.jit
def _logs(mantissa: jax.Array, exponent: jax.Array) -> jax.Array:
    """Logarithms, flat; −inf for 0, and what is not a number stays so."""
    mantissa = mantissa.reshape(-1)
    positive = jnp.where(mantissa > 0, mantissa, 1)
    logs = jnp.log(positive) + log_of(exponent, positive.dtype)
    return jnp.where(mantissa > 0, logs, jnp.where(mantissa == 0, -jnp.inf, jnp.nan))


@jax.jit
def _log_mean_ratio(logs: jax.Array) -> jax.Array:
    """log(AM/GM) of the positive ones of the numbers with these logarithms."""
    positive = logs != -jnp.inf
    count = jnp.maximum(positive.sum(), 1).astype(logs.dtype)
    centre = jnp.where(positive, logs, 0).sum() / count
    # Relative to the geometric mean, so that equal entries give exactly 0 at any magnitude.
    spread = jnp.where(positive, logs - centre, -jnp.inf)
    return jnp.maximum(jax.nn.logsumexp(spread) - jnp.log(count), 0)


def _zeros(shape: tuple[int, ...], dtype: Any) -> Scaled:
    return Scaled(jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def sums_over_paths(
    spec: ArchSpec, made: list[tuple[Node, int]], leaves: Sequence[Any]
) -> list[Scaled]:
    """The sums Σ_p Φ_p² up to each result of the program.

    Args:
      spec: the architecture.
      made: a list that each sum's operation and value id are added to.
      leaves: the parameters.
    """
    found: list[Scaled] = []

    class Recorded(Lifting):
        def _apply(self, graph: Graph, node: Node, inputs: list[Value]) -> Sequence[Value]:
            results = super()._apply(graph, node, inputs)
            for number, value in zip(node.outputs, results, strict=True):
                if isinstance(value, Signal) and graph is spec.program:
                    made.append((node, number))
                    found.append(self.power(value))
            return results

    trainable = [leaf.trainable for leaf in spec.leaves]
    Recorded(spec.program, leaves, trainable, order=2, max_pool=spec.max_pool)
    return found


def _lifting(
    params: PyTree,
    spec: ArchSpec,
    order: int,
    kind: type[Lifting] = Lifting,
    **options: Any,
) -> Lifting:
    if spec.program is None:
        raise SpecError("this spec has no program to lift; build it with trace_spec")
    trainable = [leaf.trainable for leaf in spec.leaves]
    values = match_leaves(spec, params)
    lifting = functools.partial(kind, spec.program, values, trainable)
    try:
        return lifting(order=order, max_pool=spec.max_pool, **options)
    except RefusedOperationError as refused:
        raise advised(refused, spec.program) from refused.__cause__


def _second(params: PyTree, spec: ArchSpec, weights: bool) -> Any:
    """One lifting, its weights' mantissas, and the derivatives as a function of those."""
    first = _lifting(params, spec, 2, keep_zero=True)
    at = [first.power(weight).mantissa for weight in first.weights]

    def derivatives(mantissas: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        again = _lifting(params, spec, 2, keep_zero=True, mantissas=mantissas)
        chosen = again.weights if weights else again.leaves
        parts = [
            _zeros(jnp.shape(c.raw), again.dtype) if part is None else part
            for c, part in zip(chosen, again.derivatives(weights), strict=True)
        ]
        return [part.mantissa for part in parts], [part.exponent for part in parts]

    return first, at, derivatives


def _with_repeated(params: PyTree, spec: ArchSpec, lifting: Lifting) -> list[Scaled | None]:
    """Where a path meets an entry k times, Σ k² Φ_p²/θ_i² = (∂ + θ_i² ∂²) Σ Φ_p² by θ_i²."""
    count = sum(map(len, lifting.repeated.values()))
    names = ", ".join(repr(spec.leaves[k].path) for k in lifting.repeated)
    if count > _MAX_REPEATED:
        raise NotPathLiftableError(
            f"paths meet {count} entries of {names} more than once; their Gram diagonal takes one "
            f"sweep per entry, which is done up to {_MAX_REPEATED} entries; use a criterion that "
            "needs no path lifting, or separate parameters"
        )
    first, at, derivatives = _second(params, spec, False)
    if any(set(weight.entries) & set(lifting.repeated) for weight in first.weights if weight.made):
        raise NotPathLiftableError(
            f"paths meet entries of {names} more than once, of which one is a function of the "
            "parameter: their Gram diagonal is that of gram_matrix only"
        )
    (mantissas, exponents) = derivatives(at)
    place = {id(weight): k for k, weight in enumerate(first.weights)}
    for leaf, entries in lifting.repeated.items():
        slot = place[id(first.leaves[leaf])]
        numbers = jnp.asarray(sorted(entries), jnp.int32) - 1

        def curvature(number: jax.Array, leaf: int = leaf, slot: int = slot) -> jax.Array:
            tangents = [jnp.zeros_like(m) for m in at]
            one = jnp.zeros(at[slot].size, at[slot].dtype).at[number].set(1)
            tangents[slot] = one.reshape(at[slot].shape)
            _, (change, _) = jax.jvp(lambda m: derivatives(m), (at,), (tangents,))
            return change[leaf].reshape(-1)[number] * at[slot].reshape(-1)[number]

        extra = jax.lax.map(curvature, numbers, batch_size=_CHUNK)
        flat = mantissas[leaf].reshape(-1).at[numbers].add(extra)
        mantissas[leaf] = flat.reshape(mantissas[leaf].shape)
    return [Scaled(m, e) for m, e in zip(mantissas, exponents, strict=True)]


@functools.partial(jax.jit, static_argnums=1)
def _gram_matrix(params: PyTree, spec: ArchSpec) -> jax.Array:
    """Σ_p ∂Φ_p/∂w_i ∂Φ_p/∂w_j = w_i w_j ∂²(Σ_p Φ_p²)/∂(w_i²)∂(w_j²), plus g_i if i = j."""
    first, at, derivatives = _second(params, spec, True)
    sizes = [m.size for m in at]
    ends = np.cumsum(sizes).tolist()
    diagonal, exponents = derivatives(at)

    def column(number: jax.Array) -> jax.Array:
        flat = jnp.zeros(ends[-1], at[0].dtype).at[number].set(1)
        tangents = [x.reshape(m.shape) for x, m in zip(jnp.split(flat, ends[:-1]), at, strict=True)]
        _, (change, _) = jax.jvp(lambda m: derivatives(m), (at,), (tangents,))
        return jnp.concatenate([part.reshape(-1) for part in change])

    second = jax.lax.map(column, jnp.arange(ends[-1]), batch_size=_CHUNK).T
    signed = jnp.concatenate(
        [
            (jnp.sign(jnp.asarray(w.raw)).astype(m.dtype) * jnp.sqrt(m)).reshape(-1)
            for w, m in zip(first.weights, at, strict=True)
        ]
    )
    own = jnp.concatenate(
        [jnp.full(n, w.power.exponent // 2) for n, w in zip(sizes, first.weights, strict=True)]
    )
    outer = jnp.concatenate([jnp.full(n, e) for n, e in zip(sizes, exponents, strict=True)])
    flat = jnp.concatenate([part.reshape(-1) for part in diagonal])
    exponent = (outer + own)[:, None] - own[None, :]
    matrix = extended_range.times_power_of_two(signed[:, None] * signed[None, :] * second, exponent)
    matrix = matrix + jnp.diag(extended_range.times_power_of_two(flat, outer))
    jacobian = _weights_by_parameters(params, spec, first)
    return jacobian.T @ matrix @ jacobian if jacobian is not None else matrix


def _weights_by_parameters(params: PyTree, spec: ArchSpec, lifting: Lifting) -> jax.Array | None:
    """∂w/∂θ for the weights of a lifted program; None if they are the parameters."""
    if not any(weight.made for weight in lifting.weights):
        return None
    values = match_leaves(spec, params)
    chosen = [k for k, leaf in enumerate(spec.leaves) if leaf.trainable]

    def weights(trained: list[jax.Array]) -> jax.Array:
        full = list(values)
        for k, value in zip(chosen, trained, strict=True):
            full[k] = value
        found = _lifting(jax.tree.unflatten(spec.treedef, full), spec, 2).weights
        return jnp.concatenate(
            [jnp.asarray(w.raw).astype(lifting.dtype).reshape(-1) for w in found]
        )

    columns = jax.jacfwd(weights)([jnp.asarray(values[k]) for k in chosen])
    count = sum(jnp.size(weight.raw) for weight in lifting.weights)
    return jnp.concatenate([c.astype(lifting.dtype).reshape(count, -1) for c in columns], axis=1)


def _check_range(what: str, instead: str, parts: list[Scaled], plain: list[jax.Array]) -> None:
    """Raises where finite numbers became inf, or all of an array 0, unless traced."""
    if any(map(is_traced, plain)):
        return
    if bool(_lost(parts, plain)):
        raise OverflowError(
            f"{what} leaves the range of {plain[0].dtype} for this network; {instead} holds any "
            "magnitude"
        )


@jax.jit
def _lost(parts: list[Scaled], plain: list[jax.Array]) -> jax.Array:
    lost = jnp.zeros((), bool)
    for part, value in zip(parts, plain, strict=True):
        if value.size:
            finite = jnp.isfinite(part.mantissa).all()
            lost |= finite & (
                jnp.isinf(value).any() | ((part.mantissa > 0).any() & (value == 0).all())
            )
    return lost
