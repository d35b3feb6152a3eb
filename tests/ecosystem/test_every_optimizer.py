"""Every optimizer of timm, pytorch_optimizer and torch_optimizer, unless NOT_HERE says why not."""

from typing import Any

import pytest
import pytorch_optimizer
import torch
import torch_optimizer

from support.ecosystem import POLICY, Recorder, a_model, loss_of, optimizer_classes, timm_optim
from tamegrad.torch import attach

LIBRARIES = {
    "timm": optimizer_classes(vars(timm_optim())),
    "pytorch_optimizer": optimizer_classes(vars(pytorch_optimizer)),
    "torch_optimizer": optimizer_classes(vars(torch_optimizer)),
}
WRAPS_ANOTHER = "wraps another optimizer: test_optimizers_around_optimizers.py"
SHARPNESS = "needs the class of another optimizer: test_sharpness_aware.py"
IN_BACKWARD = "steps during backward, and leaves no gradients for a step"
NOT_HERE = {
    "timm.Lookahead": WRAPS_ANOTHER,
    "torch_optimizer.Lookahead": WRAPS_ANOTHER,
    "pytorch_optimizer.Lookahead": WRAPS_ANOTHER,
    "pytorch_optimizer.Magma": WRAPS_ANOTHER,
    "pytorch_optimizer.OrthoGrad": WRAPS_ANOTHER,
    "pytorch_optimizer.PCGrad": WRAPS_ANOTHER,
    "pytorch_optimizer.SafeFP16Optimizer": WRAPS_ANOTHER,
    "pytorch_optimizer.ScheduleFreeWrapper": WRAPS_ANOTHER,
    "pytorch_optimizer.TRAC": WRAPS_ANOTHER,
    "pytorch_optimizer.BSAM": SHARPNESS,
    "pytorch_optimizer.FriendlySAM": SHARPNESS,
    "pytorch_optimizer.GSAM": SHARPNESS,
    "pytorch_optimizer.LookSAM": SHARPNESS,
    "pytorch_optimizer.SAM": SHARPNESS,
    "pytorch_optimizer.WSAM": SHARPNESS,
    "pytorch_optimizer.AdaLOMO": IN_BACKWARD,
    "pytorch_optimizer.LOMO": IN_BACKWARD,
    "pytorch_optimizer.DeMo": "needs einops and a process group",
    "pytorch_optimizer.DistributedMuon": "needs a process group",
}
NAMES = [f"{library}.{name}" for library, classes in LIBRARIES.items() for name in classes]
# Everything else is made of the parameters alone.
TAKES_THE_MODEL = {"pytorch_optimizer.AdamMini"}
MATRICES_AND_THE_REST = {f"pytorch_optimizer.{name}" for name in ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")}
MATRICES_ONLY = {"pytorch_optimizer.SpectralSphere"}
SETTINGS: dict[str, dict[str, Any]] = {
    "pytorch_optimizer.AliG": {"max_lr": 0.01},  # without it, a small gradient makes a step that ends the training
    "pytorch_optimizer.Ranger21": {"num_iterations": 10},
    "timm.SGDP": {"lr": 0.01},
}
NEEDS_A_CLOSURE = {"pytorch_optimizer.AliG"}
# Its step calls super().step(), so that its hooks run twice.
CALLS_ANOTHER_STEP = {"pytorch_optimizer.MuonClip"}
# Their estimate of the curvature differentiates the gradients.
SECOND_ORDER = {
    "pytorch_optimizer.AdaHessian",
    "pytorch_optimizer.SophiaH",
    "timm.Adahessian",
    "torch_optimizer.Adahessian",
}


def made(name: str, model: Any) -> Any:
    library, _, short = name.partition(".")
    parameters: Any = model if name in TAKES_THE_MODEL else model.parameters()
    if name in MATRICES_AND_THE_REST:
        parameters = [
            {"params": [parameter for parameter in model.parameters() if (parameter.ndim == 2) is matrices]}
            | {"use_muon": matrices}
            for matrices in (True, False)
        ]
    return LIBRARIES[library][short](parameters, **SETTINGS.get(name, {}))


def test_names_are_of_optimizers_that_exist() -> None:
    made_specially = TAKES_THE_MODEL | MATRICES_AND_THE_REST | MATRICES_ONLY | set(SETTINGS)
    stepped_specially = NEEDS_A_CLOSURE | CALLS_ANOTHER_STEP | SECOND_ORDER
    assert set(NOT_HERE) | made_specially | stepped_specially <= set(NAMES)


def test_finds_the_optimizers() -> None:
    assert {"timm.Lamb", "pytorch_optimizer.Shampoo", "torch_optimizer.Yogi"} <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_HERE])
def test_its_update_finds_normalized_gradients(name: str) -> None:
    model = a_model(bias=name not in MATRICES_ONLY)
    optimizer = made(name, model)
    normalizer = attach(model, optimizer, POLICY)
    recorder = Recorder(model.named_parameters(), optimizer)

    @torch.enable_grad()
    def evaluate() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward(create_graph=name in SECOND_ORDER)
        recorder.backward_is_done()
        return loss

    for _ in range(3):
        if name in NEEDS_A_CLOSURE:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    recorder.check(steps=6 if name in CALLS_ANOTHER_STEP else 3)
    assert normalizer.steps == 3
    assert normalizer.report is not None
    assert normalizer.report["0"].clipped
