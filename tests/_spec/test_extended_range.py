"""Numbers of extended range at the ends of the range of their dtype."""

import jax.numpy as jnp
import numpy as np
import pytest

from pathcond_jax._spec.extended_range import times_power_of_two


@pytest.mark.parametrize(
    ("value", "exponent", "expected"),
    [
        (3.0, 5, 96.0),
        (3.0, -5, 3 / 32),
        (2.0**-120, 240, 2.0**120),  # 2^240 is no float32
        (2.0**120, -240, 2.0**-120),
        (0.0, 1000, 0.0),  # not 0 · inf
        (1.5, 1000, np.inf),
        (1.5, -1000, 0.0),
    ],
)
def test_times_power_of_two(value, exponent, expected):
    found = times_power_of_two(jnp.float32(value), jnp.int32(exponent))
    assert found.dtype == jnp.float32
    assert float(found) == expected
