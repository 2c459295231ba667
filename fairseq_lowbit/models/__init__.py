"""HuBERT with a configurable convolutional front-end, in plain torch with fairseq's state keys."""

from fairseq_lowbit.models.architecture import Architecture, parse_conv_layers
from fairseq_lowbit.models.checkpoint import (
    LoadedModel,
    check_same_shapes,
    is_calibrated_only,
    load_model,
    load_without_weights,
    read_checkpoint,
    start_from,
    updates_of,
    write_model,
)
from fairseq_lowbit.models.model import Hubert, WithoutWeights

__all__ = [
    "Architecture",
    "Hubert",
    "LoadedModel",
    "WithoutWeights",
    "check_same_shapes",
    "is_calibrated_only",
    "load_model",
    "load_without_weights",
    "parse_conv_layers",
    "read_checkpoint",
    "start_from",
    "updates_of",
    "write_model",
]
