"""Five hundred random programs a day: none is changed, none raises what is not the library's."""

import datetime

import fuzz
import jax
import numpy as np
import pytest
from fuzzing import subject

_BLOCKS, _PROGRAMS = 20, 25


def first_seed(day):
    """The first program of a day; a day's programs do not meet those of another."""
    return day.toordinal() * _BLOCKS * _PROGRAMS


@pytest.fixture
def promotion():
    """Programs are written as users write them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# Not in the tests' names: xdist wants the same ones in all workers, also around midnight.
@pytest.mark.usefixtures("x64", "promotion")
@pytest.mark.parametrize("block", range(_BLOCKS))
def test_todays_programs(block):
    today = datetime.datetime.now(datetime.UTC).date()
    start = first_seed(today) + block * _PROGRAMS

    report = fuzz.run(range(start, start + _PROGRAMS), fuzz.Rates(0.1, 0.02, 0.0))

    found = [
        f"{kind}: {detail}\n  python tests/fuzz.py --seed {seed} --count 1 --lifting 1"
        for kind, examples in report.failures.items()
        for seed, _, detail in examples
    ]
    assert not found, "\n".join([f"programs of {today}, from {start}", *found])


@pytest.mark.usefixtures("x64", "promotion")
def test_programs_are_those_of_their_seed():
    one, two = (fuzz.Program(fuzz.random_recipe(7)) for _ in range(2))

    assert str(one.jaxpr()) == str(two.jaxpr())


def evaluated(seed):
    """A program, its arguments, and what the fuzzer makes of them; None if it needs JAX itself."""
    program = fuzz.Program(fuzz.random_recipe(seed))
    params, x, n = program.draw(np.random.default_rng(seed), 3)
    arguments = [*(params[name] for name in sorted(params)), x, n]
    try:
        return program, params, x, n, fuzz.evaluation.evaluate(program.jaxpr(), arguments)
    except fuzz.evaluation.CannotEvaluateError:
        return None


@pytest.mark.usefixtures("x64", "promotion")
def test_the_fuzzers_evaluation_is_that_of_jax():
    cases = list(filter(None, map(evaluated, range(40, 60))))
    assert len(cases) > 10

    for program, params, x, n, found in cases:
        for k in range(3):
            one = {name: value[k] for name, value in params.items()}
            for mine, theirs in zip(found, jax.jit(program)(one, x[k], n[k]), strict=True):
                mine = mine[min(k, len(mine) - 1)]
                size = abs(mine).max(initial=0, where=np.isfinite(mine))
                np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6 * size)


@pytest.mark.usefixtures("x64", "promotion")
def test_a_wrong_symmetry_is_found_and_shrunk(monkeypatch):
    # As if every neuron could scale all parameters up.
    honest = subject.directions
    monkeypatch.setattr(subject, "directions", lambda spec: honest(spec) ** 0)
    rates = fuzz.Rates(0.0, 0.0, 0.0)
    recipe = next(
        r for r in map(fuzz.random_recipe, range(100)) if fuzz.examine(r, 0, rates).failure
    )

    small = fuzz.shrunk(recipe, fuzz.fails_alike("WRONG", 0))

    assert fuzz.examine(small, 0, rates).failure.kind == "WRONG"
    assert len(small.steps) < len(recipe.steps)
