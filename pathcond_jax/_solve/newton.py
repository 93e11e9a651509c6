"""All log-scales at once: Newton's method with conjugate gradients inside.

To be read from :func:`newton` down. What a loop repeats is :func:`_look`: what is known at a point
(:func:`_evaluate`), whether to go there (:func:`_judge`), and the next direction: back, to the
minimum over one color, or a step of Newton's method (:func:`_conjugate_gradients` on
:func:`_hessian_product`), which also says how good the point is (:func:`_certificate`). The rest
are the neurons that the box holds.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pathcond_jax._solve import coarse, flat_objective, stacks
from pathcond_jax._solve.block import block_step, colors
from pathcond_jax._solve.flat_objective import Problem, Run
from pathcond_jax._solve.objective import Model, Smooth
from pathcond_jax._solve.stacks import Table, Weights
from pathcond_jax._spec.log_scales import by_group
from pathcond_jax._spec.spec import ArchSpec

# Conjugate gradient steps within a Newton step, and halvings of it. Most steps need few; after one
# that is left unfinished, the next starts over.
INNER_STEPS = 100
HALVINGS = 30
# More conjugate gradient steps than these cost more than a better preconditioner.
PATIENCE = 20
# The decrease that a step must reach, relative to the one its slope promises.
ARMIJO = 1e-4
# The furthest that a log-scale moves in one step.
REACH = 20.0


class Iterate(NamedTuple):
    """Log-scales and what Newton's method knows there.

    Attributes:
      z: (H,) log-scales.
      value: F.
      gradient: (H,), of F.
      diagonal: (H,), that of its Hessian, nearly.
      terms: the probabilities of the entries of each term, in factors.
      means: (H,) for each term, the mean of the rows of B: outgoing minus incoming probability.
    """

    z: jax.Array
    value: jax.Array
    gradient: jax.Array
    diagonal: jax.Array
    terms: tuple[Weights, ...]
    means: tuple[jax.Array, ...]


class State(NamedTuple):
    """Between two looks at F.

    Attributes:
      z: (H,) log-scales, the best that were looked at.
      value: F there.
      gradient: of F there.
      direction: (H,), where to go from z.
      halvings: how often that was too far.
      steps: how many directions were taken.
      swept: how many colors were moved to their minimum, before the first direction.
      products: passes over the masses.
      decrement: λ² = −⟨∇F, d⟩ of the last direction.
      done: whether no further direction is to follow.
      converged: whether that is because the tolerance is met.
      suboptimality: an upper bound of F(z) − min F.
      gradient_norm: that of the projected gradient at z.
      ended: whether the last direction was taken.
      before: F where it started.
      inner: how many conjugate gradient steps the last direction took.
      small: a part of the preconditioner; see :mod:`~pathcond_jax._solve.coarse`.
    """

    z: jax.Array
    value: jax.Array
    gradient: jax.Array
    direction: jax.Array
    halvings: jax.Array
    steps: jax.Array
    swept: jax.Array
    products: jax.Array
    decrement: jax.Array
    done: jax.Array
    converged: jax.Array
    suboptimality: jax.Array
    gradient_norm: jax.Array
    ended: jax.Array
    before: jax.Array
    inner: jax.Array
    small: jax.Array


def newton(
    problem: Problem,
    spec: ArchSpec,
    z: jax.Array,
    max_steps: jax.Array,
    tol: jax.Array,
) -> Run:
    """Newton-CG with a Jacobi preconditioner, projected on the box, after a sweep over the colors.

    Converged means ``‖∇F‖ ≤ tol Σ w`` and a Newton decrement ``λ² ≤ tol² Σ w``, or one that
    rounding keeps from shrinking further. The last step is taken even so.
    """
    infinity, zero = jnp.full((), jnp.inf, z.dtype), jnp.zeros((), jnp.int32)
    no = jnp.zeros((), bool)
    start = State(
        z=z,
        value=infinity,
        gradient=jnp.zeros_like(z),
        direction=jnp.zeros_like(z),
        halvings=zero,
        steps=zero,
        swept=zero,
        products=zero,
        decrement=infinity,
        done=max_steps == 0,
        converged=no,
        suboptimality=infinity,
        gradient_norm=infinity,
        ended=no,
        before=infinity,
        inner=zero,
        small=coarse.unknown(coarse.directions(stacks.table(spec).sizes), z.dtype),
    )
    end = lax.while_loop(
        lambda state: ~state.ended,
        lambda state: _look(problem, spec, max_steps, tol, state),
        start,
    )
    return Run(
        end.z,
        end.steps,
        end.products,
        end.converged,
        end.suboptimality,
        end.value,
        end.gradient_norm,
        end.before,
    )


def _look(
    problem: Problem,
    spec: ArchSpec,
    max_steps: jax.Array,
    tol: jax.Array,
    state: State,
) -> State:
    """Evaluates F where the last direction leads; from there a new one, or back half the way.

    One program text evaluates F, its gradient and all that a direction needs: at the first point,
    after each color of the first sweep, at every trial and at the last point.
    """
    table = stacks.table(spec)
    count = len(colors(spec).mask) if problem.masses else 0
    length = 0.5 ** state.halvings.astype(state.z.dtype)
    # Clipped: where F is almost linear, a full step may leave the range of the dtype. The first
    # sweep may go far, because what it minimizes is exact.
    reach = jnp.where(state.steps == 0, jnp.inf, REACH).astype(state.z.dtype)
    step = jnp.clip(length * state.direction, -reach, reach)
    here, smooth_product = _evaluate(problem, table, problem.box.clip(state.z + step))
    change, accepted = _judge(problem, state, here)
    first = state.value == jnp.inf
    accepted, change = accepted | first, jnp.where(first, 0, change)
    sweeping = state.swept < count
    state = state._replace(
        before=jnp.where(first, here.value, state.before), products=state.products + 1
    )
    # Transformed by vmap, all three are computed.
    wanted = accepted & ~sweeping & ~state.done
    following: State = lax.switch(
        jnp.where(accepted, jnp.where(sweeping, 1, 2), 0),
        [
            lambda: _back(state, count),
            lambda: _sweep(problem, spec, here, state),
            lambda: _step(
                problem, table, here, smooth_product, max_steps, tol, change, wanted, state
            ),
        ],
    )
    return following


def _back(state: State, count: int) -> State:
    """Half the way of the last direction; none of it, and no further color, in the first sweep."""
    given_up = state.halvings + 1 >= HALVINGS
    return state._replace(
        direction=jnp.where(state.steps == 0, 0, state.direction),
        halvings=state.halvings + 1,
        swept=jnp.full_like(state.swept, count),
        done=state.done | given_up,
        ended=given_up,
    )


def _sweep(problem: Problem, spec: ArchSpec, here: Iterate, state: State) -> State:
    """To the minimum over one color, which brings its neurons within the range of the dtype."""
    if not problem.masses:
        return state
    table = stacks.table(spec)
    color = jax.tree.map(lambda part: jnp.asarray(part)[state.swept], colors(spec))
    sums = flat_objective.sums_of(table, here.terms[0])
    moved = block_step(problem, table, color, here.z, sums)
    return state._replace(
        z=here.z,
        value=here.value,
        gradient=here.gradient,
        direction=moved - here.z,
        swept=state.swept + 1,
    )


def _step(
    problem: Problem,
    table: Table,
    here: Iterate,
    smooth_product: Callable[[jax.Array], jax.Array],
    max_steps: jax.Array,
    tol: jax.Array,
    change: jax.Array,
    wanted: jax.Array,
    state: State,
) -> State:
    """A direction of Newton's method.

    How it ends. The tolerance asks for a small gradient *and* a small Newton decrement: a
    gradient is small along directions of hardly any curvature long before F is near its minimum.
    In float32 the decrement may stop shrinking above its tolerance. Once a step leaves at least
    half of it, and its root is down to a thousand roundings, no further step can help: that is
    the ``floor``, and it counts as converged if the gradient is small. The test looks at z before
    the step, which is taken all the same: it costs one evaluation and usually squares the error.
    """
    z, gradient, total = here.z, here.gradient, problem.scale
    # Vanishes with the gradient, and keeps neurons with hardly any mass within reach.
    damping = jnp.abs(gradient) / REACH
    diagonal = here.diagonal + damping
    diagonal = jnp.where(diagonal > 0, diagonal, total)
    free = problem.box.alive & ~_held(problem, z, gradient, diagonal)

    def curvature(v: jax.Array) -> jax.Array:
        return _hessian_product(problem, table, here, v) + smooth_product(v) + damping * v

    forward = jnp.where(free & wanted, gradient, 0)
    size = jnp.sqrt(jnp.sum(forward**2 / diagonal) / total)
    # Looser far from the minimum, tighter near it: convergence faster than linear (Dembo,
    # Eisenstat, Steihaug 1982) without solving exactly where the model is poor anyway.
    accuracy = jnp.minimum(0.1, jnp.sqrt(size))
    inverse, small = _preconditioner(problem, table, curvature, diagonal, free, wanted, state)
    direction, image, inner = _conjugate_gradients(curvature, -forward, inverse, free, accuracy)
    # What the certificate needs is the Hessian of the logarithms alone.
    image = image - smooth_product(direction) - damping * direction
    bound = _certificate(problem, table, here, direction, image)
    decrement = -jnp.sum(forward * direction)
    # Neurons at a face of the box that want to leave it stay; those close to it go there.
    direction = jnp.where(free, direction, -gradient / diagonal)

    norm = jnp.linalg.norm(problem.box.projected(z, gradient))
    noise = (1e3 * jnp.finfo(z.dtype).eps) ** 2 * total
    floor = (decrement >= 0.5 * state.decrement) & (decrement <= noise)
    converged = (norm <= tol * total) & ((decrement <= tol**2 * total) | floor)
    rounding = jnp.finfo(z.dtype).eps * total
    steps = state.steps + jnp.where(state.done, 0, 1)
    return state._replace(
        z=z,
        value=here.value,
        gradient=gradient,
        direction=direction,
        halvings=jnp.zeros_like(state.halvings),
        steps=steps,
        products=state.products + inner,
        decrement=decrement,
        done=state.done | converged | floor | (steps >= max_steps),
        converged=jnp.where(state.done, state.converged, converged),
        suboptimality=jnp.maximum(jnp.minimum(state.suboptimality + change, bound), rounding),
        gradient_norm=norm,
        ended=state.done,
        inner=inner,
        small=small,
    )


def _judge(problem: Problem, state: State, here: Iterate) -> tuple[jax.Array, jax.Array]:
    """An upper bound of how F changes from the last point, and whether it decreases enough.

    A difference of values drowns in rounding long before the gradient does. By convexity the
    change is at most ⟨∇F(z + d), d⟩, which keeps its digits; where that is too coarse a bound and
    the values are equal to within rounding, the slope at the end must not exceed the one at the
    beginning.

    References:
      Hager, Zhang, *A new conjugate gradient method with guaranteed descent and an efficient line
      search*, SIAM Journal on Optimization, 2005.
    """
    step = here.z - state.z
    before, after = jnp.dot(state.gradient, step), jnp.dot(here.gradient, step)
    rounding = 8 * jnp.finfo(step.dtype).eps * (jnp.abs(here.value) + problem.scale)
    difference = here.value - state.value
    enough = ARMIJO * jnp.minimum(before, 0)
    level = (difference <= rounding) & (after <= (1 - 2 * ARMIJO) * jnp.abs(before))
    accepted = (after <= enough) | (difference <= enough) | level
    return jnp.minimum(difference + rounding, after), accepted


def _evaluate(
    problem: Problem, table: Table, z: jax.Array
) -> tuple[Iterate, Callable[[jax.Array], jax.Array]]:
    """Everything at z, and products with the Hessian of the smooth functions."""
    models = [(part, _model(part, table, z)) for part in problem.smooth]
    slopes, diagonal = problem.slopes(), jnp.zeros_like(z)
    value, gradient = -jnp.dot(slopes, z), -slopes
    for part, found in models:
        weight = jnp.asarray(part.weight).astype(z.dtype)
        value = value + weight * found.value
        gradient = gradient + weight * found.gradient
        diagonal = diagonal + weight * found.diagonal

    def product(v: jax.Array) -> jax.Array:
        images = (
            jnp.asarray(part.weight).astype(z.dtype) * found.product(v) for part, found in models
        )
        return sum(images, jnp.zeros_like(v))

    terms, means = [], []
    for k, (w, s) in enumerate(zip(problem.weights, problem.exponents, strict=True)):
        term = flat_objective.weights(problem, table, k, z)
        met = stacks.collect(table, term.marginals)
        mean = stacks.differences(table, met)
        terms.append(term)
        means.append(mean)
        value = value + w * term.total
        gradient = gradient + w * s * mean
        diagonal = diagonal + w * s * s * stacks.squares(table, met)
    gradient = jnp.where(problem.box.alive, gradient, 0)
    return Iterate(z, value, gradient, diagonal, tuple(terms), tuple(means)), product


def _model(part: Smooth, table: Table, z: jax.Array) -> Model:
    """A smooth function at z: its own derivatives, or JAX's."""
    if part.model is not None:
        found: Model = part.model(by_group(z, table.sizes))
        return found

    def function(z: jax.Array) -> jax.Array:
        return jnp.asarray(part.function(by_group(z, table.sizes))).astype(z.dtype)

    gradient, product = jax.linearize(jax.grad(function), z)
    # The mean of the diagonal, from products with random signs.
    signs = jax.random.rademacher(jax.random.key(0), z.shape, z.dtype)
    diagonal = jnp.full_like(z, jnp.abs(jnp.mean(signs * product(signs))))
    return Model(function(z), gradient, diagonal, product)


