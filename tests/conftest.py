"""What holds for every test: strict promotion, the CPU, reproducible examples in CI."""

import concurrent.futures
import contextvars
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from fast_compilation import environment

# Workers get the variables from the process that starts them.
os.environ |= {} if "PYTEST_XDIST_WORKER" in os.environ else environment()

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Programs of their own, which tests and `make wheel` start, and a suite with an environment of its
# own; --doctest-modules would import them.
collect_ignore = [
    "_spec/sharded_program.py",
    "packaging",
    "quantization/sharded.py",
    "real_models",
]

# The first example compiles, so no deadline can be right.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# Linux allows a process 65530 memory maps, of which each compiled program holds a few. Reading
# them takes as long as a small test.
_MOST_MAPS, _TESTS_BETWEEN = 30_000, 20
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Forgets compiled programs before there are so many that XLA crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(_tests) % _TESTS_BETWEEN or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Runs each test in a thread of its own.

    MLIR keeps a table per thread of all programs that the thread has lowered and JAX remembers,
    and goes through it for every further one: after a thousand it takes three times as long.
    """
    test, context = pyfuncitem.obj, contextvars.copy_context()

    @functools.wraps(test)
    def in_a_thread(**arguments: Any) -> None:
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            threads.submit(context.run, test, **arguments).result()

    pyfuncitem.obj = in_a_thread
    return (yield)


@pytest.fixture
def x64() -> Iterator[None]:
    """The test runs with float64 enabled."""
    # jax.enable_x64 is newer than the oldest supported JAX; the option is in all of them.
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
