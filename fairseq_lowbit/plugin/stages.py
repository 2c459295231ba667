"""Schedules: a run in stages of falling precision, each started from the one before.

The last stage lives where a run without stages does, in ``checkpoint.save_dir``; each earlier one
in ``stage<number>_<precision>`` below it, with a mark once it is finished.
"""

import copy
import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING, DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from fairseq_lowbit.configurations import fold_rules, meta_model, read_model_config
from fairseq_lowbit.errors import LowbitError, describe_config_error
from fairseq_lowbit.precision import parse_precision
from fairseq_lowbit.runs.folder import (
    FINISHED_FILE,
    LAST_CHECKPOINT,
    stage_folders,
    stage_name,
)

ORIGINAL, PREVIOUS = "original", "previous"
OWN_DIR = "give this run a hydra.run.dir of its own"
# Settings that would give every stage the same start, or none a successor.
_CONTRADICTIONS = {
    "checkpoint.no_save": False,
    "checkpoint.no_last_checkpoints": False,
    "checkpoint.restore_file": LAST_CHECKPOINT,
    "checkpoint.finetune_from_model": None,
    "checkpoint.continue_once": None,
}


@dataclass
class Stage:
    """One entry of ``task.stages``."""

    precision: str = MISSING  # a name, or its bits alone: the model's method
    updates: Optional[int] = None  # default: optimization.max_update
    teacher: str = ORIGINAL  # original: task.teacher; previous: the stage before
    lr: Optional[float] = None  # default: optimization.lr


def read_stages(config: DictConfig) -> list[Stage]:
    """``task.stages`` of a run, with the full names of its precisions; empty without a schedule.

    Raises:
        LowbitError: stages that contradict themselves, each other or the run's other settings.
    """
    given = OmegaConf.select(config, "task.stages") or []
    if OmegaConf.is_config(given):
        given = OmegaConf.to_container(given, resolve=True)
    if not isinstance(given, list):
        raise LowbitError(f"task.stages {given!r}: give a list of stages, as in config/schedule")
    stages = [_read_stage(values, f"task.stages.{index}") for index, values in enumerate(given)]
    if stages:
        own = config.model.precision.name
        for stage in stages:
            stage.precision = _full_name(stage.precision, own)
        _check_stages(stages, config)
    return stages


