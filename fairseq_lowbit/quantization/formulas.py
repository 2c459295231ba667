"""The formulas of ``docs/numerics.md`` on plain tensors: encode, decode, gradients.

Every function works on values that belong together, whole tensors or blocks of them, and says
nothing of how it is executed; see :mod:`fairseq_lowbit.quantization.execution`. Scales, shifts and
zero points are fp32 and broadcast to the values.
"""

import torch
from torch import Tensor

from fairseq_lowbit.quantization.levels import LevelSet


def encode(
    levels: LevelSet,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    zero_point: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Codes of ``x``, held as fp32, in ``out`` or a new tensor.

    u = (x - shift)/scale, by a true division; with a zero point u is rounded to x/scale first, so
    that zero has an exact code.
    """
    u = normalize(x, scale, shift, out)
    if zero_point is not None:
        u.round_().add_(zero_point)
    return levels.encode(u, u)


def decode_(
    levels: LevelSet, code: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    """scale * (level(code) - zero point) + origin, in place of fp32 codes."""
    level = levels.value_(code)
    decoded = (level if zero_point is None else level.sub_(zero_point)).mul_(scale)
    return decoded.add_(levels.origin) if levels.origin else decoded


def encode_into(
    levels: LevelSet,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    out: Tensor,
) -> None:
    """Codes of ``x`` into ``out``, integers of any type that holds them."""
    out.copy_(encode(levels, x, scale, shift, zero_point))


def decode_into(
    levels: LevelSet, code: Tensor, scale: Tensor, zero_point: Tensor | None, out: Tensor
) -> None:
    """What integer codes stand for, into ``out``, fp32."""
    decode_(levels, out.copy_(code), scale, zero_point)


def normalize(x: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor | None = None) -> Tensor:
    """u = (x - shift)/scale, fp32, in ``out`` or a new tensor."""
    x = x.float()
    if shift is None:
        return torch.div(x, scale, out=out)
    return torch.sub(x, shift, out=out).div_(scale)


def quantize(
    levels: LevelSet,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    zero_point: Tensor | None,
    out: Tensor,
) -> None:
    """Decoded codes of ``x``, fp32, into ``out``."""
    decode_(levels, encode(levels, x, scale, shift, zero_point, out), scale, zero_point)


def add_gradients(
    levels: LevelSet,
    x: Tensor,
    grad_output: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    grad_x: Tensor,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
) -> None:
    """Fills in ``grad_x`` and adds to the others, before their factor 1/sqrt(N * Qp)."""
    grad = grad_output.float().contiguous()
    u = normalize(x, scale, shift)
    # hardtanh stops the gradient at the ends of its range, too.
    lowest, highest = levels.clip_range
    torch.ops.aten.hardtanh_backward.grad_input(grad, u, *levels.beyond, grad_input=grad_x)
    if grad_shift is not None:
        grad_shift.sub_(grad_x.sum_to_size(grad_shift.shape))
    if grad_scale is None:
        return
    if levels.is_sign:
        slope = levels.encode(u, u).mul_(grad)
    else:
        slope = levels.value_(levels.encode(u)).mul_(grad)
        # Clamped first: infinity times 0 would be nan.
        slope.addcmul_(u.clamp_(lowest, highest), grad_x, value=-1)
    grad_scale.add_(slope.sum_to_size(grad_scale.shape))


def encode_squashed(levels: LevelSet, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Codes of tanh(P) for ``x`` = P, held as fp32, in ``out`` or a new tensor. With one threshold,
    at zero, P itself has them."""
    x = x.float()
    if levels.size == 2:
        return levels.encode(x, out)
    squashed = torch.tanh(x, out=out)
    return levels.encode(squashed, squashed)


def encode_squashed_into(levels: LevelSet, x: Tensor, out: Tensor) -> None:
    """Codes of tanh(P) for ``x`` = P into ``out``, integers of any type that holds them."""
    out.copy_(encode_squashed(levels, x))


def quantize_squashed(levels: LevelSet, x: Tensor, gain: Tensor, out: Tensor) -> None:
    """gain * level(code of tanh(P)) for ``x`` = P, fp32, into ``out``."""
    decode_(levels, encode_squashed(levels, x, out), gain)


def add_squashed_gradients(
    levels: LevelSet,
    x: Tensor,
    grad_output: Tensor,
    gain: Tensor,
    grad_x: Tensor,
    grad_gain: Tensor,
) -> None:
    """Fills in ``grad_x``, with dQ/dW = 1 and dW/dP = 1 - W^2, and adds to ``grad_gain``."""
    x, grad = x.float(), grad_output.float()
    if levels.size == 2:
        code = levels.encode(x)
        # 1 - W^2 = 4 s (1 - s) with s = sigmoid(2 P), which takes CPUs a third of the time of tanh.
        sigmoid = (2 * x).sigmoid_()
        torch.ops.aten.sigmoid_backward.grad_input(grad, sigmoid, grad_input=grad_x).mul_(4)
    else:
        squashed = x.tanh()
        torch.ops.aten.tanh_backward.grad_input(grad, squashed, grad_input=grad_x)
        code = levels.encode(squashed, squashed)
    grad_x.mul_(gain)
    grad_gain.add_(levels.value_(code).mul_(grad).sum_to_size(grad_gain.shape))
