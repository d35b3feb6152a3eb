"""`normalize_grad_` takes gradients themselves, in a dictionary, as functional training has them."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tamegrad import Clip, ClipValue, NonFiniteGradientError, Renormalize, SettingError, TamegradWarning
from tamegrad.torch import GradientNormalizer, attach, normalize_grad_

BACKENDS = ["cpu", "foreach"]


def functional_gradients() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        output: tuple[Tensor, Any] = functional_call(model, parameters, (torch.ones(5, 3),))
        return (100 * output[0]).square().sum()

    gradients: dict[str, Tensor] = grad(loss)(
        {name: parameter.detach() for name, parameter in model.named_parameters()}
    )
    return gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "strategy", [Clip(0.5), Renormalize(per="param_type"), Clip(0.5, per="tensor"), ClipValue(0.1)], ids=str
)
def test_normalizes_in_place_as_if_parameters_had_the_gradients(backend: Any, strategy: Any) -> None:
    gradients = functional_gradients()
    parameters = {name: nn.Parameter(torch.zeros_like(gradient)) for name, gradient in gradients.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    held, before = dict(gradients), {name: gradient.clone() for name, gradient in gradients.items()}
    report = normalize_grad_(gradients, strategy, overrides={"1.l0/bias": None}, backend=backend)
    expected = normalize_grad_(parameters.items(), strategy, overrides={"1.l0/bias": None}, backend=backend)
    assert report.rows() == expected.rows()
    for name, gradient in gradients.items():
        # PyTorch computes one gradient for the two biases.
        assert (gradient is held[name]) == (name != "1.bias_hh_l0")
        assert torch.equal(gradient, parameters[name].grad)  # type: ignore[arg-type]
        assert torch.equal(gradient, before[name]) == (name in {"1.bias_ih_l0", "1.bias_hh_l0"})


def test_dictionaries_in_it_are_layers_as_in_the_normalize_of_numpy() -> None:
    gradients = {"encoder": {"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])}, "scale": torch.tensor([2.0])}
    report = normalize_grad_(gradients, Clip(1.0))
    assert report.groups == ("encoder", "(root)")
    assert report.norms.tolist() == [5.0, 2.0]
    torch.testing.assert_close(gradients["encoder"]["weight"], torch.tensor([0.6]))  # type: ignore[index]


def test_slashes_separate_layers_like_dots() -> None:
    gradients = {"model/dense/kernel": torch.tensor([3.0]), "model/dense/bias": torch.tensor([4.0])}
    assert normalize_grad_(gradients, Clip(1.0))["model.dense"].norm == 5.0


def sparse(positions: list[int]) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([positions]), torch.tensor([3.0, 4.0]), (4,), check_invariants=True, is_coalesced=False
    )


AWKWARD: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.tensor([2.0]).expand(4),
    "lazily conjugated": lambda: torch.tensor([3 + 4j]).conj(),
    "strided": lambda: torch.full((4, 4), 2.0).t()[1:, ::2],
    "sparse": lambda: sparse([0, 2]).coalesce(),
    "uncoalesced": lambda: sparse([0, 0]),
    "complex": lambda: torch.tensor([3 + 4j]),
    "narrow": lambda: torch.tensor([3.0, 4.0], dtype=torch.float16),
    "wide": lambda: torch.tensor([3e200, 4e200], dtype=torch.float64),
    "of no dimension": lambda: torch.tensor(3.0),
    "empty": lambda: torch.empty(0),
}
REPLACED = {"expanded", "lazily conjugated", "uncoalesced"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", AWKWARD)
def test_a_gradient_that_cannot_be_changed_in_place_is_replaced(kind: str, backend: Any) -> None:
    def dense(tensor: Tensor) -> Tensor:
        return tensor.to_dense() if tensor.is_sparse else tensor.resolve_conj()

    gradient = AWKWARD[kind]()
    before = dense(gradient).clone()
    gradients = {"first": {"weight": gradient}, "other": {"weight": torch.ones(2)}}
    largest = float(before.abs().max()) if before.numel() else 1.0
    norm = largest * float(torch.linalg.vector_norm(before / largest))
    report = normalize_grad_(gradients, Clip(1.0, per="tensor"), backend=backend)
    after = gradients["first"]["weight"]
    assert (after is not gradient) == (kind in REPLACED)
    assert report["first.weight"].norm == pytest.approx(norm)
    torch.testing.assert_close(dense(after), before / (norm or 1.0))


def test_a_tensor_that_two_names_share_is_the_gradient_of_both() -> None:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return (parameters["a.weight"] + parameters["a.bias"]).square().sum()

    gradients = grad(loss)({"a.weight": torch.tensor([1.5, 2.0]), "a.bias": torch.zeros(2)})
    assert gradients["a.weight"] is gradients["a.bias"]
    report = normalize_grad_(gradients, Clip(1.0))
    assert report["a"].norm == pytest.approx(50**0.5)
    assert gradients["a.weight"] is not gradients["a.bias"]
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, torch.tensor([3.0, 4.0]) / 50**0.5)


@pytest.mark.parametrize("kind", ["expanded", "sparse"])
def test_an_awkward_tensor_that_two_names_share_is_the_gradient_of_both(kind: str) -> None:
    shared = AWKWARD[kind]()
    norm = float(torch.linalg.vector_norm(shared.to_dense()))
    gradients = {"a.weight": shared, "a.bias": shared}
    assert normalize_grad_(gradients, Clip(1.0))["a"].norm == pytest.approx(2**0.5 * norm)
    for gradient in gradients.values():
        assert float(torch.linalg.vector_norm(gradient.to_dense())) == pytest.approx(0.5**0.5)


def test_parts_of_one_buffer_are_normalized_in_place() -> None:
    buffer = torch.tensor([3.0, 4.0, 6.0, 8.0])
    normalize_grad_({"a.weight": buffer[:2], "b.weight": buffer[2:]}, Clip(1.0))
    torch.testing.assert_close(buffer, torch.tensor([0.6, 0.8, 0.6, 0.8]))


def test_none_stands_for_no_gradient() -> None:
    gradients = {"a.weight": None, "b.weight": torch.tensor([3.0, 4.0])}
    report = normalize_grad_(gradients, Clip(1.0))
    assert report.norms.tolist() == [0.0, 5.0]
    assert gradients["a.weight"] is None
    with pytest.warns(TamegradWarning, match="nothing to normalize"):
        normalize_grad_({"a.weight": None}, Clip(1.0))


def test_another_default_device_changes_nothing() -> None:
    gradients = {"a.weight": torch.tensor([3.0, 4.0]), "b.weight": None}
    with torch.device("meta"):
        report = normalize_grad_(gradients, Clip(1.0))
    assert report.norms.tolist() == [5.0, 0.0]
    torch.testing.assert_close(gradients["a.weight"], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("kind", ["plain", "expanded"])
def test_changes_nothing_where_it_raises(kind: str) -> None:
    good = torch.tensor([3.0, 4.0]) if kind == "plain" else AWKWARD["expanded"]()
    gradients = {"a.weight": good, "b.weight": torch.tensor([torch.nan])}
    before = good.clone()
    with pytest.raises(NonFiniteGradientError, match="layer 'b'"):
        normalize_grad_(gradients, Clip(0.1), on_nonfinite="raise")
    assert gradients["a.weight"] is good
    assert torch.equal(good, before)


def with_graph() -> Tensor:
    weight = torch.ones(2, requires_grad=True)
    return torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": nn.Parameter(torch.ones(2))}, "a: got a parameter among gradients.*the gradients alone"),
        ({"a": torch.ones(2, requires_grad=True)}, "a: got a parameter among gradients"),
        ({"a": nn.Parameter(torch.ones(2), requires_grad=False)}, "a: got a parameter among gradients"),
        ({"a": {"b": 1.0}}, r"a\.b: got a float among gradients"),
        ({"a": [torch.ones(2)]}, "a: got a list among gradients"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "a: got a tensor of torch.int64, which is no gradient"),
        ({"a": with_graph()}, r"a: got a gradient that requires grad itself \(create_graph=True\).*detach\(\)"),
        ({3: torch.ones(2)}, "3: got the key 3 of a dict.*names as keys"),
        ({"a": MappingProxyType({"b": torch.ones(2)})}, r"a\.b: got the key 'b' of a mappingproxy.*pass a dict"),
    ],
)
def test_refuses_a_mixture(bad: dict[Any, Any], message: str) -> None:
    good = torch.tensor([3.0, 4.0])
    for gradients in ({"good": good, **bad}, {**bad, "good": good}):
        with pytest.raises(SettingError, match=rf"^normalize_grad_\(gradients\): {message}"):
            normalize_grad_(gradients, Clip(1.0))
    assert good.tolist() == [3.0, 4.0]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_refuses_a_gradient_of_a_kind_that_no_gradient_may_be_with_its_name() -> None:
    with pytest.raises(SettingError, match=r"^gradient of a\.weight: got a gradient in the layout torch.sparse_csr"):
        normalize_grad_({"a.weight": torch.eye(2).to_sparse_csr()}, Clip(1.0))


def test_refuses_a_gradient_with_a_graph_alone() -> None:
    with pytest.raises(SettingError, match="requires grad itself"):
        normalize_grad_({"a": with_graph()}, Clip(1.0))


def test_refuses_a_state_dict_whose_tensors_would_be_normalized_as_gradients() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(SettingError, match="got a state_dict, which holds the parameters.*pass the model itself"):
        normalize_grad_(model.state_dict(), Renormalize())
    assert torch.equal(model.weight, before)


def test_refuses_two_gradients_under_one_name() -> None:
    gradients = {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}
    with pytest.raises(SettingError, match=r"different parameters have the same name: 'a\.b'"):
        normalize_grad_(gradients, Clip(1.0))


def test_refuses_pairs_of_gradients_and_names_the_dictionary() -> None:
    gradients = functional_gradients()
    with pytest.raises(SettingError, match=r"call normalize_grad_\(\{name: gradient\}, policy\) with a dictionary"):
        normalize_grad_(gradients.items(), Clip(1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [dict, list])
def test_only_normalize_grad_takes_gradients(form: Any) -> None:
    gradients = form(functional_gradients().items())
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    for door in (lambda: GradientNormalizer(gradients, Clip(1.0)), lambda: attach(gradients, optimizer, Clip(1.0))):
        with pytest.raises(SettingError, match=r"normalize_grad_\(\{name: gradient\}, policy\)"):
            door()


@pytest.mark.parametrize("transform", [vmap, lambda f: grad(lambda x: f(x).sum())])
def test_refuses_gradients_inside_of_a_transform(transform: Any) -> None:
    def step(parameter: Tensor) -> Tensor:
        gradients: dict[str, Tensor] = {"a": grad(lambda x: x.square().sum())(parameter)}
        normalize_grad_(gradients, Clip(1.0))
        return gradients["a"]

    with pytest.raises(
        SettingError, match="a: got a tensor inside of .*normalize what the outermost transform returns"
    ):
        transform(step)(torch.ones(3, 2))
