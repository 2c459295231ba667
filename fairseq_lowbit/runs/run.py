"""Reading a run: its settings and its progress."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import is_calibrated_only, read_checkpoint, updates_of
from fairseq_lowbit.interop.huggingface_directory import is_model_directory
from fairseq_lowbit.precision import parse_precision
from fairseq_lowbit.precision.grammar import LEARNED_SCALE
from fairseq_lowbit.precision.rules import BEFORE_THE_KEY
from fairseq_lowbit.runs.folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    LAST_CHECKPOINT,
    OVERRIDES_FILE,
    has_finished,
    is_run,
    read_failure,
    read_storage_mb,
    read_text,
)

LOSSES = {"lowbit_kd": "distillation", "lowbit_hubert": "hubert", "lowbit_ctc": "ctc"}
# Stands for the loss of a checkpoint that was quantized without training.
CALIBRATION = "calibration"
# PyYAML's loader in C is ten times as fast; not every build has it.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a schedule as it was asked for.

    Attributes:
        precision: its full name, or its bits alone, as in ``task.stages``.
        teacher: ``original``, or ``previous``: the stage before.
    """

    precision: str
    teacher: str
    updates: int


@dataclass(frozen=True)
class Run:
    """A run, a stage of one, or a checkpoint outside of any.

    Attributes:
        folder: of a checkpoint outside of any run, the checkpoint itself.
        precision: name of the precision; ``rules`` refine it.
        form: of its learned scales, see :class:`fairseq_lowbit.precision.Precision`; None where it
            has none.
        loss: ``distillation``, ``hubert``, the name of another criterion, or ``calibration``.
        data: None when the configuration names none.
        teacher: or else the checkpoint it started from; None for neither. Of a stage, that of its
            run, also where the stage learned from the one before: so all are measured alike.
        planned: number of updates that were asked for.
        saves: whether it keeps checkpoints at all (``checkpoint.no_save``).
        updates: of ``checkpoint``; None without a readable one.
        best_loss: best value of the validation metric; None before the first validation.
        storage_mb: planned size of the stored model; None before the model was built.
        overrides: what its command line added to the configuration, ``key=value`` each.
        failure: why the job failed, or why its checkpoint cannot be read; None for neither.
        is_finished: training ended with ``checkpoint``, at its last planned update or before.
        seed: of training; None when the configuration has none.
        stages: of a run in stages, or the run that a stage belongs to, all; otherwise empty.
    """

    folder: Path
    checkpoint: Path
    precision: str
    rules: int
    form: str | None
    loss: str
    data: Path | None
    teacher: Path | None
    planned: int
    saves: bool
    updates: int | None
    best_loss: float | None
    storage_mb: float | None
    overrides: tuple[str, ...] = ()
    failure: str | None = None
    is_finished: bool = False
    seed: int | None = None
    stages: tuple[PlannedStage, ...] = ()


def read_run(path: Path) -> Run:
    """Reads a run by its configuration and the header of its last checkpoint.

    Args:
        path: folder of a run or of a stage, or a checkpoint outside of any run: a file, or a folder
            in the form of Hugging Face.

    Raises:
        LowbitError: the configuration or a lone checkpoint is unreadable, or not of a training run.
    """
    if path.is_file() or is_model_directory(path):
        return _read_lone_checkpoint(path)
    return _read_started(path) if is_run(path) else _read_stage(path)


def _read_started(folder: Path) -> Run:
    path = folder / CONFIG_FILE
    config = _read_config(path)
    settings = _settings(config, path)
    if settings["stages"]:
        settings["planned"] = settings["stages"][-1].updates  # the last is the run itself
    checkpoints = folder / OmegaConf.select(config, "checkpoint.save_dir", default=CHECKPOINTS)
    updates, best_loss, problem = _progress(checkpoints / LAST_CHECKPOINT)
    return Run(
        folder=folder,
        checkpoint=checkpoints / LAST_CHECKPOINT,
        updates=updates,
        best_loss=best_loss,
        storage_mb=read_storage_mb(checkpoints),
        overrides=tuple(_overrides(folder / OVERRIDES_FILE)),
        failure=read_failure(folder) or problem,
        is_finished=has_finished(checkpoints, updates, settings["planned"]),
        **settings,
    )


