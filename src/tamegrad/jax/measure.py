"""Measures the gradients of a pytree: sums of squares for every group, in the table that `decide` reads.

`P` is the number of slots, `G` the number of groups, and floats are float64 where JAX has it and float32 elsewhere.
All sums are of squares at a fixed scale, because sums over devices merge into one collective, which maxima do not. As a
rule one sum a leaf is enough; the sums of values past its range, and the counts of values that are not finite, are
computed only in a step in which a group needs them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tamegrad.decide import FORMATS
from tamegrad.jax.tree import Leaf, PlannedTree

__all__ = ["Gradient", "float_dtype", "group_sums", "measured", "real_parts"]

# A leaf and its values.
Gradient: TypeAlias = tuple[Leaf, Array]
# What is summed of a leaf: given its values, and its limits in a shape that broadcasts.
Term: TypeAlias = Callable[[Array, Any], Array]

# A sum of squares between these is right: below, squares that are taken for zero might matter, for as many as 2^30
# values; above, the sum might overflow.
SAFE = {4: (2.0**-72, 2.0**126), 8: (2.0**-900, 2.0**972)}


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

    def sums(term: Term, of: Sequence[Gradient]) -> Array:
        return group_sums(term, of, planned, axis_names)

    before = _squares(real_parts, gradients, sums)
    none = jnp.zeros_like(before[0])
    finite = jnp.all(jnp.isfinite(sum(before)))
    nonfinite = lax.cond(finite, lambda: none, lambda: sums(_nonfinite, gradients))
    after, cut = [none] * 3, none
    if planned.rules.has_limits:
        limited = [(leaf, array) for leaf, array in gradients if np.isfinite(planned.limits[leaf.slots]).any()]
        after, cut = _squares(_limited_parts, limited, sums), sums(_is_cut, limited)
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
    term: Term, gradients: Sequence[Gradient], planned: PlannedTree, axis_names: Sequence[str]
) -> Array:
    """Adds up a term over the values of every group, on all devices.

    Args:
        term: What is added up of a leaf's values.
        gradients: Leaves of the plan with their values.
        planned: The plan.
        axis_names: The mesh axes to sum over, inside of `shard_map`.

    Returns:
        `(G,)` sums.
    """
    total = jnp.zeros(len(planned.groups), float_dtype())
    by_axes: dict[tuple[str, ...], list[Gradient]] = {}
    for leaf, array in gradients:
        by_axes.setdefault(_split_over(array, axis_names), []).append((leaf, array))
    for axes, members in by_axes.items():
        slots = np.concatenate([np.arange(leaf.first, leaf.first + leaf.count) for leaf, _ in members])
        sums = jnp.concatenate([_slot_sums(term, leaf, array, planned) for leaf, array in members])
        grouped = jax.ops.segment_sum(sums, planned.group_of[slots], num_segments=len(planned.groups))
        total = total + (lax.psum(grouped, axes) if axes else grouped)
    return total


def _slot_sums(term: Term, leaf: Leaf, array: Array, planned: PlannedTree) -> Array:
    """Returns the sums of a term over the slots of one leaf, in one dimension."""
    limits = planned.limits[leaf.slots]
    axes = tuple(range(1, array.ndim)) if leaf.stacked else None
    uniform = (limits == limits[0]).all()
    limit = float(limits[0]) if uniform else limits.reshape(-1, *[1] * (array.ndim - 1)).astype(float_dtype())
    return _replicated(jnp.sum(term(array, limit), axes).reshape(leaf.count))


def _squares(
    parts: Callable[[Array, Any], list[Array]],
    gradients: Sequence[Gradient],
    sums: Callable[[Term, Sequence[Gradient]], Array],
) -> list[Array]:
    """Returns three `(G,)` sums of squares, of small, middle and big values; of a group at most one is not zero."""
    floats = jnp.finfo(float_dtype())

    def scaled(exponent: int) -> Array:
        factor = 2.0**exponent
        return sums(lambda array, limit: sum(jnp.square(part * factor) for part in parts(array, limit)), gradients)

    middle = scaled(0)
    none = jnp.zeros_like(middle)
    if all(2 * jnp.finfo(array.dtype).maxexp <= floats.maxexp for _, array in gradients):
        return [none, middle, none]
    form, (smallest, largest) = FORMATS[floats.dtype.itemsize], SAFE[floats.dtype.itemsize]
    is_small, is_big = middle < smallest, ~(middle < largest)
    small = lax.cond(jnp.any(is_small), lambda: scaled(form.small_exponent), lambda: none)
    big = lax.cond(jnp.any(is_big), lambda: scaled(form.big_exponent), lambda: none)
    # A group with a value that is not finite stays in the middle, whose sum is not finite either.
    is_big = is_big & (big < jnp.inf)
    return [
        jnp.where(is_small, small, none),
        jnp.where(is_small | is_big, none, middle),
        jnp.where(is_big, big, none),
    ]


def _limited_parts(array: Array, limit: Any) -> list[Array]:  # noqa: ANN401  a number or an array
    return [jnp.minimum(_magnitudes(array), limit)]


def _is_cut(array: Array, limit: Any) -> Array:  # noqa: ANN401  a number or an array
    return (_magnitudes(array) > limit).astype(float_dtype())


def _nonfinite(array: Array, limit: object) -> Array:
    return sum((~jnp.isfinite(part)).astype(float_dtype()) for part in real_parts(array, limit))


def _magnitudes(array: Array) -> Array:
    return jnp.abs(array).astype(float_dtype())


def _split_over(array: Array, axis_names: Sequence[str]) -> tuple[str, ...]:
    """Returns the mesh axes over which devices have different parts of a leaf."""
    if not axis_names:
        return ()
    # With `check_vma=False` JAX does not know which, and every leaf counts as split over all axes.
    known = [name for name in axis_names if name in jax.typeof(lax.axis_index(name)).vma]
    return tuple(name for name in axis_names if name not in known or name in jax.typeof(array).vma)


def _replicated(sums: Array) -> Array:
    """Gathers sums that are sharded over explicit axes of a mesh; XLA does it on its own over all other axes."""
    sharding = jax.typeof(sums).sharding
    if sharding.spec == jax.sharding.PartitionSpec(None):
        return sums
    return jax.sharding.reshard(sums, jax.sharding.PartitionSpec(None))
