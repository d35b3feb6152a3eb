"""Refuses what cannot be right when layers are stepped inside backward."""

import sys
from collections.abc import Iterable
from inspect import currentframe
from traceback import walk_stack

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from tamegrad.errors import SettingError
from tamegrad.groups import Plan
from tamegrad.torch.living import living
from tamegrad.torch.settings import Settings

__all__ = [
    "is_nested",
    "refuse_compiled_autograd",
    "refuse_create_graph",
    "refuse_data_parallel",
    "refuse_model_wide",
    "refuse_retain_graph",
    "refuse_scaler",
    "refuse_settings",
    "scaler_error",
]

_WHERE = "loss.backward() with StepInBackward"
_ENGINE_FILE, _FUNCTION_FILE = torch.autograd.graph.__file__, torch.autograd.function.__file__


def refuse_settings(settings: Settings) -> None:
    """Refuses settings that need the whole model's gradients at once.

    Raises:
        SettingError: If there is one.
    """
    if settings.on_nonfinite == "skip":
        raise SettingError(
            "StepInBackward(on_nonfinite)",
            got='"skip", which must see every gradient before the first layer is stepped',
            allowed='"keep", "zero", "skip_group" or "raise"',
            advice='pass on_nonfinite="skip_group" to leave out the groups that are not finite, or "zero"; to skip '
            "whole steps, attach() to an optimizer that steps after backward()",
        )
    if settings.process_groups:
        raise SettingError(
            "StepInBackward(process_groups)",
            got="process groups of a pipeline, whose stages would wait for each other after every layer",
            allowed="no process_groups, since no norm spans several layers",
            advice="leave process_groups out",
        )


def refuse_model_wide(plan: Plan) -> None:
    """Refuses groups that span layers.

    Raises:
        SettingError: If the plan has one.
    """
    for group in plan.groups:
        if group.strategy.per == "model":
            raise SettingError(
                "StepInBackward(policy)",
                got=f"{group.strategy}, whose norm is known only when every gradient is there",
                allowed='per="layer", "param_type" or "tensor", Keep() and ClipValue',
                advice='pass per="layer"; for a norm over the model, attach() to an optimizer that steps after '
                "backward(); for one norm over some modules, merge them into a layer: layers=[...]",
            )


def refuse_data_parallel(parameters: Iterable[nn.Parameter]) -> None:
    """Refuses parameters whose gradients `DistributedDataParallel` averages after they would have been stepped.

    Raises:
        SettingError: If some are in such a wrapper.
    """
    if not torch.distributed.is_initialized():
        return
    # A module does not know what wraps it.
    own = set(map(id, parameters))
    wrappers = [
        wrapper
        for wrapper in living(DistributedDataParallel)
        if any(id(parameter) in own for parameter in wrapper.parameters())
    ]
    if wrappers:
        raise SettingError(
            "StepInBackward(model)",
            got=f"a model in {type(wrappers[0]).__name__}, which averages gradients over the ranks after they would "
            "have been stepped: the replicas would drift apart",
            allowed="a model on one process, or sharded by FSDP2",
            advice="shard with torch.distributed.fsdp.fully_shard (FSDP2), or attach() to an optimizer that steps "
            "after backward()",
        )


def refuse_scaler() -> None:
    """Refuses a loss scale: whether a step is taken is known only when every gradient is there.

    Raises:
        SettingError: If an enabled scaler is alive that has scaled a loss.
    """
    for scaler in living(GradScaler):
        if scaler.is_enabled() and scaler._scale is not None:  # noqa: SLF001  torch has no other name
            raise scaler_error("a GradScaler that has scaled a loss in this process; nothing has been stepped yet")


def scaler_error(got: str) -> SettingError:
    """Returns the error for a loss scale."""
    return SettingError(
        "StepInBackward with torch.amp.GradScaler",
        got=got,
        allowed="gradients without a loss scale, since the scaler decides after backward() whether to step",
        advice="train in bfloat16, which needs no scaler, or attach() to an optimizer that steps after backward(); a "
        "scaler of another model has to be deleted first",
    )


def refuse_create_graph() -> None:
    """Refuses, inside a hook, a backward pass that makes a graph of the gradients.

    Raises:
        SettingError: If it was called with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise SettingError(
            _WHERE,
            got="create_graph=True, which differentiates through gradients that are changed and freed here",
            allowed="backward() without it",
            advice="call torch.autograd.grad(..., create_graph=True) for the inner gradient, as gradient penalties do",
        )


def refuse_retain_graph() -> None:
    """Refuses, inside a hook, a backward pass whose graph is kept: it holds the weights that are about to change.

    Raises:
        SettingError: If it was called with `retain_graph=True`.
    """
    # Older versions of PyTorch do not tell; there the version counters notice most of what is used again.
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # noqa: SLF001
    if keeps_graph is not None and keeps_graph():
        raise SettingError(
            _WHERE,
            got="retain_graph=True, which keeps a graph of weights that change in this backward pass",
            allowed="the last backward pass through a graph",
            advice="add the losses up and call backward() once; or call all but the last inside "
            "`with stepper.accumulate():`, and the last without retain_graph",
        )


def refuse_compiled_autograd() -> None:
    """Refuses, inside a hook, a backward pass that compiled autograd runs, which never says that it ended.

    Raises:
        SettingError: If it does.
    """
    # Whoever uses it has imported it.
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if getattr(compiled, "in_compiled_autograd_region", False):
        raise SettingError(
            _WHERE,
            got="a backward pass that compiled autograd runs, which never says that it ended",
            allowed="backward() without compiled autograd; compiled models are fine",
            advice="leave out torch._dynamo.config.compiled_autograd, or step after backward() with attach()",
        )


def is_nested() -> bool:
    """Returns whether the backward pass of the calling hook was started by another one, as reentrant checkpoints do."""
    engines = 0
    for frame, _ in walk_stack(currentframe()):
        code = frame.f_code
        engines += code.co_filename == _ENGINE_FILE and code.co_name == "_engine_run_backward"
        in_function = engines and code.co_filename == _FUNCTION_FILE and code.co_name == "apply"
        if engines > 1 or in_function:
            return True
    return False
