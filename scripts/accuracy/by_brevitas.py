"""Brevitas' quantization-aware training."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from accuracy.rows import Row
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.nn import Linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a package that only its rotations use
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import LAYERWISE_COMPUTE_LAYER_MAP, layerwise_quantize
    from brevitas.quant import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst


def quantize(student: Hubert, row: Row, batches: list[Tensor]) -> None:
    """Its defaults for a linear: one scale per tensor, for inputs calibrated and then learned."""
    operator, defaults = LAYERWISE_COMPUTE_LAYER_MAP[nn.Linear]
    layer_map = {Linear: (operator, {**defaults, **_bits(row)})}
    layerwise_quantize(student.encoder.layers, layer_map)
    with torch.no_grad(), calibration_mode(student):
        for batch in batches:
            student.final_output(batch)


def _bits(row: Row) -> dict[str, Any]:
    """One bit has quantizers of its own, whose scales are constant."""
    weights = (
        {"weight_quant": SignedBinaryWeightPerTensorConst}
        if row.weight_bits == 1
        else {"weight_bit_width": row.weight_bits}
    )
    inputs = (
        {"input_quant": SignedBinaryActPerTensorConst}
        if row.activation_bits == 1
        else {"input_bit_width": row.activation_bits}
    )
    return {**weights, **inputs}
