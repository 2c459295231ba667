"""fairseq tasks: HuBERT pre-training and label-free distillation, float or quantized."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, OmegaConf, open_dict

from fairseq_lowbit.data.calibration_audio import (
    CalibrationAudio,
    CalibrationConfig,
    calibration_batches,
)
from fairseq_lowbit.data.label_file import LabelFile, count_classes, read_dictionary
from fairseq_lowbit.data.manifest import Manifest, check_format, read_manifest
from fairseq_lowbit.data.recordings import LABEL_RATE, AudioConfig, AudioOptions
from fairseq_lowbit.distillation import refuse_other_frames, same_front_end
from fairseq_lowbit.errors import LowbitError, require_number
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import Hubert, LoadedModel, start_from
from fairseq_lowbit.models.extractor import receptive_field
from fairseq_lowbit.monitoring.health import every_layer, measure_health, refuse_collapsed
from fairseq_lowbit.nn import is_quantized
from fairseq_lowbit.plugin.dataset import SpeechDataset
from fairseq_lowbit.plugin.processes import gather, is_first, refuse_different, together
from fairseq_lowbit.plugin.quantized_training import HEALTH_INTERVAL
from fairseq_lowbit.plugin.run_files import read_unusable, write_unusable
from fairseq_lowbit.plugin.stages import Stage
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.runs.folder import UNUSABLE_FILE

logger = logging.getLogger(__name__)


@dataclass
class SpeechTaskConfig(AudioConfig, FairseqDataclass):
    data: Optional[str] = None  # folder of the manifests
    max_unusable: float = 0.05  # share of unusable files at which a run gives up
    health_interval: int = HEALTH_INTERVAL  # updates between health records; 0: none
    compile: bool = False  # the layers of the encoder, and of the teacher's, by torch.compile
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    seconds_per_update: Optional[float] = None  # what optimization.update_freq follows from
    stages: list[Stage] = field(default_factory=list)  # on the way; see config/schedule
    # Checkpoints, float or quantized. A student is of the teacher's shape.
    teacher: Optional[str] = None
    init_from: Optional[str] = None  # default: the teacher
    output_dir: str = II("checkpoint.save_dir")
    train_subset: str = II("dataset.train_subset")
    max_tokens: Optional[int] = II("dataset.max_tokens")
    seed: int = II("common.seed")


@dataclass
class LowbitPretrainingConfig(SpeechTaskConfig):
    labels: list[str] = field(default_factory=lambda: ["km"])  # extension of the label files
    label_dir: Optional[str] = None  # default: the data folder
    label_rate: float = LABEL_RATE  # labels per second


@dataclass
class LowbitDistillationConfig(SpeechTaskConfig):
    # A student with convolutions of its own, of the teacher's frame rate, that starts them anew.
    new_front_end: bool = False


class SpeechTask(FairseqTask):
    """What all tasks share: data, what is calibrated on, and the guards of a long run.

    Args:
        from_checkpoint: only to load a model back, where its data and its teacher may be gone.
    """

    cfg: SpeechTaskConfig
    label_classes = 0
    units: tuple[str, ...] = ()

    def __init__(self, cfg: SpeechTaskConfig, from_checkpoint: bool = False) -> None:
        super().__init__(cfg)
        if not cfg.data and not from_checkpoint:
            raise LowbitError("task.data is not set: name the folder with train.tsv and valid.tsv")
        if not from_checkpoint and not Path(cfg.data).is_dir():
            raise LowbitError(f"task.data: there is no folder {cfg.data}")
        if not from_checkpoint:
            require_number("task.health_interval", cfg.health_interval, 0)
            require_number("task.max_unusable", cfg.max_unusable, 0)
        self._calibration_audio = CalibrationAudio.from_config(cfg.calibration)
        self.model: Hubert | None = None
        self.unusable = read_unusable(Path(cfg.output_dir))

    @property
    def source_dictionary(self) -> None:
        return None

    target_dictionary = source_dictionary

    def max_positions(self) -> None:
        return None

    def filter_indices_by_size(self, indices, *args, **kwargs):
        return indices

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Hubert:
        if not from_checkpoint:
            with together():
                self.model = super().build_model(cfg)
                self._initialize(self.model)
            return self.model
        if cfg.get("precision"):
            # Before fairseq fills in the defaults of this version.
            precision = Precision.from_mapping(OmegaConf.to_container(cfg.precision))
            with open_dict(cfg):
                cfg.precision = precision.to_mapping()
        self.model = super().build_model(cfg, from_checkpoint)
        return self.model

    def _initialize(self, model: Hubert) -> None:
        """Weights to start from, before any checkpoint of this run is loaded."""
        if self.cfg.init_from:
            start_from(model, open_model(self.cfg.init_from))

    def _compare_audio(self, teacher: LoadedModel) -> None:
        """A warning, because a converted checkpoint may not tell what its audio was like."""
        if teacher.normalize != self.cfg.normalize and is_first():
            wanted = str(teacher.normalize).lower()
            logger.warning(
                f"task.normalize={str(self.cfg.normalize).lower()}, but as far as "
                f"{teacher.source} says, its audio was {'' if teacher.normalize else 'not '}"
                f"normalized: set task.normalize={wanted} unless you know better"
            )

    def load_dataset(self, split: str, **kwargs: Any) -> None:
        with together():
            dataset = self._read_dataset(split)
        # Where they lie may differ from machine to machine.
        refuse_different(f"files or labels of split {split}", dataset.digest)
        self.datasets[split] = dataset

    def calibration_batches(self) -> Iterator[torch.Tensor]:
        """Waveforms [batch, samples]: see :class:`QuantizedTraining`."""
        recordings = self.datasets[self.cfg.train_subset].recordings
        frame = receptive_field(self.model.conv_layers)
        batches = calibration_batches(recordings, self._calibration_audio, frame)
        return (batch.waveform for batch in batches)

    def forward_for_calibration(self, model: Hubert, batch: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the layers: see :class:`QuantizedTraining`."""
        return every_layer(model, batch)

    def _read_dataset(self, split: str) -> SpeechDataset:
        manifest = read_manifest(Path(self.cfg.data) / f"{split}.tsv")
        check_format(manifest, self.cfg.sample_rate)
        dataset = self.build_dataset(manifest)
        longest = int(dataset.sizes.max())
        if longest > (self.cfg.max_tokens or longest):
            raise LowbitError(
                f"dataset.max_tokens {self.cfg.max_tokens} is less than one utterance of {longest} "
                f"samples: raise it, or lower task.max_sample_size ({self.cfg.max_sample_size})"
            )
        return dataset

    def get_batch_iterator(self, *args: Any, **kwargs: Any) -> EpochBatchIterator:
        iterator = super().get_batch_iterator(*args, **kwargs)
        # Made anew for every epoch, so its workers must end with it instead of piling up.
        iterator.persistent_workers = False
        return iterator

    def build_dataset(self, manifest: Manifest) -> SpeechDataset:
        return SpeechDataset(manifest, self.audio_options())

    def audio_options(self) -> AudioOptions:
        frame = 400 if self.model is None else receptive_field(self.model.conv_layers)
        return AudioOptions.from_config(self.cfg, frame, self.cfg.seed)

    def train_step(self, sample, *args: Any, **kwargs: Any):
        self._account_for(sample["unusable"])
        return super().train_step(sample, *args, **kwargs)

    def begin_epoch(self, epoch: int, model: torch.nn.Module) -> None:
        """Each process meets the unusable files of its own batches; one accounts for all."""
        with together():
            for found in gather(self.unusable):
                self._account_for(list(found.items()))

    begin_valid_epoch = begin_epoch

    def valid_step(self, sample, model, criterion):
        self._account_for(sample["unusable"])
        return super().valid_step(sample, model, criterion)

    def _account_for(self, unusable: list[tuple[str, str]]) -> None:
        for name, reason in unusable:
            if name not in self.unusable:
                self.unusable[name] = reason
                if is_first():
                    logger.warning(f"skipped unusable file {reason} ({len(self.unusable)} so far)")
                write_unusable(Path(self.cfg.output_dir), self.unusable)
        total = len(self.datasets[self.cfg.train_subset])
        listed = Path(self.cfg.output_dir, UNUSABLE_FILE).resolve()
        if len(self.unusable) > max(1.0, self.cfg.max_unusable * total):
            raise LowbitError(
                f"{len(self.unusable)} of {total} training files are unusable, listed in {listed}; "
                "repair the data or raise task.max_unusable"
            )


