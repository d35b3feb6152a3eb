"""`normalize_gradients` in TRL's SFTTrainer, with adapters of PEFT, compared with a loop that is written by hand."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import AutocastKwargs
from torch import nn

from support.ecosystem import Recorder
from support.trainers import STEPS, check_same, train_by_hand
from tamegrad import Clip
from tamegrad.integrations.transformers import normalize_gradients

datasets: Any = pytest.importorskip("datasets")
peft: Any = pytest.importorskip("peft")
tokenizers: Any = pytest.importorskip("tokenizers")
transformers: Any = pytest.importorskip("transformers")
trl: Any = pytest.importorskip("trl")

ROWS = 2  # in a batch
STRICT = Clip(1e-4)  # far below the norms of these adapters


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps the state of a process for all tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def a_model_with_adapters() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def an_optimizer(model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=10.0, momentum=0.9, fused=fused or None)


def text(batches: int) -> torch.Tensor:
    return torch.randint(4, 32, (batches * ROWS, 9), generator=torch.Generator().manual_seed(1))


def loss_of(model: Any, rows: torch.Tensor) -> Any:
    return model(input_ids=rows, labels=rows).loss


class InOrder(trl.SFTTrainer):  # type: ignore[misc]
    def _get_train_sampler(self, *_: object) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def a_trainer(folder: Path, model: Any, *, batches: int = STEPS, fused: bool = False, **settings: Any) -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"<{number}>": number for number in range(32)}, "<0>"))
    arguments = trl.SFTConfig(
        str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **({"bf16": False} | settings),
    )
    return InOrder(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": text(batches).tolist()}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words,
            pad_token="<0>",
            eos_token="<1>",
            unk_token="<2>",
        ),
        optimizers=(an_optimizer(model, fused=fused), None),
    )


def by_hand(model: Any, *, batches: int, accumulate: int) -> Any:
    data = torch.split(text(batches), ROWS)
    optimizer = an_optimizer(model)
    return train_by_hand(model, data, accumulate=accumulate, policy=STRICT, loss=loss_of, optimizer=optimizer)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_adapters_are_those_of_a_loop_by_hand(tmp_path: Path, accumulate: int, *, fused: bool, scaled: bool) -> None:
    model = a_model_with_adapters()
    copied = copy.deepcopy(model)
    settings = {"batches": accumulate * STEPS, "gradient_accumulation_steps": accumulate}
    trainer = a_trainer(tmp_path, model, fused=fused, **settings)
    if scaled:
        accelerator = trainer.accelerator
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    callback = normalize_gradients(trainer, STRICT)
    trainer.train()
    check_same(model, by_hand(copied, batches=accumulate * STEPS, accumulate=accumulate))
    assert callback.normalizer is not None
    assert callback.normalizer.steps == STEPS
    assert trainer.state.log_history[-2]["grad/clipped"] == 8  # two matrices of two projections of two blocks
    if scaled:
        assert accelerator.scaler._get_growth_tracker() == STEPS


def test_bfloat16(tmp_path: Path) -> None:
    model = a_model_with_adapters()

    class Recording(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
            self.recorder = Recorder(trained, optimizer.optimizer)

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.recorder.backward_is_done()

    trainer = a_trainer(tmp_path, model, bf16=True)
    trainer.add_callback(recording := Recording())
    normalize_gradients(trainer, STRICT)
    trainer.train()
    recording.recorder.check(steps=STEPS, policy=STRICT)
