"""The transformation under JAX's transformations and optax's wrappers: compiled, batched, looped, differentiated."""

import math
import pickle
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import test_util
from jax.experimental import checkify

from support.contract import documented_strategy
from support.jax_contract import transformed
from tamegrad import (
    Clip,
    ClipValue,
    GradientNormalization,
    Keep,
    NonFiniteGradientError,
    Policy,
    Renormalize,
    SettingError,
    UnmatchedError,
)
from tamegrad.jax import normalize_gradients, plan_of, report_of

TREE: dict[str, Any] = {
    "out": {"bias": jnp.ones(2), "kernel": jnp.full((2, 3), 2.0)},
    "in": {"kernel": jnp.full((3, 2), 0.1), "missing": None},
}


def assert_same(actual: Any, expected: Any, rtol: float = 1e-6) -> None:
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-7), actual, expected)


class TestCompiled:
    def test_a_second_call_does_not_compile_again(self) -> None:
        transformation = normalize_gradients(Clip(1.0))
        traced = []

        def update(gradients: Any, state: Any) -> Any:
            traced.append(1)
            return transformation.update(gradients, state)

        step = jax.jit(update, donate_argnums=(0, 1))
        _, state = step(jax.tree.map(jnp.copy, TREE), transformation.init(TREE))
        _, state = step(jax.tree.map(jnp.copy, TREE), state)
        assert len(traced) == 1
        assert report_of(state)["out"].clipped

    def test_vmap_gives_every_model_its_own_norms(self) -> None:
        transformation = normalize_gradients(Clip(1.0))
        factors = jnp.asarray([1.0, 1e-30, 1e30])
        many = jax.tree.map(lambda array: factors.reshape(-1, *[1] * array.ndim) * array, TREE)
        updates, states = jax.jit(jax.vmap(lambda one: transformation.update(one, transformation.init(one))))(many)
        for index in range(3):
            one = jax.tree.map(lambda array: array[index], many)  # noqa: B023  called at once
            expected, report = transformed(one, Clip(1.0))
            assert_same(jax.tree.map(lambda array: array[index], updates), expected)  # noqa: B023
            state = jax.tree.map(lambda array: array[index], states)  # noqa: B023
            np.testing.assert_allclose(report_of(state).norms, report.norms, rtol=1e-6)
        with pytest.raises(SettingError, match="jax.vmap gave 1 more dimension"):
            report_of(states)

    def test_scan_carries_the_state(self) -> None:
        optimizer = optax.chain(normalize_gradients(Clip(1.0)), optax.adam(0.1))

        def step(carry: Any, factor: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.tree.map(lambda array: array * factor, params), state, params)
            return (optax.apply_updates(params, updates), state), state[0].total_norm

        (_, state), totals = jax.lax.scan(step, (TREE, optimizer.init(TREE)), jnp.arange(1.0, 4.0))
        assert totals.shape == (3,)
        assert report_of(state).total_norm == totals[-1]


