"""What test_calibrate runs on eight devices in a process of its own."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from networks import depthwise, difference, made

import pathcond_jax as pathcond
from pathcond_jax.quantization import calibrate, quantization_noise

params, x, spec = made(depthwise)
found = calibrate(depthwise, params, spec, [x], draws=100)
whole, _ = pathcond.condition(params, spec, quantization_noise(found, weight_bits=4))
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(kind,))
    everywhere, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    held, images = jax.device_put(params, everywhere), jax.device_put(x, divided)
    again = calibrate(depthwise, held, spec, [images], draws=100)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    better, _ = pathcond.condition(held, spec, quantization_noise(again, weight_bits=4))
    assert difference(jax.device_get(better), jax.device_get(whole)) < 1e-4
    print(kind, images.sharding.num_devices)
