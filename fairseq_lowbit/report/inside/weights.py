"""How weights lie against the levels they are quantized to, before and after squashing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from fairseq_lowbit.monitoring.health import split_layer
from fairseq_lowbit.nn.operators import Operator
from fairseq_lowbit.quantization import Codes, SquashedQuantizer
from fairseq_lowbit.quantization.calibration import thin
from fairseq_lowbit.report.inside.quantizers import MAX_VALUES

Item = TypeVar("Item")
_BINS = 96
# Of the operators in a layer, those shown where they are quantized.
_SHOWN = ("self_attn.q_proj", "fc1", "fc2")
# Calibration clips what it unsquashes to this, that is to +-3.8, which the range shows.
_UNSQUASH_LIMIT = 0.999
_UNSQUASHED_RANGE = (-4.0, 4.0)
_TAILS = 0.0005


@dataclass(frozen=True)
class Histogram:
    """Distribution of a weight's values.

    Attributes:
        edges: of the bins, evenly spaced.
        student: density per bin. The area is 1 less the share of values beyond the edges.
        teacher: the same of the teacher's weight in the student's units; None without a teacher.
    """

    edges: tuple[float, ...]
    student: tuple[float, ...]
    teacher: tuple[float, ...] | None


@dataclass(frozen=True)
class WeightAnatomy:
    """One operator's weight.

    Attributes:
        module: its name.
        bits: of its quantizer.
        levels: 2^bits, ascending, in units of ``encoded``.
        shares: of the weights at each level.
        encoded: what is rounded to levels: the weight over its scale, or the squashed weight.
        stored: of a squashed weight what is stored and trained, the argument of tanh; None for
            other methods.
        squash_std: the standard deviation that training holds ``stored`` to, None likewise.
    """

    module: str
    bits: int
    levels: tuple[float, ...]
    shares: tuple[float, ...]
    encoded: Histogram
    stored: Histogram | None
    squash_std: float | None = None

    @property
    def layer(self) -> int | None:
        """Encoder layer, from 0; None outside the encoder layers."""
        return split_layer(self.module)[0]

    @property
    def operator(self) -> str:
        """The module's name in its layer."""
        return split_layer(self.module)[1]


def weight_anatomies(student: nn.Module, teacher: nn.Module | None) -> tuple[WeightAnatomy, ...]:
    """The weights of a few quantized operators: of the first, the middle and the last layer the
    query projection and the feed-forward network, or what else is quantized."""
    names = [
        name
        for name, module in student.named_modules()
        if isinstance(module, Operator) and module.weight_quantizer is not None
    ]
    return tuple(
        _weight_anatomy(name, student.get_submodule(name), teacher and teacher.get_submodule(name))
        for name in _shown(names)
    )


def first_middle_last(items: Sequence[Item]) -> list[Item]:
    """Those three of ``items``, in their order; fewer of fewer."""
    return [items[i] for i in sorted({0, (len(items) - 1) // 2, len(items) - 1}) if items]


def _shown(names: Sequence[str]) -> list[str]:
    by_operator: dict[str, list[str]] = {}
    for name in names:
        layer, operator = split_layer(name)
        if layer is not None:
            by_operator.setdefault(operator, []).append(name)
    operators = [operator for operator in _SHOWN if operator in by_operator] or list(by_operator)[
        :3
    ]
    if not operators:
        return first_middle_last(names)
    return [name for operator in operators for name in first_middle_last(by_operator[operator])]


def _weight_anatomy(name: str, own: Operator, teacher: Operator | None) -> WeightAnatomy:
    stored, quantizer = own.stored_weight(), own.weight_quantizer
    codes = quantizer.codes(stored)
    values = _encoded(quantizer.target(stored), codes)
    teachers = None if teacher is None else _encoded(_float_weight(teacher), codes)
    levels = codes.levels.all_values().tolist()
    counts = codes.level_counts()
    unsquashed = aim = None
    if isinstance(quantizer, SquashedQuantizer):
        aim = quantizer.target_std
        unsquashed = _histogram(
            thin(stored, MAX_VALUES),
            None if teachers is None else _unsquashed(teachers),
            _UNSQUASHED_RANGE,
        )
    return WeightAnatomy(
        module=name,
        bits=codes.levels.bits,
        levels=tuple(levels),
        shares=tuple((counts / counts.sum()).tolist()),
        encoded=_histogram(values, teachers, _range(values, levels)),
        stored=unsquashed,
        squash_std=aim,
    )


def _encoded(weight: Tensor, codes: Codes) -> Tensor:
    """``weight`` on the axis of the levels of ``codes``, flat."""
    position = weight.reshape(codes.integers.shape) / codes.scale
    if codes.zero_point is not None:
        position += codes.zero_point
    return thin(position, MAX_VALUES)


def _float_weight(operator: Operator) -> Tensor:
    stored = operator.stored_weight()
    return stored if operator.weight_quantizer is None else operator.weight_quantizer.target(stored)


def _unsquashed(encoded: Tensor) -> Tensor:
    """The argument of tanh, with what no tanh reaches clipped as calibration clips it."""
    return encoded.clamp(-_UNSQUASH_LIMIT, _UNSQUASH_LIMIT).atanh()


def _range(values: Tensor, levels: Sequence[float]) -> tuple[float, float]:
    """Holds every level and nearly every value."""
    margin = (levels[1] - levels[0]) / 2
    tails = values.quantile(values.new_tensor([_TAILS, 1 - _TAILS]))
    lowest, highest = tails.tolist()
    return min(lowest, levels[0] - margin), max(highest, levels[-1] + margin)


def _histogram(values: Tensor, teacher: Tensor | None, span: tuple[float, float]) -> Histogram:
    edges = torch.linspace(*span, _BINS + 1).tolist()
    own, others = (None if v is None else tuple(_density(v, span)) for v in (values, teacher))
    return Histogram(tuple(edges), own, others)


def _density(values: Tensor, span: tuple[float, float]) -> list[float]:
    counts = torch.histc(values.float().cpu(), _BINS, *span)
    width = (span[1] - span[0]) / _BINS
    return (counts / (values.numel() * width)).tolist()
