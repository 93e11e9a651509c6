"""Compression: networks from whose parameters much is cut or rounded."""

from pathcond_jax.quantization._caps import CappingWarning, caps_as_parameters
from pathcond_jax.quantization._fold import FoldingWarning, fold_batch_norm
from pathcond_jax.quantization._prune import PruningWarning, magnitude_saliency, prune
from pathcond_jax.quantization._saliency import path_saliency

__all__ = [
    "CappingWarning",
    "FoldingWarning",
    "PruningWarning",
    "caps_as_parameters",
    "fold_batch_norm",
    "magnitude_saliency",
    "path_saliency",
    "prune",
]
