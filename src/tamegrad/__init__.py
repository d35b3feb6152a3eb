"""Normalizes and clips gradients per layer, per parameter type, per tensor, per element or over the model.

This package imports no framework; `tamegrad.torch` is for PyTorch.
"""

from tamegrad.errors import (
    MissingExtraError,
    NonFiniteGradientError,
    SettingError,
    TamegradError,
    TamegradWarning,
    UnmatchedError,
)
from tamegrad.policy import Policy
from tamegrad.reference import normalize
from tamegrad.report import GroupReport, Report
from tamegrad.strategies import Clip, ClipValue, GradientNormalization, Keep, Renormalize, Strategy

__all__ = [
    "Clip",
    "ClipValue",
    "GradientNormalization",
    "GroupReport",
    "Keep",
    "MissingExtraError",
    "NonFiniteGradientError",
    "Policy",
    "Renormalize",
    "Report",
    "SettingError",
    "Strategy",
    "TamegradError",
    "TamegradWarning",
    "UnmatchedError",
    "normalize",
]
__version__ = "0.1.0"
