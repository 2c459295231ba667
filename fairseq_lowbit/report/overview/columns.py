"""The columns of the comparison, which the figures of quality against cost take from too."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fairseq_lowbit.profiling.cost import CONVERSION_RATE
from fairseq_lowbit.report.subjects import SECONDS, Subject

Value = Callable[[Subject], float | None]
# In a note, stands for what runtimes are relative to.
FLOAT_MODEL = "the float model"


@dataclass(frozen=True)
class Column:
    """A number of every subject.

    Attributes:
        key: of file names.
        name: on the axis of a figure, with the unit.
        note: one sentence that defines it.
        value: None where it is not known.
        digits: behind the decimal point.
        spread: standard deviation, where there is one.
        is_loss: less of it is better.
        short: for the head of a column, where ``name`` is long.
    """

    key: str
    name: str
    unit: str
    note: str
    value: Value
    digits: int
    spread: Value | None = None
    is_loss: bool = False
    short: str | None = None

    @property
    def head(self) -> str:
        return self.short or self.name

    @property
    def axis(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def text(self, subject: Subject) -> str:
        """The cell; a dash for what is not known."""
        value = self.value(subject)
        if value is None:
            return "–"
        spread = self.spread(subject) if self.spread else None
        text = f"{value:,.{self.digits}f}"
        return text if spread is None else f"{text} ± {spread:.{self.digits}f}"


def runtime_reference(subjects: Iterable[Subject]) -> str:
    """What the runtimes of a report are relative to."""
    return next((s.costs.reference for s in subjects if s.costs is not None), FLOAT_MODEL)


def _recorded(key: str, factor: float = 1.0) -> Value:
    def value(subject: Subject) -> float | None:
        found = subject.value(key)
        return None if found is None else factor * found

    return value


def _counted(key: str, factor: float) -> Value:
    return lambda s: None if s.costs is None else factor * getattr(s.costs.profile, key)


COSTS = (
    Column(
        "storage",
        "storage",
        "MB",
        "bytes of all parameters, each at its own width, 16 bits where it is float; 1 MB is "
        "1,000,000 bytes",
        lambda subject: subject.storage_mb,
        2,
    ),
    Column(
        "gflops",
        "FLOPs",
        "G",
        f"operations with a float operand for {SECONDS:g} s of audio, 2 per multiply-accumulate",
        _counted("flops", 1e-9),
        2,
    ),
    Column(
        "quantops",
        "QuantOps",
        "Gbit",
        "operations between quantized operands, times the wider one's bits",
        _counted("quantops", 1e-9),
        2,
    ),
    Column(
        "runtime",
        "runtime",
        "est.",
        f"an estimate: (FLOPs + QuantOps / {CONVERSION_RATE:g}) / FLOPs of {FLOAT_MODEL}",
        lambda s: None if s.costs is None else s.costs.runtime,
        3,
    ),
)
QUALITIES = (
    Column(
        "masked_accuracy",
        "masked accuracy",
        "%",
        "labels of masked frames that the model predicts, on held-out audio",
        _recorded("masked_accuracy", 100),
        1,
        short="masked acc.",
    ),
    Column(
        "cosine",
        "cosine to the teacher",
        "last layer",
        "mean cosine between the frames of the last layer and the teacher's, each centred",
        _recorded("cosine"),
        3,
        short="cosine",
    ),
    Column(
        "snr",
        "SNR against the teacher",
        "dB",
        "signal-to-noise ratio of the last layer against the teacher's",
        _recorded("snr_db"),
        1,
        short="SNR",
    ),
    Column(
        "word_probe",
        "word probe",
        "%",
        "words that a linear classifier reads off the mean of the frozen last layer, on unseen "
        "voices; ± is the standard deviation over three subsets of the training words",
        _recorded("word_probe", 100),
        1,
        spread=_recorded("word_probe_std", 100),
    ),
)
VALIDATION_LOSS = Column(
    "valid_loss",
    "validation loss",
    "",
    "best validation loss; comparable between runs of one loss and one teacher",
    _recorded("best_loss"),
    4,
    is_loss=True,
    short="valid. loss",
)
# What orders models that nothing was measured of.
DISTILLATION_LOSS = replace(
    VALIDATION_LOSS,
    name="validation loss of distillation",
    value=lambda s: s.value("best_loss") if s.record["loss"] == "distillation" else None,
)
COLUMNS = (*COSTS, VALIDATION_LOSS, *QUALITIES)
