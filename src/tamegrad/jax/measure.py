"""Measures the gradients of a pytree: sums of squares for every group, in the table that `decide` reads.

`P` is the number of slots, `G` the number of groups, and floats are float64 where JAX has it and float32 elsewhere.
All sums are of squares at a fixed scale, because sums over devices merge into one collective, which maxima do not. As a
rule one sum a leaf is enough; the sums of values past its range, and the counts of values that are not finite, are
taken in a loop that runs only in a step in which a group needs them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tamegrad.jax.tree import Leaf, PlannedTree
from tamegrad.ranges import FORMATS

__all__ = ["Gradient", "float_dtype", "group_sums", "measured", "real_parts"]

# A leaf and its values.
Gradient: TypeAlias = tuple[Leaf, Array]
# The real numbers whose squares are summed: given the values of a leaf, and its limit or limits.
Parts: TypeAlias = Callable[[Array, Any], list[Array]]
# What is summed of a leaf: given its values, its limit or limits, and what else the sum depends on.
Term: TypeAlias = Callable[..., Array]

# A sum of squares between these is right: below, squares that are taken for zero might matter, for as many as 2^30
# values; above, the sum might overflow.
SAFE = {4: (2.0**-72, 2.0**126), 8: (2.0**-900, 2.0**972)}
# What the rounds of the loop look for.
SMALL, BIG, NONFINITE, ROUNDS = range(4)


def float_dtype() -> Any:  # noqa: ANN401  NumPy's types of dtypes do not fit JAX's
    """Returns the dtype of sums, norms and scales: float64 if `jax_enable_x64` is set, else float32."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def measured(gradients: Sequence[Gradient], planned: PlannedTree, axis_names: Sequence[str]) -> Array:
    """Measures gradients.

    Args:
        gradients: The leaves of the plan with their values.
        planned: The plan.
        axis_names: The mesh axes to sum over, inside of `shard_map`.

    Returns:
        `(G, COLUMNS)`, as `decide` takes it.
    """

    def sums(term: Term, of: Sequence[Gradient], *others: Array) -> Array:
        return group_sums(term, of, planned, axis_names, *others)

    *before, nonfinite = _squares(real_parts, gradients, sums)
    none = jnp.zeros_like(nonfinite)
    after, cut = [none] * 3, none
    if planned.rules.has_limits:
        limited = [(leaf, array) for leaf, array in gradients if np.isfinite(planned.limits[leaf.slots]).any()]
        *after, _ = _squares(_limited_parts, limited, sums)
        cut = sums(_is_cut, limited)
    return jnp.stack([*before, nonfinite, none, none, *after, cut], 1)


def real_parts(array: Array, limit: object = None) -> list[Array]:
    """Returns the values as real numbers in the dtype of sums: of complex values two parts.

    Args:
        array: Gradients.
        limit: Ignored.
    """
    del limit
    parts = [array.real, array.imag] if jnp.iscomplexobj(array) else [array]
    return [part.astype(float_dtype()) for part in parts]


def group_sums(
    term: Term, gradients: Sequence[Gradient], planned: PlannedTree, axis_names: Sequence[str], *others: Array
) -> Array:
    """Adds up a term over the values of every group, on all devices.

    Args:
        term: What is added up of a leaf's values.
        gradients: Leaves of the plan with their values.
        planned: The plan.
        axis_names: The mesh axes to sum over, inside of `shard_map`.
        others: More arguments of the term.

    Returns:
        `(G,)` sums.
    """
    by_axes: dict[tuple[str, ...], list[Gradient]] = {}
    for leaf, array in gradients:
        by_axes.setdefault(_split_over(array, axis_names), []).append((leaf, array))
    totals = []
    for axes, members in by_axes.items():
        slots = np.concatenate([np.arange(leaf.first, leaf.first + leaf.count) for leaf, _ in members])
        sums = [_slot_sums(term, leaf.stacked, array, _limit(leaf, array, planned), *others) for leaf, array in members]
        groups = planned.group_of[slots]
        grouped = jax.ops.segment_sum(jnp.concatenate(sums), groups, num_segments=len(planned.groups))
        totals.append(lax.psum(grouped, axes) if axes else grouped)
    return functools.reduce(jnp.add, totals)


# Compiled, a function is traced once for all leaves of a shape.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _slot_sums(term: Term, stacked: bool, array: Array, limit: Any, *others: Array) -> Array:  # noqa: ANN401, FBT001
    """Returns the sums of a term over the slots of one leaf, in one dimension."""
    sums = jnp.sum(term(array, limit, *others), tuple(range(1, array.ndim)) if stacked else None)
    return _replicated(sums if stacked else sums[None])


