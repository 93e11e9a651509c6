"""The networks whose figures are in ``golden/``, as the authors' PyTorch code has them."""

import pathlib

import jax
import jax.numpy as jnp
from jax import lax

GOLDEN = pathlib.Path(__file__).parent / "golden"
NETWORKS = ("mlp_2-8-8-2", "mlp_2-32-32-32-2", "conv_plain_8-16-20")


def mlp(params, x):
    """Linear and ReLU in turn; weights (out, in), no bias on the last layer."""
    layers = sorted({name.rpartition(".")[0] for name in params})
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"][None])
    return x @ params[f"{layers[-1]}.weight"].T


def conv_net(params, x):
    """Nine convolutions in NCHW layout, each followed by ReLU; two max pools, one average pool."""
    for number in range(1, 10):
        weight, bias = params[f"conv{number}.weight"], params[f"conv{number}.bias"]
        pad = [(side // 2, side // 2) for side in weight.shape[2:]]
        x = lax.conv_general_dilated(
            x, weight, (1, 1), pad, dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        x = jax.nn.relu(x + bias[None, :, None, None])
        if number in (3, 6):
            pads = [(0, 0), (0, 0), (1, 1), (1, 1)]
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), pads)
    x = lax.reduce_window(x, 0.0, lax.add, (1, 1, 8, 8), (1, 1, 8, 8), "VALID") / 64
    return x.reshape(x.shape[0], -1)
