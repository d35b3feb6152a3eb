"""What is passed as a model and is none, and what to pass instead."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tamegrad.errors import SettingError

__all__ = ["named_tensors"]

_LONGEST_SHOWN = 40
_NO_PAIRS = "without (name, parameter) pairs"
_ADVICE = "pass the model itself, or model.named_parameters()"
_OF_GRADIENTS = "normalize_grad_({name: gradient}, policy) takes gradients themselves"


def named_tensors(model: object) -> list[tuple[str, Any]]:
    """Returns the pairs of a name and a tensor that were passed in place of a model.

    Args:
        model: The pairs, or a dictionary.

    Returns:
        The pairs, at least one.

    Raises:
        SettingError: If it is something else; the message says what to pass instead.
    """
    if isinstance(model, Tensor) or not isinstance(model, Iterable):
        items = None
    else:
        items = list(model.items() if isinstance(model, Mapping) else model)
        if items and all(map(_is_pair, items)):
            return items
    got, advice = _diagnosis(model) if items is None else _diagnosis_of_items(model, items)
    raise SettingError("model", got=got, allowed="a torch.nn.Module, or (name, parameter) pairs", advice=advice)


def _is_pair(item: object) -> bool:
    match item:
        case (str(), Tensor()):
            return True
        case _:
            return False


def _diagnosis(model: object) -> tuple[str, str]:
    """Returns what was passed, and what to do instead."""
    kind = type(model).__name__
    match model:
        case torch.optim.Optimizer():
            return f"{kind}, an optimizer", "pass the model first: attach(model, optimizer, policy)"
        case type() if issubclass(model, nn.Module):
            return f"the class {model.__name__}", f"pass an instance: {model.__name__}(...)"
        case Tensor():
            return f"a {kind} without a name", f'pass pairs: [("name", parameter)]; {_OF_GRADIENTS}'
        case _ if inspect.isroutine(model):
            return f"the function {model.__name__}", f"{_ADVICE}; {_OF_GRADIENTS}"
        case _:
            return f"a {kind} {_NO_PAIRS}", _ADVICE


def _diagnosis_of_items(model: object, items: list[Any]) -> tuple[str, str]:
    """Returns what was passed, and what to do instead, for an iterable or the items of a dictionary."""
    kind = type(model).__name__
    if not items:
        once = "; a generator yields its items only once" if inspect.isgenerator(model) else ""
        return f"a {kind} of nothing", f"{_ADVICE}{once}"
    wrong = next(item for item in items if not _is_pair(item))
    got, advice = f"a {kind} {_NO_PAIRS}; the first that is none: {_shown(wrong)}", _ADVICE
    match wrong:
        case nn.Module():
            got = f"a {kind} of modules"
            advice = "pass nn.ModuleList([...]) of them, or nn.ModuleDict({...}) to choose the names of their layers"
        case (str(), nn.Module()):
            got = f"a {kind} of names and modules"
            advice = "pass nn.ModuleDict({...}) of them, or the module that holds them"
        case Tensor():
            got = f"a {kind} of tensors without names"
            advice = f"pass named_parameters() in place of parameters(); {_OF_GRADIENTS}"
        case {"params": _}:
            got = f"a {kind} of an optimizer's parameter groups"
        case np.ndarray() | (str(), np.ndarray()):
            got = f"a {kind} of NumPy arrays"
            advice = "call tamegrad.normalize({layer: {type: gradient}}, policy)"
        case (str(), Mapping()):
            got, advice = f"a nested {kind}", f"{_ADVICE}; {_OF_GRADIENTS}"
        case (key, value) if isinstance(model, Mapping):
            got, advice = f"a {kind} with {_shown(key)}: {_shown(value)}", f"{_ADVICE}; {_OF_GRADIENTS}"
    return got, advice


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"a {type(value).__name__}"
