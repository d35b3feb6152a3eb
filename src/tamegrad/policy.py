"""Which layer gets which strategy: a default, and overrides by name or module class."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tamegrad.errors import SettingError
from tamegrad.strategies import Strategy, as_strategy

__all__ = ["Overrides", "Policy"]

# From a key to a strategy. Keys are names or classes, checked when the policy is made: `Mapping` is invariant in its
# keys, so a narrower type would reject a plain dict[str, ...].
Overrides: TypeAlias = Mapping[Any, object]

# The first slash outside of brackets separates layer and type, so "[/]" matches a slash in a layer's name.
_KEY = re.compile(r"(?P<layer>(?:\[[^]]+\]|[^/\[]|\[)+)(?:/(?P<type>.+))?", re.DOTALL)
_ESCAPED = re.compile(r"\[([*?\[/])\]")
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Override:
    """One entry of a policy: what it matches, and the strategy for it.

    Args:
        key: A glob on layer names, two globs with a slash between (layer and parameter type), or a module class.
        strategy: The strategy for everything that the key matches.

    Attributes:
        type_pattern: The glob on parameter types, if the key has one.
        exact_layer: The layer name that the key matches, if it is neither a glob nor a class.
    """

    key: str | type
    strategy: Strategy
    type_pattern: str | None = field(init=False, repr=False, compare=False)
    exact_layer: str | None = field(init=False, repr=False, compare=False)
    _layer_glob: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = _KEY.fullmatch(self.key) if isinstance(self.key, str) else None
        if parts is None and not isinstance(self.key, type):
            raise SettingError(
                "Policy(overrides)",
                got=f"the key {self.key!r}",
                allowed='a layer name or glob ("rnn.*"), layer and type ("*/bias"), or a module class (nn.LayerNorm)',
                advice="print(normalizer.plan) shows the names of a model",
            )
        layer = parts["layer"] if parts else None
        exact = None if layer is None or _WILDCARD.search(_ESCAPED.sub("", layer)) else _ESCAPED.sub(r"\1", layer)
        glob = re.compile(fnmatch.translate(layer)) if layer is not None and exact is None else None
        object.__setattr__(self, "type_pattern", parts["type"] if parts else None)
        object.__setattr__(self, "exact_layer", exact)
        object.__setattr__(self, "_layer_glob", glob)

    @property
    def name(self) -> str:
        """The key as text: a module class by its name."""
        return self.key if isinstance(self.key, str) else self.key.__name__

    def matches_layer(self, names: Sequence[str], module_class: type | None) -> bool:
        """Returns whether the layer part of the key matches, ignoring the parameter type.

        Args:
            names: The names that the layer answers to.
            module_class: The class of its module, if it has one.

        Returns:
            Whether it matches.
        """
        if self.exact_layer is not None:
            return self.exact_layer in names
        if self._layer_glob is not None:
            return any(self._layer_glob.match(name) for name in names)
        assert isinstance(self.key, type)
        return module_class is not None and issubclass(module_class, self.key)

    def matches(self, names: Sequence[str], param_type: str | None, module_class: type | None) -> bool:
        """Returns whether the key matches a parameter type of a layer, or, with None, the layer as a whole.

        Args:
            names: The names that the layer answers to.
            param_type: A parameter type; or None for the layer as a whole, which a key with a slash never matches.
            module_class: The class of the layer's module, where there is one.

        Returns:
            Whether it matches.
        """
        if self.type_pattern is not None and (
            param_type is None or not fnmatch.fnmatchcase(param_type, self.type_pattern)
        ):
            return False
        return self.matches_layer(names, module_class)


@dataclass(frozen=True, slots=True, init=False)
class Policy:
    """A default strategy and overrides; the first override that matches wins, the default takes the rest.

    Args:
        default: A strategy, a member of `GradientNormalization` (threshold 1.0), or None for `Keep()`.
        overrides: From a key to a strategy, a member, or None for `Keep()`. A key is a glob on layer names (`*` crosses
            dots), with a slash a glob on layers and one on parameter types (`"*/bias"`), or a module class with its
            subclasses. A name that holds `*`, `?`, `[` or `/` itself is written with `Policy.escape`.

    Raises:
        SettingError: If a key or a strategy is invalid.

    Example:
        >>> from tamegrad import Clip, Policy
        >>> policy = Policy(Clip(1.0), overrides={"*/bias": None, "rnn.*": Clip(0.5, per="param_type")})
        >>> policy.strategy_for("rnn.l0", "weight")
        Clip(threshold=0.5, per='param_type')
        >>> policy.strategy_for("rnn.l0", "bias")
        Keep()
    """

    default: Strategy
    overrides: tuple[Override, ...]
    # Positions of the overrides that name one layer, by that name, and of all others. Policies read from Deeplearning4j
    # models can have 10,000 such names, and every layer is looked up.
    _exact: dict[str, list[int]] = field(repr=False, compare=False)
    _others: list[int] = field(repr=False, compare=False)

    def __init__(self, default: object = None, overrides: Overrides | None = None) -> None:
        made = tuple(
            Override(key, as_strategy(value, f"Policy(overrides[{key!r}])")) for key, value in (overrides or {}).items()
        )
        object.__setattr__(self, "default", as_strategy(default, "Policy(default)"))
        object.__setattr__(self, "overrides", made)
        exact: dict[str, list[int]] = {}
        for position, override in enumerate(made):
            if override.exact_layer is not None:
                exact.setdefault(override.exact_layer, []).append(position)
        object.__setattr__(self, "_exact", exact)
        object.__setattr__(self, "_others", [i for i, override in enumerate(made) if override.exact_layer is None])

    def __repr__(self) -> str:
        overrides = ", ".join(f"{override.key!r}: {override.strategy!r}" for override in self.overrides)
        return f"Policy({self.default!r}, overrides={{{overrides}}})"

    @staticmethod
    def escape(name: str) -> str:
        """Returns a key that matches only the layer of this name, whatever characters it contains.

        Args:
            name: A layer's name.

        Returns:
            A key for `overrides`.

        Example:
            >>> Policy.escape("block/conv[1]")
            'block[/]conv[[]1]'
        """
        return re.sub(r"([*?\[/])", r"[\1]", name)

    def strategy_for(self, layer: str, param_type: str | None = None, module_class: type | None = None) -> Strategy:
        """Returns the strategy for a layer, or for one parameter type of it.

        Args:
            layer: The layer's name.
            param_type: The parameter type; None for the layer as a whole, which keys with a slash never match.
            module_class: The class of the layer's module, for policies with classes as keys.

        Returns:
            The strategy of the first override that matches, else the default.

        Example:
            >>> from tamegrad import Clip, Policy
            >>> Policy(None, overrides={"out": Clip(1.0)}).strategy_for("out")
            Clip(threshold=1.0, per='layer')
        """
        override = self.override_for((layer,), param_type, module_class)
        return self.default if override is None else override.strategy

    def override_for(self, names: Sequence[str], param_type: str | None, module_class: type | None) -> Override | None:
        """Returns the entry that governs a parameter type of a layer, or None if the default does.

        Args:
            names: The names that the layer answers to.
            param_type: The parameter type, or None for the layer as a whole.
            module_class: The class of the layer's module, where there is one.

        Returns:
            The first override that matches, or None.
        """
        positions = sorted([*self._others, *(position for name in names for position in self._exact.get(name, ()))])
        candidates = (self.overrides[position] for position in positions)
        return next((override for override in candidates if override.matches(names, param_type, module_class)), None)


def as_policy(value: object, overrides: Overrides | None, where: str) -> Policy:
    """Returns the policy that a user meant.

    Args:
        value: A policy, a strategy, a member of `GradientNormalization` (threshold 1.0), or None for `Keep()`.
        overrides: As in `Policy`; only beside a strategy.
        where: The call it was given to, for the message.

    Returns:
        The policy.

    Raises:
        SettingError: If `value` is something else, or a policy comes with overrides.

    Example:
        >>> from tamegrad import Clip, Keep
        >>> as_policy(Keep(), {"out": Clip(1.0)}, "attach")
        Policy(Keep(), overrides={'out': Clip(threshold=1.0, per='layer')})
    """
    if not isinstance(value, Policy):
        return Policy(as_strategy(value, where), overrides)
    if overrides is not None:
        raise SettingError(
            where,
            got="a Policy together with overrides=",
            allowed="a Policy alone, or a strategy with overrides=",
            advice="put the overrides into the policy: Policy(default, overrides={...})",
        )
    return value
