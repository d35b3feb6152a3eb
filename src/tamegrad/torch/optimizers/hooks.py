"""The hooks by which optimizers normalize right before they step."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tamegrad.errors import Line, NonFiniteGradientError, SettingError, warn
from tamegrad.report import Report
from tamegrad.torch.normalizer import GradientNormalizer
from tamegrad.torch.optimizers.inertness import InertnessWatch
from tamegrad.torch.optimizers.stepping import NormalizedStep, Snapshot, StepCall, check_loss_scales, steps_around
from tamegrad.torch.optimizers.wrappers import held_by, hook_inherited_steps, optimizers_inside

__all__ = ["StepHooks"]


class StepHooks:
    """Normalizes before every step of some optimizers. They keep it alive, and it does not keep them alive.

    Args:
        normalizer: The normalizer.
        optimizers: The optimizers, and with each those inside it for the same parameters. With several, all gradients
            are normalized at the first step of a round, in which each of them steps once.
        normalized_step: Where one step calls another, which of them normalizes; None if the user did not say.
        attached_at: The user's line that attached.

    Attributes:
        report: What the last step did; None before the first.
        steps: How many steps were seen, or rounds of several optimizers.
    """

    def __init__(
        self,
        normalizer: GradientNormalizer,
        optimizers: Sequence[Optimizer],
        normalized_step: NormalizedStep | None,
        attached_at: Line,
    ) -> None:
        self.report: Report[Tensor] | None = None
        self.steps = 0
        self._normalizer = normalizer
        self._normalized_step = normalized_step
        self._numbers = WeakKeyDictionary[Optimizer, int]()
        may_call_others = False
        for number, optimizer in enumerate(optimizers):
            for one in (optimizer, *optimizers_inside(optimizer)):
                self._numbers[one] = number
                may_call_others |= hook_inherited_steps(one) or one is not optimizer
        self._refuse_innermost(len(optimizers), may_call_others=may_call_others)
        # Whether gradients may change between normalizing and stepping, and what they were.
        self._several = len(optimizers) > 1
        self._may_change = may_call_others or self._several
        self._snapshot = Snapshot(())
        # Which of the optimizers have stepped in this round.
        self._stepped: set[int] = set()
        self._running = 0
        self._is_normalized = False
        self._left_out: set[nn.Parameter] = set()
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        self._before_round: tuple[int, Report[Tensor] | None] = (0, None)
        self._warned_about_change = False
        self._watched_plan: object = None
        self.watch = InertnessWatch(" and ".join(type(one).__name__ for one in optimizers), attached_at)
        self._watch_parameters()
        # Opaque to torch.compile, which would trace the whole normalizer.
        disable: Any = torch.compiler.disable
        before, after = disable(self._before_step), disable(self._after_step)
        self._handles: list[Any] = []
        for one in self._numbers:
            self._handles += [one.register_step_pre_hook(before), one.register_step_post_hook(after)]

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that have hooks, those inside others included."""
        return list(self._numbers)

    def remove(self) -> None:
        """Removes the hooks; the report stays."""
        for handle in self._handles:
            handle.remove()
        self.watch.stop()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = StepCall(args, kwargs)
        closure = call.closure
        if self._running:
            self._running = steps_around(self.optimizers)
        is_inner = self._running > 0
        self._running += 1
        if not is_inner:
            self._begin(optimizer)
        if is_inner != (self._normalized_step == "innermost"):
            if is_inner and closure is None:
                self._warn_about_change(optimizer)
            return None
        if closure is None:
            self._normalize_once(optimizer)
            if call.may_only_initialize:
                self._forget_if_zero()
            return None
        # The gradients do not exist yet.

        def normalized() -> object:
            loss = closure()
            # LBFGS changes the parameters after each of them.
            self.watch.step_seen()
            self._normalize(optimizer)
            return loss

        return call.with_closure(normalized)

    def _after_step(self, *_: object) -> None:
        self._running -= 1
        if self._running:
            self._running = steps_around(self.optimizers)
        if not self._running:
            self._end()

    def _begin(self, optimizer: Optimizer) -> None:
        """Begins a step that is not inside another one."""
        self.watch.step_seen()
        # Gradients hidden by a step that raised are not restored: by now they may be of another batch.
        self._hidden.clear()
        self._is_normalized = False
        self._before_round = (self.steps, self.report)
        if self._begins_round(optimizer):
            self.steps += 1

    def _end(self) -> None:
        """Ends a step that is not inside another one."""
        # Some steps evaluate the model themselves, and change parameters in between.
        self.watch.step_seen()
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()
        if not self._is_normalized and self._normalized_step == "innermost":
            raise SettingError(
                'attach(normalize="innermost")',
                got="a step that called no other step inside, and so used its gradients as they were",
                allowed='"innermost" for optimizers that call another step in each of their steps',
                advice='pass normalize="outermost"',
            )
        self._normalizer.settings.log.after_step(self.steps, self.report)

    def _begins_round(self, optimizer: Optimizer) -> bool:
        return not self._stepped or self._numbers[optimizer] in self._stepped

    def _normalize_once(self, optimizer: Optimizer) -> None:
        """Normalizes, unless the gradients that the optimizer steps with are normalized already."""
        changed = self._may_change and self._snapshot.changed(held_by(optimizer))
        if self._is_normalized and not changed:
            return
        if self._begins_round(optimizer):
            if self._several:
                check_loss_scales(self.optimizers)
            self._normalize(optimizer)
            return
        if changed:
            raise SettingError(
                f"{type(optimizer).__name__}.step",
                got="gradients that changed since they were normalized at the step of another optimizer",
                allowed="a backward pass, and then one step of every optimizer that is attached to",
                advice="call backward() before the first of the steps, and change no gradient between them",
            )
        self._stepped.add(self._numbers[optimizer])
        self._hide(optimizer)

    def _normalize(self, optimizer: Optimizer) -> None:
        # torch.amp.GradScaler leaves it to a fused optimizer to divide by the loss scale and to skip on infinity.
        loss_scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        scaler_skips = (
            found_inf is not None and self._normalizer.settings.on_nonfinite in {"skip", "raise"} and bool(found_inf)
        )
        try:
            self.report = self._normalizer._normalize(loss_scale, scaler_skips=scaler_skips)  # noqa: SLF001
        except NonFiniteGradientError:
            # The scaler removes its attributes after the step, which it no longer reaches.
            for name in ("grad_scale", "found_inf"):
                if hasattr(optimizer, name):
                    delattr(optimizer, name)
            raise
        self._left_out = set(self._normalizer._left_out(self.report))  # noqa: SLF001
        self._is_normalized = True
        self._stepped = {self._numbers[optimizer]}
        self._hide(optimizer)
        self._watch_parameters()
        if self._may_change:
            self._snapshot = Snapshot(parameter for one in self.optimizers for parameter in held_by(one))

    def _forget_if_zero(self) -> None:
        """Leaves no trace of a step that only created the optimizer's state."""
        if self.report is not None and self.report.total_norm == 0:
            self.steps, self.report = self._before_round

    def _hide(self, optimizer: Optimizer) -> None:
        """Hides gradients: a hook cannot cancel a step, but no optimizer touches a parameter without a gradient."""
        skipped = self.report is not None and self.report.skipped
        # Most steps hide nothing, and looking at every parameter takes time.
        for parameter in held_by(optimizer) if skipped or self._left_out else []:
            if parameter.grad is not None and (skipped or parameter in self._left_out):
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None

    def _warn_about_change(self, optimizer: Optimizer) -> None:
        """Warns once if a step changed its gradients before it called another step, and the user did not choose."""
        if self._normalized_step is not None or self._warned_about_change:
            return
        if self._snapshot.changed(held_by(optimizer)):
            self._warned_about_change = True
            warn(
                f"{type(optimizer).__name__}.step() changed its gradients after they were normalized, and then called "
                'another step with them. Pass normalize="innermost" to attach() to normalize what that step uses, as '
                'gradient surgery wants, or normalize="outermost" to keep it as it is (tamegrad warns once)'
            )

    def _refuse_innermost(self, optimizers: int, *, may_call_others: bool) -> None:
        if self._normalized_step == "innermost" and (optimizers > 1 or not may_call_others):
            raise SettingError(
                'attach(normalize="innermost")',
                got=f"{optimizers} optimizers" if optimizers > 1 else "an optimizer whose step calls no other step",
                allowed='"innermost" for one optimizer whose step calls super().step(), or that of one inside it',
                advice='leave normalize= out, or pass "outermost"',
            )

    def _watch_parameters(self) -> None:
        if self._normalizer.plan is not self._watched_plan or not self.watch.is_watching:
            self._watched_plan = self._normalizer.plan
            self.watch.watch([parameter for one in self.optimizers for parameter in held_by(one)])
