import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tamegrad import (
    Clip,
    ClipValue,
    GradientNormalization,
    GroupReport,
    Keep,
    NonFiniteGradientError,
    Policy,
    Renormalize,
    Report,
    SettingError,
    TamegradWarning,
    UnmatchedError,
)
from tamegrad.torch import GradientNormalizer, attach, normalize_grad_


def two_layers(first: list[float], second: list[float]) -> Any:
    """Returns a model whose layers `a` and `b` have these gradients."""
    model = nn.ModuleDict()
    for name, values in {"a": first, "b": second}.items():
        model[name] = nn.Module()
        model[name].weight = nn.Parameter(torch.zeros(len(values)))
        model[name].weight.grad = torch.tensor(values)
    return model


def gradients(model: nn.Module) -> list[list[float]]:
    return [[] if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()]


def test_normalizes_in_place_and_reports() -> None:
    model = two_layers([3.0, 4.0], [0.0, 0.5])
    held = [parameter.grad for parameter in model.parameters()]
    report = normalize_grad_(model, Clip(1.0))
    assert held[0] is not None
    torch.testing.assert_close(held[0], torch.tensor([0.6, 0.8]))
    assert report["a"] == GroupReport("a", norm=5.0, scale=0.2, norm_after=1.0, clipped=True, nonfinite=0)
    assert report["b"] == GroupReport("b", norm=0.5, scale=1.0, norm_after=0.5, clipped=False, nonfinite=0)
    assert report.total_norm.item() == math.sqrt(25.25)
    assert not report.skipped


def test_keep_measures() -> None:
    model = two_layers([3.0, 4.0], [0.0, 0.5])
    report = normalize_grad_(model, Keep())
    assert report.norms.tolist() == [5.0, 0.5]
    assert gradients(model) == [[3.0, 4.0], [0.0, 0.5]]


def test_clipping_values_reports_the_layer() -> None:
    report = normalize_grad_(two_layers([3.0, -4.0], [0.5, 0.25]), ClipValue(3.0))
    assert report["a"].norm_after == math.sqrt(18)
    assert report["a"].scale == pytest.approx(math.sqrt(18) / 5)
    assert report.clipped.tolist() == [True, False]


def test_there_is_no_report_before_the_first_step() -> None:
    assert GradientNormalizer(two_layers([1.0], [1.0]), Clip(1.0)).report is None


def test_a_report_is_a_snapshot() -> None:
    model = two_layers([3.0, 4.0], [1.0, 0.0])
    normalizer = GradientNormalizer(model, Clip(1.0))
    first = normalizer.normalize_()
    second = normalizer.normalize_()
    assert normalizer.report is second
    assert first["a"].norm == 5.0
    assert second["a"].norm == pytest.approx(1.0)


@pytest.mark.parametrize("backend", ["cpu", "foreach"])
def test_a_report_can_be_copied_and_pickled(backend: Any) -> None:
    normalizer = GradientNormalizer(two_layers([3.0, 4.0], [1.0, 0.0]), Clip(1.0), backend=backend)
    ways: list[Callable[[Any], Any]] = [
        copy.copy,
        copy.deepcopy,
        lambda report: pickle.loads(pickle.dumps(report)),  # noqa: S301  our own bytes
    ]
    for copied in ways:
        original = normalizer.normalize_()
        report = copied(original)
        assert isinstance(report, Report)
        assert report.rows() == copied(report).rows() == original.rows()
        assert not hasattr(report, "norm")


