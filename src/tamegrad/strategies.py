"""What can be done to a group of gradients: frozen values, checked when they are made.

A strategy owns its meaning: `Strategy.target` says what norm a group ends with, `Strategy.limit` how large an element
may be, and nothing else in tamegrad knows what a strategy means, except the oracle in `reference.py` and the fused GPU
kernel, which are tested against it.

Here `G` is all values of one group as a vector, `‖G‖` its Euclidean norm and `t` the threshold. The definitions are
those of Deeplearning4j's `GradientNormalization` (org.deeplearning4j.nn.conf, 1.0.0-M2.1), without its epsilon.
Under every strategy an all-zero group stays zero; a group that holds NaN or infinity is never scaled: `on_nonfinite`
decides what happens to it.
"""

import math
from collections.abc import Callable
from dataclasses import Field, dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from tamegrad.errors import SettingError, quoted

__all__ = ["Clip", "ClipValue", "GradientNormalization", "Keep", "OnNonfinite", "Per", "Renormalize", "Strategy"]

Per: TypeAlias = Literal["layer", "param_type", "tensor", "model"]

# What happens to a group that holds NaN or infinity: left as it is, zeroed, the whole step skipped, an error raised.
OnNonfinite: TypeAlias = Literal["keep", "zero", "skip_group", "skip", "raise"]

# An array of NumPy, PyTorch or JAX, which have no type in common.
AnyArray: TypeAlias = Any


class Strategy:
    """Base class of all strategies; subclass it to write your own.

    A subclass is a frozen dataclass with a field or property `per` and a method `target`. It then works on every
    backend, on sharded models and under a loss scale, like the built-in ones. `docs/your-own-strategy.md` shows one
    from start to end.

    `target` is called once a step for all groups that the class governs, whatever their thresholds: inside it, each
    field that was given as a float is a `(G,)` float64 array with one entry a group, on the device of `norms`. Fields
    of other types are as they were given; instances that differ in one of them are called separately.

    Attributes:
        per: What makes one group: `"layer"`, `"param_type"`, `"tensor"` or `"model"`. `"layer"` by default.

    Example:
        >>> import numpy as np
        >>> from tamegrad import normalize
        >>> @dataclass(frozen=True)
        ... class Soften(Strategy):
        ...     threshold: float
        ...     per: Per = "layer"
        ...
        ...     def target(self, norms, xp):
        ...         return self.threshold * xp.tanh(norms / self.threshold)
        >>> _, report = normalize({"out": {"weight": np.array([30.0, 40.0])}}, Soften(2.0))
        >>> report["out"].norm_after
        2.0
    """

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # of each subclass

    per: Per = "layer"

    def target(self, norms: AnyArray, xp: ModuleType) -> AnyArray:
        """Returns the norms that groups should end with.

        Called with the true norms: without the loss scale, added up over all ranks.

        Args:
            norms: `(G,)` float64, the norms before. NaN or infinite for groups that are not finite, and infinite for
                finite float64 groups whose norm is past 1.8e308.
            xp: The namespace of `norms`: `numpy`, `torch` or `jax.numpy`. Use functions that all three have.

        Returns:
            `(G,)` float64, the norms after: 0 or larger, and equal to `norms` where nothing should change. A group with
            an element that would grow past the largest number of its dtype ends with the largest norm that fits. What
            is returned for groups that are zero or not finite is ignored. On the CPU a target that is NaN, negative or
            infinite raises `SettingError` before any gradient is changed; on a device, where looking would make the
            host wait, such a group is left as it is and its scale in the report is NaN. Another shape always raises.
        """
        del xp
        return norms

    @property
    def limit(self) -> float:
        """The largest magnitude that an element may have; infinity unless the strategy limits elements.

        A strategy with a finite limit is element-wise: its `target` is not called, and its norms after are measured.
        """
        return math.inf

    @property
    def grows_to(self) -> float:
        """The largest norm that `target` may give a group whose norm is smaller; 0 if no norm ever grows.

        The default, infinity, makes every step check that no element overflows its dtype, which on a device takes one
        more pass over the gradients.
        """
        return math.inf

    @property
    def only_measures(self) -> bool:
        """Whether no group ever changes, whatever its norm; then a device does not even write its gradients.

        False unless there is no limit, and `target` is that of the base class or the strategy says so.
        """
        return type(self).target is Strategy.target and self.limit == math.inf


@dataclass(frozen=True, slots=True)
class Keep(Strategy):
    """Leaves every group as it is, and measures it. The group is the layer.

    Example:
        >>> Keep()
        Keep()
    """

    @property
    def grows_to(self) -> float:
        """0: no norm grows."""
        return 0.0

    def __str__(self) -> str:
        return "Keep()"


