"""The plain backend on accelerators: launches and waits counted on the meta device, results as if the CPU were one."""

import math
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.contract import Case, assert_same_values, every_strategy
from support.gradients import model_with, random_gradients
from support.launches import Launches
from tamegrad import Clip, ClipValue, Keep, Policy, Renormalize, SettingError, normalize
from tamegrad.strategies import OnNonfinite, Strategy
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.backends import base, kept
from tamegrad.torch.backends.foreach import ForeachBackend, device
from tamegrad.torch.memory import DTYPES

FOREACH: Any = "foreach"


Shapes: TypeAlias = dict[str, dict[str, tuple[int, ...]]]


def gpt2() -> Shapes:
    """The shapes of GPT-2 with 124 million parameters."""
    width = 768
    norm: dict[str, tuple[int, ...]] = {"weight": (width,), "bias": (width,)}
    layers: Shapes = {"wte": {"weight": (50257, width)}, "wpe": {"weight": (1024, width)}, "ln_f": norm}
    linear = {"attn": (3 * width, width), "proj": (width, width), "fc": (4 * width, width), "out": (width, 4 * width)}
    for block in range(12):
        layers |= {f"h{block}_{name}": {"weight": shape, "bias": shape[:1]} for name, shape in linear.items()}
        layers |= {f"h{block}_ln_1": norm, f"h{block}_ln_2": norm}
    return layers


def linears(count: int = 1000) -> Shapes:
    layers: Shapes = {f"layer{place}": {"weight": (64, 64), "bias": (64,)} for place in range(count)}
    return layers


