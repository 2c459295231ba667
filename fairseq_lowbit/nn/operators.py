"""Weighted operators. Without quantizers in their slots they are the plain float operators.

Each states its role and which values it reads, what a precision plan decides by, and its work.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.weight_norm import WeightNorm

from fairseq_lowbit.nn.work import Steps, Work
from fairseq_lowbit.precision import InputKind, Role
from fairseq_lowbit.quantization import Quantizer, SquashedQuantizer, encoded_once, product
from fairseq_lowbit.quantization.quantizer import keep_dtype
from fairseq_lowbit.quantization.squashed import SQUASHED_GROUP


class Operator(nn.Module):
    """A weighted operator with slots for quantizers, None for float."""

    role: Role
    input_kind: InputKind
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None

    @property
    def weight_shape(self) -> torch.Size:
        """Of :meth:`stored_weight`."""
        return self.weight.shape

    @property
    def input_features(self) -> int:
        """Values of one frame of the input."""
        raise NotImplementedError

    @property
    def output_features(self) -> int:
        """Values of one frame of the output."""
        return self.weight_shape[0]

    @property
    def frame_dim(self) -> int | tuple[int, int]:
        """Dimensions of the input over which a frame extends. A single value is its own range, so
        a waveform has one per utterance."""
        return 1 if self.input_features > 1 else (1, 2)

    def work(self, steps: Steps) -> tuple[Work]:
        """What one call on a single utterance takes."""
        read, written = self.input_features * steps.read, self.output_features * steps.written
        # What follows value by value reads and writes as much as this one writes.
        return (Work(self.weight_shape.numel() * steps.written, max(read, written) + written),)

    def stored_weight(self) -> Tensor:
        """What the weight quantizer encodes, output channels first."""
        return self.weight

    @property
    def weight_parameters(self) -> tuple[nn.Parameter, ...]:
        """What :meth:`stored_weight` is computed from."""
        return (self.weight,)

    def weight_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters with which :meth:`stored_weight` is ``weight``."""
        return {"weight": weight}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Operator":
        """A weight that is quantized stays fp32 under ``.half()`` and ``.bfloat16()``: its codes
        are those of the stored weight whatever the model computes in. The device is followed."""
        if self.weight_quantizer is None:
            return super()._apply(fn, recurse)
        kept = {id(t) for p in self.weight_parameters for t in (p, p.grad)}

        def convert(tensor: Tensor) -> Tensor:
            return keep_dtype(fn, tensor) if id(tensor) in kept else fn(tensor)

        return super()._apply(convert, recurse)

    def name_groups(self) -> None:
        """Puts what is squashed into a group of its own in the optimizer: its values are tens of
        times a float weight's, and the loss, not weight decay, keeps their spread."""
        if isinstance(self.weight_quantizer, SquashedQuantizer):
            for parameter in self.weight_parameters:
                parameter.param_group = SQUASHED_GROUP

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        """Why the float ``module`` cannot become this operator; empty when it can."""
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            return "its weight is no parameter of its own but computed, by pruning for example"
        return ""

    @classmethod
    def adopt(cls, module: nn.Module, role: Role, input_kind: InputKind) -> None:
        """Turns the float ``module`` into this operator. It stays the same object with the same
        parameters, hooks and state-dict keys; only its class changes."""
        module.__class__ = cls
        module.role, module.input_kind = role, input_kind
        module.weight_quantizer = module.input_quantizer = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.name_groups()  # a deep copy strips parameters of their attributes


class Linear(Operator, nn.Linear):
    """y = Q(W) Q(x) + b.

    Args:
        role: what the operator does in its model; a precision's name selects roles.
        input_kind: which values it reads; the level set of its input depends on them.

    ``weight_quantizer`` and ``input_quantizer`` are None for float. A module whose input is
    quantized upstream (q, k, v share one quantizer) keeps ``input_quantizer`` None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        role: Role = Role.ENCODER_LINEAR,
        input_kind: InputKind = InputKind.ANY,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.role, self.input_kind = role, input_kind
        self.weight_quantizer = self.input_quantizer = None

    @property
    def input_features(self) -> int:
        return self.in_features

    @property
    def frame_dim(self) -> int:
        return -1

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        x = _quantized(x, self.input_quantizer)
        return product.linear(x, _effective_weight(self, product.compute_dtype(x)), self.bias)


class Conv1d(Operator, nn.Conv1d):
    """``nn.Conv1d`` with quantizer slots; ``role`` and ``input_kind`` as for :class:`Linear`."""

    def __init__(
        self,
        *args: Any,
        role: Role = Role.CONVOLUTION,
        input_kind: InputKind = InputKind.ANY,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.role, self.input_kind = role, input_kind
        self.weight_quantizer = self.input_quantizer = None

    @property
    def input_features(self) -> int:
        return self.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, samples] -> [batch, out, frames]."""
        x = self.quantized_input(x)
        weight = _effective_weight(self, product.compute_dtype(x))
        padding, mode = self.padding, self.padding_mode
        if mode != "zeros" or isinstance(padding, str):
            widths, mode = self._reversed_padding_repeated_twice, mode.replace("zeros", "constant")
            x, padding = product.through(x, lambda v: F.pad(v, widths, mode)), (0,)
        return product.conv1d(
            x, weight, self.bias, self.stride, padding, self.dilation, self.groups
        )

    def quantized_input(self, x: Tensor) -> Tensor:
        return _quantized(x, self.input_quantizer)


