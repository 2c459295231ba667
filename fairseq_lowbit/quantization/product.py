"""Products of quantized operands that keep no decoded values for the backward.

The gradient of a product needs its operands. Those of a quantized operator are decoded values,
which can be decoded again from what the graph holds anyway, or from the integer codes of a weight.
So a quantized model needs hardly more memory in training than a float one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Shapes = tuple[torch.Size, torch.Size]
Needed = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Values = Callable[[], Tensor]


@dataclass(frozen=True)
class Source:
    """What values are decoded from.

    Attributes:
        tensors: inputs of ``decode``, without graph.
        decode: returns the values.
        version: of the values; what changes them in place makes another one of it.
    """

    tensors: tuple[Tensor | None, ...]
    decode: Callable[..., Tensor]
    version: int = 0


def remember(values: Tensor, source: Source) -> Tensor:
    """``values``, of which a product keeps ``source`` instead."""
    # A compiler decides itself what it computes again, and nothing is kept without a graph.
    if values.requires_grad and not torch.compiler.is_compiling():
        tensors = tuple(None if t is None else t.detach() for t in source.tensors)
        values.source = Source(tensors, source.decode, values._version)
    return values


def through(values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(values)``, of which a product keeps what it would keep of ``values``. The function
    is called again in the backward."""
    result, source = function(values), _source(values)
    if source is None:
        return result
    decode = source.decode  # alone: what keeps the function must not keep the tensors
    return remember(result, Source(source.tensors, lambda *tensors: function(decode(*tensors))))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``."""
    return _multiply(_Linear(), x, weight, bias)


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1,),
    padding: tuple[int, ...] = (0,),
    dilation: tuple[int, ...] = (1,),
    groups: int = 1,
) -> Tensor:
    """``F.conv1d``, with zeros as padding."""
    return _multiply(_Conv1d(stride, padding, dilation, groups), x, weight, bias)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of equal leading dimensions."""
    return _multiply(_Matmul(), left, right, None)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values.to(dtype)``, see :func:`through`."""
    return values if values.dtype == dtype else through(values, lambda v: v.to(dtype))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a product of ``x`` computes in: its dtype, or that of autocast."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class _Kind(Protocol):
    """A product and its gradients."""

    def compute(self, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor: ...

    def gradients(
        self, grad: Tensor, left: Values, right: Values, needed: Needed, shapes: Shapes
    ) -> Gradients:
        """Of left, right and bias, None where not needed. Operands are decoded when called."""


@dataclass(frozen=True)
class _Linear:
    def compute(self, left, right, bias):
        return F.linear(left, right, bias)

    def gradients(self, grad, left, right, needed, shapes):
        rows = _rows(grad)
        grad_left = (rows @ right()).view(shapes[0]) if needed[0] else None
        grad_right = rows.T @ _rows(left()) if needed[1] else None
        return grad_left, grad_right, rows.sum(0) if needed[2] else None


@dataclass(frozen=True)
class _Conv1d:
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def compute(self, left, right, bias):
        return F.conv1d(left, right, bias, self.stride, self.padding, self.dilation, self.groups)

    def gradients(self, grad, left, right, needed, shapes):
        # Of an operand that is not decoded, the shape alone is read.
        left = left() if needed[1] else grad.new_empty(shapes[0])
        right = right() if needed[0] else grad.new_empty(shapes[1])
        return torch.ops.aten.convolution_backward(
            grad,
            left,
            right,
            right.shape[:1],
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0,),
            self.groups,
            needed,
        )


@dataclass(frozen=True)
class _Matmul:
    def compute(self, left, right, bias):
        return left @ right

    def gradients(self, grad, left, right, needed, shapes):
        # Contiguous first, as torch keeps them: otherwise its kernels sum in another order.
        grad_left = grad @ right().contiguous().transpose(-1, -2) if needed[0] else None
        grad_right = left().contiguous().transpose(-1, -2) @ grad if needed[1] else None
        return grad_left, grad_right, None


def _multiply(kind: _Kind, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    if _source(left) is None and _source(right) is None:
        return kind.compute(left, right, bias)
    dtype = compute_dtype(left)
    left, right = cast(left, dtype), cast(right, dtype)
    bias = None if bias is None else bias.to(dtype)
    return _Product.apply(kind, _source(left), _source(right), left, right, bias)


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _source(values: Tensor) -> Source | None:
    if torch.compiler.is_compiling():
        return None
    source = getattr(values, "source", None)
    return source if source is not None and source.version == values._version else None


class _Product(torch.autograd.Function):
    """A product that saves of every operand what it was decoded from."""

    @staticmethod
    def forward(ctx: Any, kind: _Kind, left_source, right_source, left, right, bias) -> Tensor:
        needs_left, needs_right, _ = ctx.needs_input_grad[3:]
        ctx.kind, ctx.shapes = kind, (left.shape, right.shape)
        ctx.left, kept_left = _kept(left, left_source, needs_right)
        ctx.right, kept_right = _kept(right, right_source, needs_left)
        ctx.save_for_backward(*kept_left, *kept_right)
        ctx.count = len(kept_left)
        with _without_autocast(left):
            return kind.compute(left, right, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        saved, count = ctx.saved_tensors, ctx.count
        with _without_autocast(grad):
            gradients = ctx.kind.gradients(
                grad,
                lambda: ctx.left(*saved[:count]),
                lambda: ctx.right(*saved[count:]),
                ctx.needs_input_grad[3:],
                ctx.shapes,
            )
        return None, None, None, *gradients


def _kept(
    values: Tensor, source: Source | None, is_needed: bool
) -> tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]:
    """What gives the values again, and the tensors that it takes."""
    if not is_needed:
        return _same, ()
    return (_same, (values,)) if source is None else (source.decode, source.tensors)


def _same(values: Tensor) -> Tensor:
    return values


def _without_autocast(tensor: Tensor) -> torch.autocast:
    # Operands have their dtype already, and a backward may run under another setting.
    device = tensor.device.type
    return torch.autocast(
        device if torch.amp.is_autocast_available(device) else "cpu", enabled=False
    )