def _hessian_product(problem: Problem, table: Table, here: Iterate, v: jax.Array) -> jax.Array:
    """``Σ_k w_k s_k² (Bᵀ diag(W) B − m mᵀ) v``, m the mean of the rows of B under W."""
    shifts, result = stacks.spread(table, v), jnp.zeros_like(v)
    for w, s, masses, term, mean in zip(
        problem.weights, problem.exponents, problem.masses, here.terms, here.means, strict=True
    ):
        image = term.marginals * shifts + stacks.weighted(masses, table, term, shifts)
        pulled = stacks.differences(table, stacks.collect(table, image))
        result = result + w * s * s * (pulled - mean * jnp.dot(mean, v))
    return result


def _preconditioner(
    problem: Problem,
    table: Table,
    curvature: Callable[[jax.Array], jax.Array],
    diagonal: jax.Array,
    free: jax.Array,
    wanted: jax.Array,
    state: State,
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """The inverse of the diagonal, and of a small matrix where that was not enough.

    Logarithms alone are well served by the diagonal, and only a smooth function that brings its
    own products has them for many vectors at nearly the price of one.
    """
    if all(part.model is None for part in problem.smooth):
        return lambda residual: residual / diagonal, state.small
    owners = coarse.directions(table.sizes)
    small = lax.cond(
        wanted & (state.inner > PATIENCE),
        lambda: coarse.inverse(curvature, owners, free, diagonal.dtype),
        lambda: state.small,
    )
    return coarse.preconditioner(diagonal, small, owners, free), small


def _conjugate_gradients(
    apply: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    precondition: Callable[[jax.Array], jax.Array],
    free: jax.Array,
    tol: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solves ``H d = target`` over the free variables.

    ``jax.scipy.sparse.linalg.cg`` tells neither H d, which the certificate needs for all
    variables, nor how many products it took.

    Returns:
      d, H d and the number of products.
    """

    def unfinished(state: tuple) -> jax.Array:
        *_, size, step = state
        return (size > tol**2 * first) & (step < INNER_STEPS)

    def body(state: tuple) -> tuple:
        x, image, residual, search, size, step = state
        product = apply(search)
        curvature = jnp.dot(search, product)
        # A curvature of 0 is rounding: then nothing is left to gain.
        length = jnp.where(curvature > 0, size / jnp.where(curvature > 0, curvature, 1), 0)
        residual = jnp.where(free, residual - length * product, 0)
        scaled = precondition(residual)
        following = jnp.where(curvature > 0, jnp.dot(residual, scaled), 0)
        return (
            x + length * search,
            image + length * product,
            residual,
            jnp.where(free, scaled + following / size * search, 0),
            following,
            step + 1,
        )

    zero, scaled = jnp.zeros_like(target), precondition(target)
    first = jnp.dot(target, scaled)
    start = (zero, zero, target, scaled, first, jnp.zeros((), jnp.int32))
    x, image, _, _, _, steps = lax.while_loop(unfinished, body, start)
    return x, image, steps


def _held(problem: Problem, z: jax.Array, gradient: jax.Array, diagonal: jax.Array) -> jax.Array:
    """Neurons at a face of the box, or about to reach it, that F pushes outward.

    References:
      Bertsekas, *Projected Newton methods for optimization problems with simple constraints*,
      SIAM Journal on Control and Optimization, 1982.
    """
    moved = jnp.abs(problem.box.clip(z - gradient / diagonal) - z).max()
    margin = problem.box.limit - jnp.minimum(1e-2, moved)
    return (jnp.abs(z) >= margin) & (jnp.sign(gradient) * z < 0)


def _certificate(
    problem: Problem, table: Table, here: Iterate, direction: jax.Array, image: jax.Array
) -> jax.Array:
    """An upper bound of F(z) − F(y) for every y in the box, from convex duality.

    For probabilities q_k over the entries, ``F(y) ≥ F(z) − Σ_k w_k KL(q_k | W_k) + ⟨ρ, y − z⟩``
    with ``ρ = Σ_k w_k s_k Bᵀ q_k − b + Σ ∇f``. Take ``q = W (1 + t η)``, η the centered s (Bd) and
    t ≤ 1 such that q ≥ 0: then Σ w KL ≤ t² ⟨d, H d⟩ and, without smooth functions,
    ``ρ = ∇F + t H d``: nothing but the residual of the conjugate gradients once t is 1.
    """
    lowest, shifts = jnp.zeros((), direction.dtype), stacks.spread(table, direction)
    for s, term, mean in zip(problem.exponents, here.terms, here.means, strict=True):
        present = jnp.where(term.marginals > 0, s * shifts, jnp.inf)
        pairs = [a.min(1) + b.min(1) for a, b in stacks.split_sides(table, present)]
        least = jnp.concatenate(pairs).min() - s * jnp.dot(mean, direction)
        lowest = jnp.minimum(lowest, least)
    t = 1 / jnp.maximum(-lowest, 1)
    curved = jnp.maximum(jnp.dot(direction, image), 0)
    return t**2 * curved + problem.box.reach(here.z, here.gradient + t * image)
