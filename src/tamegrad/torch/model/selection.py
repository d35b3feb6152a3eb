"""Which of a model's parameters are normalized."""

from collections.abc import Iterable

from torch import nn

from tamegrad.groups import Plan
from tamegrad.policy import Policy
from tamegrad.torch.model.layers import ModelLayers

__all__ = ["Selection"]


class Selection:
    """All parameters of the model; subclasses select some."""

    @staticmethod
    def of(parameters: "Iterable[nn.Parameter] | Selection | None") -> "Selection":
        """Returns the selection of the listed parameters, or of all if none are listed."""
        if isinstance(parameters, Selection):
            return parameters
        return Selection() if parameters is None else _Listed(parameters)

    def apply(self, layers: ModelLayers) -> ModelLayers:
        """Returns the layers with the selected parameters only."""
        return layers

    def check(self, plan: Plan, layers: ModelLayers, policy: Policy) -> None:
        """Looks at a first plan of the selected parameters.

        Args:
            plan: The plan.
            layers: All layers of the model.
            policy: The policy.
        """

    def changed(self) -> bool:
        """Returns whether `apply` would select other parameters now than last time."""
        return False


class _Listed(Selection):
    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)

    def apply(self, layers: ModelLayers) -> ModelLayers:
        return layers.restricted_to(self._parameters)
