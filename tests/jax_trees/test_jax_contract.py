"""Every strategy means the same in JAX as in `reference.py`, with float64 and without it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from support.contract import Case, documented_strategy, every_strategy
from support.jax_contract import assert_contract, transformed
from tamegrad import Clip, ClipValue, Policy, Renormalize, normalize
from tamegrad.strategies import OnNonfinite
from tamegrad.torch import GradientNormalizer

# Compiling takes most of the time, so one tree holds the same layers for every strategy. There are layers on both sides
# of a threshold, so one is enough.
STRATEGIES = [strategy for strategy in every_strategy() if getattr(strategy, "threshold", 1.0) == 1.0]
POLICY = Policy(None, {f"s{index:02}.*": strategy for index, strategy in enumerate(STRATEGIES)})


def gradients(dtype: Any, *, finite: bool) -> dict[str, dict[str, Any]]:
    """Layers of ordinary, small, big and mixed values, a zero one and an empty one, for every strategy."""
    largest = float(jnp.finfo(dtype).max)
    rng = np.random.default_rng(0)

    def values(magnitude: float) -> dict[str, Any]:
        made = {"bias": rng.standard_normal(7) * magnitude, "weight": rng.standard_normal((7, 9)) * magnitude}
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        return {kind: array * (1 + 2j) / 3 if is_complex else array for kind, array in made.items()}

    small, big, ordinary, odd = (values(magnitude) for magnitude in (largest**-0.7, largest**0.7, 1.0, 1.0))
    if not finite:
        odd["weight"][2, 3:6] = [math.nan, math.inf, -math.inf]
    layers = {
        "big": big,
        "empty": {"weight": np.zeros((0, 3))},
        "mixed": {"bias": big["bias"], "weight": small["weight"]},
        "odd": odd,
        "ordinary": ordinary,
        "small": small,
        "zero": {"scale": np.zeros(()), "weight": np.zeros((3, 2))},
    }
    return {f"s{index:02}.{name}": layers[name] for index in range(len(POLICY.overrides)) for name in layers}


@pytest.mark.parametrize(
    ("dtype", "on_nonfinite"),
    [(jnp.float32, None), (jnp.bfloat16, "zero"), (jnp.float16, "keep"), (jnp.complex64, "zero")],
    ids=str,
)
def test_every_strategy_means_what_the_reference_says(dtype: Any, on_nonfinite: OnNonfinite | None) -> None:
    assert_contract(gradients(dtype, finite=on_nonfinite is None), dtype, POLICY, on_nonfinite or "keep")


@pytest.mark.parametrize(
    ("dtype", "on_nonfinite"),
    [(jnp.float64, None), (jnp.float32, "zero"), (jnp.bfloat16, None), (jnp.complex128, "keep")],
    ids=str,
)
def test_every_strategy_means_it_with_float64_too(dtype: Any, on_nonfinite: OnNonfinite | None) -> None:
    with jax.enable_x64(True):  # noqa: FBT003  JAX's own signature
        assert_contract(gradients(dtype, finite=on_nonfinite is None), dtype, POLICY, on_nonfinite or "keep")


@pytest.mark.parametrize("kind", [Clip, ClipValue])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_a_group_exactly_at_its_threshold_keeps_its_bits_and_one_above_does_not(dtype: Any, kind: Any) -> None:
    tree = {"out": {"weight": jnp.asarray([3.0, -4.0, 0.0], dtype)}}
    limit = 4.0 if kind is ClipValue else 5.0
    same, report = transformed(tree, kind(limit))
    assert np.asarray(same["out"]["weight"]).tobytes() == np.asarray(tree["out"]["weight"]).tobytes()
    assert not report["out"].clipped
    _, report = transformed(tree, kind(float(np.nextafter(np.float32(limit), np.float32(0)))))
    assert report["out"].clipped


def test_the_same_gradients_give_the_same_result_in_pytorch_jax_and_numpy() -> None:
    rng = np.random.default_rng(1)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "a": {"bias": (40,), "weight": (40, 30)},
        "b": {"weight": (20, 40)},
    }
    arrays = {
        layer: {kind: rng.standard_normal(shape).astype(np.float32) for kind, shape in types.items()}
        for layer, types in shapes.items()
    }
    policy = Policy(Clip(1.0), {"*/bias": Renormalize(per="param_type"), "b": documented_strategy()(0.5)})  # type: ignore[call-arg]
    expected, _ = normalize(arrays, policy)
    in_jax, _ = transformed({layer: dict(types) for layer, types in arrays.items()}, policy)
    case = Case.of(
        {layer: {k: torch.from_numpy(g.copy()) for k, g in types.items()} for layer, types in arrays.items()}
    )
    GradientNormalizer(case.model, policy).normalize_()
    for layer, types in expected.items():
        for kind, want in types.items():
            np.testing.assert_allclose(in_jax[layer][kind], want, rtol=1e-6)
            np.testing.assert_allclose(case.gradients[layer][kind].numpy(), want, rtol=1e-6)


def test_sums_of_small_dtypes_are_of_float32_at_least() -> None:
    for dtype, value in ((jnp.bfloat16, 0.01), (jnp.float16, 100.0)):
        tree = {"out": {f"w{index}": jnp.full((64, 64), value, dtype) for index in range(8)}}
        _, report = transformed(tree, Clip(1.0))
        exact = float(tree["out"]["w0"][0, 0]) * (8 * 64 * 64) ** 0.5
        assert report["out"].norm == pytest.approx(exact, rel=1e-6)


def test_where_the_range_of_float32_ends() -> None:
    # XLA's arithmetic on the CPU takes subnormal numbers for zero, as those are below 2^-126.
    tree = {"normal": jnp.full(4, 2.0**-126), "subnormal": jnp.full(4, 2.0**-130), "largest": jnp.full(4, 3e38)}
    updates, report = transformed(tree, Renormalize(per="tensor"))
    assert report["normal"].norm == 2.0**-125
    np.testing.assert_allclose(updates["normal"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["largest"], 0.5, rtol=1e-6)
    assert report["largest"].norm == math.inf
    assert report["subnormal"].norm == 0
    assert np.asarray(updates["subnormal"]).tobytes() == np.asarray(tree["subnormal"]).tobytes()
