"""Collects the gradients of a step as dense tensors that every backend can read and write in place, each once."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tamegrad.errors import SettingError
from tamegrad.torch.memory import (
    DTYPES,
    HeldMemory,
    Memory,
    is_dense,
    is_lazy,
    mark_changed,
    overlaps_itself,
    owns_memory,
)
from tamegrad.torch.sharded.partial import with_placements_of
from tamegrad.torch.sharded.sharding import local_part, mesh_of, waited_for, with_local_part

__all__ = ["Gradients", "collect"]


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of a gradient that cannot be read or written in place.

    Args:
        tensor: The copy: dense, or coalesced sparse.
        target: The gradient, if the copy is written back to it; None if the copy replaces it.
        parameters: The parameters that have this gradient.
    """

    tensor: Tensor
    target: Tensor | None
    parameters: list[nn.Parameter]

    @property
    def values(self) -> Tensor:
        """The dense values of the copy."""
        return self.tensor.values() if self.tensor.is_sparse else self.tensor

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies the values to the gradient, or makes the copy the gradient of its parameters."""
        if self.target is not None:
            self.target.copy_(self.tensor)
            return
        for parameter in self.parameters:
            parameter.grad = self.tensor if mesh_of(parameter) is None else with_local_part(parameter, self.tensor)


@dataclass(eq=False)
class Gradients:
    """The gradients of one step.

    Args:
        values: One a parameter of the plan: a dense tensor of one of `DTYPES`. It is the gradient itself, the values of
            a sparse gradient, this rank's shard, or a copy. None without a gradient, or if an earlier parameter shares
            it.
        memory: Where the values are, one entry a parameter.
        copies: The copies, by the position of their values.
    """

    values: list[Tensor | None]
    memory: Memory
    copies: dict[int, Copy] = field(default_factory=dict)

    def on_host(self) -> bool:
        """Returns whether all values are in memory of the CPU."""
        # Meta tensors have values, but no addresses. Where there is no accelerator, no other tensors are elsewhere.
        memory = self.memory
        readable = bool(memory.addresses.all() or ((memory.addresses != 0) | (memory.counts == 0)).all())
        return readable and (not _may_be_elsewhere() or all(values is None or values.is_cpu for values in self.values))

    def to_write(self, changed: NDArray[np.bool_]) -> HeldMemory:
        """Returns where changing gradients are now, for a backend that writes by address, and marks them as changed.

        Code that ran since they were measured may have given them other memory.

        Args:
            changed: `(P,)`: whether each gradient changes.

        Returns:
            Their memory, one entry a parameter. It stays allocated as long as the result is alive.

        Raises:
            SettingError: If one has another size or dtype than when it was measured; nothing was changed.
        """
        positions = np.flatnonzero(changed & (self.memory.dtypes >= 0))
        tensors: list[Any] = [self.values[position] for position in positions.tolist()]
        held = HeldMemory.of(tensors)
        now = held.memory
        same = (
            held.is_held & (now.counts == self.memory.counts[positions]) & (now.dtypes == self.memory.dtypes[positions])
        )
        if not same.all():
            raise SettingError(
                "normalize_()",
                got="a gradient that changed its size or dtype while it was normalized",
                allowed="gradients that no other thread, signal handler or finalizer replaces in the meantime",
                advice="let the other code wait until the optimizer step is done",
            )
        mark_changed(tensors)
        return replace(held, memory=now.scattered(positions, len(changed)))

    def refuse_unwritable(self, changed: NDArray[np.bool_], names: Sequence[str]) -> None:
        """Refuses to change inference tensors outside of inference mode, as PyTorch does; nothing was changed yet."""
        if torch.is_inference_mode_enabled():
            return
        positions = np.flatnonzero(changed).tolist()
        present = (values for values in map(self.values.__getitem__, positions) if values is not None)
        if not any(map(Tensor.is_inference, present)):
            return
        for position in positions:
            values = self.values[position]
            if values is not None and values.is_inference():
                raise SettingError(
                    f"gradient of {names[position]}",
                    got="an inference tensor outside of inference mode, which PyTorch does not let anyone change",
                    allowed="ordinary tensors, or a call inside torch.inference_mode()",
                    advice="clone the gradient outside of torch.inference_mode()",
                )

    def write_back(self, changed: NDArray[np.bool_]) -> None:
        """Writes the copies back that changed."""
        for position, copy in self.copies.items():
            if changed[position]:
                copy.write_back()


def collect(parameters: Sequence[nn.Parameter], names: Sequence[str], *, sharded: bool) -> Gradients:
    """Collects the gradients that parameters have now.

    A gradient that two parameters share, as one tensor or as the same memory, is collected once. Of a sharded gradient
    this rank's shard is collected. What cannot be read and written in place is copied: uncoalesced sparse, lazily
    conjugated, expanded and strided gradients, and tensor subclasses without memory of their own.

    Args:
        parameters: The parameters in the order of the plan.
        names: Their names, for messages.
        sharded: Whether some parameters are DTensors.

    Returns:
        The gradients.

    Raises:
        SettingError: If a gradient is of a kind that cannot be normalized; nothing was changed.
    """
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    copies: dict[int, Copy] = {}
    classes = set(map(type, gradients))
    if sharded or classes - {Tensor, type(None)}:
        gradients = _plain_parts(parameters, gradients, names, copies)
        classes.add(type(None))
    sparse: dict[int, Tensor] = {}
    positions, present = _present(gradients) if type(None) in classes else (np.arange(len(gradients)), gradients)
    try:
        memory = Memory.of(present)
    except RuntimeError:
        # Some have no storage of their own; their values have.
        sparse = _replace_sparse(gradients, names)
        positions, present = _present(gradients)
        memory = Memory.of(present)
    if memory.unusual or sparse or not memory.are_distinct:
        places = positions.tolist()
        sharing: dict[int, list[nn.Parameter]] = {}
        for index, owner in memory.shared().items():
            sharing.setdefault(places[owner], []).append(parameters[places[index]])
            gradients[places[index]] = None
        for position in {*(places[index] for index in memory.unusual), *sparse}:
            if gradients[position] is not None:
                holders = [parameters[position], *sharing.get(position, [])]
                copy = _copied(names[position], gradients[position], sparse.get(position), holders)
                if copy is not None:
                    copies[position] = copy
                    gradients[position] = copy.values
        positions, present = _present(gradients)
        memory = Memory.of(present)
    if len(positions) < len(gradients):
        memory = memory.scattered(positions, len(gradients))
    return Gradients(gradients, memory, copies)


def _may_be_elsewhere() -> bool:
    """Returns whether a tensor may be on an accelerator; PyTorch before 2.6 cannot tell."""
    return not hasattr(torch, "accelerator") or torch.accelerator.is_available()


def _present(gradients: list[Any]) -> tuple[NDArray[np.int64], list[Tensor]]:
    """Returns the positions of the gradients that there are, and the gradients."""
    positions = [position for position, gradient in enumerate(gradients) if gradient is not None]
    return np.array(positions, dtype=np.int64), [gradients[position] for position in positions]


@torch.no_grad()
def _plain_parts(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Any], names: Sequence[str], copies: dict[int, Copy]
) -> list[Any]:
    """Returns plain tensors for gradients of other classes: shards, results of collectives, or copies.

    Adds the copies to `copies`.
    """
    parts = list(gradients)
    elsewhere: dict[int, Any] = {}
    wrappers = set[int]()
    for position, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if gradient is None:
            continue
        mesh = mesh_of(gradient)
        if mesh is not None or mesh_of(parameter) is not None:
            _check_mesh(names[position], parameter, mesh)
            if gradient.placements == parameter.placements:  # type: ignore[attr-defined]  # a DTensor
                parts[position] = local_part(gradient)
            else:
                elsewhere[position] = gradient
        elif type(gradient) is not Tensor:
            parts[position] = waited_for(gradient)
            if parts[position] is gradient and gradient.layout is torch.strided and not _has_memory(gradient):
                parts[position] = None
                # Two parameters may share one wrapper.
                if id(gradient) not in wrappers:
                    wrappers.add(id(gradient))
                    parts[position] = _stand_in(names[position], gradient)
                    copies[position] = Copy(parts[position], gradient, [parameter])
    if elsewhere:
        for position, gradient in with_placements_of(parameters, elsewhere).items():
            parts[position] = local_part(gradient)
            copies[position] = Copy(parts[position], None, [parameters[position]])
    return parts


def _has_memory(gradient: Tensor) -> bool:
    return gradient.device.type == "meta" or owns_memory(gradient)


def _stand_in(name: str, gradient: Tensor) -> Tensor:
    """Copies a tensor subclass without memory of its own to a plain tensor."""
    _check(name, gradient)
    try:
        dense = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
        dense.copy_(gradient)
    except (NotImplementedError, RuntimeError, TypeError, AssertionError) as error:
        raise SettingError(
            f"gradient of {name}",
            got=f"a {type(gradient).__name__} that has no memory of its own and cannot be copied to a tensor: {error}",
            allowed="tensors, and subclasses that can be copied to one and back with copy_()",
            advice="leave this parameter out: parameters=[...], or give it an optimizer of its own",
        ) from error
    return dense


def _replace_sparse(gradients: list[Any], names: Sequence[str]) -> dict[int, Tensor]:
    """Replaces sparse gradients in a list by their values, and returns them by position."""
    sparse = {}
    for position, gradient in enumerate(gradients):
        if gradient is not None and gradient.layout is not torch.strided:
            _check(names[position], gradient)
            sparse[position] = gradient
            gradients[position] = gradient._values()  # noqa: SLF001  whether coalesced or not
    return sparse


@torch.no_grad()
def _copied(name: str, values: Tensor, sparse: Tensor | None, holders: list[nn.Parameter]) -> Copy | None:
    """Returns a dense copy of a gradient, or of `sparse` with its values; None if the values can be used in place."""
    _check(name, values)
    is_usable = is_dense(values) and not is_lazy(values)
    if sparse is not None:
        return None if is_usable and sparse.is_coalesced() else Copy(sparse.clone().coalesce(), None, holders)
    if is_usable:
        return None
    dense = values.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return Copy(dense, None if is_lazy(values) or overlaps_itself(values) else values, holders)


def _check_mesh(name: str, parameter: nn.Parameter, mesh: object) -> None:
    home = mesh_of(parameter)
    if mesh == home:
        return
    given, wanted = ("a plain tensor" if of is None else f"sharded over {of}" for of in (mesh, home))
    raise SettingError(
        f"gradient of {name}",
        got=f"a gradient that is {given} of a parameter that is {wanted}",
        allowed="a gradient on the mesh of its parameter",
        advice="leave it to backward() to make the gradients",
    )


def _check(name: str, gradient: Tensor) -> None:
    if gradient.layout not in {torch.strided, torch.sparse_coo}:
        found = f"a gradient in the layout {gradient.layout}"
    elif gradient.dtype not in DTYPES:
        found = f"a gradient of {gradient.dtype}"
    else:
        return
    raise SettingError(
        f"gradient of {name}",
        got=found,
        allowed=f"dense and sparse COO gradients of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}",
        advice="leave this parameter out: parameters=[...], or give it an optimizer of its own",
    )
