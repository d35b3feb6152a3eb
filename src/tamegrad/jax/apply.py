"""Normalizes the leaves of a plan: measure, decide, multiply; with its derivative."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tamegrad.decide import decide
from tamegrad.jax.measure import float_dtype, group_sums, measured, real_parts
from tamegrad.jax.tree import Leaf, PlannedTree, Settings

__all__ = ["Outcome", "normalized"]

Arrays: TypeAlias = tuple[Array, ...]


class Outcome(NamedTuple):
    """What is decided on every group, as in `tamegrad.decide.Decision`; the first six are a report's."""

    norms: Array
    scales: Array
    norms_after: Array
    clipped: Array
    nonfinite: Array
    total_norm: Array
    first: Array
    second: Array
    limits: Array | None
    zeroed: Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def normalized(planned: PlannedTree, settings: Settings, arrays: Arrays) -> tuple[Arrays, Outcome]:
    """Normalizes gradients.

    Args:
        planned: The plan.
        settings: What the user set.
        arrays: The values of `planned.leaves`.

    Returns:
        The new values in the same dtypes, and what was decided.
    """
    gradients = list(zip(planned.leaves, arrays, strict=True))
    table = measured(gradients, planned, settings.axis_names)
    decision = decide(table, _rules(planned), jnp, on_nonfinite=settings.on_nonfinite)
    outcome = Outcome(*(getattr(decision, name) for name in Outcome._fields))
    changed = jnp.any(decision.changed)
    factors = _at_leaves(planned, changed, [outcome.first, outcome.second, outcome.limits, outcome.zeroed])
    after = tuple(_applied(array, *own) for (_, array), own in zip(gradients, factors, strict=True))
    return after, outcome


@normalized.defjvp
def _derivative(
    planned: PlannedTree, settings: Settings, primals: tuple[Arrays], tangents: tuple[Arrays]
) -> tuple[tuple[Arrays, Outcome], tuple[Arrays, Outcome]]:
    """The derivative of `target(‖G‖)·G/‖G‖`; the parts that `decide` is made of have none that are right."""
    (arrays,), (dots,) = primals, tangents
    after, outcome = normalized(planned, settings, arrays)
    norms, scales = outcome.norms, outcome.scales
    moves = (outcome.nonfinite == 0) & (norms > 0) & (norms < math.inf) & ~jnp.isnan(scales)
    safe = jnp.where(moves, norms, 1.0)
    norm_dots = _inner(planned, settings, (arrays, dots), safe, moves)
    rules = _rules(planned)
    _, target_dots = jax.jvp(lambda values: rules.targets(values, jnp), (norms,), (norm_dots,))
    target_dots = jnp.where(moves, target_dots, 0.0)
    scale_dots = jnp.where(moves, (target_dots - outcome.first * outcome.second * norm_dots) / safe, 0.0)
    vectors = [moves, scale_dots, outcome.first, outcome.second, outcome.limits, outcome.zeroed]
    factors = _at_leaves(planned, jnp.any(moves), vectors)
    after_dots = tuple(_applied_dot(array, dot, own) for array, dot, own in zip(arrays, dots, factors, strict=True))
    second_dots, after_norm_dots = scale_dots / outcome.first, target_dots
    if outcome.limits is not None:
        cut = outcome.limits < math.inf
        safe_after = jnp.where(cut, outcome.norms_after, 1.0)
        cut_dots = _inner(planned, settings, (after, after_dots), safe_after, cut)
        after_norm_dots = jnp.where(cut, cut_dots, target_dots)
        scale_dots = jnp.where(cut, (cut_dots - scales * norm_dots) / safe, scale_dots)
    total = jnp.where((outcome.total_norm > 0) & (outcome.total_norm < math.inf), outcome.total_norm, 1.0)
    total_dot = jnp.sum(safe / total * norm_dots)
    dots_of = {
        "norms": norm_dots,
        "scales": scale_dots,
        "norms_after": after_norm_dots,
        "total_norm": total_dot,
        "second": second_dots,
    }
    outcome_dots = Outcome(*(dots_of.get(name, _no_dot(value)) for name, value in outcome._asdict().items()))
    return (after, outcome), (after_dots, outcome_dots)


def _rules(planned: PlannedTree) -> Any:  # noqa: ANN401  rules of jax arrays
    floats = float_dtype()

    def convert(array: np.ndarray[Any, Any]) -> Array:
        with np.errstate(over="ignore", under="ignore"):
            return jnp.asarray(array.astype(floats) if array.dtype == np.float64 else array)

    return planned.rules.converted(convert)


