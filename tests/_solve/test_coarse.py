"""The preconditioner by groups: exact within its span, and where the diagonal fails it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathcond_jax._solve import coarse, newton

SIZES = (5, 3, 4)
OWNERS = coarse.directions(SIZES)
FREE = np.arange(12) != 2


def nearly_singular(dtype):
    """A matrix that shifts of whole groups hardly notice."""
    factor = np.asarray(jax.random.normal(jax.random.key(0), (12, 12)))
    shifts = np.eye(3)[OWNERS]
    centered = np.eye(12) - shifts @ np.diag(1 / np.array(SIZES)) @ shifts.T
    return jnp.asarray(centered @ factor @ factor.T @ centered + 1e-4 * np.eye(12), dtype)


@pytest.mark.usefixtures("x64")
def test_the_small_matrix_is_that_of_the_free_neurons():
    matrix = nearly_singular(jnp.float64)
    small = coarse.inverse(lambda v: matrix @ v, OWNERS, jnp.asarray(FREE), matrix.dtype)
    shifts = np.eye(3)[OWNERS] * FREE[:, None]
    np.testing.assert_allclose(small @ (shifts.T @ matrix @ shifts), np.eye(3), atol=2e-3)


def test_conjugate_gradients_need_few_steps():
    matrix, free = nearly_singular(jnp.float32), jnp.ones(12, bool)
    apply = lambda v: matrix @ v  # noqa: E731
    target = jnp.linspace(1, 2, 12)
    diagonal = jnp.diagonal(matrix)
    small = coarse.inverse(apply, OWNERS, free, matrix.dtype)
    found = {}
    for name, part in {"none": coarse.unknown(OWNERS, matrix.dtype), "known": small}.items():
        inverse = coarse.preconditioner(diagonal, part, OWNERS, free)
        *_, found[name] = newton._conjugate_gradients(
            apply, target, inverse, free, jnp.float32(1e-3)
        )
    assert found["known"] < found["none"]


def test_many_groups_share_directions():
    owners = coarse.directions((2,) * 200)
    assert owners.max() + 1 == coarse.DIRECTIONS
    assert (np.diff(owners) >= 0).all()
