"""Path-conditioned training for JAX: rescaling symmetries, found, lifted, solved and applied."""

from pathcond_jax.lifting import (
    NotPathLiftableError,
    ScaledDiagonal,
    conditioning_score,
    gram_diagonal,
    path_norm,
    scaled_gram_diagonal,
)
from pathcond_jax.rescaling import check_spec, condition, rescale, round_to_powers_of_two
from pathcond_jax.solvers import Solution, Status, solve
from pathcond_jax.spec import ArchSpec, Incidence, Leaf, NeuronGroup, Pinned, SpecError
from pathcond_jax.symmetry import chain_spec, trace_spec

__all__ = [
    "ArchSpec",
    "Incidence",
    "Leaf",
    "NeuronGroup",
    "NotPathLiftableError",
    "Pinned",
    "ScaledDiagonal",
    "Solution",
    "SpecError",
    "Status",
    "chain_spec",
    "check_spec",
    "condition",
    "conditioning_score",
    "gram_diagonal",
    "path_norm",
    "rescale",
    "round_to_powers_of_two",
    "scaled_gram_diagonal",
    "solve",
    "trace_spec",
]
