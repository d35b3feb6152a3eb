"""Trees of JAX libraries: the names of their layers, a step of training, a checkpoint."""

import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tamegrad import Clip, Keep
from tamegrad.jax import normalize_gradients, plan_of, report_of


def layers_of(tree: Any, **settings: Any) -> dict[str, tuple[str, ...]]:
    return {layer.name: layer.types for layer in plan_of(tree, Keep(), **settings).layers}


def test_flax_nnx_variables_do_not_show_in_names() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.LSTMCell(3, 3, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    assert layers_of(state)["layers.0"] == ("bias", "kernel")
    merged = layers_of(state, layers=["layers.1"])
    assert list(merged) == ["layers.0", "layers.1"]
    assert "hf.kernel" in merged["layers.1"]


def test_flax_nnx_optimizer_trains_and_reports() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(normalize_gradients(Clip(0.1)), optax.sgd(1.0)), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        gradients = nnx.grad(lambda model: jnp.square(model(jnp.ones((3, 4))) - 5).sum())(model)
        optimizer.update(model, gradients)

    before = model.kernel[...]
    step(model, optimizer)
    report = report_of(optimizer.opt_state)
    assert report.groups == ("(root)",)
    moved = jnp.sqrt(jnp.square(before - model.kernel[...]).sum() + jnp.square(model.bias[...]).sum())
    assert float(moved) == pytest.approx(0.1, rel=1e-5)


def test_flax_linen_parameters_with_and_without_boxes() -> None:
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):  # type: ignore[name-defined, misc, unused-ignore]  # flax may be missing
        @nn.compact  # type: ignore[untyped-decorator, unused-ignore]
        def __call__(self, x: Any) -> Any:
            initializer = nn.with_partitioning(nn.initializers.lecun_normal(), ("rows", "columns"))
            return nn.Dense(2)(nn.Dense(3, kernel_init=initializer)(x))

    params = Model().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    expected = {"Dense_0": ("bias", "kernel"), "Dense_1": ("bias", "kernel")}
    assert layers_of(params) == expected
    assert layers_of(nn.unbox(params)) == expected


def test_equinox_modules() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    gradients = eqx.filter_grad(lambda model: model(jnp.ones(2)).sum())(model)
    assert layers_of(gradients) == {"layers.0": ("weight", "bias"), "layers.1": ("weight", "bias")}
    optimizer = normalize_gradients(Clip(0.1))
    updates, _ = optimizer.update(gradients, optimizer.init(eqx.filter(model, eqx.is_inexact_array)))
    assert eqx.apply_updates(model, updates).layers[0].weight.shape == (4, 2)


def test_orbax_restores_the_report(tmp_path: Path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    tree = {"out": {"w": jnp.asarray([3.0, 4.0])}}
    optimizer = optax.chain(normalize_gradients(Clip(1.0)), optax.adam(0.1))
    _, state = optimizer.update(tree, optimizer.init(tree))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", optimizer.init(tree))
    assert report_of(restored).rows() == report_of(state).rows()
    np.testing.assert_array_equal(restored[1][0].mu["out"]["w"], state[1][0].mu["out"]["w"])


def test_flax_serialization_restores_the_report() -> None:
    serialization = pytest.importorskip("flax.serialization")
    tree = {"out": {"w": jnp.asarray([3.0, 4.0])}}
    optimizer = optax.chain(normalize_gradients(Clip(1.0)), optax.adam(0.1))
    _, state = optimizer.update(tree, optimizer.init(tree))
    restored = serialization.from_bytes(optimizer.init(tree), serialization.to_bytes(state))
    assert report_of(restored).rows() == report_of(state).rows()


def test_the_example_trains_and_draws(tmp_path: Path) -> None:
    for library in ("flax", "sklearn", "matplotlib"):
        pytest.importorskip(library)
    picture = tmp_path / "norms.png"
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "jax_digits.py"))
    assert example["main"](str(picture), steps=100) > 0.9
    assert picture.stat().st_size > 10_000
