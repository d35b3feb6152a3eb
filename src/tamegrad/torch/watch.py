"""Notices that a model has changed since its plan was made: a layer added, replaced or taken away."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from tamegrad.torch.kernels.memory import ModuleTables

__all__ = ["ModuleWatch"]


class ModuleWatch:
    """Remembers which modules and parameters a model has, and says whether it still has them.

    It compares identities, table by table, which takes a fraction of walking the model again.

    Args:
        model: The model.
        compiled: Whether compiled code may do it, which takes Numba.

    Attributes:
        tables: What compiled code looks at; None where it cannot.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> watch = ModuleWatch(model)
        >>> model[1] = nn.Linear(2, 1)
        >>> watch.changed()
        True
    """

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        self._tables: list[tuple[Mapping[str, Any], int]] = []
        self._entries: list[tuple[Mapping[str, Any], str, object]] = []
        for module in model.modules():
            for table in (module._parameters, module._modules):  # noqa: SLF001  the tables themselves, not copies
                self._tables.append((table, len(table)))
                self._entries += [(table, name, entry) for name, entry in table.items()]

        self.tables: ModuleTables | None = None
        if compiled and all(isinstance(table, dict) for table, _ in self._tables):
            entries = [(id(name), id(entry)) for _, name, entry in self._entries]
            self.tables = ModuleTables(
                np.array([(id(table), size) for table, size in self._tables], dtype=np.int64),
                np.array(entries, dtype=np.int64).reshape(-1, 2),
            )

    def changed(self) -> bool:
        """Says whether a module or a parameter was added, replaced or taken away."""
        if self.tables is not None:
            # Numba takes a while to import, and another backend does not need it.
            from tamegrad.torch.kernels import objects  # noqa: PLC0415

            # Another string of the same letters, or another order, is looked at again.
            if objects.unchanged(self.tables):
                return False
        return any(len(table) != size for table, size in self._tables) or any(
            table.get(name) is not entry for table, name, entry in self._entries
        )
