"""Tensors that are made when they are looked at, for what every step leaves behind and hardly anyone reads."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

__all__ = ["Deferred"]


class Deferred:
    """Makes some attributes when one of them is first read, with a method `_make`, which returns them by name.

    A class that inherits from this first and from a dataclass second is one of that kind, whose values are yet to come.

    Example:
        >>> class Norm(Deferred):
        ...     def __init__(self, squares):
        ...         self._squares = squares
        ...
        ...     def _make(self):
        ...         print("making it")
        ...         return {"norm": self._squares**0.5}
        >>> norm = Norm(25.0)
        >>> norm.norm
        making it
        5.0
        >>> norm.norm
        5.0
    """

    @abstractmethod
    def _make(self) -> Mapping[str, Any]:
        """Returns the attributes that are to come, by name; called once."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  what `_make` returns
        # Python asks for what is not there, which is an error only when all is made.
        if not name.startswith("_") and self._is_made_now():
            return getattr(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def __getstate__(self) -> dict[str, Any]:
        """Returns all attributes, made by then, to be copied or pickled; what they are made of stays behind."""
        self._is_made_now()
        return {name: value for name, value in vars(self).items() if not name.startswith("_")} | {"_made": True}

    def _is_made_now(self) -> bool:
        """Makes the attributes if they are not made yet; says whether they were not."""
        attributes = vars(self)
        if "_made" in attributes:
            return False
        attributes.update(self._make(), _made=True)
        return True