def _limit(leaf: Leaf, array: Array, planned: PlannedTree) -> Any:  # noqa: ANN401  a number or an array
    """Returns the limit of a leaf; if its slices have different ones, in a shape that broadcasts."""
    limits = planned.limits[leaf.slots]
    if (limits == limits[0]).all():
        return float(limits[0])
    return limits.reshape(-1, *[1] * (array.ndim - 1)).astype(float_dtype())


def _squares(parts: Parts, gradients: Sequence[Gradient], sums: Callable[..., Array]) -> list[Array]:
    """Returns `(G,)` sums of squares of small, middle and big values, of which at most one is not zero, and counts.

    The counts are of values that are not finite.
    """
    floats = jnp.finfo(float_dtype())
    form, (smallest, largest) = FORMATS[floats.dtype.itemsize], SAFE[floats.dtype.itemsize]
    middle = sums(_bound(_square, parts), gradients)
    # Zeros that vary over the same mesh axes.
    none = jnp.where(jnp.isnan(middle), 0.0, 0.0).astype(middle.dtype)
    is_small, is_big = middle < smallest, ~(middle < largest)
    if all(2 * jnp.finfo(array.dtype).maxexp <= floats.maxexp for _, array in gradients):
        # Every square fits the middle range; what is not finite is still counted.
        start = jnp.int32(NONFINITE)
        is_small = jnp.zeros_like(is_small)
    else:
        start = jnp.where(jnp.any(is_small), SMALL, BIG)
    end = jnp.where(jnp.any(is_big), ROUNDS, start + jnp.any(is_small))
    factors = jnp.asarray([2.0**form.small_exponent, 2.0**form.big_exponent, 1.0], middle.dtype)

    def body(round_: Array, found: Array) -> Array:
        found_now = sums(_bound(_looked_for, parts), gradients, factors[round_], round_ == NONFINITE)
        return lax.dynamic_update_index_in_dim(found, found_now, round_, 0)

    small, big, nonfinite = lax.fori_loop(start, end, body, jnp.stack([none] * ROUNDS))
    # A group with a value that is not finite stays in the middle, whose sum is not finite either.
    is_big = is_big & (big > 0) & (big < jnp.inf)
    is_middle = ~is_small & ~is_big
    ranges = (is_small, small), (is_middle, middle), (is_big, big)
    return [*(jnp.where(is_own, own, none) for is_own, own in ranges), nonfinite]


@functools.cache
def _bound(term: Callable[..., Array], parts: Parts) -> Term:
    """Returns a term for these parts, always the same object, by which JAX finds what it has traced."""
    return functools.partial(term, parts)


def _square(parts: Parts, array: Array, limit: Any) -> Array:  # noqa: ANN401  a number or an array
    return functools.reduce(jnp.add, (jnp.square(part) for part in parts(array, limit)))


def _looked_for(parts: Parts, array: Array, limit: Any, factor: Array, counts: Array) -> Array:  # noqa: ANN401
    """Returns squares of scaled values, or in the last round 1 for each value that is not finite."""
    # Both depend on the factor: XLA moves whatever does not out of the loop, where it would run in every step.
    scaled = [part * factor for part in parts(array, limit)]
    return functools.reduce(jnp.add, (jnp.where(counts, ~jnp.isfinite(part), jnp.square(part)) for part in scaled))


def _limited_parts(array: Array, limit: Any) -> list[Array]:  # noqa: ANN401  a number or an array
    return [jnp.minimum(_magnitudes(array), limit)]


def _is_cut(array: Array, limit: Any) -> Array:  # noqa: ANN401  a number or an array
    return (_magnitudes(array) > limit).astype(float_dtype())


def _magnitudes(array: Array) -> Array:
    return jnp.abs(array).astype(float_dtype())


def _split_over(array: Array, axis_names: Sequence[str]) -> tuple[str, ...]:
    """Returns the mesh axes over which devices have different parts of a leaf."""
    if not axis_names:
        return ()
    # With `check_vma=False` JAX does not know which, and every leaf counts as split over all axes.
    known = _varying(lax.axis_index(tuple(axis_names)))
    return tuple(name for name in axis_names if name not in known or name in _varying(array))


def _varying(array: Array) -> frozenset[str]:
    varying: frozenset[str] = jax.typeof(array).manual_axis_type.varying
    return varying


def _replicated(sums: Array) -> Array:
    """Gathers sums that are sharded over explicit axes of a mesh; XLA does it on its own over all other axes."""
    whole = jax.sharding.PartitionSpec(None)
    return sums if jax.typeof(sums).sharding.spec == whole else jax.sharding.reshard(sums, whole)
