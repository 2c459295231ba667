"""Held-out utterances in padded batches, for models outside of training."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_lowbit.data.audio import SAMPLE_RATE, UnusableAudio, read_audio
from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import device_of
from fairseq_lowbit.models.protocols import HiddenStates

logger = logging.getLogger(__name__)

_BATCH_SAMPLES = 640_000


@dataclass(frozen=True)
class Utterances:
    """A padded batch of audio.

    Attributes:
        lines: manifest lines, [batch].
        waveform: [batch, samples].
        lengths: [batch] valid samples.
    """

    lines: list[int]
    waveform: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> "Utterances":
        return Utterances(self.lines, self.waveform.to(device), self.lengths.to(device))


def chosen_lines(
    manifest: Manifest, seconds: float, among: Sequence[int] | None = None
) -> list[int]:
    """Random but reproducible lines of a manifest: at most ``seconds`` of audio, at least one.

    Args:
        among: the lines to choose among; None for all.
    """
    order = np.random.default_rng(0).permutation(len(manifest) if among is None else among)
    within = np.cumsum(manifest.sizes[order]) <= seconds * SAMPLE_RATE
    return order[: max(1, int(within.sum()))].tolist()


def read_batches(
    manifest: Manifest, lines: list[int], normalize: bool = False
) -> Iterator[Utterances]:
    """The files on ``lines`` of a manifest, longest first, in batches of about 40 s.

    Unusable files are left out with a warning each.

    Raises:
        LowbitError: no file is usable.
    """
    usable = 0
    for batch in batched(manifest.sizes, lines):
        audio = read_usable(manifest, batch, normalize)
        if audio:
            usable += len(audio)
            lengths = torch.tensor([len(wave) for wave in audio.values()])
            padded = torch.nn.utils.rnn.pad_sequence(list(audio.values()), batch_first=True)
            yield Utterances(list(audio), padded, lengths)
    if not usable:
        raise LowbitError(f"{manifest.path}: none of the files to measure on is usable")


def read_usable(manifest: Manifest, lines: list[int], normalize: bool) -> dict[int, Tensor]:
    """The samples of the usable files among ``lines``, by line; warns about the others."""
    audio = {}
    for line in lines:
        try:
            wave = torch.from_numpy(read_audio(manifest.root / manifest.names[line]))
        except UnusableAudio as error:
            logger.warning(f"left out: {error}")
            continue
        audio[line] = F.layer_norm(wave, wave.shape) if normalize else wave
    return audio


def batched(sizes: Sequence[int], lines: Iterable[int]) -> Iterator[list[int]]:
    """Lines in batches of about 40 s, longest first; ``sizes`` in samples, by line."""
    batch: list[int] = []
    for line in sorted(lines, key=lambda line: -sizes[line]):
        if batch and (len(batch) + 1) * sizes[batch[0]] > _BATCH_SAMPLES:
            yield batch
            batch = []
        batch.append(line)
    if batch:
        yield batch


@torch.no_grad()
def layer_outputs(model: HiddenStates, batch: Utterances) -> tuple[list[Tensor], Tensor]:
    """Outputs of layers 1..L [batch, frames, dim], and the valid frames [batch, frames], on the
    device of the model."""
    batch = batch.to(device_of(model))
    outputs, padding = model.hidden_states(batch.waveform, batch.lengths)
    return outputs, ~padding
