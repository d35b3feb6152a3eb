"""Kinds of gradients: sparse, complex, shared, expanded, of odd shapes and layouts."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from support.contract import QUICK_BACKENDS
from tamegrad import Clip, ClipValue, Keep, Renormalize, SettingError
from tamegrad.torch import normalize_grad_
from tamegrad.torch.backends import SelectedBackend, select
from tamegrad.torch.memory import overlaps_itself


@pytest.fixture(autouse=True, params=QUICK_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test on each backend, unless the test asks for one."""

    def selected(name: str, parameters: Iterable[Tensor]) -> SelectedBackend:
        return select(request.param if name == "auto" else name, parameters)

    monkeypatch.setattr("tamegrad.torch.step.select", selected)


STRATEGIES = [Clip(1.0), ClipValue(0.5), Renormalize(), Clip(1.0, per="model"), Clip(1.0, per="tensor")]


def model_with(*gradients: Tensor) -> Any:
    """Returns a model whose parameters `p0`, `p1`, ... have these gradients."""
    model = nn.Module()
    for index, gradient in enumerate(gradients):
        dense = gradient.layout in {torch.strided, torch.sparse_coo}
        zeros = torch.zeros(gradient.shape, dtype=gradient.dtype) if dense else torch.zeros_like(gradient)
        parameter = nn.Parameter(zeros)
        parameter.grad = gradient
        model.register_parameter(f"p{index}", parameter)
    return model


def sparse_gradient(*, coalesced: bool) -> Tensor:
    """Returns a gradient of five rows of two values, with entries in rows 1, 4 and again 1."""
    values = torch.tensor([[3.0, 0.0], [0.0, -8.0], [1.0, 1.0]])
    gradient = torch.sparse_coo_tensor(torch.tensor([[1, 4, 1]]), values, (5, 2), check_invariants=True)
    return gradient.coalesce() if coalesced else gradient


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("coalesced", [False, True])
def test_a_sparse_gradient_matches_the_dense_one(strategy: Any, *, coalesced: bool) -> None:
    sparse, dense = (
        model_with(sparse_gradient(coalesced=coalesced)),
        model_with(sparse_gradient(coalesced=True).to_dense()),
    )
    report, expected = normalize_grad_(sparse, strategy), normalize_grad_(dense, strategy)
    assert sparse.p0.grad.is_sparse
    assert sparse.p0.grad.coalesce().indices().tolist() == [[1, 4]]
    torch.testing.assert_close(sparse.p0.grad.to_dense(), dense.p0.grad)
    assert report.rows() == expected.rows()


@pytest.mark.parametrize("coalesced", [False, True])
def test_a_sparse_gradient_that_keeps_its_values_is_not_touched(*, coalesced: bool) -> None:
    gradient = sparse_gradient(coalesced=coalesced)
    model = model_with(gradient)
    normalize_grad_(model, Clip(100.0))
    assert model.p0.grad is gradient
    assert gradient.is_coalesced() == coalesced
    assert gradient._nnz() == (2 if coalesced else 3)


def test_a_sparse_gradient_without_entries_is_zero() -> None:
    indices, values = torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 2)
    empty = torch.sparse_coo_tensor(indices, values, (5, 2), check_invariants=True)
    model = model_with(empty, torch.tensor([3.0, 4.0]))
    assert normalize_grad_(model, Renormalize())["(root)"].norm == 5.0
    assert model.p0.grad._nnz() == 0


def test_a_sparse_embedding_trains() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 1, 7])).square().sum().backward()
    report = normalize_grad_(embedding, Clip(0.1))
    assert report["(root)"].norm_after == 0.1
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.to_dense().norm().item() == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_gradients_keep_their_direction(dtype: torch.dtype) -> None:
    gradient = torch.tensor([3.0 + 4.0j, 0.0, -12.0j], dtype=dtype)
    clipped, cut, unit = (model_with(gradient.clone()) for _ in range(3))
    assert normalize_grad_(clipped, Clip(1.3))["(root)"].norm == 13.0
    torch.testing.assert_close(clipped.p0.grad, gradient / 10)
    normalize_grad_(cut, ClipValue(5.5))
    torch.testing.assert_close(cut.p0.grad, torch.tensor([3.0 + 4.0j, 0.0, -5.5j], dtype=dtype))
    normalize_grad_(unit, Renormalize())
    torch.testing.assert_close(unit.p0.grad, gradient / 13)


def test_zero_size_and_zero_dimensional_gradients() -> None:
    model = model_with(torch.empty(0), torch.empty(3, 0), torch.tensor(3.0), torch.tensor([[4.0]]))
    assert normalize_grad_(model, Clip(1.0))["(root)"].norm == 5.0
    assert model.p2.grad.item() == pytest.approx(0.6)
    only_empty = model_with(torch.empty(0))
    assert normalize_grad_(only_empty, Renormalize())["(root)"].norm == 0.0


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_an_expanded_gradient_counts_every_value(strategy: Any) -> None:
    expanded, dense = model_with(torch.tensor([2.0]).expand(3, 4)), model_with(torch.full((3, 4), 2.0))
    assert normalize_grad_(expanded, strategy).rows() == normalize_grad_(dense, strategy).rows()
    assert torch.equal(expanded.p0.grad, dense.p0.grad)


