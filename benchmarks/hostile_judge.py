"""Judges in one word what a tool did to gradients, from their values before and after alone.

The oracle is NumPy float64 (norms as `m·2^e`, so that nothing overflows) and independent of the tools.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from hostile_inputs import Gradients, Input
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["MEANINGS", "ROUNDINGS", "Per", "Tool", "Verdict", "Word", "judge", "outcome"]

Array: TypeAlias = NDArray[Any]
# The group that shares one norm; under "value" each value counts on its own.
Per: TypeAlias = Literal["model", "layer", "tensor", "value"]

# A value is right within this many spacings of its dtype: the norm, the scale and the product are each rounded.
ROUNDINGS = 4

# The errors that the tools are known to raise; any other error is a bug of this benchmark.
RAISED = (RuntimeError, ValueError)


class Word(StrEnum):
    """What a tool did to gradients, from best to worst."""

    RIGHT = "right"
    UNTOUCHED = "untouched"
    CHANGED = "changed"
    WRONG_NORM = "wrong norm"
    WRONG_DIRECTION = "wrong direction"
    ZEROED = "zeroed"
    INF = "inf"
    NAN = "NaN"
    NEIGHBOUR = "neighbour changed"
    RAISED = "raised"
    NOT_APPLICABLE = "not applicable"


MEANINGS = {
    Word.RIGHT: "over the threshold: the norm is the threshold and the direction is kept, "
    f"every value to {ROUNDINGS} spacings of its dtype; at or under it: every value is unchanged; "
    "a layer that holds NaN or infinity has no right norm, so its finite values must stay unchanged",
    Word.UNTOUCHED: "unchanged although over the threshold, or although the threshold is invalid",
    Word.CHANGED: "changed although not over the threshold, with the change of the norm in brackets; "
    "or finite values of a layer that holds NaN or infinity were changed",
    Word.WRONG_NORM: "the direction is kept, but the norm is off by the percentage in brackets",
    Word.WRONG_DIRECTION: "the values are not a multiple of the right ones",
    Word.ZEROED: "every value became 0, or every finite value of a layer that holds NaN or infinity did",
    Word.INF: "finite values became infinite",
    Word.NAN: "finite values became NaN",
    Word.NEIGHBOUR: "NaN or infinity in one layer changed another layer, with the outcome for that layer in brackets",
    Word.RAISED: "the tool raised the error in brackets; no gradient was changed, unless the brackets say so",
    Word.NOT_APPLICABLE: "the framework has no such gradient",
}
_SEVERITY = list(Word)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One cell of the table."""

    word: Word
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.detail})" if self.detail else str(self.word)


@dataclass(frozen=True)
class Tool:
    """One column of the table.

    Args:
        name: The heading.
        per: The group that shares one norm.
        clip: Takes gradients and a threshold and returns the clipped gradients; may change its input.
        lacks: The `needs` that its framework does not have.
    """

    name: str
    per: Per
    clip: Callable[[Gradients, float], Gradients]
    lacks: frozenset[str] = frozenset()


def outcome(tool: Tool, row: Input) -> Verdict:
    """Gives one input to one tool and judges the outcome.

    Args:
        tool: The tool.
        row: The input.

    Returns:
        The verdict.
    """
    if row.needs in tool.lacks:
        return Verdict(Word.NOT_APPLICABLE)
    gradients = row.make()
    try:
        after = tool.clip(gradients, row.threshold)
    except RAISED as error:
        same = all(_same(old.wide, new.wide) for old, new in zip(_pieces(row.make()), _pieces(gradients), strict=True))
        return Verdict(Word.RAISED, type(error).__name__ + ("" if same else ", some already changed"))
    return judge(tool.per, row.threshold, row.make(), after)


def judge(per: Per, threshold: float, before: Gradients, after: Gradients) -> Verdict:
    """Judges clipped gradients against the gradients before clipping.

    Args:
        per: The group that shares one norm.
        threshold: The threshold of the tool; if it is not above 0, only raising is right.
        before: The gradients before clipping.
        after: The gradients of the same parameters after clipping.

    Returns:
        The worst verdict of all groups.
    """
    old = _pieces(before)
    new = {(piece.layer, piece.name): piece.wide for piece in _pieces(after)}
    pairs = [_Pair(piece, new[piece.layer, piece.name]) for piece in old]
    if not threshold > 0:
        return _fault(pairs, [piece.wide for piece in old])
    if per == "value":
        return _worst(_judge_values(pair, threshold) for pair in pairs)
    groups: dict[object, list[_Pair]] = {}
    for pair in pairs:
        key = {"model": None, "layer": pair.old.layer, "tensor": (pair.old.layer, pair.old.name)}[per]
        groups.setdefault(key, []).append(pair)
    return _worst(_judge_group(group, threshold) for group in groups.values())


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=lambda verdict: _SEVERITY.index(verdict.word), default=Verdict(Word.RIGHT))


@dataclass(frozen=True, slots=True)
class _Piece:
    """One gradient in float64 or complex128; `identity` is the same for a tensor that is shared."""

    layer: str
    name: str
    identity: int
    wide: Array
    spacing: float
    smallest: float


@dataclass(frozen=True, slots=True)
class _Pair:
    old: _Piece
    new: Array


def _pieces(gradients: Gradients) -> list[_Piece]:
    return [
        _piece(layer, name, gradient)
        for layer, named in gradients.items()
        for name, gradient in named.items()
        if gradient is not None
    ]


def _piece(layer: str, name: str, gradient: Tensor) -> _Piece:
    dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    finfo = torch.finfo(gradient.dtype)
    # A copy, because a tool may change the tensor later.
    wide = dense.to(torch.complex128 if dense.is_complex() else torch.float64, copy=True).numpy()
    return _Piece(layer, name, id(gradient), wide, finfo.eps, finfo.smallest_normal * finfo.eps)


