"""The table of ``docs/optimizers.md`` says what is measured, and what is measured is true."""

import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import SPEC, draw, optimizers, quietly, row

import pathcond_jax as pathcond
from pathcond_jax._optax.transport import find_buffers, transport

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")
DOCUMENTED = dict(re.findall(r"^(\| `([^`]+)` \| .*)$", PAGE, re.M))
DOCUMENTED = {name: line for line, name in DOCUMENTED.items()}
WRITTEN_FOR = re.search(r"optax (\d+\.\d+\.\d+)", PAGE)[1]

RNG = np.random.default_rng(0)
# Two orders below the parameters, and far above what keeps quotients finite.
HISTORY = [(draw(RNG), draw(RNG, 1e-2)) for _ in range(4)]
SCALES = tuple(jnp.asarray(RNG.normal(size=group.size), jnp.float32) for group in SPEC.groups)
TRAVELS = [name for name, line in DOCUMENTED.items() if not re.search("refused|none", line)]
# What depends on how far the parameters moved, besides on where they are.
MOVING = {name for name in TRAVELS if "schedule_free" in name}


@pytest.mark.parametrize("name", [name for name in optimizers() if name in DOCUMENTED])
def test_the_table_says_what_is_measured(name):
    line = row(name, optimizers()[name])
    if line == DOCUMENTED[name]:
        return
    # Other versions of optax may have other names for the same.
    named = [set(re.findall("`([^`]+)`", text)) for text in (line, DOCUMENTED[name])]
    assert optax.__version__ != WRITTEN_FOR, line
    assert named[0] != named[1], line


def test_the_table_is_complete():
    if optax.__version__ == WRITTEN_FOR:
        assert list(optimizers()) == list(DOCUMENTED)
    else:
        assert len(set(optimizers()) & set(DOCUMENTED)) > 40


@pytest.mark.parametrize("name", [name for name in TRAVELS if name in optimizers()])
def test_the_state_is_that_of_the_rescaled_history(name):
    """The state that travelled is the one of an optimizer that saw the new parameters all along."""
    inner = optax.with_extra_args_support(quietly(optimizers()[name]))
    buffers = find_buffers(inner, SPEC)
    extra = {"value": jnp.ones(())} if "momo" in name else {}
    params = optax.LookaheadParams.init_synced if "lookahead" in name else lambda params: params

    @jax.jit
    def run(history):
        with jax.numpy_dtype_promotion("standard"):
            state = inner.init(params(history[0][0]))
            for w, g in history:
                g = jax.tree.map(jnp.zeros_like, g) if name in MOVING else g
                _, state = inner.update(g, state, params(w), **extra)
        return state

    rescaled = [
        (pathcond.rescale(w, SPEC, SCALES), pathcond.rescale(g, SPEC, SCALES, power=-1))
        for w, g in HISTORY
    ]
    chex.assert_trees_all_close(
        transport(run(HISTORY), SPEC, SCALES, buffers), run(rescaled), rtol=1e-3, atol=1e-12
    )
