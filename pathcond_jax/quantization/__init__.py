"""Compression: networks from whose parameters much is cut or rounded."""

from pathcond_jax.quantization._calibrate import calibrate
from pathcond_jax.quantization._caps import CappingWarning, caps_as_parameters
from pathcond_jax.quantization._correct import correct_biases
from pathcond_jax.quantization._fold import FoldingWarning, fold_batch_norm
from pathcond_jax.quantization._noise import quantization_noise
from pathcond_jax.quantization._prediction import PredictedNoise, predicted_noise
from pathcond_jax.quantization._prune import PruningWarning, magnitude_saliency, prune
from pathcond_jax.quantization._quantizers import quantize_weights, simulate
from pathcond_jax.quantization._saliency import path_saliency
from pathcond_jax.quantization._schemes import SCHEMES, Scheme
from pathcond_jax.quantization._statistics import Channels, Statistics

__all__ = [
    "SCHEMES",
    "CappingWarning",
    "Channels",
    "FoldingWarning",
    "PredictedNoise",
    "PruningWarning",
    "Scheme",
    "Statistics",
    "calibrate",
    "caps_as_parameters",
    "correct_biases",
    "fold_batch_norm",
    "magnitude_saliency",
    "path_saliency",
    "predicted_noise",
    "prune",
    "quantization_noise",
    "quantize_weights",
    "simulate",
]
