"""The dataset behind both tasks: a fairseq manifest, with labels when pre-training."""

from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset
from torch import Tensor

from fairseq_lowbit.data.label_file import LabelFile, check_labels
from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.data.recordings import FIRST_EPOCH, AudioOptions, Recording, Recordings
from fairseq_lowbit.plugin.interruption import detach_data_worker

NO_LABEL = -1


class SpeechDataset(FairseqDataset):
    """Utterances of a manifest.

    Batches and crops depend on (seed, epoch, index) only, so a resumed run sees what the
    interrupted one would have seen. An unusable file is replaced by the next usable one of about
    its size and reported in the batch's ``unusable`` list.

    Args:
        labels: one label file per label set; empty for distillation.

    Raises:
        LowbitError: no file of a usable size; labels that do not fit the files.
    """

    # Reused iterators would keep the first epoch's batches, and their workers its crops.
    can_reuse_epoch_itr_across_epochs = False

    def __init__(
        self, manifest: Manifest, options: AudioOptions, labels: tuple[LabelFile, ...] = ()
    ) -> None:
        super().__init__()
        self.manifest, self.options, self.labels = manifest, options, labels
        for label in labels:
            check_labels(label, manifest, options.label_rate, options.sample_rate)
        self.recordings = Recordings(manifest, options)
        self.sizes = self.recordings.sizes
        self.epoch = FIRST_EPOCH

    def digest(self) -> list[str]:
        """Equal for the same files and labels, wherever they lie."""
        return [self.manifest.digest(), *(label.digest() for label in self.labels)]

    def __len__(self) -> int:
        return len(self.recordings)

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    num_tokens = size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def ordered_indices(self) -> np.ndarray:
        # fairseq seeds numpy around this call.
        return np.lexsort([np.random.permutation(len(self)), self.sizes])[::-1]

    def __getitem__(self, index: int) -> Recording:
        detach_data_worker()
        return self.recordings.read(index)

    def collater(self, samples: list[Recording]) -> dict[str, Any]:
        """A batch: ``waveform`` [batch, samples], ``sizes`` (valid samples, list of int),
        ``lengths`` [batch] or None when nothing is padded, ``targets`` list of [batch, labels]
        (-1 where there is none), ``names``, ``unusable``."""
        if not samples:
            return {}
        limit = self.options.max_size or max(len(s.audio) for s in samples)
        lengths = [min(len(s.audio), limit) for s in samples]
        if not self.options.pad_audio:
            lengths = [min(lengths)] * len(samples)
        waveform, starts = self.recordings.cut(samples, lengths, self.epoch)
        return {
            "id": torch.tensor([s.index for s in samples]),
            "names": [s.name for s in samples],
            "waveform": waveform,
            "sizes": lengths,
            "lengths": torch.tensor(lengths) if min(lengths) < max(lengths) else None,
            "targets": [self._targets(label, samples, starts) for label in self.labels],
            "unusable": [entry for s in samples for entry in s.unusable],
        }

    def _targets(self, label: LabelFile, samples: list[Recording], starts: list[int]) -> Tensor:
        per_sample = self.options.label_rate / self.options.sample_rate
        rows = [
            torch.from_numpy(label[sample.line][round(start * per_sample) :])
            for sample, start in zip(samples, starts, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_LABEL)
