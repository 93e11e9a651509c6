"""Soundness: whatever the program, rescaling what was found never changes its function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from programs import Program, programs

import pathcond_jax as pathcond


def largest_change(program, spec, seed):
    """The largest change of an output under random scales, powers of two, relative to itself."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=program.input_shape))
    log_scales = tuple(
        jnp.asarray(np.log(2.0) * rng.choice([-2, -1, 1, 2], group.size)) for group in spec.groups
    )
    params = program.draw(seed)
    moved = pathcond.rescale(params, spec, log_scales)
    change = 0.0
    for before, after in zip(
        jax.tree.leaves(program(params, x)), jax.tree.leaves(program(moved, x)), strict=True
    ):
        before, after = np.asarray(before), np.asarray(after)
        # Overflow and 0/0 say nothing about scales.
        assume(np.isfinite(before).all())
        change = max(change, np.max(abs(after - before)) / max(np.max(abs(before)), 1e-100))
    return change


many_examples = settings(
    max_examples=260,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.usefixtures("x64")
@many_examples
@given(programs(max_steps=5), st.integers(0, 1000))
def test_no_short_program_is_changed(steps, seed):
    check(steps, seed)


@pytest.mark.usefixtures("x64")
@many_examples
@given(programs(max_steps=10), st.integers(0, 1000))
def test_no_long_program_is_changed(steps, seed):
    check(steps, seed)


def check(steps, seed):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = Program(steps)
        assume(program.shapes)
        try:
            spec = pathcond.trace_spec(program, program.draw(seed), jnp.ones(program.input_shape))
        except pathcond.SpecError:
            # No parameter reaches the output.
            return
        if spec.groups:
            assert largest_change(program, spec, seed) < 1e-8, str(spec)