class WeightNormConv1d(Conv1d):
    """A convolution under one of torch's two ``weight_norm`` functions, with their parameters.

    Made from a float one only. A frame of zeros stays zero behind a quantizer with a shift, because
    encoders zero what is padded before their positional convolution.
    """

    gain_name: str
    direction_name: str
    norm_dim: int

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        return ""

    @classmethod
    def adopt(cls, module: nn.Module, role: Role, input_kind: InputKind) -> None:
        hook = weight_norm_hook(module)
        if hook is None:
            names = ("parametrizations.weight.original0", "parametrizations.weight.original1")
            module.norm_dim = module.parametrizations.weight[0].dim
        else:
            # The hook would set ``weight``, which nobody reads any more and no deep copy survives.
            key, normalization = hook
            del module._forward_pre_hooks[key], module.weight
            names, module.norm_dim = ("weight_g", "weight_v"), normalization.dim
        module.gain_name, module.direction_name = names
        super().adopt(module, role, input_kind)

    @property
    def weight_shape(self) -> torch.Size:
        return self.get_parameter(self.direction_name).shape

    @property
    def weight_parameters(self) -> tuple[nn.Parameter, ...]:
        return self.get_parameter(self.direction_name), self.get_parameter(self.gain_name)

    @property
    def weight(self) -> Tensor:
        """gain * direction / |direction|, [out, in/groups, kernel]."""
        direction, gain = self.weight_parameters
        return direction * (gain / torch.norm_except_dim(direction, 2, self.norm_dim))

    def weight_state(self, weight: Tensor) -> dict[str, Tensor]:
        norm = torch.norm_except_dim(weight, 2, self.norm_dim)
        return {self.direction_name: weight, self.gain_name: norm}

    def quantized_input(self, x: Tensor) -> Tensor:
        if self.input_quantizer is None:
            return x
        is_zero = (x == 0).all(1, keepdim=True)
        return product.through(self.input_quantizer(x), lambda v: v.masked_fill(is_zero, 0))


def weight_norm_hook(module: nn.Module) -> tuple[int, WeightNorm] | None:
    """Key and hook of ``torch.nn.utils.weight_norm`` on the weight of ``module``; None without."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return key, hook
    return None


class Embedding(Operator, nn.Embedding):
    """``nn.Embedding`` with a quantizer slot for its table; its inputs are indices.

    Made from a float one only.
    """

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        if module.max_norm is not None or module.sparse:
            return "its max_norm or sparse gradients need the float table"
        return super().obstacle(module)

    @classmethod
    def adopt(cls, module: nn.Module, role: Role, input_kind: InputKind) -> None:
        super().adopt(module, role, input_kind)
        # Follows the dtype of the model, as a quantized table does not.
        module.register_buffer("dtype_holder", module.weight.new_empty(0), persistent=False)

    @property
    def input_features(self) -> int:
        return 1

    @property
    def output_features(self) -> int:
        return self.embedding_dim

    def work(self, steps: Steps) -> tuple[Work]:
        """Rows are copied; nothing is multiplied."""
        return (Work(0, 2 * self.embedding_dim * steps.written),)

    def forward(self, indices: Tensor) -> Tensor:
        """Integers of any shape -> [..., embedding_dim]."""
        weight = _effective_weight(self, self.dtype_holder.dtype)
        return F.embedding(
            indices, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )


class PositionalConv1d(Operator):
    """Grouped "same" convolution over frames with weight normalisation over the kernel axis.

    Parameters are named as ``torch.nn.utils.weight_norm(dim=2)`` names them, so fairseq's
    checkpoints load; unlike it, the module can be deep-copied.
    """

    role = Role.POSITIONAL_CONVOLUTION
    input_kind = InputKind.ANY

    def __init__(self, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels are not divisible by {groups} groups")
        self.kernel, self.groups = kernel, groups
        weight = torch.empty(channels, channels // groups, kernel)
        nn.init.normal_(weight, std=math.sqrt(4 / (kernel * channels)))
        self.weight_v = nn.Parameter(weight)
        # Any arithmetic on the meta device loads seconds' worth of torch.
        gain = torch.empty(1, 1, kernel)
        self.weight_g = nn.Parameter(
            gain if weight.is_meta else weight.norm(dim=(0, 1), keepdim=True)
        )
        self.bias = nn.Parameter(torch.zeros(channels))
        self.weight_quantizer = self.input_quantizer = None

    @property
    def weight_shape(self) -> torch.Size:
        return self.weight_v.shape

    @property
    def weight_parameters(self) -> tuple[nn.Parameter, ...]:
        return self.weight_v, self.weight_g

    @property
    def input_features(self) -> int:
        return len(self.bias)

    def stored_weight(self) -> Tensor:
        """g * v / |v|, [channels, channels/groups, kernel]."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))

    def weight_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight_v": weight, "weight_g": weight.norm(dim=(0, 1), keepdim=True)}

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """[batch, channels, frames] -> same shape.

        Args:
            padding_mask: [batch, frames], True at padding, which is zeroed *after* quantization:
                a quantizer with a shift need not map zero to zero.
        """
        x = _quantized(x, self.input_quantizer)
        if padding_mask is not None:
            x = product.through(x, lambda v: v.masked_fill(padding_mask[:, None], 0))
        weight = _effective_weight(self, product.compute_dtype(x))
        padding = (self.kernel // 2,)
        y = product.conv1d(x, weight, self.bias, padding=padding, groups=self.groups)
        return y[..., : x.shape[-1]]


def _quantized(x: Tensor, quantizer: Quantizer | None) -> Tensor:
    return x if quantizer is None else quantizer(x)


def _effective_weight(operator: Operator, dtype: torch.dtype) -> Tensor:
    """The weight that the operator computes with, where it is quantized in ``dtype``."""
    quantizer, weight = operator.weight_quantizer, operator.stored_weight()
    if quantizer is None:
        return weight
    codes = encoded_once.find(quantizer, weight, operator.weight_parameters)
    return quantizer(weight, dtype=dtype, codes=codes)