def _read_stage(values: object, where: str) -> Stage:
    known = ", ".join(entry.name for entry in fields(Stage))
    if not isinstance(values, dict):
        raise LowbitError(f"{where} {values!r}: a stage has the keys {known}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Stage), values))
    except OmegaConfBaseException as error:
        reason = describe_config_error(error, where)
        raise LowbitError(f"{reason}; a stage has the keys {known}") from error


def _full_name(precision: str, own: str) -> str:
    method, separator, _ = own.partition("_")
    return f"{method}_{precision}" if separator and re.match(r"w\d", precision) else precision


def _check_stages(stages: list[Stage], config: DictConfig) -> None:
    for index, stage in enumerate(stages):
        where = f"task.stages.{index}"
        try:
            parse_precision(stage.precision)
        except LowbitError as error:
            raise LowbitError(f"{where}.precision: {error}") from error
        updates = updates_of(stage, config)
        if updates < 1:
            raise LowbitError(f"{where}.updates {updates}: a stage needs at least one update")
        if stage.lr is not None and stage.lr <= 0:
            raise LowbitError(f"{where}.lr {stage.lr}: give a positive learning rate")
        if stage.teacher not in (ORIGINAL, PREVIOUS):
            raise LowbitError(
                f"{where}.teacher {stage.teacher!r}; allowed are {ORIGINAL}, {PREVIOUS}"
            )
        if index == 0 and stage.teacher == PREVIOUS:
            raise LowbitError(f"{where}.teacher: no stage comes before the first; write {ORIGINAL}")
    own = config.model.precision.name
    if stages[-1].precision != own:
        raise LowbitError(
            f"the last of task.stages is {stages[-1].precision}, but this is a run of {own}: take "
            f"--config-name {stages[-1].precision} (or quant=), or end the stages with {own}"
        )
    for key, needed in _CONTRADICTIONS.items():
        value = OmegaConf.select(config, key, default=needed)
        if value != needed:
            raise LowbitError(f"{key}={value} contradicts task.stages, which start from each other")


def updates_of(stage: Stage, config: DictConfig) -> int:
    """How many updates a stage makes in a run of this configuration."""
    return config.optimization.max_update if stage.updates is None else stage.updates


class Schedule:
    """The stages of one run, and how far they have come in its ``checkpoint.save_dir``."""

    def __init__(self, stages: list[Stage], folder: Path) -> None:
        self.stages = stages
        self._folder = folder.absolute()

    @classmethod
    def from_config(cls, config: DictConfig) -> "Schedule":
        """Raises LowbitError, see :func:`read_stages`."""
        return cls(read_stages(config), Path(config.checkpoint.save_dir))

    def describe(self, index: int) -> str:
        return f"stage {index + 1} of {len(self.stages)} ({self.stages[index].precision})"

    def subfolder(self, index: int) -> str:
        """Where a stage lives below the run's folder."""
        if index == len(self.stages) - 1:
            return ""
        return stage_name(index + 1, self.stages[index].precision)

    def checkpoint(self, index: int) -> Path:
        """What a stage hands on to the next."""
        return self._folder / self.subfolder(index) / LAST_CHECKPOINT

    def first_unfinished(self) -> int:
        """The stage to train now; the last one is never finished, as it can be prolonged.

        Raises:
            LowbitError: the folder holds other stages than these, or a later one that has begun.
        """
        self.refuse_other_stages()
        last = len(self.stages) - 1
        current = next((i for i in range(last) if not self._mark(i).is_file()), last)
        later = [i for i in range(current + 1, last + 1) if self._has_begun(i)]
        if later:
            raise LowbitError(
                f"{self._folder / self.subfolder(current)} has no finished "
                f"{self.describe(current)}, but {self.describe(later[0])} has begun: restore that "
                f"folder, or {OWN_DIR}"
            )
        for index in range(current):
            self._refuse_other_training(index)
        return current

    def refuse_other_stages(self) -> None:
        """Raises LowbitError when the folder holds stages that are not in the list."""
        own = {self.subfolder(index) for index in range(len(self.stages))}
        others = {path.name for path in stage_folders(self._folder)} - own
        if others:
            raise LowbitError(
                f"{self._folder} holds a run with other stages ({', '.join(sorted(others))}): give "
                f"the schedule that it was begun with, or {OWN_DIR}"
            )

    def _mark(self, index: int) -> Path:
        """What a finished stage leaves, so that the next start of this run goes on behind it."""
        return self.checkpoint(index).with_name(FINISHED_FILE)

    def _has_begun(self, index: int) -> bool:
        return self.checkpoint(index).is_file() or self._mark(index).is_file()

    def _refuse_other_training(self, index: int) -> None:
        was: Any = None
        with suppress(ValueError):
            was = json.loads(self._mark(index).read_text())
        for key, value in asdict(self.stages[index]).items():
            before = was.get(key) if isinstance(was, dict) else None
            if before != value:
                raise LowbitError(
                    f"{self.describe(index)} was trained with {key} {before}, as "
                    f"{self._mark(index)} says, not with {value}: give it as it was, or {OWN_DIR}"
                )


def stage_configs(config: DictConfig, schedule: Schedule) -> list[DictConfig]:
    """The configurations of all stages, each that of a run of its own.

    Args:
        config: of the whole run, unresolved: what refers to a changed value follows.

    Raises:
        LowbitError: a stage whose precision does not go with the run's rules.
    """
    configs = [_stage_config(config, schedule, index) for index in range(len(schedule.stages))]
    for index, own in enumerate(configs):
        try:
            meta_model(read_model_config(own.model))
        except LowbitError as error:
            raise LowbitError(f"{schedule.describe(index)}: {error}") from error
    return configs


def _stage_config(config: DictConfig, schedule: Schedule, index: int) -> DictConfig:
    stage = schedule.stages[index]
    own = copy.deepcopy(config)
    fold_rules(own.model)
    with read_write(own), open_dict(own):
        own.model.precision.name = stage.precision
        own.optimization.max_update = updates_of(stage, config)
        if stage.lr is not None:
            own.optimization.lr = [stage.lr]
        if index:
            own.task.init_from = str(schedule.checkpoint(index - 1))
        if stage.teacher == PREVIOUS:
            own.task.teacher = own.task.init_from
        for section, key in (("checkpoint", "save_dir"), ("common", "tensorboard_logdir")):
            if own[section][key]:
                own[section][key] = str(Path(own[section][key]) / schedule.subfolder(index))
    return own


def stops_early(config: DictConfig) -> bool:
    """Whether fairseq may end training before optimization.max_update, as the user asked."""
    optimization = config.optimization
    return (
        config.checkpoint.patience > 0
        or optimization.max_epoch > 0
        or optimization.stop_time_hours > 0
        or optimization.stop_min_lr >= 0
    )
