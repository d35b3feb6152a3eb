"""Refuses FSDP1 and DeepSpeed, whose gradients are not where PyTorch puts them: norms would be silently wrong."""

from tamegrad.errors import SettingError
from tamegrad.torch.model.layers import ModelLayers
from tamegrad.torch.model.names import comes_from

__all__ = ["refuse_deepspeed", "refuse_unsupported"]


def refuse_unsupported(model: object, layers: ModelLayers) -> None:
    """Refuses a model that FSDP1 or DeepSpeed has sharded.

    Args:
        model: The model, or its (name, parameter) pairs.
        layers: Its layers.

    Raises:
        SettingError: If FSDP1 or DeepSpeed has sharded it.
    """
    refuse_deepspeed("model", model)
    names = (parameter.name for layer in layers.layers for parameter in layer.parameters)
    for name, parameter in zip(names, layers.parameters, strict=True):
        # FSDP1 marks its flat parameters, and with `use_orig_params=True` the views of them.
        if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
            raise SettingError(
                f"parameter {name}",
                got="an FSDP1 parameter, which does not record what part of it other ranks hold",
                allowed="plain parameters and DTensors",
                advice="shard with torch.distributed.fsdp.fully_shard (FSDP2)",
            )
        # ZeRO stage 3 marks every parameter that it partitions.
        if hasattr(parameter, "ds_id"):
            raise _deepspeed_error(f"parameter {name}", "a parameter that DeepSpeed has partitioned")


def refuse_deepspeed(where: str, owner: object) -> None:
    """Refuses an object of DeepSpeed, which keeps the gradients to itself.

    Args:
        where: The argument, for the message.
        owner: Its value.

    Raises:
        SettingError: If its class is from DeepSpeed.
    """
    if comes_from(owner, "deepspeed"):
        raise _deepspeed_error(where, f"a {type(owner).__name__} from DeepSpeed")


def _deepspeed_error(where: str, got: str) -> SettingError:
    return SettingError(
        where,
        got=f"{got}, which keeps the gradients to itself",
        allowed="a model whose gradients are in its parameters' .grad",
        advice='set "gradient_clipping" in the DeepSpeed configuration, which clips by one norm over the model, or '
        "shard with torch.distributed.fsdp.fully_shard (FSDP2)",
    )
