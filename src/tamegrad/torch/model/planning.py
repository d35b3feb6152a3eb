"""Makes the plan of a model, and makes it anew when the model changes."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from tamegrad.errors import UnmatchedError
from tamegrad.groups import Plan, make_plan, unmatched_overrides
from tamegrad.torch.model.layers import ModelLayers, check_patterns, find_layers
from tamegrad.torch.model.pairs import Pairs, read_pairs
from tamegrad.torch.model.selection import Selection
from tamegrad.torch.model.unsupported import refuse_unsupported
from tamegrad.torch.model.watch import ModuleWatch
from tamegrad.torch.settings import Settings
from tamegrad.torch.sharded.distributed import Reduction

__all__ = ["Model", "PlannedModel", "Planner"]

Model: TypeAlias = nn.Module | Pairs


@dataclass(frozen=True, eq=False)
class PlannedModel:
    """A plan with the tensors that it is for.

    Args:
        plan: The plan.
        parameters: The parameters, in the order of the plan.
        reduction: The sums over ranks.
        device: The device of the first parameter when the plan was made.
        watch: Notices when the model changes.
    """

    plan: Plan
    parameters: tuple[nn.Parameter, ...]
    reduction: Reduction
    device: torch.device
    watch: ModuleWatch


class Planner:
    """Makes the plan of a model, and new ones when the model changes.

    Args:
        model: The model, or pairs of a name and a parameter.
        settings: What the user set.
        selection: Which parameters are planned for.

    Raises:
        SettingError: If `model` is neither of the two, two parameters have one name, or FSDP1 or DeepSpeed has its
            gradients.
    """

    def __init__(self, model: Model, settings: Settings, selection: Selection) -> None:
        self._settings = settings
        self._selection = selection
        self._module = model if isinstance(model, nn.Module) else None
        read: Any = read_pairs if self._module is None else find_layers
        self._layers: ModelLayers = read(model, settings.layers)
        refuse_unsupported(model, self._layers)

    def first_plan(self) -> PlannedModel:
        """Makes the first plan, in which every pattern must match something.

        Raises:
            SettingError: If there is no parameter to plan for, or the plans of the ranks differ.
            UnmatchedError: If an override or a pattern of merged layers matches nothing.
        """
        return self._plan(first=True)

    def new_plan(self) -> PlannedModel:
        """Makes the plan of the model as it is now; patterns that no longer match are no error."""
        if self._module is not None:
            self._layers = find_layers(self._module, self._settings.layers)
        return self._plan(first=False)

    def is_stale(self, planned: PlannedModel) -> bool:
        """Returns whether a plan made now could differ."""
        # A model moves as a whole: one parameter shows whether another backend is better now.
        moved = planned.parameters[0].device != planned.device
        return moved or self._selection.changed() or planned.watch.changed()

    def _plan(self, *, first: bool) -> PlannedModel:
        selected = self._selection.apply(self._layers)

        def make() -> tuple[Plan, dict[str, UnmatchedError]]:
            if first:
                check_patterns(self._settings.layers, self._layers.paths)
            unmatched = unmatched_overrides(self._layers.layers, self._settings.policy) if first else {}
            return make_plan(selected.layers, self._settings.policy), unmatched

        parameters = tuple(selected.parameters)
        reduction = Reduction(parameters, self._settings.process_groups)
        plan = reduction.agree(make)
        # Pairs of names and parameters have no modules, and so none that change.
        watch = ModuleWatch(nn.Module() if self._module is None else self._module)
        return PlannedModel(plan, parameters, reduction, parameters[0].device, watch)
