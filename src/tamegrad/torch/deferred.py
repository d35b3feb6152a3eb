"""Tensors that are made when they are looked at, for what every step leaves behind and hardly anyone reads."""

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Deferred"]


class Deferred:
    """Makes some attributes when one of them is first read.

    A dataclass that inherits from this first and from another dataclass second is one of that kind, without values for
    these attributes yet.

    Args:
        make: Returns the attributes by name; called at most once.
        **known: The attributes that need no making.

    Example:
        >>> deferred = Deferred(lambda: {"norm": 5.0}, group="out")
        >>> sorted(vars(deferred))
        ['_make', 'group']
        >>> deferred.norm
        5.0
        >>> sorted(vars(deferred))
        ['group', 'norm']
    """

    def __init__(self, make: Callable[[], Mapping[str, Any]], **known: object) -> None:
        vars(self).update(known, _make=make)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  what `make` returns
        # Python asks for what is not there, which after making is an error as anywhere.
        if not name.startswith("__") and self._made():
            return getattr(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def __getstate__(self) -> dict[str, Any]:
        """Returns all attributes, made by then, to be copied or pickled."""
        self._made()
        return vars(self)

    def _made(self) -> bool:
        """Makes the attributes; says whether that had still to be done."""
        make = vars(self).pop("_make", None)
        vars(self).update(make() if make is not None else {})
        return make is not None
