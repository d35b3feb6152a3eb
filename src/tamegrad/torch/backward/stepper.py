"""`StepInBackward`: the optimizer of a model that steps each layer while backward is still running."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Unpack

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from tamegrad.errors import SettingError, users_line, warn
from tamegrad.groups import Plan
from tamegrad.policy import Policy
from tamegrad.report import Report
from tamegrad.torch.backward.hooks import hook_parameters, refuse_hooked
from tamegrad.torch.backward.passes import Passes
from tamegrad.torch.backward.refusals import (
    refuse_data_parallel,
    refuse_model_wide,
    refuse_scaler,
    refuse_settings,
    scaler_error,
)
from tamegrad.torch.backward.reports import joined
from tamegrad.torch.backward.turns import Turns
from tamegrad.torch.backward.units import MakeOptimizer, Unit, flat_groups
from tamegrad.torch.model.planning import PlannedModel, Planner
from tamegrad.torch.model.selection import Selection
from tamegrad.torch.settings import Keywords, Settings

__all__ = ["StepInBackward"]

# Calls of step() without a step, after which accumulation is probably a mistake.
_MANY_HELD_CALLS = 100


class StepInBackward(Optimizer):
    """Normalizes, steps and frees each layer inside `loss.backward()`, as soon as its gradient is there.

    After `loss.backward()` the parameters are what they would be had all gradients been normalized and stepped after
    it, and the gradients are gone: at no time are there more than those of the layers that backward is working on. A
    layer whose parameters did not all get a gradient is stepped at the end of backward.

    It is an optimizer of the whole model: learning rate schedulers take it, `param_groups` and `state_dict` are those
    of one optimizer that `make_optimizer` would make for all parameters, and `step()` may stay in the loop. Every
    `backward()` steps, so gradients are accumulated inside `with stepper.accumulate():`.

    Args:
        model: The model; its layers are the modules that own parameters.
        make_optimizer: A function that takes the list of a layer's parameters and returns an optimizer for them. It is
            called once a layer.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization` (threshold 1.0); not `per="model"`.
        parameters: The parameters to step, where not all of the model's. Frozen parameters may be among them: they are
            stepped once they are unfrozen.
        **settings: As in `GradientNormalizer`, without `process_groups`. `layers=` merges modules into one layer, which
            is held until its last gradient is there. `on_nonfinite="skip"` is refused; under `"raise"`, the error says
            which layers were stepped before.

    Attributes:
        settings: What was set.
        report: What the last backward pass did; None before the first.
        steps: How many backward passes have stepped so far.

    Raises:
        SettingError: If a setting is unknown or needs the gradients of the whole model, `make_optimizer` returns no
            optimizer for exactly these parameters, the parameters have a `StepInBackward` already, or the model is in
            `DistributedDataParallel`.
        UnmatchedError: If an override or a pattern of `layers` matches nothing; the message names the closest.

    Example:
        >>> import torch
        >>> from tamegrad import Clip
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> stepper = StepInBackward(model, lambda params: torch.optim.AdamW(params, lr=0.1), Clip(1.0, per="layer"))
        >>> model(torch.ones(4, 2)).square().sum().backward()
        >>> model[0].weight.grad is None, stepper.steps, stepper.report.groups
        (True, 1, ('0', '1'))
        >>> stepper.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        policy: object,
        *,
        parameters: Iterable[nn.Parameter] | None = None,
        **settings: Unpack[Keywords],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SettingError(
                "StepInBackward(model)", got=f"a {type(model).__name__}", allowed="a module", advice="pass the model"
            )
        self.settings = Settings.of(policy, **settings)
        refuse_settings(self.settings)
        order = list(model.parameters() if parameters is None else parameters)
        self._planner = Planner(model, self.settings, Selection.of(None if parameters is None else order))
        self._planned = self._plan(self.settings.policy)
        refuse_hooked([parameter.name for parameter in self.plan.parameters], self._planned.parameters)
        refuse_data_parallel(self._planned.parameters)
        self._units = [Unit(part, self.settings, make_optimizer) for part in self._planned.by_layer()]
        groups = flat_groups(self._units, order)
        self._is_built = False
        super().__init__(groups, dict(self._units[0].optimizer.defaults))
        self._is_built = True
        for unit in self._units:
            self.state.update(unit.optimizer.state)
            unit.optimizer.state = self.state
        self.report: Report[Tensor] | None = None
        self.steps = 0
        self._passes = Passes(self._units)
        self._turns = Turns(self._units, self._planned.reduction.group)
        self._was_looked_at = False
        self._passes_since_step = 0
        self._arrived_since_step = False
        self._held_calls = 0
        self._warned: set[str] = set()
        # Gradients of several devices arrive on several threads.
        self._lock = threading.RLock()
        units = [unit.parameters for unit in self._units]
        self._handles = hook_parameters(units, self._arrived, users_line())

    @property
    def policy(self) -> Policy:
        """Which layer gets which strategy; assign another to change it, between two backward passes.

        Raises:
            SettingError: If what is assigned is neither a policy nor a strategy, or needs the whole model's gradients,
                or the model has other parameters than at the beginning; then nothing changes.
            UnmatchedError: If an override matches nothing; then nothing changes.
        """
        return self.settings.policy

    @policy.setter
    def policy(self, policy: object) -> None:
        settings = self.settings.with_policy(policy)
        planned = self._plan(settings.policy)
        if list(map(id, planned.parameters)) != list(map(id, self._planned.parameters)):
            raise SettingError(
                "StepInBackward.policy",
                got="a model with other parameters or layers than when its StepInBackward was made",
                allowed="a change of the policy alone",
                advice="call detach(), make a new StepInBackward, and load the state_dict() of this one",
            )
        for unit, part in zip(self._units, planned.by_layer(), strict=True):
            unit.use(part, settings)
        self._planned, self.settings = planned, settings

    @property
    def plan(self) -> Plan:
        """Every layer, its parameter types, its strategy."""
        return self._planned.plan

    @property
    def nonfinite_steps(self) -> dict[str, int]:
        """In how many steps so far each group held NaN or infinity; groups that never did are left out.

        Reads the device.
        """
        return dict(sum((unit.nonfinite_steps for unit in self._units), Counter[str]()))

    @property
    def attached(self) -> bool:
        """Whether backward passes step: not after `detach`."""
        return bool(self._handles)

    def accumulate(self) -> AbstractContextManager[None]:
        """Returns a context in which `backward()` adds to the gradients and steps nothing.

        Run all micro-batches of a step but the last inside of it. The gradients of all layers are kept until then, so
        accumulating takes as much memory as stepping after backward.

        Example:
            >>> import torch
            >>> from tamegrad import Clip
            >>> model = torch.nn.Linear(2, 1)
            >>> stepper = StepInBackward(model, torch.optim.SGD, Clip(1.0))
            >>> with stepper.accumulate():
            ...     model(torch.ones(4, 2)).sum().backward()
            >>> model(torch.ones(4, 2)).sum().backward()
            >>> stepper.steps
            1
        """
        return self._passes.accumulate()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401  what the closure returns
        """Does nothing after a backward pass, which has stepped already, so that it may stay in the loop.

        Gradients that no backward pass has made, but someone has put there, are normalized and stepped.

        Args:
            closure: Called first, if given: the backward pass in it steps.

        Returns:
            What the closure returned.

        Raises:
            SettingError: After `detach`.

        Warns:
            TamegradWarning: Once each, if several backward passes have stepped since the last call, if no gradient has
                come since then, and if `accumulate` has held back all steps for many calls.
        """
        if not self.attached:
            raise SettingError(
                "StepInBackward.step", got="a call after detach()", allowed="calls before it", advice="make a new one"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_gradients_put_by_hand()
        self._warn_about_loop()
        self._held_calls = 0 if self._passes_since_step else self._held_calls + 1
        self._passes_since_step, self._arrived_since_step = 0, False
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002  the signature of the base class
        """Drops all gradients that are there: accumulated ones, and those that a backward pass left that raised.

        Args:
            set_to_none: As in `torch.optim.Optimizer.zero_grad`.

        Warns:
            TamegradWarning: If the last backward pass raised half way, with the layers that it stepped, unless the
                error itself said so.
        """
        self._passes.drop()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses: the layers are known when this is made.

        Raises:
            SettingError: Always.
        """
        if self._is_built:
            raise SettingError(
                "StepInBackward.add_param_group",
                got="further parameters",
                allowed="the parameters that it was made with; frozen ones are stepped once they are unfrozen",
                advice="call detach(), make a new StepInBackward with all parameters, and load the state_dict() of "
                "this one",
            )
        super().add_param_group(param_group)

    def detach(self) -> None:
        """Removes the hooks: from now on backward leaves its gradients. Detaching twice is not an error."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _plan(self, policy: Policy) -> PlannedModel:
        planned = self._planner.first_plan(policy)
        refuse_model_wide(planned.plan)
        return planned

    def _arrived(self, position: int) -> None:
        """Counts a gradient that has arrived for a unit; called by the hooks."""
        unit = self._units[position]
        with self._lock:
            self._arrived_since_step = True
            try:
                if self._passes.begin_if_new():
                    self._look_once()
                    self._turns.begin()
                    _at_the_end_of_backward(lambda: _at_the_end_of_backward(self._end))
                if self._passes.accumulates:
                    return
                if self._passes.completes(unit):
                    for finishable in self._turns.finishable_with(unit):
                        self._finish(finishable)
            except Exception as error:
                self._passes.explain(error)
                raise

    def _end(self) -> None:
        """Steps what is left at the end of a backward pass."""
        with self._lock:
            try:
                for unit in self._turns.in_order(self._passes.unfinished()):
                    self._finish(unit)
                self._turns.settle(self._passes.finished_units)
            except Exception as error:
                self._passes.explain(error)
                raise
            self._passes.end()
        self._count_step()

    def _finish(self, unit: Unit) -> None:
        unit.finish(self.param_groups, self.state)
        self._passes.finished(unit)

    def _count_step(self) -> None:
        self.report = joined([unit.report for unit in self._units if unit.report is not None])
        self.steps += 1
        self.settings.log.after_step(self.steps, self.report)
        self._passes_since_step += 1
        # What learning rate schedulers look at, to warn if they step before the optimizer.
        self._opt_called = True

    def _look_once(self) -> None:
        """Looks, in the first backward pass, for what must not be around it."""
        if not self._was_looked_at:
            refuse_scaler()
            refuse_data_parallel(self._planned.parameters)
            self._was_looked_at = True

    def _step_gradients_put_by_hand(self) -> None:
        if self._arrived_since_step or self._passes.holds or not any(unit.has_gradient() for unit in self._units):
            return
        self._arrived_since_step = True
        for unit in self._units:
            unit.finish(self.param_groups, self.state)
        self._count_step()

    def _warn_about_loop(self) -> None:
        if self._passes_since_step > 1:
            self._warn_once(
                "forgotten",
                f"{self._passes_since_step} backward passes have stepped since the last step(). To accumulate "
                "gradients, run all but the last inside `with stepper.accumulate():` (tamegrad warns once)",
            )
        elif not self._arrived_since_step:
            self._warn_once(
                "no gradient",
                "nothing to step: no gradient of this model has arrived since the last step(). Call loss.backward() on "
                "the model that was given (tamegrad warns once)",
            )
        elif self._passes.holds and self._held_calls >= _MANY_HELD_CALLS:
            self._warn_once(
                "held back",
                f"nothing was stepped in {self._held_calls} calls of step(): accumulate() holds all gradients back. "
                "Call backward() for the last micro-batch of a step outside of it (tamegrad warns once)",
            )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warn(message)

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        # GradScaler asks for this in its step(), and would then fail without saying why.
        raise scaler_error("GradScaler.step() after a backward pass whose gradients had a loss scale, and were stepped")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for unit in self._units:
            unit.load(self.param_groups, self.state)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SettingError(
            "a copy or pickle of StepInBackward",
            got="hooks on the parameters of one model",
            allowed="one StepInBackward a model",
            advice="copy the model, make a new StepInBackward for it, and load the state_dict() of this one",
        )

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        kinds = " and ".join(dict.fromkeys(type(unit.optimizer).__name__ for unit in self._units))
        counts = f"{len(self._units)} layers, {self.steps} steps"
        return f"<StepInBackward: {state}, {kinds}, {counts}, {self.policy}>"


def _at_the_end_of_backward(call: Callable[[], None]) -> None:
    """Calls a function at the end of the backward pass that runs, after those that were queued before."""
    Variable._execution_engine.queue_callback(call)  # noqa: SLF001  torch has no other name
