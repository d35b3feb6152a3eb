"""What the transformation carries from step to step, and the report that it makes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tamegrad.errors import SettingError
from tamegrad.jax.measure import float_dtype
from tamegrad.report import Report

__all__ = ["NormalizeState", "initial_state", "report_of"]


class NormalizeState(NamedTuple):
    """What the last step did, as arrays of fixed shapes; `report_of` makes a report of it.

    Floats are float64 if `jax_enable_x64` is set, else float32; integers likewise. `G` is the number of groups, `W` the
    length of the longest name in bytes.

    Attributes:
        names: `(G, W)` uint8, the names of the groups in UTF-8, with zeros behind them. As an array they go into every
            kind of checkpoint.
        norms: `(G,)`, before.
        scales: `(G,)`, the factors that were applied.
        norms_after: `(G,)`.
        clipped: `(G,)` bool.
        nonfinite: `(G,)` integers, how many values are NaN or infinite.
        total_norm: 0-dim, the norm of all that was measured, before.
    """

    names: Array
    norms: Array
    scales: Array
    norms_after: Array
    clipped: Array
    nonfinite: Array
    total_norm: Array


def initial_state(groups: Sequence[str]) -> NormalizeState:
    """Returns the state before the first step: zero norms, and scales of 1."""
    floats = float_dtype()
    integers = jax.dtypes.canonicalize_dtype(np.int64)
    count = len(groups)
    return NormalizeState(
        names=_encoded(groups),
        norms=jnp.zeros(count, floats),
        scales=jnp.ones(count, floats),
        norms_after=jnp.zeros(count, floats),
        clipped=jnp.zeros(count, jnp.bool_),
        nonfinite=jnp.zeros(count, integers),
        total_norm=jnp.zeros((), floats),
    )


def report_of(state: Any) -> Report[Array]:  # noqa: ANN401  any optimizer state
    """Returns the report of the last step.

    Args:
        state: The state of `normalize_gradients`, or the state of an optimizer that it is a part of.

    Returns:
        The report. Its arrays are those of the state, on their device until they are read. Before the first step all
        norms are 0.

    Raises:
        SettingError: If there is no such state, or more than one; or if it is batched by `jax.vmap`.

    Example:
        >>> import jax.numpy as jnp
        >>> from tamegrad import Clip
        >>> from tamegrad.jax import normalize_gradients
        >>> tx = normalize_gradients(Clip(1.0))
        >>> gradients = {"out": {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}}
        >>> updates, state = tx.update(gradients, tx.init(gradients))
        >>> print(report_of(state))
        1 group, total norm 5, 1 clipped, 0 non-finite
        group  norm  scale  norm after  clipped  non-finite
        out    5     0.2    1           yes
    """
    nodes = jax.tree.leaves(state, is_leaf=_is_state)
    found = [node for node in nodes if _is_state(node)]
    if len(found) != 1:
        raise SettingError(
            "report_of(state)",
            got=f"a {type(state).__name__} with {len(found)} states of normalize_gradients",
            allowed="a state of normalize_gradients, or an optimizer state that contains one",
            advice="pass the part of the state that belongs to one transformation",
        )
    (one,) = found
    if isinstance(one.names, jax.core.Tracer):
        raise SettingError(
            "report_of(state)",
            got="a state inside of compiled code",
            allowed="a state that jax.jit, jax.vmap or jax.lax.scan has returned",
            advice="use the arrays of the state itself there: state.norms",
        )
    names = np.asarray(one.names)
    if names.ndim != 2:  # noqa: PLR2004  groups and bytes
        raise SettingError(
            "report_of(state)",
            got=f"a state that jax.vmap gave {names.ndim - 2} more dimensions",
            allowed="the state of one model",
            advice="select one: report_of(jax.tree.map(lambda array: array[0], state))",
        )
    arrays = (getattr(one, name) for name in NormalizeState._fields[1:])
    return Report(_decoded(names), *arrays)


def _is_state(node: object) -> bool:
    return isinstance(node, NormalizeState)


def _encoded(names: Sequence[str]) -> Array:
    encoded = [name.encode() for name in names]
    width = max(map(len, encoded), default=0)
    return jnp.asarray(np.frombuffer(b"".join(name.ljust(width, b"\0") for name in encoded), np.uint8)).reshape(
        len(names), width
    )


def _decoded(names: np.ndarray[Any, Any]) -> tuple[str, ...]:
    return tuple(bytes(row).rstrip(b"\0").decode() for row in names)
