"""Linear pieces of functions of one variable."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_FIRST_CELLS = 1024
_MOST_HALVINGS = 30
_MOST_BENT = 0.01


def count_linear_pieces_1d(
    fun: Callable[[jax.Array], jax.Array], low: float, high: float, *, tol: float | None = None
) -> int:
    """Counts the linear pieces of a continuous, piecewise linear function on an interval.

    A cell of the interval is done when the tangents at its ends are one line, or when they meet
    within it on the graph of the function and are its tangents on both sides of that point: then
    it holds exactly one kink. Others are halved. Only a bump within one of the first 1024 cells
    that returns to the same line can be missed.

    Args:
      fun: from a scalar to a scalar, such as ``lambda x: apply_fn(params, x[None, None])[0, 0]``.
      low: left end.
      high: right end.
      tol: error relative to the largest value, or slope, below which two count as equal; None:
        1000 times the machine precision. Float64 tells many more pieces apart than float32.

    Returns:
      The number of pieces.

    Raises:
      ValueError: the function is not piecewise linear, or its kinks are too close to tell apart.

    Example:
      >>> import jax.numpy as jnp
      >>> import pathcond_jax as pathcond
      >>> pathcond.count_linear_pieces_1d(lambda x: jnp.maximum(x, 0.0) - jnp.abs(x - 0.3), -1, 1)
      3
    """
    dtype = jnp.zeros(()).dtype
    eps = float(jnp.finfo(dtype).eps)
    tol = 1000 * eps if tol is None else tol
    # An irrational offset, because kinks like round numbers; and the ends, a little inside.
    inner = low + (high - low) * (np.arange(_FIRST_CELLS) + 0.3819660113) / _FIRST_CELLS
    edge = 4 * eps * max(abs(low), abs(high))
    points = _tangents(fun, np.concatenate([[low + edge], inner, [high - edge]]), dtype)
    scale = tol * np.abs(points).max(axis=1)
    left, right = points[:, :-1], points[:, 1:]
    count, bent = 1, 0.0
    for _ in range(_MOST_HALVINGS):
        straight, kinked = _resolve(fun, left, right, scale, dtype)
        count += int(kinked.sum())
        bent += np.abs(right[2] - left[2])[straight].sum()
        rest = ~(straight | kinked)
        if not rest.any() and bent <= _MOST_BENT * np.abs(points[2]).max():
            return count
        if not rest.any():
            raise ValueError("the function is not piecewise linear: its slope changes gradually")
        left, right = left[:, rest], right[:, rest]
        middle = _tangents(fun, 0.5 * (left[0] + right[0]), dtype)
        left, right = np.hstack([left, middle]), np.hstack([middle, right])
    raise ValueError(
        f"the function is not piecewise linear near {left[0, 0]:g}, or its kinks are too close for "
        f"{dtype}"
    )


def _tangents(fun: Callable[[jax.Array], jax.Array], x: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """Places, values and slopes: array (3, n)."""
    # A few sizes only, each of which compiles once.
    padded = np.resize(x, 1 << (max(len(x), 64) - 1).bit_length())
    places = jnp.asarray(padded, dtype)
    values, slopes = jax.vmap(jax.value_and_grad(fun))(places)
    return np.stack([np.asarray(a, np.float64)[: len(x)] for a in (places, values, slopes)])


def _resolve(
    fun: Callable[[jax.Array], jax.Array],
    left: np.ndarray,
    right: np.ndarray,
    scale: np.ndarray,
    dtype: jnp.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Which cells hold no kink, and which hold exactly one."""
    (x0, f0, s0), (x1, f1, s1) = left, right
    same = np.abs(s1 - s0) <= scale[2]
    straight = same & (np.abs(f0 + s0 * (x1 - x0) - f1) <= scale[1])
    meeting = (f1 - f0 + s0 * x0 - s1 * x1) / np.where(same, 1, s0 - s1)
    inside = ~same & (x0 - scale[0] <= meeting) & (meeting <= x1 + scale[0])
    meeting = np.where(inside, meeting, 0.5 * (x0 + x1))
    places = np.concatenate([meeting, 0.5 * (x0 + meeting), 0.5 * (meeting + x1)])
    tangents = _tangents(fun, places, dtype)
    (at, value, _), (_, _, before), (_, _, after) = np.split(tangents, 3, axis=1)
    kinked = inside & (np.abs(f0 + s0 * (at - x0) - value) <= scale[1])
    kinked &= (np.abs(before - s0) <= scale[2]) & (np.abs(after - s1) <= scale[2])
    return straight, kinked
