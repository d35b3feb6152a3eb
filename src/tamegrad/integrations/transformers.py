"""For the Trainer of Transformers, and those of TRL: normalizes where it would clip, and logs the norms."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, Unpack

from torch import Tensor, nn

from tamegrad.errors import SettingError
from tamegrad.integrations.required import require_one_of
from tamegrad.torch.attach import AttachedNormalizer, attach
from tamegrad.torch.clip_grad import clip_grad_norm_
from tamegrad.torch.optimizers.stepping import NormalizedStep, check_normalized_step
from tamegrad.torch.settings import Keywords, Settings
from tamegrad.torch.sharded.sharding import local_part, mesh_of

require_one_of(("transformers",), module=__name__, install="transformers accelerate")

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback  # noqa: E402  needs what is required
from transformers.trainer_callback import ExportableState  # noqa: E402  likewise

__all__ = ["NormalizeGradients", "normalize_gradients"]

_PREFIX = "grad"

# Objects of Transformers, whose types are unknown where it is missing.
Foreign: TypeAlias = Any


def normalize_gradients(
    trainer: Foreign,
    policy: object,
    *,
    normalize: NormalizedStep | None = None,
    **settings: Unpack[Keywords],
) -> "NormalizeGradients":
    """Makes a trainer normalize gradients before each of its steps, instead of clipping them.

    Call it before `trainer.train()`. While it trains, the trainer's own clipping only measures, whatever
    `max_grad_norm` is, so that `grad_norm` stays in the logs. What is logged every `logging_steps` gets the numbers of
    `Report.as_scalars`, which so reach `trainer.state.log_history`, TensorBoard, W&B and others; they are not printed.

    Every `train()` attaches anew, to the optimizer that it uses. With `resume_from_checkpoint`, the counters go on.

    Args:
        trainer: A `Trainer` of Transformers, or of a subclass, such as TRL's `SFTTrainer`.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization` (threshold 1.0).
        normalize: As in `attach`.
        **settings: As in `attach`; `log_every` is for `sinks` alone.

    Returns:
        The callback that does it; `callback.normalizer` has the report.

    Raises:
        SettingError: If a setting is invalid, it is no `Trainer` or has been normalizing already, or DeepSpeed, FSDP1
            or Apex steps for it.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from tamegrad import Clip
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> rows = [{"input_ids": row, "labels": row} for row in torch.arange(64).view(8, 8) % 16]
        >>> quiet = dict(report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=3, use_cpu=True, **quiet)
        >>> trainer = Trainer(model, arguments, train_dataset=rows)
        >>> callback = normalize_gradients(trainer, Clip(0.1))
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> callback.normalizer.steps, callback.normalizer.report["lm_head"].norm_after
        (3, 0.1)
    """
    if not isinstance(trainer, Trainer):
        raise SettingError(
            "normalize_gradients(trainer)",
            got=f"a {type(trainer).__name__}",
            allowed="a Trainer of Transformers, or of a subclass",
            advice="make the trainer first, then call normalize_gradients(trainer, ...), then trainer.train()",
        )
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, NormalizeGradients) for callback in callbacks):
        raise SettingError(
            "normalize_gradients(trainer)",
            got="a trainer that normalizes gradients already",
            allowed="one call a trainer",
            advice="put both strategies into one policy: overrides={...}",
        )
    _refuse_unsupported(trainer)
    Settings.of(policy, **settings)
    check_normalized_step(normalize)
    callback = NormalizeGradients(trainer, policy, normalize, settings)
    # Before the callbacks that report, which see what it adds to the logs.
    callbacks.insert(0, callback)
    trainer.add_callback(NormalizerCounters(callback))
    return callback


class NormalizeGradients(TrainerCallback):  # type: ignore[misc]  # its type is unknown where Transformers is missing
    """The callback that `normalize_gradients` makes.

    Args:
        trainer: The trainer.
        policy: The policy, or a strategy.
        normalize: As in `attach`.
        settings: As in `attach`.

    Attributes:
        normalizer: The attached normalizer; after the training it is detached, and its report stays. None before the
            first.
    """

    def __init__(self, trainer: Foreign, policy: object, normalize: NormalizedStep | None, settings: Keywords) -> None:
        self.normalizer: AttachedNormalizer | None = None
        self._trainer = trainer
        self._policy = policy
        self._normalize: NormalizedStep | None = normalize
        self._settings = settings
        self._replaced: list[tuple[Any, str]] = []

    def on_train_begin(
        self,
        args: Foreign,
        state: Foreign,
        control: Foreign,
        model: Foreign = None,
        optimizer: Foreign = None,
        **_: object,
    ) -> None:
        """Attaches to the optimizer of this training, and keeps the trainer from clipping.

        Raises:
            SettingError: As `attach` does.
            UnmatchedError: As `attach` does.
        """
        del args, control
        # An earlier training ends without a word if it raises, as `auto_find_batch_size` expects.
        self._stop()
        self.normalizer = attach(model, optimizer, self._policy, normalize=self._normalize, **self._settings)
        self._continue_counters(state)
        self._replace_clipping()
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback | PrinterCallback):
                self._replace(callback, "on_log", _without_norms(callback.on_log))

    def on_log(
        self,
        args: Foreign,
        state: Foreign,
        control: Foreign,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        """Adds the norms to what is logged of a step; evaluations stay as they are."""
        del args, control
        report = None if self.normalizer is None else self.normalizer.report
        if report is None or logs is None or "loss" not in logs:
            return
        scalars = report.as_scalars(_PREFIX)
        logs.update(scalars)
        # The trainer has copied the logs there already.
        state.log_history[-1].update(scalars)

    def on_train_end(self, *_: object, **__: object) -> None:
        """Detaches, and lets the trainer clip again."""
        self._stop()

    def _replace_clipping(self) -> None:
        accelerator = self._trainer.accelerator

        def measure(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
            """Returns the norm of all gradients, without a loss scale, and leaves them as they are."""
            del max_norm
            accelerator.unscale_gradients()
            norm = clip_grad_norm_(parameters, math.inf, norm_type)
            return norm if mesh_of(norm) is None else local_part(norm)

        def measure_model(model: nn.Module, max_norm: float) -> Tensor:
            return measure(model.parameters(), max_norm)

        self._replace(accelerator, "clip_grad_norm_", measure)
        # Newer trainers do it themselves where parameters are sharded over several meshes.
        if hasattr(self._trainer, "_mixed_mesh_grad_norm"):
            self._replace(self._trainer, "_mixed_mesh_grad_norm", measure_model)

    def _replace(self, owner: Foreign, name: str, function: Callable[..., object]) -> None:
        """Replaces a method of one object until the training ends."""
        setattr(owner, name, function)
        self._replaced.append((owner, name))

    def _stop(self) -> None:
        if self.normalizer is not None:
            self.normalizer.detach()
        for owner, name in self._replaced:
            delattr(owner, name)
        self._replaced.clear()

    def _continue_counters(self, state: Foreign) -> None:
        assert self.normalizer is not None
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, NormalizerCounters):
                # The trainer may have made it anew, from the checkpoint.
                callback.owner = self
        # The trainer expects an entry there, which a checkpoint that was made without tamegrad lacks.
        saved = state.stateful_callbacks.setdefault(NormalizerCounters.__name__, NormalizerCounters(self).state())
        if state.global_step and (counters := saved["attributes"]["counters"]):
            self.normalizer.load_state_dict(counters)


class NormalizerCounters(TrainerCallback, ExportableState):  # type: ignore[misc]  # as above
    """Saves the counters in the trainer's checkpoints; `NormalizeGradients` loads them.

    It is a callback of its own because a trainer with `restore_callback_states_from_checkpoint` makes such callbacks
    anew, and moves them to the end of its list.

    Args:
        owner: The callback that has the normalizer.
    """

    def __init__(self, owner: NormalizeGradients | None = None) -> None:
        self.owner = owner
        self.counters: Mapping[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Returns the counters in the form that the trainer saves. Reads the device."""
        normalizer = None if self.owner is None else self.owner.normalizer
        counters = self.counters if normalizer is None else normalizer.state_dict()
        return {"args": {}, "attributes": {"counters": counters}}


