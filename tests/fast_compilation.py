"""Variables under which programs compile fast: most of a test's time goes into compiling."""

import os
import pathlib
import subprocess
import sys

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


def environment() -> dict[str, str]:
    """For this process, before it imports JAX, and for those that tests start.

    They share what they compile, in this run and in the next.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(__file__).parents[1] / "build" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_known_flags()}".strip(),
    }
