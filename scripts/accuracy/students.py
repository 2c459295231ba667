"""A student before its first update: the teacher, quantized by one of the libraries and calibrated.

Every library reaches the same modules, the linears of the encoder's layers.
"""

from copy import deepcopy
from importlib import import_module

from torch import Tensor

import fairseq_lowbit
from accuracy.rows import FLOAT, OURS, Row
from fairseq_lowbit.configurations import model_config
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.nn import decoded_state


def build_student(row: Row, teacher: Hubert, batches: list[Tensor]) -> Hubert:
    """A copy of the teacher at the row's precision, in eval mode: nothing drops out in training.

    Args:
        batches: to calibrate on, [batch, samples] each, without padding.
    """
    student = deepcopy(teacher)
    if row.library == FLOAT:
        _round_weights(student)
    elif row.library == OURS:
        _quantize(student, row, batches)
    else:
        # A module for each, as neither has to be installed.
        import_module(f"accuracy.by_{row.library}").quantize(student, row, batches)
    student.requires_grad_(True)
    student.feature_extractor.requires_grad_(False)
    return student.eval()


def _round_weights(student: Hubert) -> None:
    """A student that is its teacher has nothing to learn. This one starts as close as 8-bit weights
    are, and shows how close training at a rate comes when nothing is quantized."""
    fairseq_lowbit.quantize(student, "minmax_w8a16")
    weights = decoded_state(student)
    fairseq_lowbit.quantize(student, "float")
    student.load_state_dict(weights)


def _quantize(student: Hubert, row: Row, batches: list[Tensor]) -> None:
    precision = model_config(row.precision, list(row.overrides)).precision
    fairseq_lowbit.quantize(student, precision)
    fairseq_lowbit.calibrate(student, batches, student.final_output)
