"""The tools to time: tamegrad, the clipping of other libraries, and the floor that none of them can beat."""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from speed_models import Subject
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import tamegrad.torch
from tamegrad import Clip, ClipValue
from tamegrad.torch import GradientNormalizer, normalize_grad_

__all__ = [
    "FOREACH",
    "HUGE",
    "LOOP",
    "PER_LAYER",
    "PLAIN",
    "READ",
    "TINY",
    "WHOLE",
    "WRITE",
    "Tool",
    "left_out",
    "tools",
    "versions",
]

# Thresholds on norms and on values: above every gradient, and below every gradient.
HUGE, TINY = 1e9, 1e-6

PER_LAYER, REPORTED, PLAIN, PER_TYPE, GLOBAL, IMPORTED, ONCE, PER_VALUE = (
    'tamegrad `Clip(per="layer")`',
    'tamegrad `Clip(per="layer")`, report read',
    'tamegrad `Clip(per="layer")`, without Numba',
    'tamegrad `Clip(per="param_type")`',
    'tamegrad `Clip(per="model")`',
    "tamegrad `clip_grad_norm_`",
    'tamegrad `normalize_grad_`, `Clip(per="model")`, planned in every call',
    "tamegrad `ClipValue`",
)
LOOP, WHOLE, FOREACH = (
    "torch, a loop of `clip_grad_norm_` per layer",
    "torch `clip_grad_norm_`",
    "torch `clip_grad_norm_(foreach=True)`",
)
READ, WRITE = "floor: a plain read", "floor: a plain read, then a read and write"

_EXTRAS = ("optax", "jax", "smartclip")


@dataclass(frozen=True)
class Tool:
    """A tool to time.

    Args:
        name: Its name.
        run: The timed call.
        refill: Called before `run`, outside the timing, to rewrite the data that `run` works on.
        rival: The name of its equivalent in tamegrad; None for tamegrad itself and the floor.
    """

    name: str
    run: Callable[[], object]
    refill: Callable[[], object]
    rival: str | None = None


def left_out() -> list[str]:
    """Lists the libraries that are not installed."""
    return [name for name in _EXTRAS if importlib.util.find_spec(name) is None]


def versions() -> str:
    """Returns the versions of everything compared, by distribution name."""
    names = ["tamegrad", "torch", "numpy", "numba", *_EXTRAS]
    return ", ".join(f"{name} {version(name)}" for name in names if importlib.util.find_spec(name) is not None)


def tools(subject: Subject, threshold: float, *, without: Iterable[str] = ()) -> list[Tool]:
    """Lists the tools to time on a model.

    Args:
        subject: The model with its gradients.
        threshold: `HUGE` to clip nothing or `TINY` to clip everything.
        without: Libraries to leave out, besides those that are not installed.

    Returns:
        The tools.
    """
    found = [*_tamegrad(subject, threshold), *_torch(subject, threshold)]
    absent = {*left_out(), *without}
    if not absent & {"optax", "jax"}:
        found.append(_optax(subject, threshold))
    if "smartclip" not in absent:
        found.append(_smartclip(subject, threshold))
    flat = subject.flat
    return [
        *found,
        Tool(READ, flat.sum, subject.refill_flat),
        Tool(WRITE, lambda: (flat.sum(), flat.mul_(0.5)), subject.refill_flat),
    ]


def _tamegrad(subject: Subject, threshold: float) -> list[Tool]:
    strategies = {
        PER_LAYER: Clip(threshold, per="layer"),
        PER_TYPE: Clip(threshold, per="param_type"),
        GLOBAL: Clip(threshold, per="model"),
        PER_VALUE: ClipValue(threshold),
    }
    first, *others = (
        Tool(name, GradientNormalizer(subject.model, strategy).normalize_, subject.refill)
        for name, strategy in strategies.items()
    )
    reporting = GradientNormalizer(subject.model, strategies[PER_LAYER])

    def report() -> object:
        read = reporting.normalize_()
        return read.norms, read.total_norm

    plain = GradientNormalizer(subject.model, strategies[PER_LAYER], backend="foreach")
    parameters, whole = subject.parameters, strategies[GLOBAL]
    return [
        first,
        Tool(REPORTED, report, subject.refill),
        Tool(PLAIN, plain.normalize_, subject.refill),
        *others,
        Tool(IMPORTED, lambda: tamegrad.torch.clip_grad_norm_(parameters, threshold), subject.refill),
        Tool(ONCE, lambda: normalize_grad_(subject.model, whole), subject.refill),
    ]


def _torch(subject: Subject, threshold: float) -> list[Tool]:
    parameters, layers = subject.parameters, subject.layers

    def loop() -> None:
        for layer in layers:
            clip_grad_norm_(layer, threshold)

    return [
        Tool(LOOP, loop, subject.refill, PER_LAYER),
        Tool(WHOLE, lambda: clip_grad_norm_(parameters, threshold), subject.refill, GLOBAL),
        Tool(FOREACH, lambda: clip_grad_norm_(parameters, threshold, foreach=True), subject.refill, GLOBAL),
        Tool("torch `clip_grad_value_`", lambda: clip_grad_value_(parameters, threshold), subject.refill, PER_VALUE),
    ]


class _Jitted:
    """optax under jit, with its input donated, as in a compiled training step.

    Args:
        subject: The model whose gradients it copies.
    """

    def __init__(self, subject: Subject) -> None:
        import jax  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415  may be missing
        import optax  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: PLC0415  may be missing

        def clip(tree: list[jax.Array], threshold: float) -> object:
            transformation = optax.clip_by_global_norm(threshold)
            return transformation.update(tree, transformation.init(tree))[0]

        self._wait: Callable[[Any], Any] = jax.block_until_ready
        self._copy: Callable[[Any], Any] = jax.jit(lambda tree: jax.tree.map(jax.numpy.copy, tree))
        # The threshold is an argument, so that it compiles only once.
        self._clip: Callable[[Any, float], Any] = jax.jit(clip, donate_argnums=0)
        self._saved = [jax.numpy.array(view.numpy()) for view in subject.views]
        self._fresh = self._saved

    def refill(self) -> None:
        self._fresh = self._wait(self._copy(self._saved))

    def run(self, threshold: float) -> object:
        return self._wait(self._clip(self._fresh, threshold))


# The last one compiled: compiling takes longer than all timing.
_compiled: dict[Subject, _Jitted] = {}


def _optax(subject: Subject, threshold: float) -> Tool:
    if subject not in _compiled:
        _compiled.clear()
        _compiled[subject] = _Jitted(subject)
    jitted = _compiled[subject]
    return Tool("optax `clip_by_global_norm` under jit", lambda: jitted.run(threshold), jitted.refill, GLOBAL)


def _smartclip(subject: Subject, threshold: float) -> Tool:
    import smartclip  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415  may be missing

    # Its thresholds follow the norms it has seen. An extreme first norm and a slow average keep them there.
    clipper = smartclip.AutoClip(
        mode="percentile", percentile=50.0, ema_decay=0.999, scope="per_layer", warmup_steps=0, min_history=0
    )
    for name, _ in subject.model.named_modules():
        clipper.observe(threshold, key=("layer", name or "root"))
    return Tool(
        "smartclip `AutoClip`, per layer",
        lambda: smartclip.apply(subject.model, clipper),
        subject.refill,
        PER_LAYER,
    )
