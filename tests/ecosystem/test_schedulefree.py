from typing import Any

import pytest
import schedulefree
import torch

from support.ecosystem import POLICY, Recorder, a_model, step_by_hand
from tamegrad import SettingError
from tamegrad.torch import attach

WRAPPERS = [schedulefree.ScheduleFreeWrapper, schedulefree.ScheduleFreeWrapperReference]
OPTIMIZERS = [schedulefree.AdamWScheduleFree, schedulefree.SGDScheduleFree, schedulefree.RAdamScheduleFree]
WITH_CLOSURE = [
    schedulefree.AdamWScheduleFreeClosure,
    schedulefree.SGDScheduleFreeClosure,
    schedulefree.RAdamScheduleFreeClosure,
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_is_refused_and_its_base_is_not(wrapper: Any) -> None:
    model = a_model()
    outer = wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(SettingError, match=r"optimizer\.base"):
        attach(model, outer, POLICY)
    normalizer = attach(model, outer.base, POLICY)
    recorder = Recorder(model.named_parameters(), outer.base)
    outer.train()
    for _ in range(3):
        step_by_hand(model, outer, recorder)
    recorder.check(steps=3)
    assert normalizer.steps == 3


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS + WITH_CLOSURE)
def test_its_own_optimizers_are_attached_to(optimizer_class: Any) -> None:
    model = a_model()
    optimizer = optimizer_class(model.parameters())
    normalizer = attach(model, optimizer, POLICY)
    recorder = Recorder(model.named_parameters(), optimizer)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(3):
        step_by_hand(model, optimizer, recorder, closure=optimizer_class in WITH_CLOSURE)
    recorder.check(steps=3)
    assert normalizer.steps == 3
