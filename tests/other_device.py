"""A stand-in for an accelerator: a device whose tensors do not mix with those on the CPU.

Its tensors say that they are on the device "lazy", which no build of torch computes on unless it is
asked to, and hold their values on the CPU. An operation on tensors of both devices is refused as
CUDA refuses it; so are ``numpy()`` and what else needs values on the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

OTHER = "lazy"

# How many of its first tensors have to be on one device; the rest, indices and sizes, may be on the
# CPU for CUDA too.
_COMPARED = {"copy_": 1, "_to_copy": 1, "index": 1, "index_put_": 1, "_ctc_loss": 2}
_COMPARED |= {"_ctc_loss_backward": 3}


class MixedDevices(Exception):
    """One operation on tensors of two devices."""


class _Tensor(torch.Tensor):
    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "_Tensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=OTHER,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"{OTHER} {self.held!r}"

    def tolist(self) -> Any:
        return self.held.tolist()  # torch's own refuses subclasses

    # What memory is shared with, as of tensors that own theirs.

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes tensors on the other device where a factory is asked for it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[str]:
    """In the block the device :data:`OTHER` is there."""
    before = torch._C._only_lift_cpu_tensors()
    # Else torch.tensor(..., device=OTHER) would not come by here.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield OTHER
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@torch.inference_mode(False)  # whose tensors no subclass may wrap
@torch.no_grad()
def _run(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if operation is torch.ops.aten._has_compatible_shallow_copy_type.default:
        return type(tensors[0]) is type(tensors[1])  # modules ask before they move
    _refuse_mixed(operation, tensors)
    place = kwargs.get("device")
    goes_there = any(isinstance(tensor, _Tensor) for tensor in tensors)
    if place is not None:
        goes_there = torch.device(place).type == OTHER
        kwargs = {**kwargs, "device": "cpu"}
    inner = tree_map_only(_Tensor, lambda tensor: tensor.held, (args, kwargs))
    result = operation(*inner[0], **inner[1])
    # In-place operations return what they were given.
    given = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, _Tensor)}
    if not goes_there:
        return result
    return tree_map_only(
        torch.Tensor,
        lambda tensor: given[id(tensor)] if id(tensor) in given else _Tensor(tensor),
        result,
    )


def _refuse_mixed(operation: Any, tensors: list[torch.Tensor]) -> None:
    compared = tensors[: _COMPARED.get(operation.overloadpacket.__name__)]
    # CUDA takes a single number from the CPU.
    if len({isinstance(tensor, _Tensor) for tensor in compared if tensor.dim()}) > 1:
        shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in compared)
        raise MixedDevices(f"{operation}: {shapes}")
