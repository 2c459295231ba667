"""Recognizing speech with a model that was fine-tuned for it (CTC): best unit of every frame."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fairseq_lowbit.data.units import collapsed, decode
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.utterances import Utterances
from fairseq_lowbit.models import LoadedModel, device_of


@torch.no_grad()
def log_probabilities(loaded: LoadedModel, batch: Utterances) -> list[Tensor]:
    """Log-probabilities of the units in the valid frames of every utterance.

    Args:
        loaded: a model with a CTC head.

    Returns:
        [frames, units] each, fp32, on the model's device.

    Raises:
        LowbitError: the model has no CTC head.
    """
    require_units(loaded)
    batch = batch.to(device_of(loaded.model))
    scores, padding = loaded.model.unit_log_probabilities(batch.waveform, batch.lengths)
    return [row[~padded] for row, padded in zip(scores, padding, strict=True)]


def require_units(loaded: LoadedModel) -> None:
    """Raises LowbitError for a model that cannot transcribe."""
    if not loaded.units:
        raise LowbitError(
            f"{loaded.source} has no CTC head and cannot transcribe: fine-tune it first with "
            "fairseq-hydra-train --config-name asr_ctc"
        )


def greedy(log_probs: Tensor, units: Sequence[str]) -> str:
    """The text of the most likely unit of every frame.

    Args:
        log_probs: [frames, units], of one utterance.
        units: what the units write, the blank first.
    """
    return decode(collapsed(log_probs.argmax(-1).tolist()), units)


def transcribe(
    loaded: LoadedModel,
    batches: Iterable[Utterances],
    decode: Callable[[Tensor, Sequence[str]], str] = greedy,
) -> dict[int, str]:
    """The text of every utterance, by its line in the manifest.

    Args:
        decode: :func:`greedy`, or another that takes what it takes.

    Raises:
        LowbitError: the model has no CTC head.
    """
    return {
        line: decode(scores, loaded.units)
        for batch in batches
        for line, scores in zip(batch.lines, log_probabilities(loaded, batch), strict=True)
    }
