"""The numbers: level sets, integer codes, quantizers with their gradients, calibration."""

from fairseq_lowbit.quantization.codes import Codes
from fairseq_lowbit.quantization.elastic import ElasticQuantizer, UncalibratedError
from fairseq_lowbit.quantization.levels import LevelSet, after_gelu, non_negative, signed

__all__ = [
    "Codes",
    "ElasticQuantizer",
    "LevelSet",
    "UncalibratedError",
    "after_gelu",
    "non_negative",
    "signed",
]
