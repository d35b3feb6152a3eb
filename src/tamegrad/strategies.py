"""What can be done to a group of gradients: frozen values, checked when they are made.

Here `G` is all values of one group as a vector, `‖G‖` its Euclidean norm and `t` the threshold. The definitions are
those of Deeplearning4j's `GradientNormalization` (org.deeplearning4j.nn.conf, 1.0.0-M2.1), without its epsilon.
Under every strategy an all-zero group stays zero; a group that holds NaN or infinity is never scaled, but treated as
`on_nonfinite` says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias, get_args

from tamegrad.errors import SettingError, quoted

__all__ = ["Clip", "ClipValue", "GradientNormalization", "Keep", "OnNonfinite", "Per", "Renormalize", "Strategy"]

Per: TypeAlias = Literal["layer", "param_type", "tensor", "model"]

# What is done about a group that holds NaN or infinity: left as it is, zeroed, the whole step skipped, an error raised.
OnNonfinite: TypeAlias = Literal["keep", "zero", "skip", "raise"]


@dataclass(frozen=True, slots=True)
class Keep:
    """Leaves every group as it is, and measures it. The group is the layer.

    Example:
        >>> Keep()
        Keep()
    """

    @property
    def per(self) -> Per:
        """What makes one group."""
        return "layer"

    def __str__(self) -> str:
        return "Keep()"


@dataclass(frozen=True, slots=True)
class Clip:
    """`G` if `‖G‖ ≤ t`, else `t·G/‖G‖`: the norm of a group ends at or under the threshold, the direction is kept.

    The comparison is strict: a group exactly at the threshold keeps its bits. A zero group stays zero.

    Args:
        threshold: The largest norm that is left alone, above 0, in the unit of the gradients; infinity only measures.
        per: What makes one group: `"layer"`, `"param_type"` (each parameter type of a layer on its own), `"tensor"` or
            `"model"`.

    Raises:
        SettingError: If the threshold is NaN, zero, negative or no number, or `per` is unknown.

    Example:
        >>> Clip(1.0)
        Clip(threshold=1.0, per='layer')
    """

    threshold: float
    per: Per = "layer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", _checked_threshold("Clip", self.threshold))
        _check_per("Clip", self.per)

    def __str__(self) -> str:
        return f'Clip({self.threshold:g}, per="{self.per}")'


@dataclass(frozen=True, slots=True)
class ClipValue:
    """Each value `g` becomes `sign(g)·min(t, |g|)`. The group that is reported is the layer.

    Args:
        threshold: The largest magnitude that is left alone, above 0, in the unit of the gradients; infinity only
            measures.

    Raises:
        SettingError: If the threshold is NaN, zero, negative or no number.

    Example:
        >>> ClipValue(0.5)
        ClipValue(threshold=0.5)
    """

    threshold: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", _checked_threshold("ClipValue", self.threshold))

    @property
    def per(self) -> Per:
        """What makes one group in the report."""
        return "layer"

    def __str__(self) -> str:
        return f"ClipValue({self.threshold:g})"


@dataclass(frozen=True, slots=True)
class Renormalize:
    """`G/‖G‖`: the norm of every group becomes 1, however small or large it was; a zero group stays zero.

    A step never shrinks under this strategy, so a run that has converged keeps moving by the learning rate.

    Args:
        per: What makes one group: `"layer"`, `"param_type"` (each parameter type of a layer on its own), `"tensor"` or
            `"model"`.

    Raises:
        SettingError: If `per` is unknown.

    Example:
        >>> Renormalize(per="param_type")
        Renormalize(per='param_type')
    """

    per: Per = "layer"

    def __post_init__(self) -> None:
        _check_per("Renormalize", self.per)

    def __str__(self) -> str:
        return f'Renormalize(per="{self.per}")'


Strategy: TypeAlias = Keep | Clip | ClipValue | Renormalize


class GradientNormalization(StrEnum):
    """Deeplearning4j's six strategies under its own spellings; calling a member with a threshold gives the strategy.

    Example:
        >>> GradientNormalization("ClipL2PerLayer")(0.5)
        Clip(threshold=0.5, per='layer')
        >>> GradientNormalization.RENORMALIZE_L2_PER_PARAM_TYPE()
        Renormalize(per='param_type')
    """

    NONE = "None"
    RENORMALIZE_L2_PER_LAYER = "RenormalizeL2PerLayer"
    RENORMALIZE_L2_PER_PARAM_TYPE = "RenormalizeL2PerParamType"
    CLIP_ELEMENT_WISE_ABSOLUTE_VALUE = "ClipElementWiseAbsoluteValue"
    CLIP_L2_PER_LAYER = "ClipL2PerLayer"
    CLIP_L2_PER_PARAM_TYPE = "ClipL2PerParamType"

    def __call__(self, threshold: float = 1.0) -> Strategy:
        """Returns the strategy of that name.

        Args:
            threshold: As in `Clip` and `ClipValue`; ignored by `NONE` and the renormalizations, as in Deeplearning4j.

        Returns:
            The strategy.

        Raises:
            SettingError: If the strategy has a threshold and this one is NaN, zero, negative or no number.
        """
        return _MAKERS[self](threshold)


_MAKERS: dict[GradientNormalization, Callable[[float], Strategy]] = {
    GradientNormalization.NONE: lambda _: Keep(),
    GradientNormalization.RENORMALIZE_L2_PER_LAYER: lambda _: Renormalize(per="layer"),
    GradientNormalization.RENORMALIZE_L2_PER_PARAM_TYPE: lambda _: Renormalize(per="param_type"),
    GradientNormalization.CLIP_ELEMENT_WISE_ABSOLUTE_VALUE: ClipValue,
    GradientNormalization.CLIP_L2_PER_LAYER: lambda threshold: Clip(threshold, per="layer"),
    GradientNormalization.CLIP_L2_PER_PARAM_TYPE: lambda threshold: Clip(threshold, per="param_type"),
}


def as_strategy(value: object, where: str) -> Strategy:
    """Returns the strategy that a user meant.

    Args:
        value: A strategy, a member of `GradientNormalization` (threshold 1.0), or None for `Keep()`.
        where: The setting it was given for, for the message.

    Returns:
        The strategy.

    Raises:
        SettingError: If `value` is anything else.

    Example:
        >>> as_strategy(GradientNormalization.CLIP_L2_PER_LAYER, "Policy(default)")
        Clip(threshold=1.0, per='layer')
    """
    if value is None:
        return Keep()
    if isinstance(value, GradientNormalization):
        return value()
    if isinstance(value, Strategy):
        return value
    raise SettingError(
        where,
        got=repr(value),
        allowed="Keep(), Clip(...), ClipValue(...), Renormalize(...), a member of GradientNormalization, or None",
        advice='pass for example Clip(1.0, per="layer") or GradientNormalization("ClipL2PerLayer")',
    )


def _checked_threshold(strategy: str, threshold: object) -> float:
    # bool is an int to Python; a NumPy or torch number converts, a string would too and is refused.
    refused = isinstance(threshold, bool | str | bytes)
    try:
        number = math.nan if refused else float(threshold)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number > 0:
        raise SettingError(
            f"{strategy}(threshold)",
            got=repr(threshold),
            allowed="a number above 0, or infinity to measure only",
            advice="pass for example 1.0, or use Keep() to leave gradients as they are",
        )
    return number


def check_on_nonfinite(value: object) -> None:
    """Refuses a choice of `on_nonfinite` that does not exist.

    Args:
        value: What the user passed.

    Raises:
        SettingError: If it is not one of `OnNonfinite`.
    """
    _check_choice(
        "on_nonfinite", value, get_args(OnNonfinite), advice='"keep" leaves such a group alone and reports it'
    )


def _check_per(strategy: str, per: object) -> None:
    _check_choice(f"{strategy}(per)", per, get_args(Per), advice='"layer" is the usual choice')


def _check_choice(where: str, value: object, choices: tuple[str, ...], advice: str) -> None:
    if value not in choices:
        raise SettingError(where, got=repr(value), allowed=quoted(choices), advice=advice)
