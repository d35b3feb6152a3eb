"""Notices that a model has changed since its plan was made: a layer added, replaced or removed."""

import operator
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import nn

__all__ = ["ModuleWatch"]

_parameters_of, _modules_of = operator.attrgetter("_parameters"), operator.attrgetter("_modules")


class ModuleWatch:
    """Remembers the modules and parameters of a model, and notices when they change.

    It compares the entries of every module's tables by identity, which takes a fraction of walking the model again.

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
        tables = chain(map(_parameters_of, self._modules), map(_modules_of, self._modules))
        # Some libraries replace the dictionaries with other mappings.
        self._are_dictionaries = all(isinstance(table, dict) for table in tables)
        self._entries = list(self._current())

    def changed(self) -> bool:
        """Returns whether a module or a parameter was added, replaced or removed."""
        try:
            return not all(map(operator.is_, _ended(self._entries), _ended(self._current())))
        except TypeError:
            # A dictionary was replaced by another mapping.
            return True

    def _current(self) -> Iterator[object]:
        """Returns the parameters and modules now in the modules' tables."""
        values_of: Any = dict.values if self._are_dictionaries else operator.methodcaller("values")
        # Most modules have no submodules, and reading an empty table takes as long as a full one.
        modules = filter(None, map(_modules_of, self._modules))
        tables = chain(map(_parameters_of, self._modules), modules)
        return chain.from_iterable(map(values_of, tables))


def _ended(entries: Iterable[object]) -> Iterator[object]:
    """Appends an end mark, so that `map` cannot miss entries when one side is shorter."""
    return chain(entries, (ModuleWatch,))
