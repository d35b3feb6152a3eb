"""Refuses models whose gradients are not where PyTorch puts them, where a norm would be silently wrong."""

from tamegrad.errors import SettingError
from tamegrad.torch.model.layers import ModelLayers

__all__ = ["refuse_deepspeed", "refuse_unsupported"]


def refuse_unsupported(model: object, layers: ModelLayers) -> None:
    """Refuses a model of FSDP1 or DeepSpeed.

    Args:
        model: The model, or what stands for it.
        layers: What was found in it.

    Raises:
        SettingError: If it is one.
    """
    refuse_deepspeed("model", model)
    names = (parameter.name for layer in layers.layers for parameter in layer.parameters)
    for name, parameter in zip(names, layers.parameters, strict=True):
        # Marks that FSDP1 leaves on its flat parameters, and with `use_orig_params=True` on what is a view of one.
        if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
            raise SettingError(
                f"parameter {name}",
                got="a parameter of FSDP1, which does not say what of it other ranks have",
                allowed="parameters that are plain or DTensors",
                advice="shard with torch.distributed.fsdp.fully_shard (FSDP2)",
            )
        # ZeRO's third stage marks every parameter that it took.
        if hasattr(parameter, "ds_id"):
            raise _deepspeed_error(f"parameter {name}", "a parameter that DeepSpeed has partitioned")


def refuse_deepspeed(where: str, owner: object) -> None:
    """Refuses what DeepSpeed made, which owns its gradients.

    Args:
        where: What was passed.
        owner: It.

    Raises:
        SettingError: If it is from DeepSpeed.
    """
    if any(kind.__module__.partition(".")[0] == "deepspeed" for kind in type(owner).__mro__):
        raise _deepspeed_error(where, f"a {type(owner).__name__} of DeepSpeed")


def _deepspeed_error(where: str, got: str) -> SettingError:
    return SettingError(
        where,
        got=f"{got}, which keeps the gradients to itself",
        allowed="a model whose gradients are in its parameters' .grad",
        advice='set "gradient_clipping" in the configuration of DeepSpeed, which has one norm over the model, or shard '
        "with torch.distributed.fsdp.fully_shard (FSDP2)",
    )
