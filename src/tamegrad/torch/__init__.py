"""For PyTorch: `attach` to an optimizer, or normalize by hand with `GradientNormalizer` or `normalize_grad_`."""

try:
    import torch  # noqa: F401  only to say which extra is missing
except ModuleNotFoundError as error:
    from tamegrad.errors import MissingExtraError

    raise MissingExtraError(
        "tamegrad.torch",
        got="a Python without PyTorch",
        allowed="PyTorch 2.4 or newer",
        advice="pip install 'tamegrad[torch]'",
    ) from error

from tamegrad.torch.attach import AttachedNormalizer, attach
from tamegrad.torch.clip_grad import clip_grad_norm_, clip_grad_value_
from tamegrad.torch.normalizer import GradientNormalizer, normalize_grad_
from tamegrad.torch.summary import GroupSummary, Summary

__all__ = [
    "AttachedNormalizer",
    "GradientNormalizer",
    "GroupSummary",
    "Summary",
    "attach",
    "clip_grad_norm_",
    "clip_grad_value_",
    "normalize_grad_",
]
