"""Running statistics that a spec rescales come back with the parameters."""

import numpy as np
from flax import nnx
from zoo.network import image

import pathcond_jax as pathcond


class Model(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_condition_nnx_writes_rescaled_statistics_back():
    model, x = Model(nnx.Rngs(0)), image(6)
    model(x)  # Statistics that are not 0.
    model.eval()
    before, mean = model(x), model.norm.mean[...]
    spec = pathcond.nnx_spec(model, x, rescale_state=True)
    assert "state/norm/mean" in spec.rescaled_paths

    solution = pathcond.condition_nnx(model, x, spec=spec)

    assert max(float(abs(z).max()) for z in solution.log_scales) > 0.1
    assert not np.allclose(model.norm.mean[...], mean)
    np.testing.assert_allclose(model(x), before, rtol=1e-5, atol=1e-6)
