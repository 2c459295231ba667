"""The numbers: level sets, integer codes, quantizers with their gradients, calibration."""

from fairseq_lowbit.quantization.calibration import Criterion
from fairseq_lowbit.quantization.codes import Codes
from fairseq_lowbit.quantization.elastic import ElasticQuantizer
from fairseq_lowbit.quantization.encoded_once import weights_encoded_once
from fairseq_lowbit.quantization.levels import LevelSet, mid_rise, non_negative, signed
from fairseq_lowbit.quantization.operand import Operand
from fairseq_lowbit.quantization.quantizer import Quantizer, UncalibratedError
from fairseq_lowbit.quantization.squashed import SquashedQuantizer, squash_penalty
from fairseq_lowbit.quantization.uniform import UniformQuantizer

__all__ = [
    "Codes",
    "Criterion",
    "ElasticQuantizer",
    "LevelSet",
    "Operand",
    "Quantizer",
    "SquashedQuantizer",
    "UncalibratedError",
    "UniformQuantizer",
    "mid_rise",
    "non_negative",
    "signed",
    "squash_penalty",
    "weights_encoded_once",
]