def on_meta(layers: Shapes, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    for name, shapes in layers.items():
        layer = nn.Module()
        for kind, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
            parameter.grad = torch.empty_like(parameter)
            layer.register_parameter(kind, parameter)
        model.add_module(name, layer)
    return model


def launches_of(model: nn.Module, policy: object, on_nonfinite: OnNonfinite = "keep", scale: Any = None) -> Launches:
    """Counts what the third step launches, which has other gradients than those before."""
    normalizer = GradientNormalizer(model, policy, on_nonfinite=on_nonfinite, backend=FOREACH)
    for _ in range(2):
        normalizer._normalize(scale)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = torch.empty_strided(
            parameter.shape, parameter.grad.stride(), dtype=parameter.dtype, device="meta"
        )
    launches = Launches()
    with launches:
        normalizer._normalize(scale)
    return launches


@pytest.fixture(scope="module")
def big_models() -> dict[str, nn.Module]:
    return {"gpt2": on_meta(gpt2()), "gpt2 in bfloat16": on_meta(gpt2(), torch.bfloat16), "linears": on_meta(linears())}


@pytest.mark.parametrize(
    ("name", "policy", "most"),
    [
        ("gpt2", Clip(1.0), 120),
        ("gpt2 in bfloat16", Renormalize(per="tensor"), 120),
        ("linears", Clip(1.0), 100),
        ("linears", Clip(1.0, per="model"), 100),
        # Limits are measured again after they cut, in a buffer.
        ("gpt2", ClipValue(1.0), 320),
        ("linears", ClipValue(1.0), 150),
    ],
    ids=str,
)
def test_how_much_a_step_launches(name: str, policy: Any, most: int, big_models: dict[str, nn.Module]) -> None:
    launches = launches_of(big_models[name], policy)
    assert launches.waits == []
    assert len(launches.names) <= most


def test_zeroing_takes_one_more_launch_for_each_large_tensor(big_models: dict[str, nn.Module]) -> None:
    kept_, zeroed = (launches_of(big_models["gpt2"], Clip(1.0), on) for on in ("keep", "zero"))
    assert zeroed.waits == []
    large = sum(parameter.numel() > device.LARGE for parameter in big_models["gpt2"].parameters())
    assert len(zeroed.names) <= len(kept_.names) + large + 7
    assert len(launches_of(big_models["linears"], Clip(1.0), "zero").names) <= 100


@pytest.mark.parametrize("scale", [None, torch.empty((), device="meta")], ids=str)
@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize("strategy", [Clip(0.1), ClipValue(0.1), Renormalize(), Keep()], ids=str)
def test_the_host_never_waits(strategy: Strategy, on_nonfinite: OnNonfinite, scale: Any) -> None:
    gradients = [torch.empty(4, 6, dtype=dtype, device="meta") for dtype in DTYPES for _ in range(3)]
    # These have gaps, so they are written back from a dense copy.
    gradients[::3] = [gradient[:, ::2] for gradient in gradients[::3]]
    model = model_with(gradients)
    assert launches_of(model, strategy, on_nonfinite, scale).waits == []


def test_a_read_would_be_seen() -> None:
    with Launches() as launches:
        torch.ones(3).sum().item()
        torch.empty(3, device="meta").copy_(torch.ones(3))
        torch.ones(3).to("meta")
    assert launches.waits == ["_local_scalar_dense", "copy_", "_to_copy"]


@pytest.fixture
def in_its_stead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats the CPU as an accelerator."""
    monkeypatch.setattr(ForeachBackend, "_kind_of", lambda self, _: self._on_device)
    monkeypatch.setattr(base, "_is_on_host", lambda _: False)


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BUFFER": 100, "LARGE": 40, "FEW": 2}.items():
        monkeypatch.setattr(device, name, value)


def a_case(dtype: torch.dtype, magnitude: float = 1.0) -> Case:
    first, second, third, fourth = random_gradients((63, 30, 1, 200), dtype)
    gradients = {
        "first": {"weight": first.view(7, 9), "scale": third.view(())},
        "second": {"weight": second, "bias": first[:20].clone()},
        "empty": {"weight": torch.zeros(0, 3, dtype=dtype)},
        "third": {"weight": fourth.view(10, 20).T},
    }
    return Case.of({name: {k: v * magnitude for k, v in types.items()} for name, types in gradients.items()})


def assert_as_on_a_device(case: Case, policy: Any, on_nonfinite: OnNonfinite = "keep", scale: Any = None) -> None:
    expected, told = normalize(case.arrays, policy, on_nonfinite=on_nonfinite)
    normalizer = GradientNormalizer(case.model, policy, on_nonfinite=on_nonfinite, backend=FOREACH)
    normalizer._step._on_host = False
    report = normalizer._normalize(scale)
    for name in ("norms", "scales", "norms_after", "total_norm"):
        np.testing.assert_allclose(getattr(report, name), getattr(told, name), rtol=1e-13, atol=1e-323, err_msg=name)
    assert (report.nonfinite.numpy() > 0).tolist() == (told.nonfinite > 0).tolist()
    for layer, types in case.gradients.items():
        for kind, gradient in types.items():
            assert_same_values(
                gradient if scale is None else gradient / scale, expected[layer][kind], f"{layer}.{kind}"
            )


CASES: list[tuple[float, float | None, OnNonfinite]] = [
    (0.0, None, "keep"),
    (-0.9, None, "zero"),
    (0.85, None, "keep"),
    (0.0, math.nan, "zero"),
    (0.0, math.inf, "keep"),
]


@pytest.mark.usefixtures("in_its_stead", "small_buffer")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", every_strategy(), ids=str)
def test_the_contract(strategy: Strategy, dtype: torch.dtype) -> None:
    power, nonfinite, on_nonfinite = CASES[(DTYPES.index(dtype) + len(str(strategy))) % len(CASES)]
    case = a_case(dtype, torch.finfo(dtype).max ** power)
    if nonfinite is not None:
        case.gradients["first"]["weight"][3, 4] = nonfinite
        case.arrays["first"]["weight"][3, 4] = nonfinite
    assert_as_on_a_device(case, strategy, on_nonfinite)


@pytest.mark.usefixtures("in_its_stead")
@pytest.mark.parametrize("strategy", [Clip(0.5), ClipValue(0.01), Renormalize()], ids=str)
def test_a_loss_scale_changes_nothing_but_the_gradients(strategy: Strategy) -> None:
    scale = torch.tensor(64.0)
    case = a_case(torch.float32)
    for types in case.gradients.values():
        for gradient in types.values():
            gradient.mul_(scale)
    assert_as_on_a_device(case, strategy, scale=scale)


@pytest.mark.usefixtures("in_its_stead", "small_buffer")
def test_groups_and_limits_that_are_not_next_to_each_other() -> None:
    gradients = {
        f"layer{i}": {"weight": g.view(-1, 2), "bias": g[:3]}
        for i, g in enumerate(random_gradients((50,) * 6, torch.float32))
    }
    for types in gradients.values():
        types["bias"] = types["bias"].clone()
    policy = Policy(
        Clip(0.5, per="model"), {"layer1": ClipValue(0.1), "layer3": ClipValue(0.2), "*/bias": ClipValue(0.1)}
    )
    assert_as_on_a_device(Case.of(gradients), policy)
    assert_as_on_a_device(Case.of(gradients), Policy(Clip(0.2, per="model"), {"*/bias": Clip(0.1, per="model")}))


@pytest.mark.usefixtures("in_its_stead")
@pytest.mark.parametrize("threshold", [1e-300, 1e-45, 1e300])
def test_thresholds_outside_of_the_range_of_float32(threshold: float) -> None:
    assert_as_on_a_device(a_case(torch.float32), Clip(threshold))
    assert_as_on_a_device(a_case(torch.float32), ClipValue(threshold))


@pytest.mark.usefixtures("in_its_stead")
def test_the_same_gradients_give_the_same_bits() -> None:
    model = model_with(random_gradients((300, 7, 70_000) * 10, torch.float32))
    normalizer = GradientNormalizer(model, Clip(1e9, per="model"), backend=FOREACH)
    first, *others = (normalizer.normalize_().norms for _ in range(3))
    assert all(map(first.equal, others))


@pytest.mark.usefixtures("in_its_stead")
@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
def test_groups_that_never_change_are_not_written(on_nonfinite: OnNonfinite) -> None:
    kinds = {"p0": Keep(), "p1": Clip(math.inf), "p2": ClipValue(math.inf)}
    model = nn.ModuleDict({name: model_with(random_gradients((5,), torch.float32)) for name in [*kinds, "p3"]})
    versions = [parameter.grad._version for parameter in model.parameters() if parameter.grad is not None]
    policy = Policy(Clip(1e-3), kinds)
    GradientNormalizer(model, policy, on_nonfinite=on_nonfinite, backend=FOREACH).normalize_()
    now = [parameter.grad._version for parameter in model.parameters() if parameter.grad is not None]
    # A group that is not finite would be zeroed.
    assert [b > a for a, b in zip(versions, now, strict=True)] == [on_nonfinite == "zero"] * 3 + [True]


@pytest.mark.usefixtures("in_its_stead")
class TestCapture:
    """What a CUDA graph allows for, as far as the host decides on it."""

    @pytest.fixture
    def capturing(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        now = [False]
        monkeypatch.setattr(kept, "is_capturing", lambda: now[0])
        return now

    def test_the_first_step_is_refused(self, capturing: list[bool]) -> None:
        capturing[0] = True
        with pytest.raises(SettingError, match=r"while a CUDA graph .*; next: run a few steps before"):
            GradientNormalizer(
                model_with(random_gradients((3,), torch.float32)), Clip(0.5), backend=FOREACH
            ).normalize_()

    def test_tables_outlive_what_a_graph_replays(self, capturing: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kept, "SETS", 1)
        tables: kept.Kept[Tensor] = kept.Kept()
        cpu = torch.device("cpu")
        first = tables.get(cpu, (1,), lambda: torch.zeros(1))
        capturing[0] = True
        assert tables.get(cpu, (1,), lambda: torch.ones(1)) is first
        capturing[0] = False
        tables.get(cpu, (2,), lambda: torch.ones(1))
        assert tables.get(cpu, (1,), lambda: torch.ones(1)) is not first
        assert tables._captured == [first]


def test_tables_are_made_once_for_each_set_of_gradients_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = [1]
    monkeypatch.setattr(kept, "_stream_on", lambda _: stream[0])
    tables: kept.Kept[object] = kept.Kept()
    cpu = torch.device("cpu")
    found: dict[tuple[int, int], object] = {}
    for stream[0] in (1, 2, 1, 2):
        for key in range(3):
            value = tables.get(cpu, (key,), object)
            assert found.setdefault((stream[0], key), value) is value
    assert len(set(found.values())) == 6
    for key in range(kept.SETS):
        tables.get(cpu, (key + 10,), object)
    assert tables.get(cpu, (0,), object) is not found[2, 0]
