"""torchao's quantization-aware training."""

import logging

import torch
from torch import Tensor, nn

from accuracy.rows import Row
from fairseq_lowbit.models import Hubert

# Of kernels for other machines, which a CPU cannot load, and of a deprecation inside of it.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
from torchao.quantization import quantize_  # noqa: E402
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig  # noqa: E402


def quantize(student: Hubert, row: Row, batches: list[Tensor]) -> None:
    """Symmetric weights per channel, asymmetric inputs per token: ranges of the values at hand, so
    nothing is calibrated on ``batches``."""
    inputs = IntxFakeQuantizeConfig(_integer(row.activation_bits), "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(_integer(row.weight_bits), "per_channel", is_symmetric=True)
    config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
    quantize_(student.encoder.layers, config, lambda module, _: isinstance(module, nn.Linear))


def _integer(bits: int) -> torch.dtype:
    return getattr(torch, f"int{bits}")
