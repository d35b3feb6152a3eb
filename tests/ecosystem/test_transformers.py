from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from support.ecosystem import POLICY, Recorder, a_model
from tamegrad import SettingError
from tamegrad.torch import attach


def a_language_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def tokens() -> torch.Tensor:
    return torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(1))


def test_a_trainer_steps_with_normalized_gradients(tmp_path: Path) -> None:
    model = a_language_model()

    class Attaching(transformers.TrainerCallback):  # type: ignore[misc]
        # Here the model and the optimizer are as Accelerate has prepared them.
        def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            self.normalizer = attach(model, optimizer, POLICY)
            self.recorder = Recorder(model.named_parameters(), optimizer.optimizer)

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.recorder.backward_is_done()

    attaching = Attaching()

    transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=3,
            max_grad_norm=0.0,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens()],
        callbacks=[attaching],
    ).train()
    attaching.recorder.check(steps=3)
    assert attaching.normalizer.steps == 3


def test_an_optimizer_that_steps_during_backward_is_refused() -> None:
    model = a_model()
    inside = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}
    with pytest.raises(SettingError, match=r'without "layerwise" in its name'):
        attach(model, LayerWiseDummyOptimizer(optimizer_dict=inside), POLICY)


def a_model_with_adapters() -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(a_language_model(), config)


def trainable(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_both_matrices_of_an_adapter_are_layers_of_their_own() -> None:
    model = a_model_with_adapters()
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], lr=1e-2)
    normalizer = attach(model, optimizer, POLICY)
    assert [layer.name for layer in normalizer.plan.layers] == [
        f"base_model.model.model.layers.{block}.self_attn.{projection}.{matrix}.default"
        for block in range(2)
        for projection in ("q_proj", "v_proj")
        for matrix in ("lora_A", "lora_B")
    ]
    recorder = Recorder(trainable(model), optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        (100 * model(input_ids=tokens(), labels=tokens()).loss).backward()
        recorder.backward_is_done()
        optimizer.step()
    recorder.check(steps=2)


def test_a_pattern_merges_both_matrices_of_an_adapter() -> None:
    model = a_model_with_adapters()
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], lr=1e-2)
    normalizer = attach(model, optimizer, POLICY, layers=["*_proj"])
    assert [layer.name for layer in normalizer.plan.layers] == [
        f"base_model.model.model.layers.{block}.self_attn.{projection}"
        for block in range(2)
        for projection in ("q_proj", "v_proj")
    ]
    (100 * model(input_ids=tokens(), labels=tokens()).loss).backward()
    optimizer.step()
    gradients = [parameter.grad for name, parameter in trainable(model) if "layers.0.self_attn.q_proj" in name]
    assert len(gradients) == 2
    assert torch.cat([gradient.ravel() for gradient in gradients]).norm().item() == pytest.approx(0.01)
