"""All log-scales at once: Newton's method with conjugate gradients inside.

To be read from :func:`newton` down. A step is :func:`_step`: what is known at z
(:func:`_evaluate`), a direction (:func:`_conjugate_gradients` on :func:`_hessian_product`), how far
to go (:func:`_line_search` on :func:`_change`), and how good z is (:func:`_certificate`). The rest
are two series that keep the digits of small changes, and the neurons that the box holds.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pathcond_jax._solve import flat_objective, stacks
from pathcond_jax._solve.block import block_sweep, colors
from pathcond_jax._solve.flat_objective import Problem, Run
from pathcond_jax._solve.stacks import Table
from pathcond_jax._spec.spec import ArchSpec

# Conjugate gradient steps within a Newton step, and halvings of it.
INNER_STEPS = 30
HALVINGS = 30
# The decrease that a step must reach, relative to the one its slope promises.
ARMIJO = 1e-4
# The furthest that a log-scale moves in one step.
REACH = 20.0


class Softmax(NamedTuple):
    """One term at some log-scales, its masses divided by their sum: probabilities of the entries.

    Attributes:
      total: log S, the logarithm of their sum.
      probabilities: W, one (batch, rows, cols) array per stack.
      marginals: (positions,), their sums over rows and columns.
      mean: (H,), the mean of the rows of B: outgoing minus incoming probability.
    """

    total: jax.Array
    probabilities: tuple[jax.Array, ...]
    marginals: jax.Array
    mean: jax.Array


class Iterate(NamedTuple):
    """Log-scales and what Newton's method knows there.

    Attributes:
      z: (H,) log-scales.
      value: F.
      gradient: (H,), of F.
      smooth: (H,), its part from the smooth functions.
      terms: the terms.
    """

    z: jax.Array
    value: jax.Array
    gradient: jax.Array
    smooth: jax.Array
    terms: tuple[Softmax, ...]


class State(NamedTuple):
    """Between two Newton steps.

    Attributes:
      z: (H,) log-scales.
      steps: how many were taken.
      products: passes over the masses.
      decrement: λ² = −⟨∇F, d⟩ of the last step.
      done: whether no further step is to follow.
      converged: whether that is because the tolerance is met.
      suboptimality: an upper bound of F(z) − min F.
      measured: F and the norm of its projected gradient at z, once there is no further step.
      ended: whether these are known.
    """

    z: jax.Array
    steps: jax.Array
    products: jax.Array
    decrement: jax.Array
    done: jax.Array
    converged: jax.Array
    suboptimality: jax.Array
    measured: tuple[jax.Array, jax.Array]
    ended: jax.Array


def newton(
    problem: Problem, spec: ArchSpec, z: jax.Array, max_steps: jax.Array, tol: jax.Array
) -> Run:
    """Newton-CG with a Jacobi preconditioner, projected on the box, after one block sweep.

    Converged means ``‖∇F‖ ≤ tol Σ w`` and a Newton decrement ``λ² ≤ tol² Σ w``, or one that
    rounding keeps from shrinking further. The last step is taken even so.
    """
    table = stacks.table(spec)
    infinity, no = jnp.full((), jnp.inf, z.dtype), jnp.zeros((), bool)
    start = State(
        z=_start(problem, spec, z),
        steps=jnp.zeros((), jnp.int32),
        products=jnp.full((), len(colors(spec).mask), jnp.int32),
        decrement=infinity,
        done=max_steps == 0,
        converged=no,
        suboptimality=infinity,
        measured=(infinity, infinity),
        ended=no,
    )
    end = lax.while_loop(
        lambda state: ~state.ended,
        lambda state: _step(problem, table, max_steps, tol, state),
        start,
    )
    return Run(end.z, end.steps, end.products, end.converged, end.suboptimality, *end.measured)


def _start(problem: Problem, spec: ArchSpec, z: jax.Array) -> jax.Array:
    """One block sweep, which brings every neuron within the range of the dtype."""
    if not problem.masses:
        return z
    swept = block_sweep(problem, spec, z)
    if len(problem.masses) == 1 and not problem.smooth:
        return swept
    value = functools.partial(flat_objective.value_and_gradient, problem, stacks.table(spec))
    return jnp.where(value(swept)[0] <= value(z)[0], swept, z)


def _step(
    problem: Problem, table: Table, max_steps: jax.Array, tol: jax.Array, state: State
) -> State:
    """One step; once no further step is to follow, only measures where it stands.

    How it ends. The tolerance asks for a small gradient *and* a small Newton decrement: a
    gradient is small along directions of hardly any curvature long before F is near its minimum.
    In float32 the decrement may stop shrinking above its tolerance. Once a step leaves at least
    half of it, and its root is down to a thousand roundings, no further step can help: that is
    the ``floor``, and it counts as converged if the gradient is small.

    The test looks at z before the step, which is taken all the same: it costs one line search and
    usually squares the error. Then the loop runs once more with ``done`` set. This last round
    neither moves nor iterates, its gradient being masked by 0, but it evaluates F, the gradient
    and the certificate at the final z. A second copy of the evaluation behind the loop would
    serve as well, and double the program that XLA compiles.
    """
    here, diagonal, smooth_product = _evaluate(problem, table, state.z)
    z, terms, gradient, total = here.z, here.terms, here.gradient, problem.scale
    # Vanishes with the gradient, and keeps neurons with hardly any mass within reach.
    damping = jnp.abs(gradient) / REACH
    diagonal = diagonal + damping
    diagonal = jnp.where(diagonal > 0, diagonal, total)
    free = problem.box.alive & ~_held(problem, z, gradient, diagonal)

    def curvature(v: jax.Array) -> jax.Array:
        return _hessian_product(problem, table, terms, v) + smooth_product(v) + damping * v

    forward = jnp.where(free & ~state.done, gradient, 0)
    size = jnp.sqrt(jnp.sum(forward**2 / diagonal) / total)
    # Looser far from the minimum, tighter near it: convergence faster than linear (Dembo,
    # Eisenstat, Steihaug 1982) without solving exactly where the model is poor anyway.
    accuracy = jnp.minimum(0.1, jnp.sqrt(size))
    direction, image, inner = _conjugate_gradients(curvature, -forward, diagonal, free, accuracy)
    # What the certificate needs is the Hessian of the logarithms alone.
    image = image - smooth_product(direction) - damping * direction
    bound = _certificate(problem, table, here, direction, image)
    decrement = -jnp.sum(forward * direction)
    # Neurons at a face of the box that want to leave it stay; those close to it go there.
    direction = jnp.where(free, direction, -gradient / diagonal)
    direction = jnp.where(state.done, 0, direction)
    moved, change, halvings = _line_search(problem, table, here, direction)

    norm = jnp.linalg.norm(problem.box.projected(z, gradient))
    noise = (1e3 * jnp.finfo(z.dtype).eps) ** 2 * total
    floor = (decrement >= 0.5 * state.decrement) & (decrement <= noise)
    converged = (norm <= tol * total) & ((decrement <= tol**2 * total) | floor)
    rounding = jnp.finfo(z.dtype).eps * total
    steps = state.steps + jnp.where(state.done, 0, 1)
    return State(
        z=moved,
        steps=steps,
        products=state.products + 1 + jnp.where(state.done, 0, inner + halvings),
        decrement=decrement,
        done=state.done | converged | floor | (steps >= max_steps),
        converged=jnp.where(state.done, state.converged, converged),
        suboptimality=jnp.maximum(jnp.minimum(state.suboptimality, bound) + change, rounding),
        measured=(here.value, norm),
        ended=state.done,
    )


def _evaluate(
    problem: Problem, table: Table, z: jax.Array
) -> tuple[Iterate, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Everything at z, the Jacobi preconditioner, and products with the smooth Hessian."""
    smooth, product = jax.linearize(
        jax.grad(lambda z: flat_objective.smooth_part(problem, table, z)), z
    )
    gradient, diagonal = smooth - problem.linear, jnp.zeros_like(z)
    if problem.smooth:
        # The mean of its diagonal, from products with random signs.
        signs = jax.random.rademacher(jax.random.key(0), z.shape, z.dtype)
        diagonal = jnp.full_like(z, jnp.abs(jnp.mean(signs * product(signs))))
    value = flat_objective.smooth_part(problem, table, z) - jnp.dot(problem.linear, z)
    terms, shifts = [], stacks.spread(table, z)
    for w, s, masses in zip(problem.weights, problem.exponents, problem.masses, strict=True):
        exponents = masses.logs + s * shifts
        total = stacks.log_total(masses, table, exponents)
        probabilities = stacks.normalized(masses, table, exponents, total)
        marginals = stacks.matvecs(probabilities, table, jnp.ones_like(exponents))
        met = stacks.collect(table, marginals)
        mean = stacks.differences(table, met)
        terms.append(Softmax(total, probabilities, marginals, mean))
        value = value + w * total
        gradient = gradient + w * s * mean
        diagonal = diagonal + w * s * s * stacks.squares(table, met)
    smooth, gradient = (jnp.where(problem.box.alive, part, 0) for part in (smooth, gradient))
    return Iterate(z, value, gradient, smooth, tuple(terms)), diagonal, product


