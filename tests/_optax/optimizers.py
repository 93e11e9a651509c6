"""Every optimizer of optax, and what happens to its buffers: the table of ``docs/optimizers.md``.

``python tests/_optax/optimizers.py`` prints it.
"""

import functools
import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import pathcond_jax as pathcond
from pathcond_jax._optax.transport import find_buffers

# The names of the biases are those of Adam's hyperparameters.
SHAPES = {"w1": (3, 5), "b1": (5,), "w2": (5, 4), "b2": (4,), "w3": (4, 2)}


def mlp(params, x):
    for k in (1, 2):
        x = jax.nn.relu(x @ params[f"w{k}"] + params[f"b{k}"][None])
    return x @ params["w3"]


def draw(rng, size=1.0):
    return {k: jnp.asarray(size * rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


SPEC = pathcond.trace_spec(mlp, draw(np.random.default_rng(0)), jnp.ones((1, 3)))

# Those that need more than a learning rate.
_SPECIAL = {
    "lbfgs": lambda: optax.lbfgs(linesearch=None),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)),
    "contrib.dpsgd": lambda: contrib.dpsgd(0.1, 1.0, 1.0, 0),
    "contrib.sam": lambda: contrib.sam(optax.adam(0.1), optax.sgd(0.05)),
    "contrib.schedule_free": lambda: contrib.schedule_free(optax.adam(0.1, b1=0.0), 0.1),
    "contrib.mechanize": lambda: contrib.mechanize(optax.sgd(0.1)),
}
_RECIPES = {
    "sgd(momentum=0.9)": lambda: optax.sgd(0.1, momentum=0.9),
    "rmsprop(momentum=0.9)": lambda: optax.rmsprop(0.1, momentum=0.9),
    "adagrad(initial_accumulator_value=0.0)": lambda: optax.adagrad(
        0.1, initial_accumulator_value=0.0
    ),
    "adafactor, matrices factored": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "chain(clip_by_global_norm(1.0), adamw)": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.1)
    ),
    "chain(clip(1.0), sgd(momentum=0.9))": lambda: optax.chain(
        optax.clip(1.0), optax.sgd(0.1, momentum=0.9)
    ),
    "chain(add_decayed_weights(1e-3), sgd(momentum=0.9))": lambda: optax.chain(
        optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9)
    ),
    "flatten(adam)": lambda: optax.flatten(optax.adam(0.1)),
    "MultiSteps(adam, 20)": lambda: optax.MultiSteps(optax.adam(0.1), 20),
    "lookahead(sgd(momentum=0.9))": lambda: optax.lookahead(optax.sgd(0.1, momentum=0.9), 5, 0.5),
}


def optimizers():
    """A factory for each optimizer that this version of optax has, and for a few recipes."""
    found = {}
    for prefix, module in (("", optax), ("contrib.", contrib)):
        # inspect.getmembers would also ask for the deprecated names, which warn.
        for name, function in sorted(vars(module).items()):
            if name.startswith(("_", "scale_by")) or not inspect.isfunction(function):
                continue
            takes_rate = "learning_rate" in inspect.signature(function).parameters
            if prefix + name in _SPECIAL:
                found[prefix + name] = _SPECIAL[prefix + name]
            elif takes_rate:
                found[prefix + name] = functools.partial(function, learning_rate=0.1)
    return found | _RECIPES


def quietly(make):
    """The optimizer; some are deprecated and still there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make()


def row(name, make):
    """A line of the table."""
    try:
        buffers = find_buffers(quietly(make), SPEC).values()
    except pathcond.SpecError as error:
        said = _refused(str(error))
    else:
        said = sorted({f"`{_short(buffer.name)}` {buffer.degree:+d}" for buffer in buffers})
    return f"| `{name}` | {'; '.join(said) or 'none'} |".replace("-", "−").replace("1e−", "1e-")


def _short(name):
    """The field of a buffer, without its place in a chain."""
    fields = [part for part in name.split("/") if not part.isdigit() and part not in SHAPES]
    return fields[-1] if fields else name


def _refused(message):
    if "cannot be run" in message:
        return [
            f"refused: it needs more arguments ({re.search('Error: (.*?)[.]*[)]', message)[1]})"
        ]
    listed = re.search(r"parameters: (.*)\. Say what", message)[1]
    reasons = re.findall(r"'([^']+)' (.*?)(?:; (?=')|$)", listed)
    return sorted({f"`{_short(name)}` refused: {_in_short(reason)}" for name, reason in reasons})


def _in_short(reason):
    mixed = re.search(r"the power (\S+) .* and (\S+) where they are large", reason)
    if mixed:
        tiny, large = (f"{int(power):+d}".replace("+0", "0") for power in mixed.groups())
        return f"{tiny} where gradients are tiny, {large} where they are large"
    for words, short in (
        ("has shape", "not of the parameter's shape"),
        ("belongs to no", "of no one parameter"),
        ("no power", "follows no power of the scale"),
    ):
        if words in reason:
            return short
    return reason


def table():
    """The lines of the table, one for each optimizer."""
    return [row(name, make) for name, make in optimizers().items()]


if __name__ == "__main__":
    print("\n".join(table()))
