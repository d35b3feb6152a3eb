"""What tests of `torch.compile` use."""

from typing import Any

import torch._dynamo
import torch._dynamo.testing

__all__ = ["compile_counter", "reset_compiler"]


def reset_compiler() -> None:
    """Forgets everything that `torch.compile` has compiled."""
    reset: Any = torch._dynamo.reset
    reset()


def compile_counter() -> Any:
    """Returns a backend that counts graphs (`frame_count`) and their operations (`op_count`), and runs them as is."""
    make: Any = torch._dynamo.testing.CompileCounter
    return make()
