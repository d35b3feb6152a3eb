"""Finds the layers of a pytree: leaves with one parent are a layer, and the last key of a path is the parameter type.

A slot is a whole leaf, or one slice of a leaf whose leading axis is a stack of layers. `P` is the number of slots,
`G` the number of groups.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, PyTreeDef, SequenceKey
from numpy.typing import NDArray

from tamegrad.decide import Rules
from tamegrad.errors import SettingError, UnmatchedError, closest, quoted
from tamegrad.groups import Group, Layer, Parameter, Plan, check_overrides, make_plan
from tamegrad.policy import Policy
from tamegrad.strategies import OnNonfinite

__all__ = ["Leaf", "PlannedTree", "Settings", "plan_tree"]

Tree: TypeAlias = Any
Path: TypeAlias = tuple[str, ...]

# The layer of leaves that have no parent, and the name of a tree that is one array.
ROOT, ARRAY = "(root)", "array"
# flax keeps a parameter in a box beside its metadata: nnx variables, and linen's partitioned parameters.
_BOXES = frozenset({"Variable", "AxisMetadata"})


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user set, checked; `normalize_gradients` explains it."""

    policy: Policy
    layers: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    on_nonfinite: OnNonfinite = "keep"
    axis_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf with gradients.

    Args:
        position: Where it is among all leaves of the tree.
        first: Its first slot.
        count: How many slots it has.
        stacked: Whether each slice along the leading axis is a slot; otherwise the leaf is one.
    """

    position: int
    first: int
    count: int
    stacked: bool

    @property
    def slots(self) -> slice:
        """All its slots."""
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True, eq=False)
class PlannedTree:
    """A plan with the leaves that it is for.

    Args:
        plan: The plan; it has no groups if the tree has no leaves with gradients.
        leaves: The leaves with gradients, in the order of the tree.
        group_of: `(P,)`: the group of each slot.
        names: The name of each slot's parameter.
    """

    plan: Plan
    leaves: tuple[Leaf, ...]
    group_of: NDArray[np.int32] = field(repr=False)
    names: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of the plan."""
        return self.plan.groups

    @cached_property
    def rules(self) -> Rules[NDArray[Any]]:
        """The rules of the groups, as NumPy arrays."""
        return Rules.of(self.groups)

    @cached_property
    def limits(self) -> NDArray[np.float64]:
        """`(P,)`: the largest magnitude of an element of each slot."""
        return self.rules.limits[self.group_of]


def plan_tree(tree: Tree, settings: Settings) -> PlannedTree:
    """Plans for the leaves of a pytree, and keeps the plan for trees of the same structure.

    Args:
        tree: Parameters or gradients. Leaves that are not floating-point arrays are in no layer.
        settings: What the user set.

    Returns:
        The plan and its leaves.

    Raises:
        SettingError: If two parameters have the same name, or a stacked leaf has no or another leading axis.
        UnmatchedError: If an override, or a pattern of `layers` or `stacked`, matches nothing.
    """
    leaves, structure = jax.tree.flatten(tree)
    sizes = tuple(_size(leaf) for leaf in leaves)
    return _planned(structure, sizes, settings)


def _size(leaf: Any) -> int | None:  # noqa: ANN401  an array, or anything else
    """Returns the length of the leading axis of a gradient, 0 if it has none; None for a leaf that is no gradient."""
    if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact):
        return None
    shape = jnp.shape(leaf)
    return int(shape[0]) if shape else 0


@lru_cache(maxsize=256)
def _planned(structure: PyTreeDef, sizes: tuple[int | None, ...], settings: Settings) -> PlannedTree:
    # The leaves are their positions; None would be no leaf.
    paths = list(_paths(jax.tree.unflatten(structure, range(structure.num_leaves))))
    gradients = {path: sizes[position] for path, position in paths if sizes[position] is not None}
    _check_unique([path for path, position in paths if sizes[position] is not None])
    if not gradients:
        return PlannedTree(Plan((), ()), (), np.zeros(0, np.int32))
    reader = _Reader(settings)
    for path, position in paths:
        if path in gradients:
            reader.read(path, position, gradients[path] or 0)
    return reader.planned()