class TestDerivative:
    def test_first_and_second_derivatives_are_those_of_the_definition(self) -> None:
        # Compiling takes most of the time: one tree for all strategies.
        policy = Policy(
            Clip(1.0),
            {"b": Renormalize(per="tensor"), "c": ClipValue(1.0), "d": documented_strategy()(2.0), "e": Keep()},  # type: ignore[call-arg]
        )
        transformation = normalize_gradients(policy)
        rng = np.random.default_rng(0)

        def loss(tree: Any) -> Any:
            updates, state = transformation.update(tree, transformation.init(tree))
            weighted = sum(
                jnp.sum(jnp.sin(array) * (1 + index)) for index, array in enumerate(jax.tree.leaves(updates))
            )
            return weighted + jnp.sum(jnp.square(state.norms) + state.norms_after * 2 + state.scales) + state.total_norm

        with jax.enable_x64(True):  # noqa: FBT003  JAX's own signature
            tree = {
                layer: {"b": jnp.asarray(rng.standard_normal(3)), "w": jnp.asarray([3.0, 0.2])} for layer in "abcde"
            }
            test_util.check_grads(loss, (tree,), order=2, modes=("rev",), rtol=1e-5, atol=1e-5)

    def test_at_a_norm_of_exactly_one_renormalize_still_projects(self) -> None:
        transformation = normalize_gradients(Renormalize())
        tree = {"a": {"w": jnp.asarray([1.0, 0.0])}}
        update = jax.jit(jax.jacobian(lambda tree: transformation.update(tree, transformation.init(tree))[0]))
        jacobian = update(tree)
        np.testing.assert_allclose(jacobian["a"]["w"]["a"]["w"], [[0.0, 0.0], [0.0, 1.0]])

    def test_a_zero_group_and_one_that_is_not_finite_pass_derivatives_through(self) -> None:
        transformation = normalize_gradients(Clip(1.0))
        tree = {"nan": {"w": jnp.asarray([math.nan, 1.0])}, "zero": {"w": jnp.zeros(2)}}
        update = jax.jit(lambda tree: transformation.update(tree, transformation.init(tree))[0])
        _, dots = jax.jvp(update, (tree,), (jax.tree.map(jnp.ones_like, tree),))
        assert_same(dots, jax.tree.map(jnp.ones_like, tree))


@pytest.mark.parametrize(
    ("of_optax", "strategy"),
    [(optax.clip_by_global_norm, lambda limit: Clip(limit, per="model")), (optax.clip, ClipValue)],
    ids=["clip_by_global_norm", "clip"],
)
@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_takes_the_place_of_clipping_by_optax(of_optax: Any, strategy: Any, limit: float) -> None:
    transformation = of_optax(limit)
    expected, _ = transformation.update(TREE, transformation.init(TREE))
    updates, report = transformed(TREE, strategy(limit))
    assert_same(updates, expected)
    # Clipping again changes nothing, and a tree under the limit keeps its values.
    again, _ = transformed(updates, strategy(limit))
    assert_same(again, expected)
    assert any(row.clipped for row in report) == (limit < 1)


class TestWrappers:
    def test_partition_gives_each_label_its_own_policy(self) -> None:
        optimizer = optax.partition(
            {
                "a": normalize_gradients(Clip(1.0)),
                "b": normalize_gradients(Renormalize()),
                "none": normalize_gradients(Keep()),
            },
            {"out": "a", "in": "b"},
        )
        updates, _ = optimizer.update(TREE, optimizer.init(TREE))
        expected, _ = transformed(TREE, Clip(1.0), overrides={"in": Renormalize()})
        assert_same(updates, expected)

    def test_multi_steps_normalizes_what_it_has_added_up(self) -> None:
        optimizer = optax.MultiSteps(optax.chain(normalize_gradients(Clip(1.0)), optax.sgd(1.0)), every_k_schedule=2)
        state = optimizer.init(TREE)
        for _ in range(2):
            updates, state = optimizer.update(TREE, state, TREE)
        expected, _ = transformed(TREE, Clip(1.0))
        assert_same(updates, jax.tree.map(jnp.negative, expected))

    def test_apply_if_finite_skips_the_whole_step(self) -> None:
        optimizer = optax.apply_if_finite(optax.chain(normalize_gradients(Clip(1.0)), optax.adam(0.1)), 5)
        bad = jax.tree.map(lambda array: array * jnp.nan, TREE)
        state = optimizer.init(TREE)
        updates, after = optimizer.update(bad, state, TREE)
        assert all(not array.any() for array in jax.tree.leaves(updates))
        assert_same(after.inner_state, state.inner_state)

    def test_map_params_finds_no_parameters_in_the_state(self) -> None:
        optimizer = optax.chain(normalize_gradients(Clip(1.0)), optax.adam(0.1))
        state = optimizer.init(TREE)
        mapped = optax.tree_map_params(optimizer, lambda array: array + 1, state)
        assert report_of(mapped).norms.tolist() == report_of(state).norms.tolist()
        assert mapped[1][0].mu["out"]["bias"].tolist() == [1.0, 1.0]

    def test_the_state_survives_pickling(self) -> None:
        _, state = (optimizer := optax.chain(normalize_gradients(Clip(1.0)), optax.sgd(0.1))).update(
            TREE, optimizer.init(TREE)
        )
        restored = pickle.loads(pickle.dumps(state))  # noqa: S301  our own
        assert str(report_of(restored)) == str(report_of(state))
        assert report_of(restored).rows() == report_of(state).rows()


