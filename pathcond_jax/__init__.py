"""Path-conditioned training for JAX: rescaling symmetries, found, lifted, solved and applied."""

from pathcond_jax import criteria, quantization
from pathcond_jax._action.check import check_spec
from pathcond_jax._action.condition import condition
from pathcond_jax._action.rescale import rescale, round_to_powers_of_two
from pathcond_jax._action.verify import WrongSpecError
from pathcond_jax._front.extend import Operation, Operations, operations, register_rule
from pathcond_jax._front.init import conditioned_init, conditioned_nnx
from pathcond_jax._front.nnx import condition_nnx, nnx_spec, nnx_variables
from pathcond_jax._front.report import Report, Representative, report
from pathcond_jax._front.trace import trace_spec
from pathcond_jax._lifting.gram import (
    conditioning_score,
    gram_diagonal,
    gram_matrix,
    lifted,
    path_norm,
    scaled_gram_diagonal,
)
from pathcond_jax._lifting.values import NotPathLiftableError
from pathcond_jax._optax.path_sgd import ScaleByPathState, scale_by_path
from pathcond_jax._optax.recondition import ReconditionedState, recondition, reconditioned
from pathcond_jax._optax.schedule import ReconditionState
from pathcond_jax._program.failures import RuleFailedWarning
from pathcond_jax._solve.solution import Solution, Status
from pathcond_jax._solve.solve import solve
from pathcond_jax._spec.extended_range import ScaledDiagonal
from pathcond_jax._spec.log_scales import LogScales
from pathcond_jax._spec.spec import ArchSpec
from pathcond_jax._spec.types import Incidence, Leaf, NeuronGroup, Pinned, SpecError
from pathcond_jax._symmetry.trace import chain_spec
from pathcond_jax._version import __version__
from pathcond_jax.criteria import Criterion
from pathcond_jax.theory.alignment import alignment, extremal_vectors
from pathcond_jax.theory.condensation import (
    condensation_directions,
    condensed_groups,
    neuron_orientations,
)
from pathcond_jax.theory.conservation import conserved_quantities, num_conservation_laws, rescale_to
from pathcond_jax.theory.constructions import TWO_LAYER_MODES, triangle_mlp, two_layer_init
from pathcond_jax.theory.finetuning import (
    mtl_penalty,
    order_and_dependence,
    ptft_penalty,
    relu_finetuning_penalty,
    scale_network,
)
from pathcond_jax.theory.pieces import count_linear_pieces_1d

__all__ = [
    "TWO_LAYER_MODES",
    "ArchSpec",
    "Criterion",
    "Incidence",
    "Leaf",
    "LogScales",
    "NeuronGroup",
    "NotPathLiftableError",
    "Operation",
    "Operations",
    "Pinned",
    "ReconditionState",
    "ReconditionedState",
    "Report",
    "Representative",
    "RuleFailedWarning",
    "ScaleByPathState",
    "ScaledDiagonal",
    "Solution",
    "SpecError",
    "Status",
    "WrongSpecError",
    "__version__",
    "alignment",
    "chain_spec",
    "check_spec",
    "condensation_directions",
    "condensed_groups",
    "condition",
    "condition_nnx",
    "conditioned_init",
    "conditioned_nnx",
    "conditioning_score",
    "conserved_quantities",
    "count_linear_pieces_1d",
    "criteria",
    "extremal_vectors",
    "gram_diagonal",
    "gram_matrix",
    "lifted",
    "mtl_penalty",
    "neuron_orientations",
    "nnx_spec",
    "nnx_variables",
    "num_conservation_laws",
    "operations",
    "order_and_dependence",
    "path_norm",
    "ptft_penalty",
    "quantization",
    "recondition",
    "reconditioned",
    "register_rule",
    "relu_finetuning_penalty",
    "report",
    "rescale",
    "rescale_to",
    "round_to_powers_of_two",
    "scale_by_path",
    "scale_network",
    "scaled_gram_diagonal",
    "solve",
    "trace_spec",
    "triangle_mlp",
    "two_layer_init",
]
