"""Tensors that are made when they are looked at, for what every step leaves behind and hardly anyone reads."""

from abc import abstractmethod
from dataclasses import Field
from typing import Any

__all__ = ["Deferred"]


class Deferred:
    """Makes each field of a dataclass when it is first read.

    A class inherits from this first and from the dataclass second, and has a method `_make`.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Circle:
        ...     radius: float
        ...     area: float
        >>> class Drawn(Deferred, Circle):
        ...     def __init__(self, radius):
        ...         vars(self)["radius"] = radius
        ...
        ...     def _make(self, name):
        ...         print("making", name)
        ...         return 3.14 * self.radius**2
        >>> circle = Drawn(10.0)
        >>> circle.area
        making area
        314.0
        >>> circle
        Drawn(radius=10.0, area=314.0)
    """

    # Of the dataclass.
    __dataclass_fields__: dict[str, Field[Any]]

    @abstractmethod
    def _make(self, name: str) -> object:
        """Returns what a field is; called at most once for each."""

    def __getattr__(self, name: str) -> object:
        # Python asks for what is not there.
        if name not in self.__dataclass_fields__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        value = vars(self)[name] = self._make(name)
        return value

    def __getstate__(self) -> dict[str, object]:
        """Returns all fields, to be copied or pickled; what they are made of stays behind."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