@dataclass(frozen=True, slots=True)
class Clip(Strategy):
    """`G` if `‖G‖ ≤ t`, else `t·G/‖G‖`: the norm of a group ends at or under the threshold, the direction is kept.

    The comparison is strict: a group exactly at the threshold keeps its bits. A zero group stays zero.

    Args:
        threshold: The largest norm that is left alone, above 0, in the unit of the gradients; infinity only measures.
        per: What makes one group: `"layer"`, `"param_type"` (each parameter type of a layer on its own), `"tensor"` or
            `"model"`.

    Raises:
        SettingError: If the threshold is NaN, zero, negative or not a number, or `per` is unknown.

    Example:
        >>> Clip(1.0)
        Clip(threshold=1.0, per='layer')
    """

    threshold: float
    per: Per = "layer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", _checked_threshold("Clip", self.threshold))
        check_per("Clip", self.per)

    def target(self, norms: AnyArray, xp: ModuleType) -> AnyArray:
        """Returns the norms, at most the threshold."""
        return xp.minimum(norms, self.threshold)

    @property
    def grows_to(self) -> float:
        """0: no norm grows."""
        return 0.0

    @property
    def only_measures(self) -> bool:
        """Whether the threshold is infinite."""
        # A subclass may have another target.
        return type(self).target is Clip.target and self.threshold == math.inf

    def __str__(self) -> str:
        return f'Clip({self.threshold:g}, per="{self.per}")'


@dataclass(frozen=True, slots=True)
class ClipValue(Strategy):
    """Each value `g` becomes `sign(g)·min(t, |g|)`. The group that is reported is the layer.

    Args:
        threshold: The largest magnitude that is left alone, above 0, in the unit of the gradients; infinity only
            measures.

    Raises:
        SettingError: If the threshold is NaN, zero, negative or not a number.

    Example:
        >>> ClipValue(0.5)
        ClipValue(threshold=0.5)
    """

    threshold: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", _checked_threshold("ClipValue", self.threshold))

    @property
    def limit(self) -> float:
        """The threshold."""
        return self.threshold

    def __str__(self) -> str:
        return f"ClipValue({self.threshold:g})"


@dataclass(frozen=True, slots=True)
class Renormalize(Strategy):
    """`G/‖G‖`: the norm of every group becomes 1, however small or large it was; a zero group stays zero.

    While gradients are multiplied by a loss scale, an element may be past the largest number of its dtype before the
    norm is 1: 65,536 in float16, where 65,504 is the largest. Such a group ends with the largest norm that fits, which
    its report shows.

    Steps never shrink under this strategy, so a run that has converged keeps moving by the learning rate.

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
        check_per("Renormalize", self.per)

    def target(self, norms: AnyArray, xp: ModuleType) -> AnyArray:
        """Returns 1 for every group."""
        return xp.ones_like(norms)

    @property
    def grows_to(self) -> float:
        """1."""
        return 1.0

    def __str__(self) -> str:
        return f'Renormalize(per="{self.per}")'


class GradientNormalization(StrEnum):
    """Deeplearning4j's six strategies with its exact spellings; call a member with a threshold to get the strategy.

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
            threshold: As in `Clip` and `ClipValue`; ignored by `NONE` and both renormalizations, as in Deeplearning4j.

        Returns:
            The strategy.

        Raises:
            SettingError: If the strategy takes a threshold and it is NaN, zero, negative or not a number.
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
        where: The setting it was passed for, for the message.

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
        _check_own(value, where)
        return value
    raise SettingError(
        where,
        got=repr(value),
        allowed="Keep(), Clip(...), ClipValue(...), Renormalize(...), an instance of your own subclass of Strategy, "
        "a member of GradientNormalization, or None",
        advice='pass for example Clip(1.0, per="layer") or GradientNormalization("ClipL2PerLayer")',
    )


def _check_own(strategy: Strategy, where: str) -> None:
    """Rejects a strategy that could change, or could not be compared, once the plan is made."""
    name = type(strategy).__name__
    if "__dataclass_fields__" not in vars(type(strategy)) or not _is_hashable(strategy):
        raise SettingError(
            where,
            got=f"a {name}, which is no frozen dataclass of its own, or has a field that cannot be hashed",
            allowed="a subclass of Strategy that is a frozen dataclass of numbers, strings and the like",
            advice=f"write @dataclass(frozen=True) above class {name}, and use tuples instead of lists",
        )
    check_per(name, strategy.per)


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


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
    """Rejects an unknown `on_nonfinite`.

    Args:
        value: What the user passed.

    Raises:
        SettingError: If it is not one of `OnNonfinite`.
    """
    _check_choice(
        "on_nonfinite", value, get_args(OnNonfinite), advice='"keep" leaves such a group alone and reports it'
    )


def check_per(strategy: str, per: object) -> None:
    """Rejects an unknown `per`.

    Args:
        strategy: The name of the strategy, for the message.
        per: What the user passed.

    Raises:
        SettingError: If it is not one of `Per`.
    """
    _check_choice(f"{strategy}(per)", per, get_args(Per), advice='"layer" is the usual choice')


def _check_choice(where: str, value: object, choices: tuple[str, ...], advice: str) -> None:
    if value not in choices:
        raise SettingError(where, got=repr(value), allowed=quoted(choices), advice=advice)