def _at_leaves(planned: PlannedTree, useful: Array, vectors: Sequence[Array | None]) -> list[list[Array | None]]:
    """Returns for every leaf its groups' entries of `(G,)` vectors, in shapes that broadcast with the leaf.

    The slots are looked up by numbers that XLA cannot fold into the code: it then compiles the same code once for all
    leaves of a shape, and not once a leaf, which took 10 s for 100 layers.

    Args:
        planned: The plan.
        useful: Whether it matters which entry a leaf gets; else it may be another group's.
        vectors: The vectors; for one that is None every leaf gets None.
    """
    starts = [leaf.first for leaf in planned.leaves]
    slots = [None if vector is None else vector[planned.group_of] for vector in vectors]
    known, slots = lax.cond(
        useful,
        lambda slots: ([jnp.uint32(start) for start in starts], slots),
        lambda slots: ([jnp.uint32(0)] * len(starts), slots),
        slots,
    )
    return [
        [None if slot is None else _entries(slot, leaf, start) for slot in slots]
        for leaf, start in zip(planned.leaves, known, strict=True)
    ]


def _entries(slots: Array, leaf: Leaf, start: Array) -> Array:
    entries = lax.dynamic_slice(slots, (start,), (leaf.count,))
    return entries if leaf.stacked else entries.reshape(())


def _fitting(entries: Array | None, array: Array) -> Any:  # noqa: ANN401  an array or None
    """Returns a leaf's entries in a shape that broadcasts: scalars, or one number a slice."""
    return entries if entries is None or entries.ndim == 0 else entries.reshape(-1, *[1] * (array.ndim - 1))


@jax.jit
def _applied(
    array: Array, first: Array | None, second: Array | None, limit: Array | None, zeroed: Array | None
) -> Array:
    first, second, limit, zeroed = (_fitting(entry, array) for entry in (first, second, limit, zeroed))
    # A group that does not change keeps its bits; XLA's arithmetic on the CPU takes subnormal numbers for zero.
    after = jnp.where((first != 1) | (second != 1), (_wide(array) * first * second).astype(array.dtype), array)
    if limit is not None:
        after = jnp.where(jnp.abs(array) > limit, _cut(_wide(array), limit).astype(array.dtype), after)
    return after if zeroed is None else jnp.where(zeroed, jnp.zeros_like(after), after)


def _applied_dot(array: Array, dot: Array, entries: Sequence[Array | None]) -> Array:
    moves, scale_dot, first, second, limit, zeroed = (_fitting(entry, array) for entry in entries)
    wide, wide_dot = _wide(array), _wide(dot)
    # The values of a group that is not finite must not reach a product, not even with zero.
    after = wide_dot * first * second + jnp.where(moves, wide, 0) * scale_dot
    if limit is not None:
        over = jnp.abs(array) > limit
        held = jnp.where(over, wide, 1)
        after = jnp.where(over, jax.jvp(lambda values: _cut(values, limit), (held,), (wide_dot,))[1], after)
    after = after.astype(array.dtype)
    return after if zeroed is None else jnp.where(zeroed, jnp.zeros_like(after), after)


def _cut(values: Array, limit: Array) -> Array:
    """Returns values with the magnitude `limit` and the same sign; of a complex value, its direction."""
    if not jnp.iscomplexobj(values):
        return jnp.sign(values) * limit
    # The magnitude of a complex value may overflow; that of half of it never does.
    held = jnp.where(jnp.isinf(jnp.abs(values)), values / 2, values)
    return held / jnp.where(held == 0, 1, jnp.abs(held)) * limit


def _inner(planned: PlannedTree, settings: Settings, pair: tuple[Arrays, Arrays], norms: Array, moves: Array) -> Array:
    """Returns the derivatives of norms, `Σ g·dg / ‖G‖`, given the values and theirs; 0 where a group does not move."""
    factors = _at_leaves(planned, jnp.any(moves), [norms, moves])
    products = []
    for leaf, array, dot, (norm, moving) in zip(planned.leaves, *pair, factors, strict=True):
        norm, moving = _fitting(norm, array), _fitting(moving, array)  # noqa: PLW2901  the same, in another shape
        pairs = zip(real_parts(array), real_parts(dot), strict=True)
        terms = [jnp.where(moving, part / norm, 0) * part_dot for part, part_dot in pairs]
        products.append((leaf, functools.reduce(jnp.add, terms)))
    return group_sums(_itself, products, planned, settings.axis_names)


def _itself(array: Array, limit: object) -> Array:
    del limit
    return array


def _wide(array: Array) -> Array:
    """Returns values in the dtype of scales, or its complex one."""
    return array.astype(jnp.promote_types(array.dtype, float_dtype()))


def _no_dot(value: Array | None) -> Any:  # noqa: ANN401  an array or None
    if value is None or jnp.issubdtype(value.dtype, jnp.inexact):
        return None if value is None else jnp.zeros_like(value)
    return np.zeros(value.shape, jax.dtypes.float0)