def test_a_report_keeps_the_loss_scale_of_its_step() -> None:
    model = two_layers([3.0, 4.0], [1.0, 0.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    normalizer = attach(model, optimizer, Clip(1.0))
    scaler.scale(torch.zeros(1))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0
    assert normalizer.report is not None
    assert normalizer.report.norms.tolist() == [1.25, 0.25]


def test_a_parameter_without_a_gradient_adds_nothing() -> None:
    model = two_layers([3.0, 4.0], [1.0, 0.0])
    model["b"].weight.grad = None
    report = normalize_grad_(model, Renormalize(per="model"))
    assert report["model"].norm == 5.0


def test_a_step_without_any_gradient_warns_once() -> None:
    model = two_layers([3.0, 4.0], [1.0, 0.0])
    model.zero_grad()
    normalizer = GradientNormalizer(model, Renormalize())
    with pytest.warns(TamegradWarning, match="^nothing to normalize: none of 2 parameters has a gradient in this step"):
        report = normalizer.normalize_()
    assert report["a"] == GroupReport("a", norm=0.0, scale=1.0, norm_after=0.0, clipped=False, nonfinite=0)
    assert gradients(model) == [[], []]
    normalizer.normalize_()


@pytest.mark.parametrize(
    ("on_nonfinite", "bad", "good"),
    [("keep", [math.inf, 8.0], [0.6, 0.8]), ("zero", [0.0, 0.0], [0.6, 0.8]), ("skip", [math.inf, 8.0], [3.0, 4.0])],
)
@pytest.mark.parametrize("strategy", [Clip(1.0), Renormalize(), Clip(1.0, per="tensor"), Clip(1.0, per="param_type")])
def test_a_nonfinite_layer_never_changes_another(
    on_nonfinite: str, bad: list[float], good: list[float], strategy: Clip | Renormalize
) -> None:
    model = two_layers([math.inf, 8.0], [3.0, 4.0])
    report = normalize_grad_(model, strategy, on_nonfinite=on_nonfinite)  # type: ignore[arg-type]
    torch.testing.assert_close(gradients(model), [bad, good])
    assert report.nonfinite.tolist() == [1, 0]
    assert report.skipped == (on_nonfinite == "skip")
    assert report.scales.tolist()[0] == (0.0 if on_nonfinite == "zero" else 1.0)


def test_raises_before_anything_is_changed() -> None:
    model = two_layers([3.0, 4.0], [math.nan, -math.inf])
    with pytest.raises(NonFiniteGradientError, match=r"^gradients of layer 'b': got b.weight: 1 NaN, 1 -inf; allowed"):
        normalize_grad_(model, Clip(1.0), on_nonfinite="raise")
    assert gradients(model)[0] == [3.0, 4.0]


def test_takes_policies_members_and_thresholds() -> None:
    member = GradientNormalization.CLIP_L2_PER_LAYER
    assert normalize_grad_(two_layers([3.0, 4.0], [1.0, 0.0]), member, threshold=2.5)["a"].norm_after == 2.5
    policy = Policy(Clip(2.0), {"b": Clip(0.5)})
    assert normalize_grad_(two_layers([3.0, 4.0], [1.0, 0.0]), policy).norms_after.tolist() == [2.0, 0.5]
    assert normalize_grad_(two_layers([3.0, 4.0], [1.0, 0.0]), None, overrides={"b": member}).scales.tolist() == [1, 1]


@pytest.mark.parametrize("policy", [Clip(1.0), Policy(Clip(1.0)), None])
def test_refuses_a_threshold_together_with_a_strategy_or_policy(policy: object) -> None:
    with pytest.raises(SettingError, match=r"^normalize_grad_\(threshold\): got 2.0 together with .*next: leave"):
        normalize_grad_(two_layers([1.0], [1.0]), policy, threshold=2.0)


def test_an_override_with_the_name_of_a_class_hints_at_the_class() -> None:
    class LayerNorm(nn.LayerNorm):
        pass

    plain, own = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), nn.Sequential(LayerNorm(2))
    for model, key, hint in [
        (plain, "LayerNorm", "nn.LayerNorm"),
        (plain, "nn.LayerNorm", "nn.LayerNorm"),
        (plain, "torch.nn.LayerNorm", "nn.LayerNorm"),
        (own, "LayerNorm", "LayerNorm or nn.LayerNorm"),
        (plain, "Module", "nn.Module"),
    ]:
        with pytest.raises(UnmatchedError, match=rf"^override '{key}': .*closest: '.*'; next: .* quotes: {hint}$"):
            normalize_grad_(model, Clip(1.0), overrides={key: None})
    with pytest.raises(UnmatchedError, match=r"next: print\(normalizer.plan\)"):
        normalize_grad_(plain, Clip(1.0), overrides={"GroupNorm": None})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"backend": "fast"}, SettingError, "^backend: got 'fast'; allowed: 'auto', 'cpu', 'gpu', 'foreach'"),
        ({"on_nonfinite": "drop"}, SettingError, "^on_nonfinite: got 'drop'"),
        ({"overrides": {"c": None}}, UnmatchedError, "^override 'c': got a key that matches none of 2 layers"),
        ({"layers": ["c*"]}, UnmatchedError, r"^layers='c\*'"),
        (
            {"layers": "a"},
            SettingError,
            r"^layers: got 'a'; allowed: a list of paths or globs; next: pass layers=\['a'\]",
        ),
    ],
)
def test_refuses_bad_settings_at_construction(
    settings: dict[str, object], error: type[Exception], message: str
) -> None:
    model = two_layers([3.0, 4.0], [1.0, 0.0])
    with pytest.raises(error, match=message):
        normalize_grad_(model, Clip(1.0), **settings)  # type: ignore[arg-type]
    assert gradients(model) == [[3.0, 4.0], [1.0, 0.0]]


