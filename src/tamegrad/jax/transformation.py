"""`normalize_gradients`, a transformation that chains before any optimizer of optax."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify

from tamegrad.errors import NonFiniteGradientError, SettingError, quoted
from tamegrad.groups import Plan
from tamegrad.jax.apply import normalized
from tamegrad.jax.measure import real_parts
from tamegrad.jax.state import NormalizeState, initial_state
from tamegrad.jax.tree import PlannedTree, Settings, Tree, plan_tree
from tamegrad.policy import Overrides, as_policy
from tamegrad.strategies import OnNonfinite, check_on_nonfinite

__all__ = ["normalize_gradients", "plan_of"]

# An optimizer of optax moves its own state whatever the gradients are, so a transformation before it cannot skip.
_SKIPS = {
    "skip": "wrap the whole chain: optax.apply_if_finite(optax.chain(normalize_gradients(...), optimizer), 5)",
    "skip_group": 'use "zero", which leaves out the gradient but not the momentum, or optax.partition with an '
    "optax.apply_if_finite for each part",
}
_NONFINITE = (np.isnan, np.isposinf, np.isneginf)


def normalize_gradients(
    policy: object,
    *,
    overrides: Overrides | None = None,
    layers: Sequence[str] | None = None,
    stacked: Sequence[str] | None = None,
    on_nonfinite: OnNonfinite = "keep",
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformation:
    """Normalizes or clips gradients per layer, parameter type, tensor, element or model; chain it before an optimizer.

    Leaves of the tree with one parent are a layer, named by the path of the parent (`encoder.layers.0`), and the last
    key of a leaf's path is its parameter type (`kernel`). Leaves that are not floating-point arrays are left alone.

    Sums, norms and scales are float64 if `jax_enable_x64` is set, and float32 else, also for float16 and bfloat16.
    A zero group stays zero. In float64 every finite gradient gets the right answer; in float32 norms from 1.2e-38
    to 3.4e38 do; `docs/jax.md` has the details.

    Args:
        policy: A strategy, a member of `GradientNormalization` (threshold 1.0), or a `Policy`.
        overrides: Strategies for some layers, as in `Policy`; only beside a strategy.
        layers: Globs on paths (`*` crosses dots); everything below a node that matches forms one layer.
        stacked: Globs on paths; below a node that matches, each slice along the leading axis of the leaves is a layer
            of its own, named as if it were not stacked: `blocks.attention` becomes `blocks.0.attention` and so on.
        on_nonfinite: What happens to a group with NaN or infinity: `"keep"` leaves it as it is, `"zero"` makes it zero,
            and both normalize the other groups as usual; `"raise"` raises.
        axis_name: Inside of `jax.shard_map`, the mesh axes over which gradients are split.

    Returns:
        The transformation. Its state is a `NormalizeState`, which `report_of` reads.

    Raises:
        SettingError: If a setting is invalid, or, in `init`, two parameters have the same name.
        UnmatchedError: In `init`, if an override or a pattern matches nothing.
        NonFiniteGradientError: In `update` outside of `jax.jit`, with `on_nonfinite="raise"`. Inside, `checkify` raises
            its own error.

    Example:
        >>> import jax.numpy as jnp
        >>> from tamegrad import Clip
        >>> from tamegrad.jax import normalize_gradients, report_of
        >>> params = {"encoder": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "out": {"kernel": jnp.ones(2)}}
        >>> tx = optax.chain(normalize_gradients(Clip(1.0), overrides={"*/bias": None}), optax.sgd(0.1))
        >>> updates, state = tx.update(params, tx.init(params))
        >>> report_of(state).groups
        ('encoder/bias', 'encoder', 'out')
    """
    settings = _settings(
        policy, overrides, layers=layers, stacked=stacked, on_nonfinite=on_nonfinite, axis_name=axis_name
    )

    def init(params: Tree) -> NormalizeState:
        return initial_state(_names(plan_tree(params, settings)))

    def update(updates: Tree, state: NormalizeState, params: Tree = None) -> tuple[Tree, NormalizeState]:
        del params
        planned = plan_tree(updates, settings)
        _check_state(planned, state)
        if not planned.groups:
            return updates, state
        flat, structure = jax.tree.flatten(updates)
        arrays = tuple(jnp.asarray(flat[leaf.position]) for leaf in planned.leaves)
        after, outcome = normalized(planned, settings, arrays)
        if on_nonfinite == "raise":
            _raise_if_nonfinite(planned, arrays, outcome.nonfinite)
        for leaf, array in zip(planned.leaves, after, strict=True):
            flat[leaf.position] = array
        return jax.tree.unflatten(structure, flat), NormalizeState(state.names, *outcome[:6])

    return optax.GradientTransformation(init, update)


def plan_of(
    params: Tree,
    policy: object,
    *,
    overrides: Overrides | None = None,
    layers: Sequence[str] | None = None,
    stacked: Sequence[str] | None = None,
) -> Plan:
    """Returns the plan for some parameters: every layer, its strategy and its parameter types. Print it.

    Args:
        params: The parameters, or gradients of the same structure.
        policy: As in `normalize_gradients`.
        overrides: As in `normalize_gradients`.
        layers: As in `normalize_gradients`.
        stacked: As in `normalize_gradients`.

    Returns:
        The plan.

    Raises:
        SettingError: If a setting is invalid, or two parameters have the same name.
        UnmatchedError: If an override or a pattern matches nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> from tamegrad import Clip
        >>> from tamegrad.jax import plan_of
        >>> blocks = {"dense": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}}
        >>> print(plan_of({"blocks": blocks}, Clip(1.0), overrides={"blocks.0.*": None}, stacked=["blocks"]))
        3 layers, 6 parameters, 3 groups
        layer           strategy              parameter types
        blocks.0.dense  Keep()                bias kernel
        blocks.1.dense  Clip(1, per="layer")  bias kernel
        blocks.2.dense  Clip(1, per="layer")  bias kernel
    """
    return plan_tree(params, _settings(policy, overrides, layers=layers, stacked=stacked)).plan


def _settings(
    policy: object,
    overrides: Overrides | None,
    *,
    layers: Sequence[str] | None,
    stacked: Sequence[str] | None,
    on_nonfinite: OnNonfinite = "keep",
    axis_name: str | Sequence[str] | None = None,
) -> Settings:
    checked = as_policy(policy, overrides, "policy")
    check_on_nonfinite(on_nonfinite)
    if on_nonfinite in _SKIPS:
        raise SettingError(
            "normalize_gradients(on_nonfinite)",
            got=repr(on_nonfinite),
            allowed='"keep", "zero", "raise": a transformation cannot keep the optimizer behind it from moving',
            advice=_SKIPS[on_nonfinite],
        )
    for where, patterns in (("layers", layers), ("stacked", stacked)):
        if isinstance(patterns, str):
            raise SettingError(
                where, got=repr(patterns), allowed="a list of paths or globs", advice=f"pass {where}=[{patterns!r}]"
            )
    axis_names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    return Settings(checked, tuple(layers or ()), tuple(stacked or ()), on_nonfinite, axis_names)


def _names(planned: PlannedTree) -> list[str]:
    return [group.name for group in planned.groups]


def _check_state(planned: PlannedTree, state: NormalizeState) -> None:
    """Refuses gradients with other groups than the parameters had that the state was made for."""
    if state.norms.shape[-1] != len(planned.groups):
        raise SettingError(
            "normalize_gradients: update(updates)",
            got=f"gradients that form {len(planned.groups)} groups: {quoted(_names(planned)[:3])}",
            allowed=f"gradients in the structure of the parameters, which form {state.norms.shape[-1]} groups",
            advice="pass init the same part of the parameters that has gradients",
        )


def _raise_if_nonfinite(planned: PlannedTree, arrays: Sequence[jax.Array], nonfinite: jax.Array) -> None:
    if isinstance(nonfinite, jax.core.Tracer):
        # Without `checkify.checkify` around the step, JAX refuses to compile it and says so.
        message = (
            f"normalize_gradients: NaN or infinity in group {{}} of the {len(planned.groups)} in print(plan_of(...))"
        )
        checkify.check(jnp.all(nonfinite == 0), message, jnp.argmax(nonfinite != 0))
    elif nonfinite.any():
        counts = {name: counts for name, counts in _counts(planned, arrays) if any(counts)}
        raise NonFiniteGradientError(counts, planned.plan.layers_of(counts))


def _counts(planned: PlannedTree, arrays: Sequence[jax.Array]) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yields for every slot how many of its values are NaN, plus and minus infinity."""
    for leaf, array in zip(planned.leaves, arrays, strict=True):
        slices = array if leaf.stacked else array[None]
        for name, values in zip(planned.names[leaf.slots], slices, strict=True):
            parts = [np.asarray(part) for part in real_parts(values)]
            nan, plus, minus = (sum(int(kind(part).sum()) for part in parts) for kind in _NONFINITE)
            yield name, (nan, plus, minus)
