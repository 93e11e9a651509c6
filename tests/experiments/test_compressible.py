"""The networks that are quantized compute the same while they are trained fast."""

import jax
import numpy as np
import pytest

from pathcond_jax.experiments.compressible import convolve_by_shifts


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 6])
def test_products_of_shifted_inputs_are_the_convolution(stride, groups):
    images = jax.random.normal(jax.random.key(0), (2, 7, 8, 6))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 6 // groups, 12 if groups == 1 else 6))
    for padding in ("SAME", "VALID"):
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
        arguments = (images, kernel, (stride, stride), padding)
        found = convolve_by_shifts(*arguments, **options)
        wanted = jax.lax.conv_general_dilated(*arguments, **options)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