def _read_config(path: Path) -> DictConfig:
    try:
        return OmegaConf.create(yaml.load(path.read_text(), _YAML_LOADER))
    except (OSError, yaml.YAMLError) as error:
        raise LowbitError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _read_stage(folder: Path) -> Run:
    checkpoint = folder / LAST_CHECKPOINT
    state = read_checkpoint(checkpoint, mmap=True)
    settings, updates = _settings(OmegaConf.create(state["cfg"]), folder), updates_of(state)
    whole = next((parent / CONFIG_FILE for parent in folder.parents if is_run(parent)), None)
    if whole is not None:
        of_run = _settings(_read_config(whole), whole)
        settings |= {key: of_run[key] for key in ("teacher", "stages")}
    return Run(
        folder=folder,
        checkpoint=checkpoint,
        updates=updates,
        best_loss=_best_loss(state),
        storage_mb=read_storage_mb(folder),
        is_finished=has_finished(folder, updates, settings["planned"]),
        **settings,
    )


def _read_lone_checkpoint(path: Path) -> Run:
    """Any setting may be missing, as in checkpoints of other code; Hugging Face's folders have
    none of a training."""
    state = {"cfg": {}} if path.is_dir() else read_checkpoint(path, mmap=True)
    config = OmegaConf.create(state["cfg"])
    settings = _named_settings(partial(OmegaConf.select, config, throw_on_missing=False))
    if is_calibrated_only(state):
        settings["loss"] = CALIBRATION
    return Run(
        folder=path,
        checkpoint=path,
        planned=updates_of(state),
        saves=True,
        updates=updates_of(state),
        best_loss=_best_loss(state),
        storage_mb=None,
        is_finished=True,
        **settings,
    )


def _settings(config: DictConfig, path: Path) -> dict[str, Any]:
    """The fields of :class:`Run` that the configuration in ``path`` decides."""
    select = partial(OmegaConf.select, config, throw_on_missing=True)
    try:
        return {
            **_named_settings(select),
            "planned": int(select("optimization.max_update")),
            "saves": not select("checkpoint.no_save"),
            "stages": _stages(config),
        }
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise LowbitError(f"{path} is not the configuration of a training run: {reason}") from error


def _named_settings(select: Callable[[str], Any]) -> dict[str, Any]:
    teacher = select("task.teacher") or select("task.init_from")
    data, criterion = select("task.data"), str(select("criterion._name"))
    # Those that rules=[...] chose, by file.
    files = select("model.precision.rule_files") or {}
    precision = str(select("model.precision.name") or "float")
    rules = len(select("model.precision.rules") or ()) + sum(map(len, files.values()))
    return {
        "precision": precision,
        "rules": rules,
        "form": form_of(precision, rules, select("model.precision.form")),
        "loss": LOSSES.get(criterion, criterion),
        "data": Path(data) if data else None,
        "teacher": Path(teacher) if teacher else None,
        "seed": select("common.seed"),
    }


def form_of(precision: str, rules: int, stored: str | None) -> str | None:
    """The form of a precision's learned scales: what is stored, or what all had before it was. None
    where the name has none and no rule could give any."""
    with suppress(LowbitError):  # of a name that no version knows
        if rules or (precision != "float" and parse_precision(precision).method in LEARNED_SCALE):
            return stored or BEFORE_THE_KEY["form"]
    return None


def _stages(config: DictConfig) -> tuple[PlannedStage, ...]:
    """The schedule in the configuration of a run; empty for one that training refused."""
    stages = OmegaConf.select(config, "task.stages") or ()
    if not all(map(OmegaConf.is_dict, stages)):
        return ()
    usual = config.optimization.max_update
    return tuple(
        PlannedStage(
            stage.get("precision"), stage.get("teacher", "original"), stage.get("updates") or usual
        )
        for stage in stages
    )


def _progress(path: Path) -> tuple[int | None, float | None, str | None]:
    """Updates and best validation loss of a checkpoint, and why it cannot be read."""
    if not path.is_file():
        return None, None, None
    try:
        state = read_checkpoint(path, mmap=True)
    except LowbitError as error:
        return None, None, str(error)
    return updates_of(state), _best_loss(state), None


def _best_loss(state: dict[str, Any]) -> float | None:
    return (state.get("extra_state") or {}).get("best")


def _overrides(path: Path) -> list[str]:
    with suppress(yaml.YAMLError):
        return [str(override) for override in yaml.safe_load(read_text(path)) or ()]
    return []