def _judge_values(pair: _Pair, threshold: float) -> Verdict:
    """Judges the finite values of one parameter, each on its own: `sign(g)·min(t, |g|)`."""
    finite = np.isfinite(pair.old.wide)
    old = pair.old.wide[finite]
    magnitudes = np.abs(old)
    over = magnitudes > threshold
    limited = np.where(over, old / np.where(over, magnitudes, 1.0) * threshold, old)
    expected = limited if over.any() else old
    pairs = [_Pair(replace(pair.old, wide=old), pair.new[finite])]
    return Verdict(Word.RIGHT) if _is_right(pairs, [expected]) else _fault(pairs, [expected])


def _judge_group(group: Sequence[_Pair], threshold: float) -> Verdict:
    bad_layers = {pair.old.layer for pair in group if not np.isfinite(pair.old.wide).all()}
    bad = [pair for pair in group if pair.old.layer in bad_layers]
    good = [pair for pair in group if pair.old.layer not in bad_layers]
    verdict = _judge_finite(good, threshold)
    if bad and verdict.word not in {Word.RIGHT, Word.UNTOUCHED}:
        return Verdict(Word.NEIGHBOUR, str(verdict))
    return _worst([verdict, _harm(bad)])


def _judge_finite(group: Sequence[_Pair], threshold: float) -> Verdict:
    # A tensor that two parameters share counts once if it is one tensor in memory, twice if each has a copy.
    once = list({pair.old.identity: pair.old.wide for pair in group}.values())
    expected = _clipped(group, _norm(once), threshold)
    if _is_right(group, expected):
        return Verdict(Word.RIGHT)
    if len(once) < len(group):
        twice = _norm([pair.old.wide for pair in group])
        if _is_right(group, _clipped(group, twice, threshold)):
            return Verdict(Word.RIGHT)
    return _fault(group, expected)


def _harm(bad: Sequence[_Pair]) -> Verdict:
    """Judges layers that hold NaN or infinity: no norm is right, but their finite values must stay unchanged."""
    olds = _flat(pair.old.wide for pair in bad)
    news = _flat(pair.new for pair in bad)[np.isfinite(olds)]
    olds = olds[np.isfinite(olds)]
    if _same(olds, news):
        return Verdict(Word.RIGHT)
    if np.isnan(news).any():
        return Verdict(Word.NAN)
    return Verdict(Word.CHANGED if news.any() else Word.ZEROED)


def _clipped(group: Sequence[_Pair], norm: tuple[float, int], threshold: float) -> list[Array]:
    mantissa, exponent = norm
    if math.ldexp(mantissa, exponent) <= threshold:
        return [pair.old.wide for pair in group]
    scaled = (np.ldexp(_real(pair.old.wide), -exponent) / mantissa * threshold for pair in group)
    return [
        part.view(pair.old.wide.dtype).reshape(pair.old.wide.shape) for part, pair in zip(scaled, group, strict=True)
    ]


def _is_right(pairs: Sequence[_Pair], expected: Sequence[Array]) -> bool:
    for pair, wanted in zip(pairs, expected, strict=True):
        if wanted is pair.old.wide:
            close = _same(pair.new, wanted)
        else:
            allowed = ROUNDINGS * np.maximum(np.abs(wanted) * pair.old.spacing, pair.old.smallest)
            close = bool((np.abs(pair.new - wanted) <= allowed).all())
        if not close:
            return False
    return True


def _fault(pairs: Sequence[_Pair], expected: Sequence[Array]) -> Verdict:
    """Names what is wrong with gradients that are not as expected."""
    old, new, wanted = _flat(pair.old.wide for pair in pairs), _flat(pair.new for pair in pairs), _flat(expected)
    if np.isnan(new).any():
        return Verdict(Word.NAN)
    if np.isinf(new).any():
        return Verdict(Word.INF)
    if not new.any():
        return Verdict(Word.ZEROED)
    if _same(new, old):
        return Verdict(Word.UNTOUCHED)
    ratio = _ratio(_norm([new]), _norm([wanted]))
    spacing = max(pair.old.spacing for pair in pairs)
    allowed = 2 * ROUNDINGS * (np.abs(new) * spacing + max(pair.old.smallest for pair in pairs))
    if (np.abs(new - wanted * ratio) > allowed).any():
        return Verdict(Word.WRONG_DIRECTION)
    return Verdict(Word.CHANGED if _same(wanted, old) else Word.WRONG_NORM, f"{(ratio - 1) * 100:+.2g}%")


def _norm(arrays: Iterable[Array]) -> tuple[float, int]:
    """Returns the Euclidean norm of all values as a mantissa and an exponent."""
    values = _flat(arrays)
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    if largest == 0:
        return 0.0, 0
    exponent = math.frexp(largest)[1]
    scaled = np.ldexp(values, -exponent)
    return math.sqrt(float(np.square(scaled, out=scaled).sum())), exponent


def _ratio(norm: tuple[float, int], other: tuple[float, int]) -> float:
    return math.ldexp(norm[0] / other[0], norm[1] - other[1])


def _flat(arrays: Iterable[Array]) -> Array:
    parts = [_real(array).ravel() for array in arrays]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0), *parts])


def _real(array: Array) -> Array:
    """Returns a complex array as real values, two for each complex one."""
    return np.atleast_1d(np.ascontiguousarray(array)).view(np.float64)


def _same(one: Array, other: Array) -> bool:
    return bool(np.array_equal(one, other, equal_nan=True))
