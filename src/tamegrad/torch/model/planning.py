"""Makes the plan of a model, and makes it anew when the model changes."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from tamegrad.errors import UnmatchedError
from tamegrad.groups import Plan, make_plan, unmatched_overrides
from tamegrad.policy import Policy
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
        model: The model, pairs of a name and a parameter, or the layers themselves.
        settings: What the user set; the policy is passed each time, since it may change.
        selection: Which parameters are planned for.

    Raises:
        SettingError: If `model` is neither of the two, or two parameters have one name.
    """

    def __init__(self, model: Model | ModelLayers, settings: Settings, selection: Selection) -> None:
        self._merged = settings.layers
        self._process_groups = settings.process_groups
        self._selection = selection
        self._model: nn.Module | ModelLayers = (
            model if isinstance(model, nn.Module | ModelLayers) else read_pairs(model, settings.layers)
        )

    def first_plan(self, policy: Policy) -> PlannedModel:
        """Makes the first plan of a policy, in which every pattern must match something.

        Raises:
            SettingError: If there is no parameter to plan for, the plans of the ranks differ, or FSDP1 or DeepSpeed has
                the gradients.
            UnmatchedError: If an override or a pattern of merged layers matches nothing.
        """
        return self._plan(policy, first=True)

    def new_plan(self, policy: Policy) -> PlannedModel:
        """Makes the plan of the model as it is now; patterns that no longer match are no error."""
        return self._plan(policy, first=False)

    def layers(self) -> ModelLayers:
        """Returns the layers of the model as it is now, whatever is selected."""
        if isinstance(self._model, ModelLayers):
            return self._model
        return find_layers(self._model, self._merged)

    def is_stale(self, planned: PlannedModel) -> bool:
        """Returns whether a plan made now could differ."""
        # A model moves as a whole: one parameter shows whether another backend is better now.
        moved = planned.parameters[0].device != planned.device
        return moved or self._selection.changed() or planned.watch.changed()

    def _plan(self, policy: Policy, *, first: bool) -> PlannedModel:
        layers = self.layers()
        refuse_unsupported(self._model, layers)
        selected = self._selection.apply(layers)

        def make() -> tuple[Plan, dict[str, UnmatchedError]]:
            if first:
                check_patterns(self._merged, layers.paths)
            return make_plan(selected.layers, policy), unmatched_overrides(layers.layers, policy) if first else {}

        parameters = tuple(selected.parameters)
        reduction = Reduction(parameters, self._process_groups)
        plan = reduction.agree(parameters, make)
        if first:
            self._selection.check(plan, layers, policy)
        # Pairs of names and parameters have no modules, and so none that change.
        watch = ModuleWatch(self._model if isinstance(self._model, nn.Module) else nn.Module())
        return PlannedModel(plan, parameters, reduction, parameters[0].device, watch)
