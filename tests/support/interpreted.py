"""Shared by the tests of Triton kernels, which run on the CPU, in Triton's interpreter, at milliseconds a program.

So gradients are few and small, and if settings are independent of each other, tests cover pairs of them rather than
every combination.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.language.core import is_builtin
from triton.runtime import interpreter

from tamegrad.torch.backends.gpu.kernels import INTERPRETED

MARKS = [
    pytest.mark.skipif(not INTERPRETED, reason="on a GPU, CPU gradients are refused"),
    # NumPy warns about what a GPU does silently: a float64 outside the range of float16 becomes infinite.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
    pytest.mark.usefixtures("patched_once"),
]


@pytest.fixture(scope="module")
def patched_once() -> Iterator[None]:
    """Makes Triton's interpreter patch its language once a launch, not on every function call: this halves the time."""
    replace = interpreter._patch_lang

    @functools.cache
    def language(function: Any) -> Any:
        return next(one for one in function.__globals__.values() if one is tl or one is tl.core)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(
            interpreter,
            "_patch_lang",
            lambda function: replace(function) if is_builtin(language(function).load) else None,
        )
        yield


def drawn(*shape: int, dtype: torch.dtype = torch.float32, magnitude: float = 1.0, seed: int = 0) -> Tensor:
    """Draws a normally distributed tensor, the same one for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return (torch.randn(shape, generator=generator, dtype=wide) * magnitude).to(dtype)
