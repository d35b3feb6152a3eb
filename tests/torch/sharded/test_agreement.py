"""Ranks that are not set alike: every rank raises when the normalizer is made, and names what differs and where."""

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from support.ranks import run_on_ranks
from tamegrad import Clip, Policy, Renormalize, Strategy
from tamegrad.errors import SettingError
from tamegrad.torch import GradientNormalizer, attach
from tamegrad.torch.sharded.agreement import describe_policy, describe_strategy, named_ranks


@dataclass(frozen=True)
class Own(Strategy):
    """A strategy with fields of many kinds."""

    threshold: float = 1.0
    name: str = "a"
    powers: tuple[float, ...] = (1.0, 2.0)
    choices: frozenset[str] = frozenset("abcdef")
    function: Any = max

    def target(self, norms: Any, xp: ModuleType) -> Any:
        return xp.minimum(norms, self.threshold)

    def __repr__(self) -> str:
        return "Own()"


def nothing() -> None:
    """A function whose text holds its address."""


NEXT = float(np.nextafter(1.0, 2.0))
# The policy and the other settings that rank 1 has, where the others have Clip(1.0), and what the message names.
SETTINGS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "on_nonfinite": (Clip(1.0), {"on_nonfinite": "skip"}, ["'on_nonfinite: skip' instead of 'on_nonfinite: keep'"]),
    "raises": (Clip(1.0), {"on_nonfinite": "raise"}, ["'on_nonfinite: raise' instead of 'on_nonfinite: keep'"]),
    "threshold": (Clip(NEXT), {}, ["threshold=1.0000000000000002", 'instead of "0: Clip(threshold=1.0']),
    "per": (Clip(1.0, per="tensor"), {}, ["per='tensor'"]),
    "strategy": (Renormalize(), {}, ["Renormalize(per='layer')"]),
    "override": (Clip(1.0), {"overrides": {"0": Clip(1.0)}}, ["\"override '0': Clip(threshold=1.0", "'(nothing)'"]),
    "layers": (Clip(1.0), {"layers": ["0"]}, ["\"layers: ('0',)\" instead of 'layers: ()'"]),
    "own": (Own(), {}, ["Own(threshold=1.0, name='a', powers=(1.0, 2.0)"]),
}  # fmt: skip


def refusals_of_settings() -> dict[str, str]:
    model: Any = fully_shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    refusals = {}
    for kind, (policy, settings, _) in SETTINGS.items():
        odd = dist.get_rank() == 1
        try:
            GradientNormalizer(model, policy if odd else Clip(1.0), **(settings if odd else {}))
        except SettingError as error:
            refusals[kind] = str(error)
    return refusals


def test_settings_that_differ_are_refused_on_every_rank() -> None:
    first, *others = run_on_ranks(refusals_of_settings, 3)
    assert others == [first] * 2
    assert set(first) == set(SETTINGS)
    for kind, message in first.items():
        assert "differ from rank 0's on 1 of 3 ranks" in message
        assert "on rank 1;" in message
        for named in SETTINGS[kind][2]:
            assert named in message


def own_thresholds() -> str:
    # Equal but for the last bit of a float that the strategy's own text leaves out.
    policy = Own(NEXT if dist.get_rank() == 1 else 1.0)
    model: Any = fully_shard(nn.Linear(4, 4))
    try:
        attach(model, torch.optim.SGD(model.parameters(), 1.0), policy)
    except SettingError as error:
        return str(error)
    return ""


def test_strategies_of_users_are_compared_by_their_fields() -> None:
    for message in run_on_ranks(own_thresholds, 2):
        assert "Own(threshold=1.0000000000000002, " in message


def set_alike() -> list[str]:
    model: Any = fully_shard(nn.Linear(4, 4))
    own = Own(1 if dist.get_rank() == 1 else 1.0, function=nothing)
    backends: Any = ["cpu", "foreach"]
    policy = Policy(own, {"*/bias": Clip(1.0)})
    normalizer = GradientNormalizer(model, policy, backend=backends[dist.get_rank()])
    return describe_policy(normalizer.settings.policy)


def test_backends_and_addresses_may_differ() -> None:
    first, second = run_on_ranks(set_alike, 2)
    assert first == second


def stages_set_differently() -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "shards"))
    stage = mesh["stages"].get_local_rank()
    model: Any = fully_shard(nn.Linear(4, 4), mesh=mesh["shards"])
    settings: Any = {"on_nonfinite": ("keep", "skip")[stage], "process_groups": [mesh["stages"].get_group()]}
    try:
        # Thresholds of groups that no other stage shares may differ.
        GradientNormalizer(model, Clip(1.0 + stage), **settings)
    except SettingError as error:
        return str(error)
    return ""


def test_stages_of_a_pipeline_agree_on_what_stops_a_step() -> None:
    for message in run_on_ranks(stages_set_differently, 4):
        assert "'on_nonfinite: skip' instead of 'on_nonfinite: keep'" in message


def shared_thresholds() -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("stages",))
    threshold = (1.0, NEXT)[mesh.get_local_rank()]
    try:
        GradientNormalizer(nn.Linear(2, 2), Clip(threshold, per="model"), process_groups=[mesh.get_group()])
    except SettingError as error:
        return str(error)
    return ""


def test_stages_compare_what_they_share_to_the_last_bit() -> None:
    for message in run_on_ranks(shared_thresholds, 2):
        assert "threshold=1.0000000000000002" in message


def test_the_text_of_a_strategy_is_the_same_in_every_process() -> None:
    one, other = Own(0.1, choices=frozenset("abc")), Own(0.1, choices=frozenset("cba"))
    assert describe_strategy(one) == describe_strategy(other)
    # An object without a text of its own, and one that holds another.
    for value in (object(), functools.partial(nothing)):
        assert " at 0x" not in describe_strategy(Own(function=value))
    assert describe_strategy(Own(10**400)) != describe_strategy(Own(10**400 + 1))


def test_many_ranks_are_not_all_named() -> None:
    assert named_ranks(range(9)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 1 more"
