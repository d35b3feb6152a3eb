"""Normalizes and clips gradients per layer, per parameter type, per tensor, per element or over the model.

This package imports no framework; `tamegrad.torch` is for PyTorch.
"""

from tamegrad import strategies
from tamegrad.errors import (
    MissingExtraError,
    NonFiniteGradientError,
    SettingError,
    TamegradError,
    TamegradWarning,
    UnknownGroupError,
    UnmatchedError,
)
from tamegrad.policy import Policy
from tamegrad.reference import normalize
from tamegrad.report import GroupReport, Report
from tamegrad.strategies import *  # noqa: F403  a new strategy is public without a change here

__all__ = [
    "GroupReport",
    "MissingExtraError",
    "NonFiniteGradientError",
    "Policy",
    "Report",
    "SettingError",
    "TamegradError",
    "TamegradWarning",
    "UnknownGroupError",
    "UnmatchedError",
    "normalize",
]
__all__ += strategies.__all__
__version__ = "0.1.0"
