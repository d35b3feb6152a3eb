"""optax's clipping, on the same gradients, under `jax.jit` as users run it."""

import jax  # not installed where types are checked
import jax.numpy as jnp  # not installed where types are checked
import numpy as np
import optax  # not installed where types are checked
import torch
from hostile_inputs import Gradients
from hostile_judge import Tool
from torch import Tensor

__all__ = ["OPTAX", "versions"]

# optax has no sparse gradients, and JAX arrays have no strides and do not change in place.
_LACKS = frozenset({"sparse", "views", "in place"})
_WIDE = (torch.float64, torch.complex128)


def versions() -> str:
    """Returns the versions of optax and JAX."""
    return f"optax {optax.__version__}, jax {jax.__version__}"


def _update(transformation: optax.GradientTransformation, gradients: Gradients) -> Gradients:
    tensors = [gradient for named in gradients.values() for gradient in named.values() if gradient is not None]
    # By default JAX converts float64 to float32; this turns that off if there is any float64.
    with jax.enable_x64(any(tensor.dtype in _WIDE for tensor in tensors)):
        tree = {layer: {name: _to_jax(g) for name, g in named.items()} for layer, named in gradients.items()}
        updates, _ = jax.jit(transformation.update)(tree, transformation.init(tree))
        return {
            layer: {name: _to_torch(updates[layer][name], gradient) for name, gradient in named.items()}
            for layer, named in gradients.items()
        }


def _to_jax(gradient: Tensor | None) -> jax.Array | None:
    if gradient is None:
        return None
    if gradient.dtype == torch.bfloat16:
        return jnp.asarray(gradient.float().numpy()).astype(jnp.bfloat16)
    return jnp.asarray(gradient.numpy())


def _to_torch(array: jax.Array, like: Tensor | None) -> Tensor | None:
    if like is None:
        return None
    widened = array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array
    return torch.from_numpy(np.array(widened)).to(like.dtype)


def _global_norm(gradients: Gradients, threshold: float) -> Gradients:
    return _update(optax.clip_by_global_norm(threshold), gradients)


def _per_layer(gradients: Gradients, threshold: float) -> Gradients:
    labels = {layer: dict.fromkeys(named, layer) for layer, named in gradients.items()}
    clips = {layer: optax.clip_by_global_norm(threshold) for layer in gradients}
    return _update(optax.partition(clips, labels), gradients)


def _values(gradients: Gradients, threshold: float) -> Gradients:
    return _update(optax.clip(threshold), gradients)


OPTAX = (
    Tool("optax `clip_by_global_norm`", "model", _global_norm, _LACKS),
    Tool("optax, a `partition` label a layer", "layer", _per_layer, _LACKS),
    Tool("optax `clip`", "value", _values, _LACKS),
)
