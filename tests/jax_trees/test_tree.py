"""Layers and names of a pytree."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from tamegrad import Clip, Keep, SettingError, UnmatchedError
from tamegrad.jax import plan_of

ONE = np.ones(2, np.float32)


class Dense(NamedTuple):
    kernel: Any
    bias: Any


def layers_of(tree: Any, **settings: Any) -> dict[str, tuple[str, ...]]:
    return {layer.name: layer.types for layer in plan_of(tree, Keep(), **settings).layers}


def test_leaves_with_one_parent_are_a_layer() -> None:
    tree = {"encoder": [{"w": ONE, "b": None}, {"w": ONE, "b": ONE}], "mlp/~/linear": {"w": ONE}, "scale": ONE}
    assert layers_of(tree) == {
        "encoder.0": ("w",),
        "encoder.1": ("b", "w"),
        "mlp/~/linear": ("w",),
        "(root)": ("scale",),
    }
    assert layers_of(ONE) == {"(root)": ("array",)}
    assert layers_of(Dense(ONE, ONE)) == {"(root)": ("kernel", "bias")}


def test_leaves_that_are_no_floating_point_arrays_are_in_no_layer() -> None:
    assert layers_of({"a": {"w": ONE, "steps": np.ones(2, np.int32)}, "b": {"key": jax.random.key(0)}}) == {"a": ("w",)}
    assert layers_of({"a": {"steps": np.ones(2, np.int32)}}) == {}


def test_layers_merges_what_is_below_the_outermost_match() -> None:
    cell = {"hf": {"bias": ONE, "kernel": ONE}, "if": {"kernel": ONE}}
    tree = {"cells": {"lstm": cell}, "out": {"kernel": ONE}}
    merged = {"cells.lstm": ("hf.bias", "hf.kernel", "if.kernel"), "out": ("kernel",)}
    assert layers_of(tree, layers=["cells.*"]) == merged


def test_each_slice_of_a_stack_is_a_layer_named_as_if_it_were_not_stacked() -> None:
    stack = {"attention": {"kernel": np.ones((2, 3, 3))}, "norm": {"scale": np.ones((2, 3))}}
    plan = plan_of({"blocks": stack}, Clip(1.0, per="tensor"), stacked=["blocks"])
    assert [layer.name for layer in plan.layers] == [
        "blocks.0.attention",
        "blocks.1.attention",
        "blocks.0.norm",
        "blocks.1.norm",
    ]
    assert plan.groups[1].name == "blocks.1.attention.kernel"
    assert layers_of({"blocks": stack}, stacked=["blocks"], layers=["blocks.*"]) == {
        "blocks.0": ("attention.kernel", "norm.scale"),
        "blocks.1": ("attention.kernel", "norm.scale"),
    }


def test_a_stack_needs_the_same_leading_axis_everywhere() -> None:
    tree = {"blocks": {"bias": np.ones((2, 3)), "kernel": np.ones((4, 3, 3))}}
    with pytest.raises(
        SettingError, match="'blocks.kernel': got a leading axis of 4; .*2 in 'blocks', as in 'blocks.bias'"
    ):
        plan_of(tree, Keep(), stacked=["blocks"])
    with pytest.raises(SettingError, match="'blocks.scale': got an array without a leading axis"):
        plan_of({"blocks": {"scale": np.ones(())}}, Keep(), stacked=["blocks"])


@pytest.mark.parametrize("where", ["layers", "stacked"])
def test_a_pattern_that_matches_nothing_names_the_closest(where: str) -> None:
    with pytest.raises(UnmatchedError, match=f"{where}='block': got a pattern that matches none .*closest: 'blocks'"):
        layers_of({"blocks": {"kernel": ONE}}, **{where: ["block"]})


def test_two_parameters_with_one_name_are_an_error() -> None:
    with pytest.raises(SettingError, match="two parameters with the name 'a.b'"):
        plan_of({"a": {"b": ONE}, "a.b": ONE}, Keep())
