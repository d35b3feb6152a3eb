"""Errors and warnings. Every message says where, what was given, what is allowed and what to do next."""

import copyreg
import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import currentframe
from traceback import walk_stack

__all__ = [
    "MissingExtraError",
    "NonFiniteGradientError",
    "SettingError",
    "TamegradError",
    "TamegradWarning",
    "UnknownGroupError",
    "UnmatchedError",
]

# Where a call to tamegrad passes through on its way from the user's own code: libraries that call `optimizer.step()`
# for their users, and what they wrap it with.
_LIBRARIES = frozenset(
    {
        "accelerate",
        "contextlib",
        "deepspeed",
        "fastai",
        "functools",
        "ignite",
        "keras",
        "lightning",
        "lightning_fabric",
        "opacus",
        "pytorch_lightning",
        "pytorch_optimizer",
        "schedulefree",
        "sentence_transformers",
        "tamegrad",
        "torch",
        "transformers",
        "trl",
    }
)


# What `warnings` has shown, so that it shows it once a line.
_warned: dict[str | tuple[str, type[Warning], int], int] = {}


class TamegradError(ValueError):
    """Base class of all user-fixable errors.

    Args:
        where: The call, setting or file at fault, as the user wrote it.
        got: What was found there.
        allowed: What would have been accepted.
        advice: What to do next.

    Example:
        >>> raise TamegradError("Clip(threshold=0)", got="0", allowed="a number above 0", advice="use Keep()")
        Traceback (most recent call last):
        tamegrad.errors.TamegradError: Clip(threshold=0): got 0; allowed: a number above 0; next: use Keep()
    """

    def __init__(self, where: str, *, got: str, allowed: str, advice: str) -> None:
        self.where = where
        self.got = got
        self.allowed = allowed
        self.advice = advice
        super().__init__(f"{where}: got {got}; allowed: {allowed}; next: {advice}")

    def __reduce__(self) -> tuple[object, ...]:
        # Python would call the constructor with the message alone. Without a call, subclasses may change its arguments.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]  # not in its stub


class TamegradWarning(UserWarning):
    """Something allowed that is probably a mistake: a step without any gradient, a parameter that no layer owns."""


class SettingError(TamegradError):
    """A setting or an input is invalid: a threshold of zero, an unknown `per`, a model without parameters."""


class UnmatchedError(TamegradError):
    """A pattern or a name matches nothing; the message names the closest matches."""


class UnknownGroupError(UnmatchedError, KeyError):
    """A report has no group of this name; the message names the closest."""

    def __str__(self) -> str:
        # A KeyError shows its message in quotes.
        return str(self.args[0])


class NonFiniteGradientError(TamegradError, RuntimeError):
    """A gradient holds NaN or infinity where that is to raise; no gradient was changed.

    It is a `RuntimeError` too, as what `torch.nn.utils.clip_grad_norm_` raises.

    Args:
        counts: By the full name of each affected parameter, how many values are NaN, plus and minus infinity; empty if
            they are all in another stage of a pipeline.
        layers: The layers of these parameters.
        where: The call at fault; by default the gradients of these layers.
        advice: What to do next.

    Example:
        >>> raise NonFiniteGradientError({"rnn.weight_hh_l0": (2, 1, 0)}, ["rnn.l0"])
        Traceback (most recent call last):
        tamegrad.errors.NonFiniteGradientError: gradients of layer 'rnn.l0': got rnn.weight_hh_l0: 2 NaN, 1 +inf;
        allowed: finite values; next: look at the loss and the inputs of this step, or pass on_nonfinite="skip", "zero"
        or "keep"
    """

    most_named = 10

    def __init__(
        self,
        counts: Mapping[str, tuple[int, int, int]],
        layers: Sequence[str],
        *,
        where: str | None = None,
        advice: str = 'look at the loss and the inputs of this step, or pass on_nonfinite="skip", "zero" or "keep"',
    ) -> None:
        self.counts = dict(counts)
        self.layers = tuple(layers)
        named = [
            f"{name}: {', '.join(f'{n} {what}' for n, what in zip(numbers, ('NaN', '+inf', '-inf'), strict=True) if n)}"
            for name, numbers in list(counts.items())[: self.most_named]
        ]
        more = len(counts) - len(named)
        named_layers = f"layer{'' if len(layers) == 1 else 's'} {quoted(layers[: self.most_named])}"
        super().__init__(
            where or f"gradients of {named_layers if layers else 'another stage of the pipeline'}",
            got="; ".join(named) + (f"; and {more} parameters more" if more else "") or "NaN or infinity, named there",
            allowed="finite values",
            advice=advice,
        )


class MissingExtraError(TamegradError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


def closest(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Returns the names that are spelled most like `name`, best first.

    Args:
        name: What the user wrote.
        names: The names that exist.
        most: The largest number of names to return.

    Returns:
        Up to `most` names. No match is too distant: any hint beats none.

    Example:
        >>> closest("rnn.0", ["embedding", "rnn.l0", "rnn.l1"], most=2)
        ['rnn.l0', 'rnn.l1']
    """
    return difflib.get_close_matches(name, list(names), n=most, cutoff=0.0)


def quoted(names: Iterable[str]) -> str:
    """Returns names as a list for a message: `'a', 'b'`, or `none`.

    Args:
        names: The names, in the order to show.

    Returns:
        One line.

    Example:
        >>> quoted(["rnn.l0", "rnn.l1"])
        "'rnn.l0', 'rnn.l1'"
    """
    return ", ".join(repr(name) for name in names) or "none"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of code.

    Args:
        file: The path of its file, as Python knows it.
        number: Its number there, from 1.
    """

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


def users_line() -> Line:
    """Returns the line of the user's own code that led here.

    That is the innermost call whose module is not of tamegrad, PyTorch or a library that steps optimizers for its
    users. If every call is of one of these, it is the outermost.
    """
    line = Line("<unknown>", 1)
    for frame, number in walk_stack(currentframe()):
        line = Line(frame.f_code.co_filename, number)
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES:
            break
    return line


def warn(message: str, at: Line | None = None) -> None:
    """Warns the user, at a line of the user's own code.

    Args:
        message: What is probably a mistake, and what to do about it.
        at: The line; by default the one that led here.

    Warns:
        TamegradWarning: As the filters of `warnings` say; by default once a line of the user's code.

    Example:
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     warn("nothing to normalize: call loss.backward() first")
        >>> caught[0].category.__name__, str(caught[0].message)
        ('TamegradWarning', 'nothing to normalize: call loss.backward() first')
    """
    line = users_line() if at is None else at
    warnings.warn_explicit(message, TamegradWarning, line.file, line.number, registry=_warned)
