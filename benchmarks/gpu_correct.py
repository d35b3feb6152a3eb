"""Every strategy on hostile gradients on the device, held against `tamegrad.normalize`, the reference in NumPy."""

import math
import random
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from gpu_names import BackendName
from gpu_subjects import Bench, is_lost
from torch import Tensor, nn

from tamegrad import Clip, ClipValue, Keep, Renormalize, normalize
from tamegrad.strategies import OnNonfinite, Strategy
from tamegrad.torch import GradientNormalizer

__all__ = ["Layers", "compare", "correct", "drawn", "model_of"]

# By layer and parameter type: the values, and how they lie in memory.
Layers: TypeAlias = dict[str, dict[str, tuple[Tensor, str]]]

PER: Any = ("layer", "param_type", "tensor", "model")
NORMS = 1e-12
WIDTHS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def strategies() -> list[Strategy]:
    """Lists the strategies that are tried."""
    clips = [Clip(threshold, per=per) for threshold in (0.03, 1.0, 40.0) for per in PER]
    return [Keep(), *clips, *map(ClipValue, (0.03, 1.0, 40.0)), *(Renormalize(per=per) for per in PER)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, magnitude: float, seed: int) -> Tensor:
    """Draws normally distributed values on the CPU."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=wide) * magnitude).to(dtype)


def placed(values: Tensor, how: str, device: torch.device) -> Tensor:
    """Copies values to a device, into one of the layouts that gradients have."""
    on: dict[str, Any] = {"dtype": values.dtype, "device": device}
    if how == "transposed":
        target = torch.empty(values.shape[::-1], **on).permute(*reversed(range(values.dim())))
    elif how == "gaps":
        target = torch.empty(*values.shape[:-1], 2 * values.shape[-1], **on)[..., : values.shape[-1]]
    elif how == "offset":
        target = torch.empty(values.numel() + 3, **on)[3:].view(values.shape)
    elif how == "channels_last":
        target = torch.empty(values.shape, **on).to(memory_format=torch.channels_last)
    else:
        target = torch.empty(values.shape, **on)
    return target.copy_(values)


def model_of(layers: Layers, device: torch.device) -> nn.Module:
    """Makes a model with these gradients on a device."""
    model = nn.Module()
    for name, types in layers.items():
        layer = nn.Module()
        for kind, (values, how) in types.items():
            parameter = nn.Parameter(torch.zeros(values.shape, dtype=values.dtype, device=device))
            parameter.grad = placed(values, how, device)
            layer.register_parameter(kind, parameter)
        model.add_module(name, layer)
    return model


def a_model(dtype: torch.dtype, magnitude: float, how: str = "plain", large: int = 0) -> Layers:
    """Returns layers of a few values, and a large one."""
    flat = how if how in {"gaps", "offset"} else "plain"
    return {
        "first": {"weight": (drawn((7, 9), dtype, magnitude, 1), how), "s": (drawn((), dtype, magnitude, 2), "plain")},
        "second": {"weight": (drawn((64,), dtype, magnitude, 3), flat)},
        "empty": {"weight": (drawn((0, 3), dtype, 1.0, 4), "plain")},
        "conv": {"weight": (drawn((2, 3, 4, 5), dtype, magnitude, 5), "channels_last")},
        "large": {"weight": (drawn((3, large), dtype, magnitude, 6), "plain")},
    }


def hostile(dtype: torch.dtype, large: int) -> Iterator[tuple[str, Layers, OnNonfinite]]:
    """Yields the name of a case, its gradients, and what to do if they are not finite."""
    info = torch.finfo(dtype)
    for power in (-0.9, -0.5, 0.0, 0.5, 0.85):
        yield f"max^{power}", a_model(dtype, info.max**power), "keep"
    for name, magnitude in (("subnormal", info.smallest_normal / 64), ("near max", info.max / 8), ("zero", 0.0)):
        yield name, a_model(dtype, magnitude), "keep"
    for how in ("transposed", "gaps", "offset"):
        yield how, a_model(dtype, 1.0, how), "keep"
    yield "large", a_model(dtype, 1.0, large=large), "keep"
    mixed = a_model(dtype, 1.0)
    mixed["second"]["weight"][0][::2] = info.max / 8
    mixed["second"]["weight"][0][1::2] = info.smallest_normal
    yield "huge beside tiny", mixed, "keep"
    exact = a_model(dtype, 0.0)
    exact["second"]["weight"][0][:2] = torch.tensor([24.0, 32.0]).to(dtype)
    yield "a norm of exactly the threshold", exact, "keep"
    choices: tuple[OnNonfinite, ...] = ("keep", "zero", "skip")
    for value in (math.nan, math.inf, -math.inf):
        for on_nonfinite in choices:
            bad = a_model(dtype, 1.0)
            bad["first"]["weight"][0][3, 4] = value
            yield f"{value}, {on_nonfinite}", bad, on_nonfinite


def compare(
    layers: Layers, strategy: object, backend: BackendName, on_nonfinite: OnNonfinite, device: torch.device
) -> list[str]:
    """Takes a step on a device, and returns what differs from the reference."""
    arrays = {
        name: {
            kind: (v.to(torch.complex128) if v.is_complex() else v.double()).numpy() for kind, (v, _) in types.items()
        }
        for name, types in layers.items()
    }
    with np.errstate(all="ignore"):
        expected, told = normalize(arrays, strategy, on_nonfinite=on_nonfinite)
    model = model_of(layers, device)
    report = GradientNormalizer(model, strategy, backend=backend, on_nonfinite=on_nonfinite).normalize_()
    wrong = []
    for name in ("norms", "scales", "norms_after", "total_norm"):
        ours, theirs = getattr(report, name).cpu().numpy(), getattr(told, name)
        if not np.allclose(ours, theirs, rtol=NORMS, atol=1e-323, equal_nan=True):
            wrong.append(f"{name} {np.ravel(ours)[:3]} instead of {np.ravel(theirs)[:3]}")
    if report.clipped.tolist() != told.clipped.tolist():
        wrong.append("clipped")
    # On a device a backend may count 1 for "some".
    if (report.nonfinite.cpu().numpy() > 0).tolist() != (told.nonfinite > 0).tolist():
        wrong.append("nonfinite")
    for name, types in layers.items():
        for kind, (before, _) in types.items():
            gradient: Any = model.get_submodule(name).get_parameter(kind).grad
            wanted = torch.from_numpy(np.asarray(expected[name][kind])).to(before.dtype)
            is_kept = expected[name][kind].tobytes() == arrays[name][kind].tobytes()
            wrong += [
                f"{name}.{kind}: {what}" for what in _wrong_values(gradient.cpu(), wanted, before, is_kept=is_kept)
            ]
    return wrong


def _wrong_values(now: Tensor, wanted: Tensor, before: Tensor, *, is_kept: bool) -> Iterator[str]:
    now, wanted, before = (torch.view_as_real(t) if t.is_complex() else t for t in (now, wanted, before))
    info, wide = torch.finfo(wanted.dtype), wanted.double()
    # In float64 there are two or three roundings on either side.
    spacings = 8 if wanted.dtype == torch.float64 else 1
    allowed = spacings * (wide.abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
    same = (now == wanted) | (now.isnan() & wanted.isnan())
    far = ((now.double() - wide).abs() > allowed) & ~same
    if far.any():
        yield f"{now[far][:3].tolist()} instead of {wanted[far][:3].tolist()}"
    if is_kept:
        width = WIDTHS[wanted.element_size()]
        changed = now.contiguous().view(width) != before.contiguous().view(width)
        # A product with 1 may change the bits of a NaN.
        if (changed & ~now.isnan()).any():
            yield "bits of a group that keeps its values"


def correct(bench: Bench, backend: BackendName, dtype: str) -> None:
    """The section."""
    facts: dict[str, Any] = {"backend": backend, "dtype": dtype, "cases": 0, "failed": 0, "first": []}
    try:
        _try_all(bench, backend, getattr(torch, dtype), facts)
    finally:
        bench.emit("correct", **facts)


def _try_all(bench: Bench, backend: BackendName, dtype: torch.dtype, facts: dict[str, Any]) -> None:
    chosen = strategies()
    for number, (name, layers, on_nonfinite) in enumerate(hostile(dtype, 30 if bench.dry else 40_001)):
        for strategy in random.Random(number).sample(chosen, 1) if bench.dry else chosen:  # noqa: S311
            if bench.left < 0:
                facts["first"].append("not all cases: no time left")
                return
            try:
                wrong = compare(layers, strategy, backend, on_nonfinite, bench.device)
            except Exception as error:  # noqa: BLE001  everything is reported
                wrong = [f"{type(error).__name__}: {str(error)[:300]}"]
            facts["cases"] += 1
            if wrong:
                facts["failed"] += 1
                facts["first"].append(f"{name}, {strategy}: {'; '.join(wrong)[:300]}")
                if is_lost(wrong[0]):
                    raise SystemExit(wrong[0])