def _without_norms(log: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the `on_log` of a callback that prints, so that hundreds of norms do not hide the loss."""

    def on_log(
        args: object, state: object, control: object, logs: dict[str, Any] | None = None, **others: Foreign
    ) -> Foreign:
        printed = {name: value for name, value in (logs or {}).items() if not name.startswith(f"{_PREFIX}/")}
        return log(args, state, control, logs=printed, **others)

    return on_log


def _refuse_unsupported(trainer: Foreign) -> None:
    """Refuses a trainer for which something else steps.

    Raises:
        SettingError: If DeepSpeed, FSDP1 or Apex does.
    """
    plugins = trainer.accelerator.state
    fsdp = getattr(plugins, "fsdp_plugin", None)
    found, advice = None, ""
    if getattr(plugins, "deepspeed_plugin", None) is not None:
        found = "DeepSpeed, which keeps the gradients to itself"
        advice = 'set "gradient_clipping" in the DeepSpeed configuration, or train with FSDP2'
    elif fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1:
        found = "FSDP1, which does not record what part of a layer other ranks hold"
        advice = 'train with FSDP2: TrainingArguments(fsdp=True, fsdp_config={"version": 2})'
    elif getattr(trainer, "use_apex", False):
        found = "Apex, whose clipping cannot be turned off here"
        advice = "leave half_precision_backend out, and train with bf16=True or fp16=True"
    if found is not None:
        raise SettingError(
            "normalize_gradients(trainer)",
            got=f"a trainer with {found}",
            allowed="training on one process, DDP, FSDP2 or tensor parallel",
            advice=advice,
        )
