"""Utterances with what is said in them."""

import hashlib
import json
from typing import Any

import torch

from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.data.recordings import AudioOptions, Recording
from fairseq_lowbit.data.units import BLANK
from fairseq_lowbit.plugin.dataset import SpeechDataset


class TranscribedDataset(SpeechDataset):
    """Whole utterances and the units of their transcripts.

    Args:
        units: of every file of ``manifest``.
    """

    def __init__(self, manifest: Manifest, options: AudioOptions, units: list[list[int]]) -> None:
        super().__init__(manifest, options)
        self.units = units

    def digest(self) -> list[str]:
        """As in :class:`SpeechDataset`."""
        units = hashlib.sha256(json.dumps(self.units).encode()).hexdigest()
        return [*super().digest(), units]

    def collater(self, samples: list[Recording]) -> dict[str, Any]:
        """As in :class:`SpeechDataset`, and ``units`` [batch, most units], padded, with their
        numbers ``unit_sizes`` (list of int)."""
        batch = super().collater(samples)
        if batch:
            rows = [torch.tensor(self.units[s.line], dtype=torch.long) for s in samples]
            batch["unit_sizes"] = [len(row) for row in rows]
            batch["units"] = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=BLANK)
        return batch