@pytest.mark.parametrize("door", [GradientNormalizer, normalize_grad_])
def test_a_misspelled_keyword_is_named_with_the_closest(door: Any) -> None:
    message = "unexpected keyword argument 'overide'; allowed: overrides, layers, .*; closest: 'overrides'"
    with pytest.raises(TypeError, match=message):
        door(two_layers([3.0, 4.0], [1.0, 0.0]), Clip(1.0), overide={"b": None})


def test_settings_are_one_frozen_value() -> None:
    normalizer = GradientNormalizer(two_layers([1.0], [1.0]), Clip(1.0), on_nonfinite="zero", layers=["a"])
    assert normalizer.settings.policy == Policy(Clip(1.0))
    assert (normalizer.settings.on_nonfinite, list(normalizer.settings.layers)) == ("zero", ["a"])
    with pytest.raises(AttributeError):
        normalizer.settings.on_nonfinite = "keep"  # type: ignore[misc]


def test_refuses_a_model_without_parameters() -> None:
    with pytest.raises(SettingError, match="^model: got no parameters"):
        GradientNormalizer(nn.ReLU(), Clip(1.0))


def test_a_layer_may_mix_dtypes() -> None:
    model: Any = nn.Module()
    model.narrow = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    model.wide = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    model.narrow.grad, model.wide.grad = torch.full((1,), 3.0, dtype=torch.float16), torch.full((1,), 4.0).double()
    assert normalize_grad_(model, Clip(1.0))["(root)"].norm == 5.0
    assert model.narrow.grad.item() == torch.tensor(0.6, dtype=torch.float16).item()
    assert model.wide.grad.item() == pytest.approx(0.8, rel=1e-15)


def test_touches_nothing_where_nothing_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(*_: object) -> None:
        raise AssertionError("a gradient was written")

    model = two_layers([3.0, 4.0], [1.0, 0.0])
    monkeypatch.setattr(torch, "_foreach_mul_", multiply)
    normalize_grad_(model, Clip(5.0), backend="foreach")
    with pytest.raises(AssertionError, match="was written"):
        normalize_grad_(model, Clip(1.0), backend="foreach")


