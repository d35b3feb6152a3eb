"""Compares the JAX transformation with the reference: the same gradients as NumPy arrays, through both."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from tamegrad import Report, normalize
from tamegrad.jax import normalize_gradients, report_of
from tamegrad.strategies import OnNonfinite

Arrays = dict[str, dict[str, NDArray[Any]]]

# With and without `jax_enable_x64`: how far sums may be off, as a part of the result.
SUMS = {np.dtype(np.float64): 1e-13, np.dtype(np.float32): 2e-6}
# XLA's arithmetic on the CPU takes subnormal numbers for zero.
SMALLEST = {np.dtype(np.float64): 2.0**-1022, np.dtype(np.float32): 2.0**-126}


def transformed(gradients: Any, strategy: object, **settings: Any) -> tuple[Any, Report[Any]]:
    """Normalizes a tree in a compiled step."""
    transformation = normalize_gradients(strategy, **settings)
    updates, state = jax.jit(transformation.update)(gradients, transformation.init(gradients))
    return updates, report_of(state)


def assert_contract(arrays: Arrays, dtype: Any, strategy: object, on_nonfinite: OnNonfinite = "keep") -> None:
    """Normalizes gradients of a dtype with JAX and compares with the reference."""
    gradients = {layer: {kind: jnp.asarray(g, dtype) for kind, g in types.items()} for layer, types in arrays.items()}
    wide = np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64
    given = {
        layer: {kind: np.asarray(g).astype(wide) for kind, g in types.items()} for layer, types in gradients.items()
    }
    expected, expected_report = normalize(given, strategy, on_nonfinite=on_nonfinite)
    updates, report = transformed(gradients, strategy, on_nonfinite=on_nonfinite)
    assert_same_report(report, expected_report)
    finfo = jnp.finfo(dtype)
    for layer, types in expected.items():
        for kind, want in types.items():
            got = updates[layer][kind]
            assert got.dtype == gradients[layer][kind].dtype
            tolerance = SUMS[report.norms.dtype] + float(finfo.eps)
            smallest = max(float(finfo.smallest_normal) * float(finfo.eps), SMALLEST[report.norms.dtype])
            with np.errstate(over="ignore", invalid="ignore"):
                rounded = np.asarray(jnp.asarray(want).astype(dtype)).astype(wide)
            np.testing.assert_allclose(
                np.asarray(got).astype(wide), rounded, rtol=tolerance, atol=smallest, err_msg=f"{layer}.{kind}"
            )
            if want.tobytes() == given[layer][kind].tobytes():
                assert np.asarray(got).tobytes() == np.asarray(gradients[layer][kind]).tobytes(), (
                    f"the bits of {layer}.{kind} changed"
                )


def assert_same_report(report: Report[Any], expected: Report[Any]) -> None:
    floats = report.norms.dtype
    assert report.groups == expected.groups
    largest = float(jnp.finfo(floats).max)
    for name in ("norms", "scales", "norms_after", "total_norm"):
        want = getattr(expected, name)
        # A norm of finite values may be past float32, as it may be past float64.
        want = np.where(np.abs(want) > largest, np.inf, want)
        got = np.asarray(getattr(report, name))
        assert got.dtype == floats
        np.testing.assert_allclose(got, want, rtol=SUMS[floats], atol=SMALLEST[floats], err_msg=name)
    np.testing.assert_array_equal(report.nonfinite, expected.nonfinite)
    # If a strategy is continuous, the last bits of a norm decide whether a group that barely changes is clipped.
    barely = np.abs(expected.scales - 1) <= SUMS[floats]
    np.testing.assert_array_equal(np.asarray(report.clipped) | barely, expected.clipped | barely)
