"""Diagnostics of related papers: what is conserved, how neurons align, what finetuning keeps."""

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
    "alignment",
    "condensation_directions",
    "condensed_groups",
    "conserved_quantities",
    "count_linear_pieces_1d",
    "extremal_vectors",
    "mtl_penalty",
    "neuron_orientations",
    "num_conservation_laws",
    "order_and_dependence",
    "ptft_penalty",
    "relu_finetuning_penalty",
    "rescale_to",
    "scale_network",
    "triangle_mlp",
    "two_layer_init",
]
