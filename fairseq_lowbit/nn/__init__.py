"""Operators with slots for quantizers, and attaching quantizers to them by a plan."""

from fairseq_lowbit.nn.attach import (
    attach,
    calibrate,
    decoded_state,
    describe_squashing,
    every_quantizer_called,
    float_state,
    forget_calibration,
    is_calibrated,
    is_quantized,
    quantizers,
    sites,
    squashed_weights,
)
from fairseq_lowbit.nn.attention import AttentionOutput, SelfAttention
from fairseq_lowbit.nn.eager import eagerly
from fairseq_lowbit.nn.operators import Conv1d, Linear, PositionalConv1d

__all__ = [
    "AttentionOutput",
    "Conv1d",
    "Linear",
    "PositionalConv1d",
    "SelfAttention",
    "attach",
    "calibrate",
    "decoded_state",
    "describe_squashing",
    "eagerly",
    "every_quantizer_called",
    "float_state",
    "forget_calibration",
    "is_calibrated",
    "is_quantized",
    "quantizers",
    "sites",
    "squashed_weights",
]
