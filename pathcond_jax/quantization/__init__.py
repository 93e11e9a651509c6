"""Compression: networks from whose parameters much is cut or rounded."""

from pathcond_jax.quantization._prune import PruningWarning, magnitude_saliency, prune
from pathcond_jax.quantization._saliency import path_saliency

__all__ = [
    "PruningWarning",
    "magnitude_saliency",
    "path_saliency",
    "prune",
]
