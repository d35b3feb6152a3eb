"""What `attach` says about parameters that the model does not own, or the optimizer does not hold."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tamegrad import Clip, ClipValue, Keep, Policy, TamegradWarning
from tamegrad.torch import attach


def a_model() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


class TestUnowned:
    """Parameters of the optimizer that belong to no layer are named, with what to do."""

    def test_by_their_place_and_shape(self) -> None:
        model, loss = a_model(), nn.Linear(5, 1)
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()])
        with pytest.warns(TamegradWarning) as seen:
            attach(model, optimizer, Clip(1.0))
        assert seen[0].filename == __file__
        message = str(seen[0].message)
        assert message.startswith("2 of the optimizer's 6 parameters belong to no layer of the model")
        assert 'param_groups[0]["params"][4] of shape (1, 5), param_groups[0]["params"][5] of shape (1,)' in message
        assert "attach(nn.ModuleList([model, other]), ...)" in message

    def test_by_name_if_the_optimizer_has_names(self) -> None:
        model, loss = a_model(), nn.Linear(5, 1)
        named = [*model.named_parameters(prefix="model"), *loss.named_parameters(prefix="loss")]
        optimizer = torch.optim.SGD(named)
        if "param_names" not in optimizer.param_groups[0]:
            pytest.skip("PyTorch before 2.6 keeps no names")
        with pytest.warns(TamegradWarning, match=r"'loss.weight' of shape \(1, 5\), 'loss.bias' of shape \(1,\)"):
            attach(model, optimizer, Clip(1.0))

    def test_but_not_what_nothing_trains(self) -> None:
        model = a_model()
        state = nn.Parameter(torch.zeros(2), requires_grad=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(model, torch.optim.SGD([*model.parameters(), state]), Clip(1.0))

    def test_only_the_first_of_many(self) -> None:
        model = a_model()
        others = [nn.Parameter(torch.zeros(1)) for _ in range(9)]
        with pytest.warns(TamegradWarning, match=r"\[8\] of shape \(1,\) and 4 more. Pass the module"):
            attach(model, torch.optim.SGD([*model.parameters(), *others]), Clip(1.0))


class TestPartialNorms:
    """A norm that covers only a part of a layer is worth a warning; what no other gradient changes is not."""

    MESSAGE = r"the norm of '0' covers only a part of it: the optimizer does not hold '0.bias'"

    def attach_to_matrices(self, policy: Any, *, frozen: bool = False) -> None:
        model = a_model()
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        for layer in model:
            layer.bias.requires_grad_(not frozen)
        attach(model, torch.optim.Muon(matrices), policy)

    @pytest.mark.parametrize("policy", [Clip(1.0), Policy(Keep(), overrides={"0": Clip(1.0)})])
    def test_warns(self, policy: Any) -> None:
        with pytest.warns(TamegradWarning, match=self.MESSAGE) as seen:
            self.attach_to_matrices(policy)
        assert len(seen) == 1
        assert "attach(model, [first, second], ...)" in str(seen[0].message)

    @pytest.mark.parametrize(
        "policy",
        [
            Clip(1.0, per="param_type"),
            Clip(1.0, per="tensor"),
            Clip(1.0, per="model"),
            ClipValue(1.0),
            Keep(),
            Policy(Clip(1.0), overrides={"*/bias": None}),
        ],
        ids=str,
    )
    def test_does_not_warn_where_nothing_is_missing(self, policy: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.attach_to_matrices(policy)

    def test_does_not_warn_about_frozen_parameters(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.attach_to_matrices(Clip(1.0), frozen=True)
