"""Held-out utterances in padded batches, for models outside of training."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_lowbit.data.audio import SAMPLE_RATE, read_audio
from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.models import Hubert

_BATCH_SAMPLES = 640_000


@dataclass(frozen=True)
class Utterances:
    """A batch.

    Attributes:
        lines: manifest lines, [batch].
        waveform: [batch, samples].
        lengths: [batch] valid samples.
    """

    lines: list[int]
    waveform: Tensor
    lengths: Tensor


def chosen_lines(manifest: Manifest, seconds: float) -> list[int]:
    """Seeded random lines of a manifest that make up at most ``seconds``, one at least."""
    order = np.random.default_rng(0).permutation(len(manifest))
    within = np.cumsum(manifest.sizes[order]) <= seconds * SAMPLE_RATE
    return order[: max(1, int(within.sum()))].tolist()


def read_batches(
    manifest: Manifest, lines: list[int], normalize: bool = False
) -> Iterator[Utterances]:
    """The files on ``lines`` of a manifest, longest first, in batches of about 40 s.

    Raises:
        UnusableAudio: naming the first file that cannot be read as 16 kHz mono.
    """
    batch: list[int] = []
    for line in sorted(lines, key=lambda line: -manifest.sizes[line]):
        if batch and (len(batch) + 1) * manifest.sizes[batch[0]] > _BATCH_SAMPLES:
            yield _read(manifest, batch, normalize)
            batch = []
        batch.append(line)
    if batch:
        yield _read(manifest, batch, normalize)


def _read(manifest: Manifest, lines: list[int], normalize: bool) -> Utterances:
    audio = [torch.from_numpy(read_audio(manifest.root / manifest.names[i])) for i in lines]
    if normalize:
        audio = [F.layer_norm(wave, wave.shape) for wave in audio]
    lengths = torch.tensor([len(wave) for wave in audio])
    return Utterances(lines, torch.nn.utils.rnn.pad_sequence(audio, batch_first=True), lengths)


@torch.no_grad()
def layer_outputs(model: Hubert, batch: Utterances) -> tuple[list[Tensor], Tensor]:
    """Outputs of layers 1..L [batch, frames, dim], and the valid frames [batch, frames]."""
    outputs, padding = model.hidden_states(batch.waveform, batch.lengths)
    return outputs, ~padding
