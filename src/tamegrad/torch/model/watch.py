"""Notices that a model has changed since its plan was made: a layer added, replaced or removed."""

import operator
from itertools import chain
from typing import Any

from torch import nn

__all__ = ["ModuleWatch"]

_parameters_of, _modules_of = operator.attrgetter("_parameters"), operator.attrgetter("_modules")


class ModuleWatch:
    """Remembers which modules and parameters a model has, and finds out whether it still has them.

    It asks the modules for their tables anew each time and compares what is in them by identity, which takes a fraction
    of walking the model again.

    Args:
        model: The model.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> watch = ModuleWatch(model)
        >>> model[1] = nn.Linear(2, 1)
        >>> watch.changed()
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._names, self._entries = self._tables()

    def changed(self) -> bool:
        """Returns whether a module or a parameter was added, replaced, renamed or removed."""
        names, entries = self._tables()
        # Tensors compare element by element, so that identity has to be asked for; strings compare as fast.
        return names != self._names or not all(map(operator.is_, entries, self._entries))

    def _tables(self) -> tuple[list[str], list[object]]:
        """Returns the names in all tables of all modules, and the parameters and modules that they name."""
        tables: list[Any] = [*map(_parameters_of, self._modules), *map(_modules_of, self._modules)]
        names = list(chain.from_iterable(tables))
        try:
            return names, list(chain.from_iterable(map(dict.values, tables)))
        except TypeError:
            # Some modules have tables of their own that are no dictionaries.
            return names, [entry for table in tables for entry in table.values()]
