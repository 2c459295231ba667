"""fairseq task: recognizing speech, by fine-tuning an encoder with CTC."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from fairseq.tasks import register_task

from fairseq_lowbit.data.manifest import Manifest, read_manifest
from fairseq_lowbit.data.recordings import AudioOptions
from fairseq_lowbit.data.transcripts import read_transcripts, transcript_path
from fairseq_lowbit.data.units import LETTERS, Units, encode_lines, fewest_frames, read_units
from fairseq_lowbit.errors import LowbitError, require_number
from fairseq_lowbit.interop import open_model, read_source
from fairseq_lowbit.models import Hubert, LoadedModel, continue_from
from fairseq_lowbit.plugin.tasks import SpeechTask, SpeechTaskConfig
from fairseq_lowbit.plugin.transcribed import TranscribedDataset
from fairseq_lowbit.runs.folder import LAST_CHECKPOINT

logger = logging.getLogger(__name__)

FROZEN = ("none", "front_end", "encoder")


@dataclass
class LowbitAsrConfig(SpeechTaskConfig):
    units: str = LETTERS  # or the path of a sentencepiece model
    freeze: str = "front_end"  # what is not trained: none, front_end, encoder (all but the head)
    freeze_updates: int = 0  # updates in which the head is trained alone, before the rest


@register_task("lowbit_asr", dataclass=LowbitAsrConfig)
class LowbitAsrTask(SpeechTask):
    """Units of whole utterances by CTC, on an encoder of any precision.

    fairseq keeps the vocabulary in the checkpoint, as the state of the task.
    """

    cfg: LowbitAsrConfig

    def __init__(self, cfg: LowbitAsrConfig, from_checkpoint: bool = False) -> None:
        super().__init__(cfg, from_checkpoint)
        self.state.add_factory("units", lambda: list(self.encoding.vocabulary))
        self._left_out: list[tuple[str, str]] = []
        if from_checkpoint:
            return
        if cfg.freeze not in FROZEN:
            raise LowbitError(f"task.freeze {cfg.freeze!r}; allowed are {', '.join(FROZEN)}")
        require_number("task.freeze_updates", cfg.freeze_updates, 0)
        if not cfg.pad_audio or cfg.random_crop:
            raise LowbitError(
                "task.pad_audio=false or task.random_crop=true would cut what is said out of an "
                "utterance: recognition takes true and false"
            )
        if find_spec("jiwer") is None:
            raise LowbitError(
                "validation counts word errors with the package jiwer: pip install "
                "'fairseq-lowbit[asr]'"
            )

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(self.state.units)

    @cached_property
    def encoding(self) -> Units:
        """Made from the training transcripts, or the file that ``task.units`` names."""
        manifest = read_manifest(Path(self.cfg.data) / f"{self.cfg.train_subset}.tsv")
        return read_units(self.cfg.units, read_transcripts(manifest))

    # The model

    def _initialize(self, model: Hubert) -> None:
        own = Path(self.cfg.output_dir, LAST_CHECKPOINT)
        if own.is_file():
            self._refuse_other_units(own)
        if self.cfg.init_from:
            source = open_model(self.cfg.init_from)
            self._compare_audio(source)
            self._start(model, source)
        _freeze(model, self.cfg.freeze)

    def _refuse_other_units(self, checkpoint: Path) -> None:
        if read_source(checkpoint, with_weights=False).units != self.units:
            raise LowbitError(
                f"{checkpoint} was trained for another vocabulary than the training transcripts "
                "and task.units have now: give them as they were, or this run a hydra.run.dir of "
                "its own"
            )

    def _start(self, model: Hubert, source: LoadedModel) -> None:
        own_head = {key: value.clone() for key, value in model.ctc_proj.state_dict().items()}
        continue_from(model, source)
        if source.units and source.units != self.units:
            logger.warning(
                f"{source.source} writes other units: the CTC head is learned anew, on its encoder"
            )
            model.ctc_proj.load_state_dict(own_head)

    @cached_property
    def _thawing(self) -> list[torch.nn.Parameter]:
        """What waits for ``task.freeze_updates``."""
        encoder = _encoder_parameters(self.model)
        return [parameter for parameter in encoder if parameter.requires_grad]

    def train_step(
        self, sample, model, criterion, optimizer, update_num, *args: Any, **kwargs: Any
    ):
        for parameter in self._thawing:
            parameter.requires_grad_(update_num >= self.cfg.freeze_updates)
        return super().train_step(sample, model, criterion, optimizer, update_num, *args, **kwargs)

    # The data

    def audio_options(self) -> AudioOptions:
        """Whole utterances: those beyond ``task.max_sample_size`` are left out."""
        options = super().audio_options()
        limits = [limit for limit in (options.max_keep, options.max_size) if limit is not None]
        return replace(options, max_keep=min(limits, default=None), max_size=None)

    def build_dataset(self, manifest: Manifest) -> TranscribedDataset:
        texts, path = read_transcripts(manifest), transcript_path(manifest)
        units = encode_lines(self.encoding, texts, path)
        frames = self.model.frame_lengths(torch.from_numpy(manifest.sizes)).tolist()
        fits = [fewest_frames(ids) <= most for ids, most in zip(units, frames, strict=True)]
        if not any(fits):
            raise LowbitError(
                f"{path}: every transcript has more units than its recording has frames (one in "
                f"{self.model.samples_per_frame} samples): choose larger units, with task.units"
            )
        kept = [line for line, fit in enumerate(fits) if fit]
        self._left_out += [
            (name, f"{manifest.root / name}: {len(ids)} units in {most} frames")
            for name, ids, most, fit in zip(manifest.names, units, frames, fits, strict=True)
            if not fit
        ]
        names = [manifest.names[line] for line in kept]
        return TranscribedDataset(
            replace(manifest, names=names, sizes=manifest.sizes[kept]),
            self.audio_options(),
            [units[line] for line in kept],
        )

    def load_dataset(self, split: str, **kwargs: Any) -> None:
        super().load_dataset(split, **kwargs)
        if split == self.cfg.train_subset:
            self._account_for(self._left_out)


def _encoder_parameters(model: Hubert) -> Iterator[torch.nn.Parameter]:
    """All but those of the CTC head."""
    head = set(model.ctc_proj.parameters())
    return (parameter for parameter in model.parameters() if parameter not in head)


def _freeze(model: Hubert, what: str) -> None:
    """Takes the gradient from what is not trained, and with it a place in the optimizer."""
    model.final_proj.requires_grad_(False)  # no part of the loss
    if not model.shape.mask_prob:
        model.mask_emb.requires_grad_(False)
    if what == "front_end":
        model.feature_extractor.requires_grad_(False)
    if what == "encoder":
        for parameter in _encoder_parameters(model):
            parameter.requires_grad_(False)