def _hessian_product(
    problem: Problem, table: Table, terms: tuple[Softmax, ...], v: jax.Array
) -> jax.Array:
    """``Σ_k w_k s_k² (Bᵀ diag(W) B − m mᵀ) v``, m the mean of the rows of B under W."""
    shifts, result = stacks.spread(table, v), jnp.zeros_like(v)
    for w, s, term in zip(problem.weights, problem.exponents, terms, strict=True):
        image = term.marginals * shifts + stacks.matvecs(term.probabilities, table, shifts)
        pulled = stacks.differences(table, stacks.collect(table, image))
        result = result + w * s * s * (pulled - term.mean * jnp.dot(term.mean, v))
    return result


def _conjugate_gradients(
    apply: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    diagonal: jax.Array,
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
        scaled = residual / diagonal
        following = jnp.where(curvature > 0, jnp.dot(residual, scaled), 0)
        return (
            x + length * search,
            image + length * product,
            residual,
            jnp.where(free, scaled + following / size * search, 0),
            following,
            step + 1,
        )

    zero, scaled = jnp.zeros_like(target), target / diagonal
    first = jnp.dot(target, scaled)
    start = (zero, zero, target, scaled, first, jnp.zeros((), jnp.int32))
    x, image, _, _, _, steps = lax.while_loop(unfinished, body, start)
    return x, image, steps


def _line_search(
    problem: Problem, table: Table, here: Iterate, direction: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Halves the step along the projected path until F decreases as Armijo asks.

    Returns:
      The new log-scales, the change of F, and how many steps were tried.
    """
    z = here.z
    # Changes of logarithms keep their digits, see `_curved_change`; those of functions do not.
    rounding = 8 * jnp.finfo(z.dtype).eps * jnp.abs(flat_objective.smooth_part(problem, table, z))

    # Clipped: where F is almost linear, a full step may leave the range of the dtype.
    def tried(length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        moved = problem.box.clip(z + jnp.clip(length * direction, -REACH, REACH))
        change = _change(problem, table, here, moved - z)
        slope = jnp.dot(here.gradient, moved - z)
        return moved, change, change <= ARMIJO * jnp.minimum(slope, 0) + rounding

    def body(state: tuple) -> tuple:
        count, *_ = state
        return count + 1, *tried(0.5 ** count.astype(z.dtype))

    start = (jnp.zeros((), jnp.int32), z, jnp.zeros((), z.dtype), jnp.zeros((), bool))
    count, moved, change, enough = lax.while_loop(
        lambda state: ~state[3] & (state[0] < HALVINGS), body, start
    )
    return jnp.where(enough, moved, z), jnp.where(enough, change, 0), count


def _change(problem: Problem, table: Table, here: Iterate, d: jax.Array) -> jax.Array:
    """F(z + d) − F(z), to within rounding of the difference where d is small."""
    shifts = stacks.spread(table, d)
    before, after = (flat_objective.smooth_part(problem, table, z) for z in (here.z, here.z + d))
    rest = after - before - jnp.dot(here.smooth, d)
    return rest + lax.cond(
        (jnp.abs(shifts).max() * jnp.abs(problem.exponents)).max(initial=0) < 2,
        lambda: jnp.dot(here.gradient, d) + _curved_change(problem, table, here, shifts, d),
        lambda: jnp.dot(here.smooth, d) + _long_change(problem, table, here, d),
    )


def _long_change(problem: Problem, table: Table, here: Iterate, d: jax.Array) -> jax.Array:
    """The change of the terms and of the linear part."""
    shifts, change = stacks.spread(table, here.z + d), -jnp.dot(problem.linear, d)
    for w, s, masses, term in zip(
        problem.weights, problem.exponents, problem.masses, here.terms, strict=True
    ):
        total = stacks.log_total(masses, table, masses.logs + s * shifts)
        change = change + w * (total - term.total)
    return change


def _curved_change(
    problem: Problem, table: Table, here: Iterate, shifts: jax.Array, d: jax.Array
) -> jax.Array:
    """The change of the terms beyond their slopes.

    A difference of F itself would drown in rounding long before the gradient does. With
    X = s (Bd)_i under the probabilities W, a term changes by w log(1 + E[e^X − 1]); and for
    X = a + b, ``e^X − 1 − X = (e^a − 1)(e^b − 1) + (e^a − 1 − a) + (e^b − 1 − b)``.
    """
    change = jnp.zeros((), d.dtype)
    for w, s, term in zip(problem.weights, problem.exponents, here.terms, strict=True):
        both = stacks.quadratic(term.probabilities, table, jnp.expm1(s * shifts))
        second = both + jnp.dot(term.marginals, _expm1_rest(s * shifts))
        change = change + w * (second - _log1p_rest(s * jnp.dot(term.mean, d) + second))
    return change


def _expm1_rest(x: jax.Array) -> jax.Array:
    """The rest e^x − 1 − x."""
    series = jnp.zeros_like(x)
    for k in range(14, 1, -1):
        series = (1 + series) * x / k
    return jnp.where(jnp.abs(x) < 0.5, series * x, jnp.expm1(x) - x)


def _log1p_rest(x: jax.Array) -> jax.Array:
    """The rest x − log(1 + x)."""
    series = jnp.zeros_like(x)
    for k in range(14, 1, -1):
        series = 1 / k - series * x
    return jnp.where(jnp.abs(x) < 0.1, series * x * x, x - jnp.log1p(x))


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
    for s, term in zip(problem.exponents, here.terms, strict=True):
        present = jnp.where(term.marginals > 0, s * shifts, jnp.inf)
        pairs = [a.min(1) + b.min(1) for a, b in stacks.split_sides(table, present)]
        least = jnp.concatenate(pairs).min() - s * jnp.dot(term.mean, direction)
        lowest = jnp.minimum(lowest, least)
    t = 1 / jnp.maximum(-lowest, 1)
    curved = jnp.maximum(jnp.dot(direction, image), 0)
    return t**2 * curved + problem.box.reach(here.z, here.gradient + t * image)
