"""Figure 3 of the paper: a fully convolutional network, without and with BatchNorm.

As published: nine convolutions with biases, BatchNorm after the third and the sixth alone.
"""

from typing import Any

from pathcond_jax.experiments import comparing, models, published
from pathcond_jax.experiments.figure2 import NORMED, WAYS
from pathcond_jax.experiments.study import Context, Options, Report, Result, Task, chosen_methods

SUMMARY = "a fully convolutional network, by learning rate (CIFAR-10, (Fashion-)MNIST, digits)"
DATASETS = ("cifar10", "fashion_mnist", "mnist", "digits")

QUICK = (published.NONE, published.TEN_SWEEPS, published.PUBLISHED)
RATES = [1e-3, 1e-2, 1e-1]
# CIFAR-10: the authors' sizes; theirs is the first learning rate alone.
PAPER = {"widths": [128, 256, 320], "num_epochs": 128, "batch_size": 128}
REDUCED = {"widths": [4, 8, 10], "num_epochs": 20, "batch_size": 32, "subset": 500} | {
    "methods": [
        published.NONE,
        published.OPTIMUM,
        published.PUBLISHED,
        published.MATCHED,
        published.MATCHED_OPTIMUM,
    ],
}
SIZES: dict[str, dict[str, Any]] = {
    "cifar10": PAPER,
    "fashion_mnist": REDUCED,
    "mnist": REDUCED,
    "digits": {"widths": [16, 32, 40], "num_epochs": 20, "batch_size": 32},
}


def tasks(options: Options) -> list[Task]:
    """A task for each network and method; it trains all learning rates and seeds."""
    sizes = {
        "dataset": options.dataset,
        "subset": None,
        "learning_rates": RATES,
        "num_seeds": 3,
        "threshold": 0.9,
        "seed": options.seed,
        "methods": list(published.WAYS),
        **SIZES[options.dataset],
    }
    if options.quick:
        sizes |= {"widths": [4, 6, 8], "num_epochs": 12, "num_seeds": 2, "methods": list(QUICK)}
        sizes |= {"learning_rates": [0.1], "threshold": 0.3, "subset": 256}
    sizes |= options.sizes
    names = chosen_methods(sizes.pop("methods"), published.WAYS)
    return [
        Task(
            f"{network}, {name}",
            {"network": network, "method": name, "batch_norm": network == NORMED, **sizes},
        )
        for network, ways in WAYS.items()
        for name in names
        if name in ways
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains one method."""
    model = models.FullyConvolutional(tuple(settings["widths"]), batch_norm=settings["batch_norm"])
    network = published.network(
        model,
        model.clone(convolution=models.convolve_by_products),
        "Conv_8",
        settings["dataset"],
        context.data_dir,
        settings["subset"],
        settings["num_epochs"],
        settings["batch_size"],
    )
    return published.run(settings, context, network)


def report(results: list[Result]) -> Report:
    """What every method gains at every learning rate, and what explains it."""
    settings = results[0].settings
    images = f", {settings['subset']} images" if settings["subset"] else ""
    title = (
        f"Figure 3 on {settings['dataset']}{images}: channels "
        f"{'-'.join(map(str, settings['widths']))}, {settings['num_epochs']} epochs, "
        f"{settings['num_seeds']} seeds"
    )
    return comparing.report(results, title)