@register_task("lowbit_pretraining", dataclass=LowbitPretrainingConfig)
class LowbitPretrainingTask(SpeechTask):
    """Masked prediction of frame labels (HuBERT), for teachers and for quantized students."""

    cfg: LowbitPretrainingConfig

    def __init__(self, cfg: LowbitPretrainingConfig, from_checkpoint: bool = False) -> None:
        super().__init__(cfg, from_checkpoint)
        if len(cfg.labels) != 1:
            raise LowbitError(f"task.labels {list(cfg.labels)}: give exactly one label set")
        # fairseq keeps the state in the checkpoint and hands it back before the model is built.
        self.state.add_factory("label_classes", self._count_classes)

    @property
    def label_classes(self) -> int:
        return self.state.label_classes

    def _dictionary(self) -> Path:
        return self._label_folder() / f"dict.{self.cfg.labels[0]}.txt"

    def _count_classes(self) -> int:
        return count_classes(read_dictionary(self._dictionary()))

    def _initialize(self, model: Hubert) -> None:
        if self.cfg.teacher:
            teacher = open_model(self.cfg.teacher)
            self._compare_audio(teacher)
            self._refuse_other_labels(teacher)
            start_from(model, teacher, role="teacher")
        super()._initialize(model)

    def _refuse_other_labels(self, teacher: LoadedModel) -> None:
        """Label embeddings learned anew would throw away what a teacher knows of its labels."""
        embeddings = getattr(teacher.model, "label_embs_concat", None)
        if embeddings is None:
            logger.warning(
                f"teacher {teacher.source} has no label embeddings: they start at random"
            )
        elif len(embeddings) != self.label_classes:
            raise LowbitError(
                f"{self._dictionary()} has {self.label_classes} label classes and the teacher "
                f"{teacher.source} {len(embeddings)}: name the labels it was trained on "
                "(task.label_dir, task.labels), or start from it by task.init_from to learn others"
            )

    @property
    def label_ratio(self) -> float:
        """Labels per frame."""
        return self.cfg.label_rate * self.model.samples_per_frame / self.cfg.sample_rate

    def build_dataset(self, manifest: Manifest) -> SpeechDataset:
        split, folder = manifest.path.stem, self._label_folder()
        labels = tuple(
            LabelFile(folder / f"{split}.{label}", folder / f"dict.{label}.txt")
            for label in self.cfg.labels
        )
        return SpeechDataset(manifest, self.audio_options(), labels)

    def _label_folder(self) -> Path:
        return Path(self.cfg.label_dir or self.cfg.data)


