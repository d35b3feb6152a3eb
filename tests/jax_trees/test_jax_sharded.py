"""Sharded trees on 8 virtual devices: right norms, and as many collectives for 16 layers as for 4."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from support.jax_contract import transformed
from tamegrad import Clip, ClipValue
from tamegrad.jax import normalize_gradients, report_of

MATRIX, VECTOR, WHOLE = PartitionSpec("data", "model"), PartitionSpec("data"), PartitionSpec()


def a_tree(layers: int) -> dict[str, Any]:
    return {f"l{index}": {"b": jnp.arange(8.0), "w": jnp.arange(64.0).reshape(8, 8) + index} for index in range(layers)}


def specs_of(tree: Any) -> Any:
    return jax.tree.map(lambda array: MATRIX if array.ndim > 1 else VECTOR, tree)


def placed(tree: Any, specs: Any, mesh: Any) -> Any:
    return jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), tree, specs)


def assert_same(actual: Any, expected: Any) -> None:
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-6), actual, expected)


def collectives(compiled: Any) -> tuple[int, int]:
    """Counts the reductions over devices in what runs in every step, and in the whole program."""
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :]
    counted = tuple(len(re.findall(r"\ball-reduce(?:-start)?\(", part)) for part in (entry, text))
    assert "all-gather(" not in text
    return counted  # type: ignore[return-value]  # of two


@pytest.fixture(params=[AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def mesh(request: pytest.FixtureRequest) -> Any:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(request.param,) * 2)


def test_collectives_do_not_grow_with_the_number_of_layers(mesh: Any) -> None:
    counts = []
    for layers in (4, 16):
        tree, transformation = a_tree(layers), normalize_gradients(Clip(1.0))
        expected, report = transformed(tree, Clip(1.0))
        with jax.set_mesh(mesh):
            sharded, state = placed(tree, specs_of(tree), mesh), transformation.init(tree)
            compiled = jax.jit(transformation.update).lower(sharded, state).compile()
            updates, after = compiled(sharded, state)
        counts.append(collectives(compiled))
        assert_same(updates, expected)
        assert_same(report_of(after).norms, report.norms)
        assert updates["l0"]["w"].sharding.spec == MATRIX
    assert counts[0] == counts[1]
    # One over each set of axes that a leaf is sharded over.
    assert 1 <= counts[0][0] <= 2


def test_a_sharded_stack_of_layers(mesh: Any) -> None:
    tree = {
        "blocks": {"b": jnp.ones((4, 2)), "w": jnp.arange(4 * 2 * 6.0).reshape(4, 2, 6)},
        "out": {"w": jnp.ones((4, 4))},
    }
    expected, report = transformed(tree, Clip(1.0), stacked=["blocks"])
    assert report.groups == ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "out")
    with jax.set_mesh(mesh):
        updates, after = transformed(
            placed(tree, jax.tree.map(lambda _: VECTOR, tree), mesh), Clip(1.0), stacked=["blocks"]
        )
    assert_same(updates, expected)
    assert_same(after.norms, report.norms)


@pytest.mark.parametrize("factor", [1.0, 1e30])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_sums_over_the_axes_that_a_leaf_is_split_over(check_vma: bool, factor: float) -> None:  # noqa: FBT001
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    matrices = {name: {"w": types["w"] * factor} for name, types in a_tree(3).items()}
    # Without the check JAX does not know that a leaf is whole on every device.
    tree = {**matrices, "whole": {"w": jnp.arange(5.0)}} if check_vma else matrices
    specs = jax.tree.map(lambda array: MATRIX if array.ndim > 1 else WHOLE, tree)
    transformation = normalize_gradients(Clip(1.0), axis_name=("data", "model"))
    update = jax.shard_map(
        transformation.update, mesh=mesh, in_specs=(specs, WHOLE), out_specs=(specs, WHOLE), check_vma=check_vma
    )
    expected, report = transformed(tree, Clip(1.0))
    updates, state = jax.jit(update)(placed(tree, specs, mesh), transformation.init(tree))
    assert_same(updates, expected)
    assert_same(report_of(state).norms, report.norms)


def test_without_axis_names_every_device_has_norms_of_its_own() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    tree = {"out": {"w": jnp.arange(8.0).reshape(8, 1)}}
    transformation = normalize_gradients(ClipValue(2.0))

    def update(tree: Any) -> Any:
        updates, state = transformation.update(tree, transformation.init(tree))
        return updates, state.norms

    sharded = placed(tree, {"out": {"w": VECTOR}}, mesh)
    updates, norms = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=VECTOR, out_specs=(VECTOR, VECTOR)))(sharded)
    assert norms.tolist() == list(range(8))
    assert updates["out"]["w"].ravel().tolist() == [0.0, 1.0, *[2.0] * 6]
