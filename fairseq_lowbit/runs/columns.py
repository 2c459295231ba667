"""The figures that models are compared by, each defined once for every table and drawing.

A model is a record: plain data, see :data:`fairseq_lowbit.runs.collection.FIELDS`. A column finds
its figure in a record and knows how it is shown.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fairseq_lowbit.evaluation.probing.tasks import MEASURES
from fairseq_lowbit.profiling.cost import CONVERSION_RATE
from fairseq_lowbit.profiling.paper import SOURCE

ModelRecord = Mapping[str, Any]
UNKNOWN = "–"
# Seconds of audio that costs are counted for.
COUNTED_SECONDS = 10.0
_LAST = "; where there is one figure, of the last layer"


@dataclass(frozen=True)
class Column:
    """A figure of every model.

    Attributes:
        key: of a record, and of file names.
        title: head of a table, without the unit.
        unit: of the figure as it is shown.
        note: one sentence that defines it.
        digits: behind the decimal point.
        factor: from the record's unit to ``unit``.
        lower_is_better: as of a cost or a loss.
        name: on the axis of a figure and in sentences; by default the title.
        loss: if given, the figure compares models of this loss only and is unknown for others.
    """

    key: str
    title: str
    unit: str
    note: str
    digits: int
    factor: float = 1.0
    lower_is_better: bool = False
    name: str = ""
    loss: str | None = None

    @property
    def head(self) -> str:
        """Above a column."""
        return f"{self.title} {self.unit}".strip()

    @property
    def label(self) -> str:
        """On an axis or in a sentence."""
        return self.name or self.title

    @property
    def axis(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def value(self, record: ModelRecord) -> float | None:
        """In ``unit``; None where it is not known."""
        if self.loss not in (None, record.get("loss")):
            return None
        return self._scaled(record.get(self.key))

    def spread(self, record: ModelRecord) -> float | None:
        """Half of the 95 % interval in ``unit``; None where there is none."""
        return self._scaled(record.get(f"{self.key}_margin"))

    def layers(self, record: ModelRecord) -> list[float]:
        """The figure of each layer in ``unit``; empty for a figure of the whole model."""
        return [self.factor * value for value in record.get(f"{self.key}_layers") or ()]

    def merit(self, record: ModelRecord) -> float | None:
        """The value with its sign chosen so that more is better; None where it is not known."""
        value = self.value(record)
        return None if value is None else -value if self.lower_is_better else value

    def text(self, record: ModelRecord) -> str:
        """A table's cell."""
        return self._text(self.value(record), self.spread(record))

    def layers_text(self, record: ModelRecord) -> str:
        """A table's cell with the figure of each layer, where the column has it."""
        layers = [self._text(value, None) for value in self.layers(record)]
        return " ".join(layers) or self.text(record)

    def _scaled(self, value: float | None) -> float | None:
        return None if value is None or math.isnan(value) else self.factor * value

    def _text(self, value: float | None, spread: float | None) -> str:
        if value is None:
            return UNKNOWN
        text = f"{value:,.{self.digits}f}"
        return text if spread is None else f"{text}±{spread:.{self.digits}f}"


STORAGE = Column(
    "storage_mb",
    "storage",
    "MB",
    "bytes of all parameters, each at its own width, 16 bits where it is float; 1 MB is 1,000,000 "
    "bytes",
    2,
    lower_is_better=True,
)
FLOPS = Column(
    "flops",
    "FLOPs",
    "G",
    f"operations with a float operand for {COUNTED_SECONDS:g} s of audio, 2 per "
    "multiply-accumulate",
    2,
    factor=1e-9,
    lower_is_better=True,
)
QUANTOPS = Column(
    "quantops",
    "QuantOps",
    "Gbit",
    "operations between quantized operands, times the wider one's bits",
    2,
    factor=1e-9,
    lower_is_better=True,
)
RUNTIME = Column(
    "runtime",
    "runtime",
    "est.",
    f"an estimate: (FLOPs + QuantOps / {CONVERSION_RATE:g}) / FLOPs of a float model of the shape "
    "that most models here have",
    3,
    lower_is_better=True,
)
VALIDATION_LOSS = Column(
    "best_loss",
    "valid. loss",
    "",
    "best validation loss; comparable between runs of one loss and one teacher",
    4,
    lower_is_better=True,
    name="validation loss",
)
# Ranks models of which no other quality is known.
DISTILLATION_LOSS = replace(
    VALIDATION_LOSS, name="validation loss of distillation", loss="distillation"
)
MASKED_ACCURACY = Column(
    "masked_accuracy",
    "masked acc.",
    "%",
    "labels of masked frames that the model predicts, on held-out audio",
    1,
    factor=100,
    name="masked accuracy",
)
COSINE = Column(
    "cosine",
    "cosine",
    "",
    f"mean cosine between the frames of a layer and the teacher's, each centred{_LAST}",
    3,
    name="cosine to the teacher",
)
SNR = Column(
    "snr_db",
    "SNR",
    "dB",
    f"signal-to-noise ratio of a layer against the teacher's{_LAST}",
    1,
    name="SNR against the teacher",
)
_PROBE_NOTES = {
    "phone_error": "phones that a linear head on frozen features gets wrong, on unseen voices",
    "letter_error": "letters that another such head gets wrong, on unseen voices",
    "word_error": "words that the head for letters spells wrong",
    "keyword_error": "isolated words that a linear head on the mean of frozen features takes for "
    "another word, on unseen voices",
    "speaker_error": "recordings that such a head gives to a wrong speaker",
    "accent_error": "recordings of unseen voices that such a head gives to a wrong accent",
}
PROBES = tuple(
    Column(
        measure.key,
        measure.name,
        "%",
        f"{_PROBE_NOTES[measure.key]}; ± is half of the 95 % interval",
        1,
        factor=100,
        lower_is_better=True,
    )
    for measure in MEASURES
)
PHONE_ERROR, LETTER_ERROR, WORD_ERROR, KEYWORD_ERROR = PROBES[:4]
PAPER_WER = Column(
    "paper_wer", "paper WER", "%", f"word error rate of {SOURCE}", 2, lower_is_better=True
)
COSTS = (STORAGE, FLOPS, QUANTOPS, RUNTIME)
# What tables have room for; CSV files have every probe.
QUALITIES = (MASKED_ACCURACY, COSINE, SNR, PHONE_ERROR, LETTER_ERROR, KEYWORD_ERROR)
# Of training in stages against one step.
SCHEDULE_FIGURES = (WORD_ERROR, PHONE_ERROR, SNR)