class TestNonfinite:
    BAD: ClassVar[Any] = {
        "in": {"kernel": jnp.asarray([1.0, math.nan, math.inf])},
        "out": {"kernel": jnp.asarray([3.0, 4.0])},
    }

    def test_raise_names_layers_and_parameters_outside_of_jit(self) -> None:
        transformation = normalize_gradients(Clip(1.0), on_nonfinite="raise")
        with pytest.raises(NonFiniteGradientError, match=r"'in': got in.kernel: 1 NaN, 1 \+inf"):
            transformation.update(self.BAD, transformation.init(self.BAD))

    def test_raise_works_with_checkify_inside_of_jit(self) -> None:
        transformation = normalize_gradients(Clip(1.0), on_nonfinite="raise")
        step = jax.jit(checkify.checkify(transformation.update))
        error, _ = step(self.BAD, transformation.init(self.BAD))
        assert "NaN or infinity in group 0 of the 2" in error.get()
        error, _ = step(jax.tree.map(jnp.ones_like, self.BAD), transformation.init(self.BAD))
        assert error.get() is None

    @pytest.mark.parametrize(("choice", "way_out"), [("skip", "apply_if_finite"), ("skip_group", "zero")])
    def test_what_needs_the_optimizer_is_refused_with_the_way_out(self, choice: Any, way_out: str) -> None:
        with pytest.raises(SettingError, match=rf"got '{choice}'.*next: .*{way_out}"):
            normalize_gradients(Clip(1.0), on_nonfinite=choice)


class TestSettings:
    def test_a_policy_a_member_and_a_strategy_mean_the_same(self) -> None:
        plans = {
            str(plan_of(TREE, policy))
            for policy in (Clip(1.0), Policy(Clip(1.0)), GradientNormalization.CLIP_L2_PER_LAYER)
        }
        assert len(plans) == 1

    def test_errors_are_those_of_pytorch(self) -> None:
        with pytest.raises(SettingError, match=r"got a Policy together with overrides="):
            normalize_gradients(Policy(Clip(1.0)), overrides={})
        with pytest.raises(SettingError, match=r"pass layers=\['in'\]"):
            normalize_gradients(Clip(1.0), layers="in")
        with pytest.raises(SettingError, match="on_nonfinite"):
            normalize_gradients(Clip(1.0), on_nonfinite="ignore")  # type: ignore[arg-type]
        with pytest.raises(UnmatchedError, match="closest: 'out'"):
            normalize_gradients(Clip(1.0), overrides={"oit": None}).init(TREE)

    def test_gradients_of_another_structure_than_the_parameters_are_refused(self) -> None:
        transformation = normalize_gradients(Clip(1.0))
        with pytest.raises(SettingError, match=r"got gradients that form 1 groups: 'in'; .*which form 2 groups"):
            transformation.update({"in": TREE["in"]}, transformation.init(TREE))

    def test_a_report_is_read_outside_of_compiled_code(self) -> None:
        state = normalize_gradients(Clip(1.0)).init(TREE)
        with pytest.raises(SettingError, match="got a state inside of compiled code; .*state.norms"):
            jax.jit(lambda state: report_of(state).norms)(state)

    def test_report_of_another_state_is_refused(self) -> None:
        with pytest.raises(SettingError, match="with 0 states of normalize_gradients"):
            report_of(optax.adam(0.1).init(TREE))
