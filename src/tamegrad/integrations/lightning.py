"""For Lightning: a callback that normalizes before every step of the optimizers, and logs the norms.

It works with `lightning` and `pytorch_lightning`, whichever the trainer is from.
"""

import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Self, TypeAlias, Unpack

from numpy.typing import NDArray
from torch import nn

from tamegrad.errors import SettingError
from tamegrad.integrations.required import require_one_of
from tamegrad.report import Report
from tamegrad.torch.attach import AttachedNormalizer, attach
from tamegrad.torch.optimizers.stepping import NormalizedStep, check_normalized_step
from tamegrad.torch.settings import Keywords, Settings

__all__ = ["NormalizeGradients"]

require_one_of(("lightning", "pytorch_lightning"), module=__name__, install="lightning")

# The same code is published under two names, and a trainer takes the callbacks of its own.
_LIBRARIES = ("lightning.pytorch", "pytorch_lightning")


# Of either library: to import its class here would choose one.
Trainer: TypeAlias = Any


class NormalizeGradients:
    """A callback for `Trainer(callbacks=[...])` that attaches to the optimizers while the trainer fits.

    It is a `Callback` of `lightning`, of `pytorch_lightning`, or of both: of what is imported when it is made.

    Every `log_every` steps the norms go to the trainer's loggers, as `Report.as_scalars` names them, under the step
    number that `LearningRateMonitor` logs with. With several optimizers the names begin with `grad/0`, `grad/1` and so
    on. They do not show in the progress bar.

    The counters of the normalizers are part of the trainer's checkpoints. A fit that starts at step 0 counts anew.

    Args:
        policy: A `Policy`, a strategy, or a member of `GradientNormalization` (threshold 1.0), for every optimizer. Or
            a list of them, one an optimizer, in the order of `configure_optimizers`.
        normalize: As in `attach`.
        **settings: As in `attach`; `log_every` (50 if not given) is for the loggers, too.

    Attributes:
        normalizers: The attached normalizers, one an optimizer; after the fit they are detached, and their reports
            stay. Empty before the first.

    Raises:
        SettingError: If a setting is invalid.

    Example:
        >>> import lightning
        >>> import torch
        >>> from tamegrad import Clip
        >>> class Module(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.out = torch.nn.Linear(4, 1)
        ...
        ...     def training_step(self, batch, _):
        ...         return (100 * self.out(batch)).square().mean()
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> callback = NormalizeGradients(Clip(1.0))
        >>> names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        >>> off = dict.fromkeys(names, False)
        >>> trainer = lightning.Trainer(accelerator="cpu", max_steps=3, callbacks=[callback], **off)
        >>> trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(8, 4)))
        >>> callback.normalizers[0].steps, callback.normalizers[0].report["out"].norm_after
        (3, 1.0)
    """

    def __new__(cls, *_: object, **__: object) -> Self:
        """Makes it a callback of what is imported."""
        declared: Any = cls
        made: Self = super().__new__(_as_callback(declared, _callback_classes()))
        return made

    def __init__(
        self, policy: object, *, normalize: NormalizedStep | None = None, **settings: Unpack[Keywords]
    ) -> None:
        self.normalizers: list[AttachedNormalizer] = []
        self._policies = list(policy) if isinstance(policy, list | tuple) else policy
        for one in self._policies if isinstance(self._policies, list) else [policy]:
            Settings.of(one, **settings)
        check_normalized_step(normalize)
        self._normalize: NormalizedStep | None = normalize
        self._settings = settings
        self._counters: list[Mapping[str, Any]] = []
        self._for_loggers: list[_ForLoggers] = []

    def on_fit_start(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Refuses a trainer that clips as well.

        Raises:
            SettingError: If `gradient_clip_val` is set.
        """
        del pl_module
        if trainer.gradient_clip_val:
            raise SettingError(
                "Trainer(gradient_clip_val)",
                got=f"{trainer.gradient_clip_val} beside NormalizeGradients, which would normalize what it has clipped",
                allowed="one of them",
                advice='leave gradient_clip_val out; Clip(threshold, per="model") does the same',
            )

    def on_train_start(self, trainer: Trainer, pl_module: nn.Module) -> None:
        """Attaches to the optimizers.

        Raises:
            SettingError: If there are more or fewer optimizers than strategies, or as `attach` does.
            UnmatchedError: As `attach` does.
        """
        optimizers = trainer.optimizers
        policies = self._policies_of(len(optimizers))
        counters = self._counters_now() if trainer.global_step else []
        sinks = self._settings.get("sinks", ())
        self.normalizers, self._for_loggers = [], []
        for number, (optimizer, policy) in enumerate(zip(optimizers, policies, strict=True)):
            for_loggers = _ForLoggers("grad" if len(optimizers) == 1 else f"grad/{number}")
            settings: Keywords = {**self._settings, "sinks": [*sinks, for_loggers]}
            normalizer = attach(pl_module, optimizer, policy, normalize=self._normalize, **settings)
            self._for_loggers.append(for_loggers)
            self.normalizers.append(normalizer)
            if number < len(counters):
                normalizer.load_state_dict(counters[number])

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Logs the norms of a step that was taken in this batch, if it is one that is logged."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001  what LearningRateMonitor logs with
        for scalars in filter(None, [for_loggers.taken() for for_loggers in self._for_loggers]):
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=step)

    def on_train_end(self, *_: object) -> None:
        """Detaches."""
        self._detach()

    def on_exception(self, *_: object) -> None:
        """Detaches."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters for the trainer's checkpoint, which `weights_only=True` loads. Reads the device."""
        counters = self._counters_now()
        return {"normalizers": counters} if counters else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keeps the counters of a checkpoint for when it attaches."""
        self.normalizers, self._counters = [], list(state["normalizers"])

    def __reduce__(self) -> tuple[object, ...]:
        # The class was made for this process, and a copy is not attached to anything.
        state = {**vars(self), "normalizers": [], "_for_loggers": [], "_counters": self._counters_now()}
        return _new, (type(self).__bases__[0],), state

    def _detach(self) -> None:
        for normalizer in self.normalizers:
            normalizer.detach()

    def _counters_now(self) -> list[Mapping[str, Any]]:
        return [normalizer.state_dict() for normalizer in self.normalizers] or self._counters

    def _policies_of(self, optimizers: int) -> Sequence[object]:
        """Returns one policy an optimizer."""
        if not isinstance(self._policies, list):
            return [self._policies] * optimizers
        if len(self._policies) != optimizers:
            raise SettingError(
                "NormalizeGradients(policy)",
                got=f"a list of {len(self._policies)} for {optimizers} optimizers",
                allowed="one strategy or policy an optimizer, or one for all",
                advice="list them in the order of configure_optimizers, with Keep() where nothing is to change",
            )
        return self._policies


class _ForLoggers:
    """A sink that keeps what is to be logged until the end of the batch.

    Args:
        prefix: What the names begin with.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._scalars: dict[str, float] = {}

    def write(self, step: int, report: Report[NDArray[Any]]) -> None:
        """Keeps one report."""
        del step
        self._scalars = report.as_scalars(self._prefix)

    def taken(self) -> dict[str, float]:
        """Returns what was kept, once; empty if there is nothing new."""
        scalars, self._scalars = self._scalars, {}
        return scalars


def _new(cls: Any) -> Any:  # noqa: ANN401  a class, and what it makes
    """Makes a callback that has no attributes yet."""
    return cls.__new__(cls)


def _callback_classes() -> tuple[type, ...]:
    """Returns `Callback` of each of the libraries that are imported; if none is, of the first that is installed."""
    names = [name for name in _LIBRARIES if name in sys.modules]
    names = names or [name for name in _LIBRARIES if find_spec(name.partition(".")[0]) is not None][:1]
    return tuple(importlib.import_module(name).Callback for name in names)


@functools.cache
def _as_callback(cls: type, bases: tuple[type, ...]) -> Any:  # noqa: ANN401  mypy does not follow bases made at runtime
    """Returns the class as a subclass of others."""
    # Checkpoints are keyed by the qualified name.
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, *bases), named)
