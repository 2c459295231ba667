"""One run: a student is built, measured, trained and measured again.

Rows differ in what :func:`build_student` makes and in nothing else: a seed has the same batches for
all of them, and loss, optimizer and schedule are those that this package trains with.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from accuracy.rows import ROWS, Row
from accuracy.students import build_student
from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.data.calibration_audio import CalibrationAudio, calibration_batches
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.data.recordings import AudioOptions, Recordings
from fairseq_lowbit.distillation import distill
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.agreement import agreement, valid_frames
from fairseq_lowbit.evaluation.utterances import Utterances, chosen_lines, read_batches
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.models.extractor import receptive_field

# Rates are compared on one split, and what is reported is measured on the other.
SPLITS = TRAIN, CHOICE, REPORT = "train", "valid", "test"
_BETAS, _EPSILON, _CLIP_NORM = (0.9, 0.98), 1e-6, 10.0
_WARM_UP = 0.1  # of the updates
_LAST = 10  # updates over which the loss is averaged


@dataclass(frozen=True)
class Teacher:
    """A float model and its corpus, a folder with manifests of three splits."""

    name: str
    checkpoint: Path
    data: Path


@dataclass(frozen=True)
class Setting:
    """What all runs have in common.

    Attributes:
        batch: utterances of an update.
        seconds: of each of them.
        held_out: seconds of audio of either split that is measured on, at most.
    """

    updates: int
    batch: int
    seconds: float
    held_out: float


@dataclass(frozen=True)
class Run:
    """A row trained at one rate; the seed draws the audio to calibrate and to train on."""

    teacher: str
    row: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        calibrated: signal-to-noise ratio of the last layer in dB by split, before training.
        trained: the same after the last update; empty for a run that diverged.
        loss: mean of the last updates.
        seconds: that the run took.
    """

    calibrated: dict[str, float]
    trained: dict[str, float]
    loss: float | None
    seconds: float


def measure(teacher: Teacher, setting: Setting, run: Run) -> Outcome:
    """Raises LowbitError for audio that the setting does not fit."""
    start = time.perf_counter()
    return _bench(teacher, setting).measure(ROWS[run.row], run.rate, run.seed, start)


@cache
def _bench(teacher: Teacher, setting: Setting) -> "Bench":
    return Bench(teacher, setting)


class Bench:
    """A teacher with its audio, and its own outputs on what is held out."""

    def __init__(self, teacher: Teacher, setting: Setting) -> None:
        loaded = open_model(teacher.checkpoint)
        self.setting, self.data = setting, teacher.data
        self.teacher: Hubert = loaded.model.requires_grad_(False)
        self.normalize, self.has_final = loaded.normalize, loaded.has_final_projection
        self.frame = receptive_field(self.teacher.conv_layers)
        self.held_out = {split: self._held_out(split) for split in (CHOICE, REPORT)}
        self.expected = {split: self._last_layer(self.teacher, split) for split in self.held_out}

    def _held_out(self, split: str) -> list[Utterances]:
        manifest = read_manifest(self.data / f"{split}.tsv")
        lines = chosen_lines(manifest, self.setting.held_out)
        return list(read_batches(manifest, lines, self.normalize))

    def _last_layer(self, model: Hubert, split: str) -> list[Tensor]:
        return valid_frames(model, self.held_out[split])[-1:]

    def _snr(self, student: Hubert) -> dict[str, float]:
        """In dB by split."""
        return {
            split: agreement(self._last_layer(student, split), expected).snr_db[-1]
            for split, expected in self.expected.items()
        }

    def measure(self, row: Row, rate: float, seed: int, start: float) -> Outcome:
        student = build_student(row, self.teacher, list(self._calibration(seed)))
        calibrated = self._snr(student)
        losses = self._train(student, rate, seed)
        trained = self._snr(student) if losses else {}
        if not all(map(math.isfinite, trained.values())):
            trained, losses = {}, []
        last = losses[-_LAST:]
        loss = sum(last) / len(last) if last else None
        return Outcome(calibrated, trained, loss, time.perf_counter() - start)

    def _recordings(self, seed: int, least: int) -> Recordings:
        """Those of at least ``least`` samples."""
        options = AudioOptions(normalize=self.normalize, min_size=least, seed=seed)
        return Recordings(read_manifest(self.data / f"{TRAIN}.tsv"), options)

    def _calibration(self, seed: int) -> Iterator[Tensor]:
        audio = CalibrationAudio(seed=seed)
        recordings = self._recordings(seed, SAMPLE_RATE // 4)
        return (batch.waveform for batch in calibration_batches(recordings, audio, self.frame))

    def _train(self, student: Hubert, rate: float, seed: int) -> list[float]:
        """The loss of every update; empty if it diverged."""
        parameters = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, rate, _BETAS, _EPSILON, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_rate)
        losses = []
        for waveform in self._batches(seed):
            loss = self._loss(student, waveform)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return []
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
            optimizer.step()
            schedule.step()
        return losses

    def _share_of_rate(self, update: int) -> float:
        """Up to the whole rate in a tenth of the updates, then down to nothing."""
        warm_up = max(1, round(_WARM_UP * self.setting.updates))
        if update < warm_up:
            return (update + 1) / warm_up
        return (self.setting.updates - update) / max(1, self.setting.updates - warm_up)

    def _loss(self, student: Hubert, waveform: Tensor) -> Tensor:
        # The frozen front-end is the same in both, and is run once.
        terms, _ = distill(self.teacher, student, waveform, shared_front_end=True)
        loss = terms.layers + terms.attention
        return loss + terms.final if self.has_final else loss

    def _batches(self, seed: int) -> Iterable[Tensor]:
        """[batch, samples] of every update."""
        samples = int(self.setting.seconds * SAMPLE_RATE)
        recordings, batch = self._recordings(seed, samples), self.setting.batch
        if len(recordings) < batch:
            raise LowbitError(
                f"{recordings.manifest.path}: {len(recordings)} recordings have "
                f"{self.setting.seconds:g} s, and a batch takes {batch}: lower --seconds or --batch"
            )
        random = np.random.default_rng(seed)
        for update in range(self.setting.updates):
            chosen = random.choice(len(recordings), batch, replace=False)
            read = [recordings.read(int(index)) for index in chosen]
            yield recordings.cut(read, [samples] * batch, epoch=update)[0]