@register_task("lowbit_distillation", dataclass=LowbitDistillationConfig)
class LowbitDistillationTask(SpeechTask):
    """Distillation without labels from a frozen teacher of the student's shape, or of the shape of
    its encoder alone.

    ``teacher`` belongs to the task and not to any module, so it is never saved with the student.
    """

    cfg: LowbitDistillationConfig
    shares_front_end = False

    def __init__(self, cfg: LowbitDistillationConfig, from_checkpoint: bool = False) -> None:
        super().__init__(cfg, from_checkpoint)
        if from_checkpoint:
            return
        if not cfg.teacher:
            raise LowbitError("task.teacher is not set: name the teacher's checkpoint")
        with together():
            self.teacher: LoadedModel = open_model(cfg.teacher)
        self._compare_audio(self.teacher)
        self.teacher.model.requires_grad_(False)
        if not self.teacher.has_final_projection:
            logger.info(f"teacher {cfg.teacher} has no final_proj: the final term is off")

    def _initialize(self, model: Hubert) -> None:
        is_new = self.cfg.new_front_end
        if is_new:
            refuse_other_frames(model, self.teacher)
        start_from(model, self.teacher, role="teacher", front_end=not is_new)
        super()._initialize(model)
        if not is_new and not is_quantized(model.feature_extractor):
            model.feature_extractor.requires_grad_(False)

    def load_dataset(self, split: str, **kwargs: Any) -> None:
        super().load_dataset(split, **kwargs)
        if split == self.cfg.train_subset and self.model is not None:
            with together():
                self._prepare_teacher()

    def _prepare_teacher(self) -> None:
        """Once the trainer has moved the student to its device."""
        parameter = next(self.model.parameters())
        self.teacher.model.to(parameter.device, parameter.dtype)
        self.shares_front_end = same_front_end(self.teacher.model, self.model)
        batch = next(self.calibration_batches()).to(parameter.device, parameter.dtype)
        health = measure_health(self.teacher.model, batch)
        refuse_collapsed(health.centered_std, self.cfg.teacher)
