"""Figure 2 of the paper: deep MLPs, and the epochs they take to fit the data.

The authors' script trains MLPs with BatchNorm, their plot names those without; here are both.
"""

from typing import Any

from pathcond_jax.experiments import comparing, models, published
from pathcond_jax.experiments.study import Context, Options, Report, Result, Task, chosen_methods

SUMMARY = "how many epochs deep MLPs take, by learning rate (CIFAR-10, (Fashion-)MNIST, digits)"
DATASETS = ("cifar10", "fashion_mnist", "mnist", "digits")

PLAIN, NORMED = "without BatchNorm", "with BatchNorm"
WAYS = {
    PLAIN: tuple(
        name
        for name in published.WAYS
        if name not in (published.PUBLISHED, published.MATCHED_OPTIMUM)
    ),
    NORMED: tuple(published.WAYS),
}
QUICK = (published.NONE, published.OPTIMUM, published.PUBLISHED, published.MATCHED)
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
# CIFAR-10: the authors' sizes; theirs is the first learning rate alone.
PAPER = {"width": 500, "depths": [3, 4, 5, 6, 7, 8], "num_epochs": 100, "batch_size": 128}
REDUCED = {"width": 200, "depths": [3], "num_epochs": 30, "batch_size": 128, "subset": 5000}
SIZES: dict[str, dict[str, Any]] = {
    "cifar10": PAPER,
    "fashion_mnist": REDUCED,
    "mnist": REDUCED,
    "digits": {"width": 100, "depths": [3], "num_epochs": 60, "batch_size": 32},
}


def tasks(options: Options) -> list[Task]:
    """A task for each depth, network and method; it trains all learning rates and seeds."""
    sizes = {
        "dataset": options.dataset,
        "subset": None,
        "learning_rates": RATES,
        "num_seeds": 3,
        "threshold": 0.99,
        "seed": options.seed,
        "methods": list(published.WAYS),
        **SIZES[options.dataset],
    }
    if options.quick:
        sizes |= {"width": 32, "num_epochs": 12, "num_seeds": 2, "methods": list(QUICK)}
        sizes |= {"learning_rates": [0.03, 0.3], "threshold": 0.9}
    sizes |= options.sizes
    names = chosen_methods(sizes.pop("methods"), published.WAYS)
    return [
        Task(
            f"{depth} layers, {network}, {name}",
            {"network": f"{depth} hidden layers, {network}", "depth": depth, "method": name}
            | {"batch_norm": network == NORMED, **sizes},
        )
        for depth in sizes.pop("depths")
        for network, ways in WAYS.items()
        for name in names
        if name in ways
    ]


def run(settings: dict[str, Any], context: Context) -> dict[str, Any]:
    """Trains one method."""
    normed = settings["batch_norm"]
    model = models.AuthorsMLP(
        (settings["width"],) * settings["depth"],
        hidden_bias=not normed,
        output_bias=normed,
        batch_norm=normed,
    )
    network = published.network(
        model,
        model,
        f"Dense_{settings['depth']}",
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
        f"Figure 2 on {settings['dataset']}{images}: width {settings['width']}, "
        f"{settings['num_epochs']} epochs, {settings['num_seeds']} seeds"
    )
    return comparing.report(results, title)
