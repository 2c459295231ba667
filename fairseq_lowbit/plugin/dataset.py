"""The dataset behind both tasks: a fairseq manifest, with labels when pre-training."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset
from torch.nn import functional as F

from fairseq_lowbit.data.audio import UnusableAudio, read_audio
from fairseq_lowbit.data.label_file import LabelFile
from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.plugin.interruption import detach_data_worker

logger = logging.getLogger(__name__)

NO_LABEL = -1
_MAX_SUBSTITUTES = 20
_PROBED_LINES = 64
_LABEL_TOLERANCE = 0.1


@dataclass(frozen=True)
class AudioOptions:
    """How utterances are read and cut; sizes in samples."""

    sample_rate: int = 16_000
    normalize: bool = False
    pad_audio: bool = False
    random_crop: bool = True
    min_size: int = 400
    max_keep: int | None = None
    max_size: int | None = None
    seed: int = 1


class SpeechDataset(FairseqDataset):
    """Utterances of a manifest.

    Batches and crops depend on (seed, epoch, index) only, so a resumed run sees what the
    interrupted one would have seen. An unusable file is replaced by the next usable one of about
    its size and reported in the batch's ``unusable`` list.

    Args:
        labels: one label file per label set; empty for distillation.
        label_rate: labels per second.

    Raises:
        LowbitError: no file of a usable size; labels that do not fit the files.
    """

    # Reused iterators would keep the first epoch's batches, and their workers its crops.
    can_reuse_epoch_itr_across_epochs = False

    def __init__(
        self,
        manifest: Manifest,
        options: AudioOptions,
        labels: tuple[LabelFile, ...] = (),
        label_rate: float = 50.0,
    ) -> None:
        super().__init__()
        self.manifest, self.options = manifest, options
        self.labels, self.label_rate = labels, label_rate
        for label in labels:
            if len(label) != len(manifest):
                raise LowbitError(
                    f"{label.path} has {len(label)} lines and {manifest.path} has "
                    f"{len(manifest)} files; make the labels again"
                )
        self.lines = self._usable_lines()
        self._check_label_rate()
        self.sizes = np.minimum(manifest.sizes[self.lines], options.max_size or np.inf).astype(int)
        self._by_size = np.argsort(self.sizes, kind="stable")
        self._place = np.argsort(self._by_size)
        self.epoch = 1

    def _usable_lines(self) -> np.ndarray:
        sizes = self.manifest.sizes
        long_enough = sizes >= self.options.min_size
        short_enough = sizes <= (self.options.max_keep or np.inf)
        lines = np.flatnonzero(long_enough & short_enough)
        if not len(lines):
            raise LowbitError(
                f"{self.manifest.path}: none of {len(sizes)} files has between "
                f"{self.options.min_size} and {self.options.max_keep or 'any number of'} samples; "
                "see task.min_sample_size and task.max_keep_size"
            )
        if len(lines) < len(sizes):
            short, long = np.flatnonzero(~long_enough), np.flatnonzero(~short_enough)
            first = self.manifest.names[(short if len(short) else long)[0]]
            logger.warning(
                f"{self.manifest.path}: left out {len(short)} files shorter than "
                f"{self.options.min_size} samples and {len(long)} too long, first {first}"
            )
        return lines

    def _check_label_rate(self) -> None:
        """A wrong rate would train a wrong teacher without a word."""
        for label in self.labels:
            for line in self.lines[:: max(1, len(self.lines) // _PROBED_LINES)]:
                seconds = self.manifest.sizes[line] / self.options.sample_rate
                count = len(label[int(line)])
                # An empty line stands for a file that could not be labelled.
                if count and abs(count / self.label_rate - seconds) > _LABEL_TOLERANCE:
                    raise LowbitError(
                        f"{label.path} line {line + 1} has {count} labels for {seconds:.2f} s of "
                        f"audio, not {self.label_rate:g} a second: set task.label_rate to "
                        f"{count / seconds:.0f}, or make the labels again"
                    )

    def __len__(self) -> int:
        return len(self.lines)

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    num_tokens = size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def ordered_indices(self) -> np.ndarray:
        # fairseq seeds numpy around this call.
        return np.lexsort([np.random.permutation(len(self)), self.sizes])[::-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        detach_data_worker()
        unusable = []
        for step in range(min(_MAX_SUBSTITUTES, len(self))):
            candidate = int(self._by_size[(self._place[index] + step) % len(self)])
            line = int(self.lines[candidate])
            name = self.manifest.names[line]
            try:
                audio = read_audio(self.manifest.root / name, self.options.sample_rate)
                if len(audio) < self.options.min_size:
                    raise UnusableAudio(name, f"only {len(audio)} samples")
            except UnusableAudio as error:
                unusable.append((name, str(error)))
                continue
            return {
                "id": candidate,
                "name": name,
                "audio": self._normalized(audio),
                "labels": [label[line] for label in self.labels],
                "unusable": unusable,
            }
        raise LowbitError(
            f"{self.manifest.path}: {len(unusable)} files in a row are unusable, first "
            f"{unusable[0][1]}"
        )

    def _normalized(self, audio: np.ndarray) -> torch.Tensor:
        waveform = torch.from_numpy(audio)
        return F.layer_norm(waveform, waveform.shape) if self.options.normalize else waveform

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch: ``waveform`` [batch, samples], ``sizes`` (valid samples, list of int),
        ``lengths`` [batch] or None when nothing is padded, ``targets`` list of [batch, labels]
        (-1 where there is none), ``names``, ``unusable``."""
        if not samples:
            return {}
        limit = self.options.max_size or max(len(s["audio"]) for s in samples)
        lengths = [min(len(s["audio"]), limit) for s in samples]
        if not self.options.pad_audio:
            lengths = [min(lengths)] * len(samples)
        return self._collate(samples, lengths)

    def unpadded_batch(self, indices: list[int], max_size: int) -> dict[str, Any]:
        """The utterances cut to their common length, at most ``max_size`` samples."""
        samples = [self[index] for index in indices]
        length = min(max_size, *(len(s["audio"]) for s in samples))
        return self._collate(samples, [length] * len(samples))

    def _collate(self, samples: list[dict[str, Any]], lengths: list[int]) -> dict[str, Any]:
        width = max(lengths)
        starts = [self._crop_start(s, n) for s, n in zip(samples, lengths, strict=True)]
        waveform = torch.zeros(len(samples), width)
        for row, sample, start, length in zip(waveform, samples, starts, lengths, strict=True):
            row[:length] = sample["audio"][start : start + length]
        return {
            "id": torch.tensor([s["id"] for s in samples]),
            "names": [s["name"] for s in samples],
            "waveform": waveform,
            "sizes": lengths,
            "lengths": torch.tensor(lengths) if min(lengths) < width else None,
            "targets": [self._targets(samples, starts, k) for k in range(len(self.labels))],
            "unusable": [entry for s in samples for entry in s["unusable"]],
        }

    def _crop_start(self, sample: dict[str, Any], length: int) -> int:
        spare = len(sample["audio"]) - length
        if spare <= 0 or not self.options.random_crop:
            return 0
        generator = np.random.default_rng((self.options.seed, self.epoch, sample["id"]))
        # Whole label steps, so that labels and frames stay aligned.
        step = round(self.options.sample_rate / self.label_rate)
        return int(generator.integers(spare // step + 1)) * step

    def _targets(
        self, samples: list[dict[str, Any]], starts: list[int], which: int
    ) -> torch.Tensor:
        per_sample = self.label_rate / self.options.sample_rate
        rows = [
            torch.from_numpy(sample["labels"][which][round(start * per_sample) :])
            for sample, start in zip(samples, starts, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_LABEL)