class _Reader:
    """One walk over the paths of a tree."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._leaves: list[Leaf] = []
        self._layers: dict[str, dict[Parameter, int]] = {}
        self._stacks: dict[str, tuple[str, int]] = {}
        self._paths: list[Path] = []
        self._unrolled: list[Path] = []

    def read(self, path: Path, position: int, size: int) -> None:
        """Reads a leaf, with the length of its leading axis."""
        depth = _outermost(path, self._settings.stacked)
        count = 1 if depth is None else self._stack_size(path, depth, size)
        self._leaves.append(Leaf(position, len(self._unrolled), count, stacked=depth is not None))
        self._paths.append(path)
        for index in range(count):
            # A slice has the name that it would have if the layers were not stacked.
            self._add(path if depth is None else (*path[:depth], str(index), *path[depth:]))

    def _add(self, path: Path) -> None:
        merged = _outermost(path, self._settings.layers)
        depth = len(path) - 1 if merged is None else merged
        parameter = Parameter(".".join(path), ".".join(path[depth:]))
        self._layers.setdefault(".".join(path[:depth]) or ROOT, {})[parameter] = len(self._unrolled)
        self._unrolled.append(path)

    def _stack_size(self, path: Path, depth: int, size: int) -> int:
        stack, name = ".".join(path[:depth]), ".".join(path)
        first, expected = self._stacks.setdefault(stack, (name, size))
        if size == 0 or size != expected:
            raise SettingError(
                f"stacked: {name!r}",
                got="an array without a leading axis" if size == 0 else f"a leading axis of {size}",
                allowed="an array whose leading axis has an entry a layer"
                + ("" if size == expected else f": {expected} in {stack!r}, as in {first!r}"),
                advice=f"let the pattern match only what is stacked below {stack!r}",
            )
        return size

    def planned(self) -> PlannedTree:
        """Returns the plan of what was read."""
        _check_patterns("stacked", self._settings.stacked, self._paths)
        _check_patterns("layers", self._settings.layers, self._unrolled)
        layers = [Layer(name, tuple(parameters)) for name, parameters in self._layers.items()]
        check_overrides(layers, self._settings.policy)
        plan = make_plan(layers, self._settings.policy)
        slots = [slot for parameters in self._layers.values() for slot in parameters.values()]
        group_of = np.zeros(len(self._unrolled), np.int32)
        group_of[slots] = plan.group_of
        return PlannedTree(plan, tuple(self._leaves), group_of, tuple(".".join(path) for path in self._unrolled))


def _paths(tree: Tree) -> Iterator[tuple[Path, int]]:
    """Yields the path and the position of every leaf; the box around a parameter does not show in its path."""
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box):
        outside = tuple(_key(entry) for entry in path)
        inside = jax.tree_util.tree_leaves_with_path(node)
        for deeper, position in inside:
            boxed = tuple(_key(entry) for entry in deeper[1:]) if _is_box(node) else ()
            yield (outside + boxed) or (ARRAY,), position


def _is_box(node: object) -> bool:
    return any(kind.__name__ in _BOXES and kind.__module__.startswith("flax.") for kind in type(node).__mro__)


def _key(entry: object) -> str:
    match entry:
        case DictKey(key=key) | FlattenedIndexKey(key=key):
            return str(key)
        case SequenceKey(idx=index):
            return str(index)
        case GetAttrKey(name=name):
            return str(name)
    return str(entry)


def _outermost(path: Path, patterns: Sequence[str]) -> int | None:
    """Returns the depth of the outermost node on a path that a pattern matches; None if none does."""
    for depth in range(1, len(path)):
        node = ".".join(path[:depth])
        if any(fnmatch.fnmatchcase(node, pattern) for pattern in patterns):
            return depth
    return None


def _check_unique(paths: Sequence[Path]) -> None:
    """Refuses paths that read the same: the key "a.b" beside a key "b" in "a"."""
    seen: dict[str, Path] = {}
    for path in paths:
        name = ".".join(path)
        other = seen.setdefault(name, path)
        if other is not path:
            raise SettingError(
                "gradients",
                got=f"two parameters with the name {name!r}, at {list(other)} and {list(path)}",
                allowed="names that differ",
                advice="rename one of the keys",
            )


def _check_patterns(where: str, patterns: Sequence[str], paths: Sequence[Path]) -> None:
    if not patterns:
        return
    nodes = dict.fromkeys(".".join(path[:depth]) for path in paths for depth in range(1, len(path)))
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(node, pattern) for node in nodes):
            raise UnmatchedError(
                f"{where}={pattern!r}",
                got=f"a pattern that matches none of {len(nodes)} nodes of the tree",
                allowed=f"the path of a node or a glob; closest: {quoted(closest(pattern, nodes))}",
                advice="print(plan_of(params, Keep())) shows the names of all layers",
            )
