"""Gradients in a dictionary, as `torch.func.grad` returns them, in place of a model."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tamegrad.errors import SettingError
from tamegrad.torch.model.names import joined
from tamegrad.torch.model.tensors import is_computed, is_differentiable, is_gradient
from tamegrad.torch.sharded.sharding import mesh_of

__all__ = ["GradientDictionary", "NamedGradients"]

# From names to gradients, or to dictionaries of the gradients below a name.
NamedGradients: TypeAlias = MutableMapping[str, Any]

_WHERE = "normalize_grad_(gradients)"
_ALLOWED = "{name: gradient} with tensors that do not require grad, or a model, or pairs of names and parameters"


@dataclass(frozen=True, slots=True)
class _Entry:
    """One value of a dictionary, and where it is kept: `home[key]`."""

    name: str
    value: Any
    home: Any
    key: Any


class GradientDictionary:
    """Gives every gradient of a dictionary a tensor that has it as its `.grad`, so that it is normalized as usual.

    Args:
        entries: The gradients.

    Attributes:
        pairs: Names, and tensors that have the gradients.
    """

    def __init__(self, entries: list[_Entry]) -> None:
        self._entries = entries
        gradients = _on_their_own([entry.value for entry in entries])
        self.pairs: list[tuple[str, Any]] = [
            (entry.name, _holder(gradient)) for entry, gradient in zip(entries, gradients, strict=True)
        ]

    @classmethod
    def of(cls, model: object) -> "GradientDictionary | None":
        """Returns the gradients in a dictionary; None for anything else, a dictionary of parameters included.

        Args:
            model: What was passed in place of a model.

        Raises:
            SettingError: If some values of a dictionary are gradients and others are not, or one cannot be normalized.

        Example:
            >>> gradients = {"out": {"weight": torch.ones(2), "bias": torch.ones(1)}}
            >>> [name for name, _ in GradientDictionary.of(gradients).pairs]
            ['out.weight', 'out.bias']
        """
        entries = list(_entries(model, "")) if isinstance(model, Mapping) else []
        tensors = [entry.value for entry in entries if isinstance(entry.value, Tensor)]
        holds_none = bool(entries) and all(entry.value is None for entry in entries)
        if not holds_none and not any(is_gradient(tensor) or is_computed(tensor) for tensor in tensors):
            return None
        _refuse_state_dict(model)
        for entry in entries:
            _check(entry)
        return cls(entries)

    def put_back(self) -> None:
        """Puts the gradients that could not be changed in place into the dictionary."""
        for entry, (_, holder) in zip(self._entries, self.pairs, strict=True):
            if holder.grad is not entry.value:
                entry.home[entry.key] = holder.grad


def _entries(home: Any, path: str) -> Iterator[_Entry]:  # noqa: ANN401  a dictionary, as the user passed it
    for key, value in home.items():
        # Keras and JAX write paths with slashes.
        name = joined(path, str(key).replace("/", "."))
        if isinstance(value, Mapping):
            yield from _entries(value, name)
        else:
            yield _Entry(name, value, home, key)


def _on_their_own(gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Returns the gradients, with a copy of each that is the same memory as an earlier one.

    `torch.func.grad` returns one tensor for two parameters that are added. It is the gradient of both.
    """
    seen: set[tuple[str, int]] = set()
    separate: list[Tensor | None] = []
    for gradient in gradients:
        own = gradient
        if gradient is not None:
            has_address = type(gradient) is Tensor and gradient.layout is torch.strided and gradient.data_ptr() != 0
            key = ("address", gradient.data_ptr()) if has_address else ("object", id(gradient))
            own = gradient.clone() if key in seen else gradient
            seen.add(key)
        separate.append(own)
    return separate


def _holder(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.empty(0, device="cpu", requires_grad=True)
    # It shares the memory of the gradient, and never uses it.
    holder = gradient.detach()
    holder.grad = gradient
    return holder


def _refuse_state_dict(gradients: object) -> None:
    # Its tensors look like gradients; normalizing them would change the model. PyTorch marks it with this attribute.
    if hasattr(gradients, "_metadata"):
        raise SettingError(
            _WHERE,
            got="a state_dict, which holds the parameters and not their gradients",
            allowed=_ALLOWED,
            advice="pass the model itself, or model.named_parameters()",
        )


def _check(entry: _Entry) -> None:
    """Refuses what is no gradient, or cannot be normalized in place, before anything is changed."""
    if not isinstance(entry.home, MutableMapping) or not isinstance(entry.key, str):
        got = f"the key {entry.key!r} of a {type(entry.home).__name__}"
        advice = "pass a dict with names as keys"
    elif entry.value is None:
        return
    elif not isinstance(entry.value, Tensor):
        got, advice = f"a {type(entry.value).__name__} among gradients", "leave it out, or make it a tensor"
    elif torch._C._functorch.is_functorch_wrapped_tensor(entry.value):  # noqa: SLF001  there is no public way to ask
        got = "a tensor inside of torch.func.grad, vmap or another transform, which has no memory of its own"
        advice = "normalize what the outermost transform returns"
    elif is_computed(entry.value):
        got = "a gradient that requires grad itself (create_graph=True)"
        advice = "detach() it first: what is changed in place cannot be differentiated"
    elif not is_gradient(entry.value):
        got, advice = "a parameter among gradients", "pass the gradients alone, or the parameters alone"
    elif not is_differentiable(entry.value):
        got, advice = f"a tensor of {entry.value.dtype}, which is no gradient", "leave it out"
    elif _has_partial_sums(entry.value):
        got = "a DTensor whose ranks still have to be added up"
        advice = "redistribute it to the placements of its parameter"
    else:
        return
    raise SettingError(f"{_WHERE}: {entry.name}", got=got, allowed=_ALLOWED, advice=advice)


def _has_partial_sums(gradient: Any) -> bool:  # noqa: ANN401  a DTensor, perhaps
    return mesh_of(gradient) is not None and any(placement.is_partial() for placement in gradient.placements)
