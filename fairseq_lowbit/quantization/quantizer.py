"""What every quantizer offers, and what those with learned parameters share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairseq_lowbit.quantization import formulas
from fairseq_lowbit.quantization.codes import Codes
from fairseq_lowbit.quantization.execution import run
from fairseq_lowbit.quantization.levels import LevelSet
from fairseq_lowbit.quantization.product import Source, remember

SCALE_GROUP = "quantizer_scale"
SHIFT_GROUP = "quantizer_shift"


class UncalibratedError(RuntimeError):
    """A quantizer was used before calibration or before loading a calibrated checkpoint."""


def keep_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What ``fn``, a conversion of ``nn.Module.to`` and the like, does to the device alone."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(device=moved.device)


class Affine(NamedTuple):
    """The numbers of one call, fp32 and broadcastable to the values; None for what there is not.
    The shift is all that is taken off a value: a threshold and the origin of its levels."""

    scale: Tensor
    shift: Tensor | None = None
    zero_point: Tensor | None = None


class Quantizer(nn.Module):
    """Turns a tensor into codes and back.

    Args:
        levels: the codes it may produce.
        group_size: for a weight with several scales: it is seen as rows of this many values, each
            with a scale of its own (a whole output channel, or a group of its inputs).
    """

    is_calibrated = True

    def __init__(self, levels: LevelSet, group_size: int | None = None) -> None:
        super().__init__()
        self.levels, self.group_size = levels, group_size

    def forward(
        self,
        x: Tensor,
        length_ratio: Tensor | None = None,
        dtype: torch.dtype | None = None,
        codes: Codes | None = None,
    ) -> Tensor:
        """Fake quantization: the decoded codes of ``x``, in its shape.

        Args:
            length_ratio: reference length / valid length, broadcastable to ``x``, for attention
                probabilities; only a learned scale makes use of it.
            dtype: of the result, that of ``x`` by default. Weights are encoded in fp32 whatever
                the model computes in.
            codes: those of ``x``, where they are known already.
        """
        raise NotImplementedError

    @torch.no_grad()
    def codes(
        self,
        x: Tensor,
        length_ratio: Tensor | None = None,
        integer_type: torch.dtype = torch.int16,
    ) -> Codes:
        """The integers that :meth:`forward` decodes; arguments as there."""
        rows = self.rows(x)
        affine = self.affine(rows, length_ratio)
        integers = torch.empty_like(rows, dtype=integer_type)
        run(formulas.encode_into, self.levels, rows, *affine, integers)
        return Codes(integers, affine.scale, self.levels, x.shape, affine.zero_point)

    def affine(self, rows: Tensor, length_ratio: Tensor | None = None) -> Affine:
        """Scale, shift and zero point for these values (see :meth:`rows`)."""
        raise NotImplementedError

    @torch.no_grad()
    def decode(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor | None = None,
        zero_point: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Decoded codes of ``x`` under these numbers, in its shape, without graph."""
        rows = self.rows(x)
        decoded = torch.empty_like(rows, dtype=torch.float32)
        run(formulas.quantize, self.levels, rows, scale, shift, zero_point, decoded)
        return decoded.view_as(x).to(dtype or x.dtype)

    def _remembered(
        self,
        values: Tensor,
        codes: Codes | None,
        tensors: tuple[Tensor | None, ...],
        decode: Callable[..., Tensor],
    ) -> Tensor:
        """``values``, of which a product keeps ``codes``, or without any ``tensors`` and
        ``decode``."""
        if codes is None:
            return remember(values, Source(tensors, partial(decode, dtype=values.dtype)))
        return remember(values, codes.source(values.dtype))

    def target(self, x: Tensor) -> Tensor:
        """The float values that the codes of ``x`` approximate, fp32."""
        return x.float()

    def share_at_floor(self) -> float:
        """Share of its learned scales that have shrunk to the smallest value a scale may have."""
        return 0.0

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale serves all values, so that any sample of them can be encoded."""
        return False

    def rows(self, x: Tensor) -> Tensor:
        """``x``, or [groups, group_size] where each group has a scale of its own."""
        return x if self.group_size is None else x.reshape(-1, self.group_size)

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", groups of {self.group_size}"
        return f"{self.levels.name}, bits={self.levels.bits}{groups}"


class LearnedQuantizer(Quantizer):
    """A quantizer with trained fp32 parameters and the flag, saved with them, that they were set.

    Its parameters stay fp32 whatever the model is cast to.

    Raises:
        UncalibratedError: in every use before calibration or loading a calibrated state.
    """

    def __init__(self, levels: LevelSet, group_size: int | None = None) -> None:
        super().__init__(levels, group_size)
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        # Host-side copy of the flag: checking the tensor would synchronise with the device.
        self._ready = False

    @property
    def is_calibrated(self) -> bool:
        return self._ready

    def mark_calibrated(self, is_calibrated: bool) -> None:
        self.calibrated.fill_(is_calibrated)
        self._ready = is_calibrated

    def name_groups(self) -> None:
        """Gives the parameters' groups in the optimizer, by an attribute of theirs."""
        raise NotImplementedError

    def check_calibrated(self) -> None:
        if not self._ready:
            raise UncalibratedError(
                "quantizer used before calibration: run calibrate(), or load a checkpoint whose "
                "quantizers are calibrated"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LearnedQuantizer":
        # .half() and .bfloat16() must not touch the parameters: only the device is followed.
        return super()._apply(partial(keep_dtype, fn), recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.name_groups()  # a deep copy strips parameters of their attributes

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._ready = bool(self.calibrated)
