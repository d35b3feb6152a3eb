"""The clipping of Keras's optimizers, on the same gradients, with Keras's PyTorch backend."""

import os
from functools import partial

import torch
from hostile_inputs import Gradients
from hostile_judge import Tool

# Read by Keras when it is imported; the gradients here are PyTorch's.
os.environ["KERAS_BACKEND"] = "torch"
import keras  # not installed where types are checked

__all__ = ["KERAS", "versions"]


def versions() -> str:
    """Returns the version of Keras."""
    return f"keras {keras.__version__} ({keras.backend.backend()} backend)"


def _step(argument: str, gradients: Gradients, threshold: float) -> Gradients:
    """Steps from zero by a learning rate of 1, so that the variables become the negative of the clipped gradients."""
    # Keras computes thresholds in `floatx`; users with float64 gradients set it to float64.
    wide = any(g is not None and g.dtype == torch.float64 for named in gradients.values() for g in named.values())
    keras.config.set_floatx("float64" if wide else "float32")
    places = [(layer, name) for layer, named in gradients.items() for name in named]
    given = [gradients[layer][name] for layer, name in places]
    variables = [
        keras.Variable(torch.zeros(2, 2) if gradient is None else torch.zeros(gradient.shape, dtype=gradient.dtype))
        for gradient in given
    ]
    keras.optimizers.SGD(learning_rate=1.0, **{argument: threshold}).apply(given, variables)
    after: Gradients = {layer: {} for layer in gradients}
    for (layer, name), variable in zip(places, variables, strict=True):
        after[layer][name] = -variable.value.detach()
    return after


# Keras has sparse gradients only on its TensorFlow and JAX backends.
_LACKS = frozenset({"sparse"})
KERAS = (
    Tool("Keras `global_clipnorm`", "model", partial(_step, "global_clipnorm"), _LACKS),
    Tool("Keras `clipnorm` (per variable)", "tensor", partial(_step, "clipnorm"), _LACKS),
    Tool("Keras `clipvalue`", "value", partial(_step, "clipvalue"), _LACKS),
)
