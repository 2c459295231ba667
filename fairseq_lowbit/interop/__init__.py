"""Models of other libraries: reading them, writing for them, and quantizing them in memory."""

from fairseq_lowbit.interop.checkpoint import (
    is_calibrated_only,
    read_checkpoint,
    updates_of,
    write_model,
)
from fairseq_lowbit.interop.opening import SOURCES, open_model, open_without_weights, read_source
from fairseq_lowbit.interop.source import Source
from fairseq_lowbit.models import LoadedModel

__all__ = [
    "SOURCES",
    "LoadedModel",
    "Source",
    "is_calibrated_only",
    "open_model",
    "open_without_weights",
    "read_checkpoint",
    "read_source",
    "updates_of",
    "write_model",
]
