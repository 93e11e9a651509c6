"""How the networks that are quantized are trained."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pathcond_jax.experiments import compressible, models, single
from pathcond_jax.experiments.data import Dataset


class Recipe(NamedTuple):
    """How a network is trained.

    Attributes:
      model: with BatchNorm or without.
      training: what of it is different in training, the same function.
      optimizer: by name.
      num_epochs: by data set.
      images: what of the model is different, by data set.
    """

    model: Any
    training: dict[str, Any]
    optimizer: str
    num_epochs: dict[str, int]
    images: dict[str, dict[str, Any]]


def _momentum(schedule: optax.Schedule) -> optax.GradientTransformation:
    """With weight decay, which shrinks channels that are of no use behind BatchNorm."""
    decay = optax.add_decayed_weights(2e-3, lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9))


def _adam(schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, weight_decay=1e-2)


# Each with the learning rate that it starts from.
OPTIMIZERS = {"momentum": (_momentum, 0.1), "adam": (_adam, 3e-3)}
NETWORKS = {
    "MobileNetV2-like": Recipe(
        compressible.InvertedResidual(),
        {"convolution": compressible.convolve_by_shifts},
        "momentum",
        {"digits": 30, "fashion_mnist": 14},
        {
            "digits": {},
            "fashion_mnist": {"widths": (16, 24, 32), "expansion": 6, "blocks": 3, "stride": 2},
        },
    ),
    "ResNet": Recipe(
        compressible.Residual(),
        {},
        "momentum",
        {"digits": 30, "fashion_mnist": 10},
        {"digits": {}, "fashion_mnist": {"width": 32, "blocks": 4, "stride": 2}},
    ),
    "CNN": Recipe(
        models.CNN((16, 32, 32)),
        {},
        "adam",
        {"digits": 40, "fashion_mnist": 8},
        {"digits": {}, "fashion_mnist": {}},
    ),
    "transformer": Recipe(
        compressible.Transformer(),
        {},
        "adam",
        {"digits": 40, "fashion_mnist": 10},
        {"digits": {}, "fashion_mnist": {"width": 64, "blocks": 3}},
    ),
}
BATCH_SIZES = {"digits": 64, "fashion_mnist": 256}


def model(network: str, dataset: str) -> Any:
    """A network for one size of images."""
    recipe = NETWORKS[network]
    return recipe.model.clone(**recipe.images[dataset])


def trained(data: Dataset, network: str, dataset: str, seed: int, num_epochs: int) -> Any:
    """The variables of a network after training."""
    batch_size = BATCH_SIZES[dataset]
    image = jnp.asarray(data.test_inputs[:1])
    variables = jax.jit(model(network, dataset).init)(jax.random.key(seed), image)
    kind = "normalized" if "batch_stats" in variables else "plain"
    steps = single.num_steps(data, num_epochs, batch_size)
    return single.fitted(
        *_learner(network, dataset, kind, steps),
        data,
        variables,
        seed=seed,
        num_epochs=num_epochs,
        batch_size=batch_size,
    )


def _normalized(model: Any, variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return logits, {**variables, **updated}


def _plain(model: Any, variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return model.apply(variables, x), variables


_FORWARD = {"normalized": _normalized, "plain": _plain}


@functools.lru_cache(maxsize=8)
def _learner(
    network: str, dataset: str, kind: str, steps: int
) -> tuple[single.TrainApplyFn, optax.GradientTransformation]:
    """What is trained and how, the same objects for all seeds, so that they compile once."""
    recipe = NETWORKS[network]
    optimizer, start = OPTIMIZERS[recipe.optimizer]
    forward = functools.partial(_FORWARD[kind], model(network, dataset).clone(**recipe.training))
    return forward, optimizer(single.decaying(start, steps))
