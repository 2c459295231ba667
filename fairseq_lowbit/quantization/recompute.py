"""Decoded values are not kept for the backward: their quantizer decodes them again.

An operator saves its inputs for its gradients. Those of a quantized operator are decoded values,
which their quantizer can make anew from its own input, and that one the graph holds anyway. So a
quantized model needs hardly more memory in training than a float one.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recomputable(torch.autograd.Function):
    """A function whose output can be computed again from the tensors that it saves: its forward
    sets ``ctx.recompute``, which takes them and returns the output.

    Its backward reads them by :func:`take_saved`: gradient checkpointing lets a saved tensor be
    read only once, and whoever computed the output again has read them already.
    """


def recomputed(*values: Tensor) -> AbstractContextManager[Any]:
    """Operators called inside do not keep those of ``values`` that come straight from a
    :class:`Recomputable`; they are computed again when the backward asks for them."""
    nodes = {_storage(v): v.grad_fn for v in values if hasattr(v.grad_fn, "recompute")}
    if not nodes:
        return nullcontext()

    def pack(saved: Tensor) -> Any:
        node = nodes.get(_storage(saved))
        if node is None:
            return saved
        # An operator may save a view, for example the transposed weight.
        return node, saved.size(), saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        node, *geometry = packed
        if not hasattr(node, "read"):
            node.read = node.saved_tensors
        return node.recompute(*node.read).as_strided(*geometry)

    return saved_tensors_hooks(pack, unpack)


def take_saved(ctx: Any) -> tuple[Tensor, ...]:
    """The tensors that a :class:`Recomputable` saved, in its backward."""
    read = vars(ctx).pop("read", None)
    return ctx.saved_tensors if read is None else read


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
