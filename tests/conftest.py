"""What holds for every test: strict promotion, the CPU, reproducible examples in CI."""

import concurrent.futures
import contextvars
import functools
import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

# What compiles faster and runs slower: kernels made without the fusion emitters, and given to LLVM
# in one piece. XLA ends a process at a flag that it does not know, so JAX is asked first.
_FASTER_COMPILATION = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
_ASK = """
import ast, sys, jax
for flag, value in ast.literal_eval(sys.argv[1]).items():
    try:
        jax.jit(lambda: 0, compiler_options={flag: value}).lower().compile()
    except Exception:
        continue
    print(f"--{flag}={str(value).lower()}")
"""


def _known_flags() -> str:
    """Those of ``_FASTER_COMPILATION`` that this version of XLA has, as in ``XLA_FLAGS``."""
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, repr(_FASTER_COMPILATION)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return " ".join(asked.stdout.split())


# Most of the time goes into compiling programs that run once, on a few numbers. The workers and
# the processes that tests start share what they compile, here and in the next run; workers get
# the variables from the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(__file__).parents[1] / "build" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_known_flags()}".strip(),
    }

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A program of its own, which test_sharding.py starts; --doctest-modules would import it.
collect_ignore = ["_spec/sharded_program.py"]

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
