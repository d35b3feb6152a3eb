"""Which of a model's parameters are normalized."""

from collections.abc import Iterable

from torch import nn

from tamegrad.torch.model.layers import ModelLayers

__all__ = ["GivenParameters", "Selection"]


class Selection:
    """All parameters of the model; subclasses select some."""

    def of(self, layers: ModelLayers) -> ModelLayers:
        """Returns the layers with the selected parameters only.

        Args:
            layers: All layers of the model.

        Returns:
            What is left.
        """
        return layers

    def changed(self) -> bool:
        """Returns whether another selection would be made now than last time."""
        return False


class GivenParameters(Selection):
    """The parameters that a user listed.

    Args:
        parameters: The list; those that are not the model's are ignored.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)

    def of(self, layers: ModelLayers) -> ModelLayers:
        """Returns the layers with these parameters only."""
        return layers.restricted_to(self._parameters)