def test_counts_skipped_steps_and_nonfinite_steps_of_each_group() -> None:
    model = two_layers([math.nan, 4.0], [1.0, 0.0])
    keeping = GradientNormalizer(model, Clip(1.0))
    skipping = GradientNormalizer(model, Clip(1.0), on_nonfinite="skip")
    for _ in range(2):
        keeping.normalize_()
        skipping.normalize_()
    model["a"].weight.grad = torch.ones(2)
    keeping.normalize_()
    skipping.normalize_()
    assert (keeping.skipped_steps, skipping.skipped_steps) == (0, 2)
    assert keeping.nonfinite_steps == skipping.nonfinite_steps == {"a": 2}


def test_follows_a_model_that_changes() -> None:
    model = two_layers([3.0, 4.0], [math.nan, 0.0])
    normalizer = GradientNormalizer(model, Clip(1.0), overrides={"b": None})
    assert normalizer.normalize_().groups == ("a", "b")
    model["c"] = two_layers([6.0, 8.0], [])["a"]
    assert normalizer.normalize_()["c"].norm == 10.0
    model["a"] = two_layers([0.0, 9.0], [])["a"]
    assert normalizer.normalize_()["a"].norm == 9.0
    del model["b"]
    assert normalizer.normalize_().groups == ("a", "c")
    assert normalizer.nonfinite_steps == {"b": 3}
    model["a"].weight.requires_grad_(requires_grad=False).grad = None
    assert normalizer.normalize_()["a"].norm == 0.0


def test_follows_a_model_that_is_falsy() -> None:
    model = nn.ModuleList()
    model.scale = nn.Parameter(torch.zeros(1))
    normalizer = GradientNormalizer(model, Clip(1.0))
    model.shift = nn.Parameter(torch.zeros(1))
    model.shift.grad = torch.tensor([7.0])
    assert normalizer.normalize_().total_norm.item() == 7.0


def test_a_model_that_moves_to_another_device_gets_the_backend_for_it() -> None:
    model = two_layers([3.0, 4.0], [1.0, 0.0])
    normalizer = GradientNormalizer(model, Clip(1.0))
    normalizer.normalize_()
    assert normalizer.backend.name == "cpu"
    model.zero_grad(set_to_none=True)
    model.to("meta")
    with pytest.warns(TamegradWarning, match="none of 2 parameters has a gradient"):
        normalizer.normalize_()
    assert str(normalizer.backend) == "foreach (the 2 parameters are on meta)"
    model.to_empty(device="cpu")
    model["a"].weight.grad = torch.tensor([6.0, 8.0])
    assert normalizer.normalize_()["a"].norm == 10.0
    assert normalizer.backend.name == "cpu"


def test_a_merged_layer_that_disappears_later_is_not_an_error() -> None:
    model = two_layers([3.0, 4.0], [1.0, 0.0])
    normalizer = GradientNormalizer(model, Clip(1.0), layers=["b"])
    del model["b"]
    assert normalizer.normalize_().groups == ("a",)


def test_parameters_may_be_chosen() -> None:
    model = two_layers([3.0, 4.0], [6.0, 8.0])
    report = GradientNormalizer(model, Clip(1.0), parameters=[model["b"].weight]).normalize_()
    assert report.groups == ("b",)
    assert gradients(model)[0] == [3.0, 4.0]


def test_everything_in_a_report_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    report = normalize_grad_(two_layers([3.0, 4.0], [math.nan, 0.5]), Clip(1.0))
    transfers: list[Tensor] = []
    original: Callable[[Tensor], Any] = Tensor.tolist

    def counted(tensor: Tensor) -> object:
        transfers.append(tensor)
        return original(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    reads: list[Callable[[], object]] = [report.rows, report.as_scalars, report.on_host, lambda: str(report)]
    for number, read in enumerate(reads, start=1):
        read()
        assert len(transfers) == number
    assert report.as_scalars("g")["g/norm/a"] == 5.0
    assert report.on_host()["a"] == report["a"]
    assert report.on_host()["b"].nonfinite == report["b"].nonfinite == 1