def test_an_expanded_gradient_that_keeps_its_values_is_not_touched() -> None:
    gradient = torch.tensor([2.0]).expand(3, 4)
    model = model_with(gradient)
    normalize_grad_(model, Clip(100.0))
    assert model.p0.grad is gradient


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_memory_around_a_gradient_is_not_touched(strategy: Any) -> None:
    around = torch.full((6, 6), 9.0)
    model = model_with(around[1:5:2, 2:4])
    assert normalize_grad_(model, strategy).rows()[0].norm == 18.0
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[1:5:2, 2:4] = True
    assert (around[~inside] == 9.0).all()
    assert (around[inside] < 9.0).all()


def test_a_channels_last_gradient_stays_channels_last() -> None:
    gradient = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    expected = gradient / gradient.double().norm()
    model = model_with(gradient)
    normalize_grad_(model, Renormalize())
    assert model.p0.grad is gradient
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient, expected.float())


@pytest.mark.parametrize("strategy", [Clip(1.0), Clip(1.0, per="tensor"), Renormalize(per="model")], ids=str)
def test_a_gradient_that_two_parameters_share_is_measured_and_scaled_once(strategy: Any) -> None:
    shared = torch.tensor([3.0, 4.0])
    for second in (shared, shared.view(2), shared.view(1, 2)):
        model = model_with(shared.copy_(torch.tensor([3.0, 4.0])), second)
        assert normalize_grad_(model, strategy).total_norm == 5.0
        torch.testing.assert_close(model.p0.grad, torch.tensor([0.6, 0.8]))
        torch.testing.assert_close(model.p1.grad.flatten(), torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("gradient", [sparse_gradient(coalesced=False), torch.tensor([2.0]).expand(3, 4)])
def test_a_shared_gradient_that_is_replaced_is_replaced_for_all_parameters(gradient: Tensor) -> None:
    model = model_with(gradient, gradient)
    normalize_grad_(model, Renormalize())
    assert model.p0.grad is model.p1.grad
    assert model.p0.grad.to_dense().norm().item() == pytest.approx(1.0)


def test_views_of_one_bucket_are_separate_gradients() -> None:
    bucket = torch.tensor([3.0, 4.0, 6.0, 8.0])
    report = normalize_grad_(model_with(bucket[:2], bucket[2:]), Clip(1.0, per="tensor"))
    assert report.norms.tolist() == [5.0, 10.0]
    torch.testing.assert_close(bucket, torch.tensor([0.6, 0.8, 0.6, 0.8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_equal_values_have_the_right_norm(dtype: torch.dtype) -> None:
    count = 10**8
    gradient = torch.tensor([0.1], dtype=dtype).expand(count)
    report = normalize_grad_(model_with(gradient), Keep())
    assert report["(root)"].norm == pytest.approx(gradient[0].item() * math.sqrt(count), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(2).to_sparse_csr(), "a gradient in the layout torch.sparse_csr"),
        (lambda: torch.ones(2).to(torch.float8_e5m2), "a gradient of torch.float8_e5m2"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_an_unsupported_kind_of_gradient_is_refused_before_anything_changes(
    make: Callable[[], Tensor], kind: str
) -> None:
    model = model_with(torch.tensor([3.0, 4.0]), make())
    with pytest.raises(SettingError, match=f"^gradient of p1: got {kind}; allowed: dense and sparse COO .*next: leave"):
        normalize_grad_(model, Clip(1.0))
    assert model.p0.grad.tolist() == [3.0, 4.0]


@given(st.data())
def test_overlap_is_found_in_any_strides(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3), "shape")
    strides = data.draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)), "strides")
    places = torch.as_strided(torch.arange(100), shape, strides).flatten().tolist()
    overlaps = len(places) != len(set(places))
    found = overlaps_itself(torch.as_strided(torch.zeros(100), shape, strides))
    # Interleaved strides that happen not to collide may count as overlapping: a copy is made then, which is right too.
    assert found or not overlaps
    if not overlaps and torch.zeros(shape).stride() == tuple(strides):
        assert not found


@pytest.mark.parametrize("strategy", [ClipValue(1.0), Clip(1.0), Renormalize()], ids=str)
def test_a_complex_zero_keeps_its_sign(strategy: Any) -> None:
    model = model_with(torch.tensor([complex(0.0, -0.0), complex(-0.0, 0.0), 3.0 + 4.0j]))
    normalize_grad_(model, strategy)
    signs = torch.view_as_real(model.p0.grad).signbit().tolist()
    assert signs == [[False, True], [True, False], [False, False]]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_lazy_conjugate_is_normalized_correctly(strategy: Any) -> None:
    values = torch.tensor([3.0 + 4.0j, 1.0 - 2.0j])
    lazy, plain = model_with(values.conj()), model_with(values.conj().resolve_conj())
    assert lazy.p0.grad.is_conj()
    assert normalize_grad_(lazy, strategy).rows() == normalize_grad_(plain, strategy).rows()
    assert torch.equal(lazy.p0.grad.resolve_conj(), plain.p0.grad)


def test_a_lazy_negation_is_normalized_correctly() -> None:
    lazy = model_with(torch.tensor([0.0 + 3.0j, 0.0 - 4.0j]).conj().imag)
    assert lazy.p0.grad.is_neg()
    assert normalize_grad_(lazy, Clip(1.0))["(root)"].norm == 5.0
    torch.testing.assert_close(lazy.p0.grad.resolve_neg(), torch.tensor([-0.6, 0.8]))
