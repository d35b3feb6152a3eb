"""Finds objects that are alive, where PyTorch keeps no record of them."""

import gc
from typing import TypeVar

__all__ = ["living"]

T = TypeVar("T")


def living(kind: type[T]) -> list[T]:
    """Returns all living objects of a class, subclasses included; looks at every object of the process.

    Example:
        >>> class Wrapper: ...
        >>> wrapper = Wrapper()
        >>> living(Wrapper) == [wrapper]
        True
    """
    # `isinstance` would ask lazy objects for their class, which may load what they stand for.
    if any(issubclass(type(one), kind) for one in gc.get_objects()):
        # Some may only wait to be collected.
        gc.collect()
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]
