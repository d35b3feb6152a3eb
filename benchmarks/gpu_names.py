"""What the GPU check names; imports nothing, since the parent process must not hold the GPU."""

from typing import Literal, TypeAlias

__all__ = ["BACKENDS", "DTYPES", "TITLES", "BackendName"]

BackendName: TypeAlias = Literal["gpu", "foreach"]
BACKENDS: tuple[BackendName, ...] = ("gpu", "foreach")
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
# The models that are timed, in this order.
TITLES = {
    "gpt2": "GPT-2 124M, float32",
    "linears": "1,000 x Linear(64, 64)",
    "resnet50": "ResNet-50, float32",
    "xl": "GPT-2 1.5B, bfloat16",
    "tiny": "10,000 x Linear(16, 16)",
}
