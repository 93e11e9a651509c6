"""What to balance. A criterion chooses one of the parameters that compute the same function.

``condition(params, spec, criterion=...)`` takes a name of ``CRITERIA`` or a criterion. Those that
minimize a function of the log-scales z add and scale, ``path() + 0.3 * norm()``, and one solver
minimizes any sum. With P trainable entries and (Bz)_i the log-scale that leaves entry i less the
one that enters it:

========================  =========================================================================
``path()``                P log Σ g e^{2Bz} − 2 Σ Bz with g the diagonal of the path-lifting Gram
                          matrix: P times log(arithmetic / geometric mean). Before training a ReLU
                          network by gradient descent (Lebeurrier et al., 2026). Entries without
                          any path, g = 0, do not count in P and Σ.
``norm(p)``               2P log ‖θ'‖_p: incoming and outgoing norms of each neuron agree. p = 2 is
                          ENorm (Stock et al., 2019), or weight balancing. For small weights, and
                          for networks without path lifting.
``equalize()``            max |in| = max |out| for each neuron. Before quantizing weights with one
                          range per layer (Nagel et al., 2019).
``fisher(...)``           as ``path()``, g being sums of squared gradients. For networks that are no
                          sum over paths, and to condition on the data at hand.
``steepest(grads, r)``    −P log ‖∇L‖² where |z| ≤ r: a local minimum, at a vertex. To take larger
                          steps for a while (Zhao et al., 2022; Mishkin et al., 2023).
``activation(A, α)``      A_h^α = W_h^{1−α}, the ranges of activations and of the weights that read
                          them. Before quantizing both, behind normalizations (Xiao et al., 2023).
``weighted(a, s)``        P log Σ a e^{s Bz} − s Σ Bz for any nonnegative weights a of the entries.
``convex(f)``             f(z), any smooth convex function written in JAX.
========================  =========================================================================

To be read function by function: each makes one criterion and stands alone. ``CRITERIA`` and
``as_criterion`` then give them names. A criterion of one's own is one more function here, or a
subclass of ``Criterion`` anywhere.

References:
  Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026, arXiv 2602.19799.
  Stock, Graham, Gribonval, Jégou, *Equi-normalization of neural networks*, ICLR 2019.
  Nagel, van Baalen, Blankevoort, Welling, *Data-free quantization through weight equalization and
  bias correction*, ICCV 2019.
  Zhao, Dehmamy, Walters, Yu, *Symmetry teleportation for accelerated optimization*, NeurIPS 2022.
  Mishkin, Bietti, Gower, *Level set teleportation*, 2023.
  Xiao, Lin, Seznec, Wu, Demouth, Han, *SmoothQuant*, ICML 2023.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathcond_jax._lifting.gram import unrefined_gram_diagonal
from pathcond_jax._program import roles
from pathcond_jax._solve.layout import layout
from pathcond_jax._solve.objective import LogSum, Objective, Smooth, reduce_masses
from pathcond_jax._solve.path import path_objective
from pathcond_jax._spec.arrays import compute_dtype
from pathcond_jax._spec.extended_range import ScaledDiagonal
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.trees import match_leaves
from pathcond_jax._spec.types import PyTree, SpecError
from pathcond_jax.criteria._base import Balance, Criterion, RangeBalance
from pathcond_jax.criteria._readings import log_statistics, powers, second_moments, squared


def path() -> Criterion:
    """Equal diagonal entries of the path-lifting Gram matrix; the default.

    Returns:
      The criterion.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> one, _ = pathcond.condition(params, spec, criterion=pathcond.criteria.path())
      >>> two, _ = pathcond.condition(params, spec, criterion="path")
      >>> bool((one["a"]["w"] == two["a"]["w"]).all())
      True

    References:
      Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026, arXiv 2602.19799.
    """

    def objective(params: PyTree, spec: ArchSpec) -> Objective:
        return path_objective(spec, unrefined_gram_diagonal(params, spec))

    return Balance("path", objective)


def norm(p: float = 2.0, *, depth_penalty: float = 1.0, biases: bool = True) -> Criterion:
    """The smallest p-norm of all parameters on the orbit; p = 2 is ENorm, and weight balancing.

    At the optimum the incoming and the outgoing p-norm of every neuron agree; where parameters take
    other powers q of its scale, ``Σ q ‖·‖_p^p`` of both sides do.

    Args:
      p: the power, positive.
      depth_penalty: c: entries of depth k count ``c^{−pk}``, so that at the optimum the outgoing
        norm of a neuron is c times the incoming one. Depths follow the forward order of the groups.
      biases: whether biases count. They are rescaled anyway.

    Returns:
      The criterion, ``2P log ‖θ'‖`` with P trainable entries.

    Raises:
      SpecError: p or the penalty is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[9.0]])}, "b": {"w": jnp.array([[1.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> balanced, _ = pathcond.condition(params, spec, criterion=pathcond.criteria.norm())
      >>> jnp.round(balanced["a"]["w"], 4).tolist(), jnp.round(balanced["b"]["w"], 4).tolist()
      ([[3.0]], [[3.0]])

    References:
      Stock, Graham, Gribonval, Jégou, *Equi-normalization of neural networks*, ICLR 2019.
    """
    for what, value in (("p", p), ("depth_penalty", depth_penalty)):
        if not value > 0:
            raise SpecError(f"{what} is {value}; it must be positive")

    def objective(params: PyTree, spec: ArchSpec) -> Objective:
        values, depths = match_leaves(spec, params), roles.depths(spec)
        ignored = frozenset() if biases else roles.biases(spec)
        counted = [
            value
            if leaf.trainable and leaf.path not in ignored
            else np.zeros(leaf.shape, np.float32)
            for leaf, value in zip(spec.leaves, values, strict=True)
        ]
        extra = tuple(-p * depths[leaf.path] * math.log2(depth_penalty) for leaf in spec.leaves)
        trees = (spec.treedef.unflatten(part) for part in powers(counted, p, extra))
        masses = reduce_masses(spec, ScaledDiagonal(*trees))
        term = LogSum(2.0 / p * spec.num_parameters, -float(p), *masses)
        return Objective((term,))

    return Balance(f"norm({p:g})", objective)


def equalize() -> Criterion:
    """Equal ranges: the largest incoming and the largest outgoing weight of each neuron agree.

    Not a minimum but a fixed point of sweeps over the groups. Ranges agree at many points of an
    orbit as soon as a weight is the largest of two neurons that it joins, as in depthwise and
    residual networks; the answer is the one that sweeps reach from the least 4-norm of the ranges,
    ``norm(4)`` without biases, of the largest weight that joins two neurons, which is one point of
    the orbit. It is therefore the same from every representative, unless ``initial`` says where
    sweeps start. (Where every weight belongs to one neuron, as with one hidden layer, ranges agree
    at one point, the limit p → ∞ of ``norm(p)``. Elsewhere that limit is one of the fixed points,
    and in general another one.) In a triple with a depthwise convolution all three ranges agree.
    Biases are rescaled but do not count.

    Returns:
      The criterion. Its ``objective`` is the largest |log(out/in)|/2 that is left, and its
      ``gradient_norm`` the Euclidean norm of these numbers. Steps are sweeps.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[8.0], [1.0]])}, "b": {"w": jnp.array([[0.5, 0.1]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> equal, _ = pathcond.condition(params, spec, criterion="equalize")
      >>> float(equal["a"]["w"].max()), float(equal["b"]["w"].max())
      (2.0, 2.0)

    References:
      Nagel, van Baalen, Blankevoort, Welling, *Data-free quantization through weight equalization
      and bias correction*, ICCV 2019.
    """
    return RangeBalance("equalize")


def fisher(source: Callable[[PyTree], PyTree] | PyTree, *, damping: float = 1e-4) -> Criterion:
    """The path criterion with squared gradients in place of the Gram diagonal.

    Args:
      source: a function from parameters to gradients, each with any axes before the parameter's
        own (examples, outputs), over which squares are summed; or second moments, a tree like the
        parameters; or the state of an optax optimizer that has a tree ``nu`` of them, such as Adam.
      damping: added to every entry, which keeps neurons without gradient in place.

    Returns:
      The criterion, in the units of ``path()``.

    Raises:
      SpecError: when it is used, if the source fits none of these.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": 8.0 * jnp.ones((1, 2))}, "b": {"w": 2.0 * jnp.ones((2, 1))}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> jacobian = jax.jacrev(lambda params: spec.apply_fn(params, jnp.ones((3, 1))))
      >>> moved, _ = pathcond.condition(params, spec, criterion=pathcond.criteria.fisher(jacobian))
      >>> jnp.round(moved["a"]["w"], 2).tolist()
      [[4.0, 4.0]]
    """

    def objective(params: PyTree, spec: ArchSpec) -> Objective:
        values = match_leaves(spec, params)
        moments = second_moments(source, params, spec)
        damped = [
            jnp.asarray(moment) + jnp.asarray(damping, compute_dtype(jnp.result_type(moment)))
            if leaf.trainable
            else value
            for leaf, value, moment in zip(spec.leaves, values, moments, strict=True)
        ]
        return path_objective(spec, jax.tree.unflatten(spec.treedef, damped))

    return Balance("fisher", objective)


def steepest(grads: PyTree, radius: float) -> Criterion:
    """Teleportation: makes the gradient large without changing the loss.

    ``‖∇L‖² = Σ (∂L/∂θ_i)² e^{2(Bz)_i}`` is convex in z, so its maximum over the box is at a vertex.
    Each step goes to the vertex that is best for the tangent at the last one, and increases it; the
    result is a local maximum. In a sum, the other criteria stay convex and are minimized with it.

    Args:
      grads: the gradient of the loss, a tree like the parameters.
      radius: of the box |z| ≤ radius, without which there is no maximum.

    Returns:
      The criterion, ``−P log ‖∇L‖²`` with P trainable entries.

    Raises:
      SpecError: the radius is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[1.0]])}, "b": {"w": jnp.array([[2.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> grads = {"a": {"w": jnp.array([[2.0]])}, "b": {"w": jnp.array([[1.0]])}}
      >>> criterion = pathcond.criteria.steepest(grads, radius=0.5)
      >>> [z.tolist() for z in pathcond.condition(params, spec, criterion)[1].log_scales]
      [[-0.5]]

    References:
      Zhao, Dehmamy, Walters, Yu, *Symmetry teleportation for accelerated optimization*, NeurIPS
      2022. Mishkin, Bietti, Gower, *Level set teleportation*, 2023.
    """
    if not radius > 0:
        raise SpecError(f"radius is {radius}; it must be positive")

    def objective(params: PyTree, spec: ArchSpec) -> Objective:
        del params
        masses = reduce_masses(spec, squared(grads, spec, "grads"))
        term = LogSum(float(spec.num_parameters), 2.0, *masses)
        return Objective((), concave=(term,), limit=radius)

    return Balance("steepest", objective)


def activation(statistics: Mapping[str, Any] | Sequence[Any], alpha: float = 0.5) -> Criterion:
    """Moves the difficulty of quantization from activations to the weights that read them.

    With A_h the largest activation of neuron h and W_h the largest weight that leaves it, scales
    ``λ_h = W_h^{1−α} / A_h^α``, so that A_h^α = W_h^{1−α} afterwards. (Activations are what the
    weights read: behind a squared ReLU, the squares, which take λ_h².) Meant for the channels
    between a normalization and the layers that read it, whose weights of the other side stay as
    they are; where both sides move it is solved jointly. For α > 0 exactly one point of the orbit
    has such ranges (sweeps contract by 1 − α), so that every representative gets the same answer
    from its own statistics.

    Args:
      statistics: largest absolute activations of the neurons on calibration data: one array
        ``(group.size,)`` per group of the spec with None for groups to leave alone, or a mapping
        from names of groups.
      alpha: the migration strength, in [0, 1]: 1 makes all activations equally large.

    Returns:
      The criterion.

    Raises:
      SpecError: α is outside of [0, 1]; or, when it is used, the statistics do not fit, or weights
        read different powers of a neuron.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[1.0]])}, "b": {"w": jnp.array([[4.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> criterion = pathcond.criteria.activation([jnp.array([16.0])])
      >>> moved, _ = pathcond.condition(params, spec, criterion)
      >>> jnp.round(moved["b"]["w"], 4).tolist()
      [[8.0]]

    References:
      Xiao, Lin, Seznec, Wu, Demouth, Han, *SmoothQuant*, ICML 2023, arXiv 2211.10438.
    """
    if not 0 <= alpha <= 1:
        raise SpecError(f"alpha is {alpha}; it lies between 0 and 1")
    return RangeBalance(
        f"activation({alpha:g})", lambda spec: log_statistics(statistics, spec), float(alpha)
    )


def weighted(
    weights: Callable[[PyTree], PyTree] | PyTree, *, exponent: float = 2.0, tilt: float = 1.0
) -> Criterion:
    """Any nonnegative weights a of the entries: ``P log Σ a e^{s Bz} − tilt · s Σ (Bz)``.

    Args:
      weights: a, a tree like the parameters, or a function from parameters to one.
      exponent: s; the weights are those of quantities that change by e^{s (Bz)}: 2 for squared
        gradients, −2 for squared parameters.
      tilt: 1 equalizes the rescaled weights, 0 makes their sum small.

    Returns:
      The criterion.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[9.0]])}, "b": {"w": jnp.array([[1.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> squares = lambda params: jax.tree.map(jnp.square, params)
      >>> criterion = pathcond.criteria.weighted(squares, exponent=-2.0, tilt=0.0)
      >>> jnp.round(pathcond.condition(params, spec, criterion)[0]["a"]["w"], 4).tolist()
      [[3.0]]
    """

    def objective(params: PyTree, spec: ArchSpec) -> Objective:
        tree = weights(params) if callable(weights) else weights
        match_leaves(spec, tree, "weights")
        term = LogSum(float(spec.num_parameters), float(exponent), *reduce_masses(spec, tree))
        factor = tilt * exponent
        return Objective((term,), factor * np.concatenate(layout(spec).surplus))

    return Balance("weighted", objective)


def convex(
    function: Callable[[tuple[jax.Array, ...]], jax.Array], name: str = "convex"
) -> Criterion:
    """Any smooth convex function of the log-scales.

    Args:
      function: from one array ``(group.size,)`` per group of the spec to a scalar, differentiable
        twice by JAX.
      name: for people.

    Returns:
      The criterion. Alone, its minimum must exist.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> params = {"a": {"w": jnp.array([[1.0]])}, "b": {"w": jnp.array([[4.0]])}}
      >>> spec = pathcond.chain_spec(params, ["a", "b"])
      >>> criterion = pathcond.criteria.convex(lambda z: jnp.sum((z[0] - 1.0) ** 2))
      >>> [round(float(z[0]), 4) for z in pathcond.condition(params, spec, criterion)[1].log_scales]
      [1.0]
    """

    def objective(params: PyTree, spec: ArchSpec) -> Objective:
        del params
        return Objective((), smooth=(Smooth(1.0, jax.tree_util.Partial(function)),))

    return Balance(name, objective)


CRITERIA: dict[str, Callable[[], Criterion]] = {
    "path": path,
    "enorm": norm,
    "equalize": equalize,
}


def as_criterion(criterion: Criterion | str, *, norm_weight: float | jax.Array = 0.0) -> Criterion:
    """The criterion of a name, plus ``norm_weight`` times ``norm()``.

    Args:
      criterion: a criterion, a name of ``CRITERIA``, or the name of a function of this module that
        needs no arguments.
      norm_weight: not negative.

    Returns:
      The criterion.

    Raises:
      SpecError: there is no such criterion.

    Example:
      >>> from pathcond_jax import criteria
      >>> criteria.as_criterion("enorm").name
      'norm(2)'
    """
    if isinstance(criterion, str):
        criterion = _by_name(criterion)
    if not isinstance(criterion, Criterion):
        name = getattr(criterion, "__name__", "")
        hint = f"; call it: criteria.{name}({_needed(name)})" if name in _FACTORIES else ""
        raise SpecError(f"no criterion {name or criterion!r}{hint}; there are {_known()}")
    plain = isinstance(norm_weight, (int, float)) and norm_weight == 0
    return criterion if plain else criterion + norm_weight * norm()


_FACTORIES: dict[str, Callable[..., Criterion]] = {
    factory.__name__: factory
    for factory in (path, norm, equalize, fisher, steepest, activation, weighted, convex)
}


def _by_name(name: str) -> Criterion:
    factory = {**_FACTORIES, **CRITERIA}.get(name)
    if factory is None:
        raise SpecError(f"no criterion {name!r}; there are {_known()}")
    if name in _FACTORIES and _needed(name):
        raise SpecError(
            f"criterion {name!r} needs more than its name: pass "
            f"criterion=pathcond_jax.criteria.{name}({_needed(name)})"
        )
    return factory()


def _needed(name: str) -> str:
    """The arguments without which a criterion cannot be made."""
    arguments = inspect.signature(_FACTORIES[name]).parameters.values()
    return ", ".join(argument.name for argument in arguments if argument.default is argument.empty)


def _known() -> str:
    return f"{', '.join(map(repr, CRITERIA))} and those of pathcond_jax.criteria"
