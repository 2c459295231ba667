"""HuBERT with a configurable convolutional front-end, in plain torch with fairseq's state keys."""

from fairseq_lowbit.models.architecture import Architecture, parse_conv_layers
from fairseq_lowbit.models.loaded import (
    LoadedModel,
    check_same_shapes,
    continue_from,
    device_of,
    start_from,
)
from fairseq_lowbit.models.model import Hubert, WithoutWeights

__all__ = [
    "Architecture",
    "Hubert",
    "LoadedModel",
    "WithoutWeights",
    "check_same_shapes",
    "continue_from",
    "device_of",
    "parse_conv_layers",
    "start_from",
]
