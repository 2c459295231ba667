"""Training runs on disk: where they are, what they were asked for and how far they came."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.models import is_calibrated_only, read_checkpoint, updates_of

CONFIG_FILE = Path(".hydra", "config.yaml")
HYDRA_FILE = Path(".hydra", "hydra.yaml")
OVERRIDES_FILE = Path(".hydra", "overrides.yaml")
FAILURE_FILE = "failure.txt"
FINISHED_FILE = "finished.json"
PLAN_FILE = "precision_plan.json"
HEALTH_FILE = "health.jsonl"
PROGRESS_FILE = "progress.jsonl"
LAST_CHECKPOINT = "checkpoint_last.pt"
LOSSES = {"lowbit_kd": "distillation", "lowbit_hubert": "hubert"}
# Of a checkpoint that was quantized without training, in place of a loss.
CALIBRATION = "calibration"
_FOLDER_LENGTH = 100
_NOT_RUNS = {"tensorboard", ".hydra", ".submitit"}
# Ten times as fast as the loader in Python, where libyaml was at hand when PyYAML was built.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """A run, or a stage of one, as its files tell.

    Attributes:
        folder: of a checkpoint outside of any run, the checkpoint itself.
        precision: name of the precision; ``rules`` refine it.
        loss: ``distillation``, ``hubert``, the name of another criterion, or ``calibration``.
        data: None when the configuration names none.
        teacher: or else the checkpoint it started from; None for neither.
        planned: how many updates it was to make.
        saves: whether it keeps checkpoints at all (``checkpoint.no_save``).
        updates: of ``checkpoint``; None without a readable one.
        best_loss: best value of the validation metric; None before the first validation.
        storage_mb: planned size of the stored model; None before the model was built.
        overrides: what its command line added to the configuration, ``key=value`` each.
        failure: why the job failed, or why its checkpoint cannot be read; None for neither.
        is_finished: training came to its end at ``checkpoint``, by its last update or before.
    """

    folder: Path
    checkpoint: Path
    precision: str
    rules: int
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


def folder_name(overrides: Iterable[str], leave_out: Iterable[str] = ()) -> str:
    """A folder for one job of a sweep: its overrides, without those of the keys ``leave_out``.

    Equal overrides give equal names and different ones different names, so a job finds its folder
    again and no other's. Characters that a shell or Hydra would read otherwise are replaced; a hash
    tells apart what that, or the cut of a long name, made alike.

    >>> folder_name(["task.data=/data", "quant=bitla_w1a1", "common.seed=2"], ["task.data"])
    'common.seed-2+quant-bitla_w1a1'
    """
    left_out = set(leave_out)
    pairs = [override.lstrip("+").partition("=") for override in overrides]
    told = sorted(f"{key}-{value}" for key, _, value in pairs if key not in left_out)
    exact = "+".join(told)
    name = "+".join(re.sub(r"-*[^\w.-]+-*", "-", text).strip("-") for text in told)
    if name != exact or len(name) > _FOLDER_LENGTH:
        digest = hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]
        name = f"{name[:_FOLDER_LENGTH]}-{digest}"
    return name or "job"


def write_failure(folder: Path, message: str) -> None:
    """Leaves word of why the job in ``folder`` failed."""
    with atomic_write(folder / FAILURE_FILE) as file:
        file.write(f"{message}\n")


def forget_failure(folder: Path) -> None:
    """For a job that starts, perhaps anew."""
    (folder / FAILURE_FILE).unlink(missing_ok=True)


def write_finished(
    folder: Path, made_updates: int, max_update: int, stage: Mapping[str, Any] | None = None
) -> None:
    """Leaves word that training has come to its end, as it also does by ``checkpoint.patience`` and
    the like.

    Args:
        folder: of its checkpoints.
        made_updates: behind the last of them.
        max_update: how many it was to make at most.
        stage: of a schedule, its settings.
    """
    told = {**(stage or {}), "made_updates": made_updates, "max_update": max_update}
    with atomic_write(folder / FINISHED_FILE) as file:
        json.dump(told, file)


def has_finished(folder: Path, updates: int | None, planned: int) -> bool:
    """Whether training has come to its end at this checkpoint; a longer one has yet to."""
    if updates is not None and updates >= planned > 0:
        return True
    with suppress(ValueError, KeyError, TypeError):
        told = json.loads(_read(folder / FINISHED_FILE))
        return (told["made_updates"], told["max_update"]) == (updates, planned)
    return False


def find_runs(root: Path) -> list[Path]:
    """Folders of runs, and of their stages, at and below ``root``, in the order of their names."""
    return [folder for folder in _folders(root) if is_run(folder) or _is_stage(folder)]


def _folders(root: Path) -> Iterator[Path]:
    for name, children, _ in os.walk(root):
        children[:] = sorted(set(children) - _NOT_RUNS)
        yield Path(name)


def is_run(folder: Path) -> bool:
    """Whether training was started in this folder."""
    return (folder / CONFIG_FILE).is_file()


def _is_stage(folder: Path) -> bool:
    return folder.name.startswith("stage") and (folder / LAST_CHECKPOINT).is_file()


def read_run(folder: Path) -> Run:
    """A run, or a stage of one, as its configuration and the header of its last checkpoint tell.

    Raises:
        LowbitError: the configuration is unreadable, or not that of a training run.
    """
    if is_run(folder):
        return _read_run(folder)
    state = read_checkpoint(folder / LAST_CHECKPOINT, mmap=True)
    settings, updates = _settings(OmegaConf.create(state["cfg"]), folder), updates_of(state)
    return Run(
        folder=folder,
        checkpoint=folder / LAST_CHECKPOINT,
        updates=updates,
        best_loss=_best_loss(state),
        storage_mb=_stored_mb(folder),
        is_finished=has_finished(folder, updates, settings["planned"]),
        **settings,
    )


def read_single(path: Path) -> Run:
    """A checkpoint outside of any run, as far as its header tells.

    Raises:
        LowbitError: it is no checkpoint.
    """
    state = read_checkpoint(path, mmap=True)
    config = OmegaConf.create(state["cfg"])

    def select(key: str) -> Any:
        return OmegaConf.select(config, key, throw_on_missing=False)

    criterion = str(select("criterion._name"))
    data, teacher = select("task.data"), select("task.teacher") or select("task.init_from")
    return Run(
        folder=path,
        checkpoint=path,
        precision=str(select("model.precision.name") or "float"),
        rules=len(select("model.precision.rules") or ()),
        loss=CALIBRATION if is_calibrated_only(state) else LOSSES.get(criterion, criterion),
        data=Path(data) if data else None,
        teacher=Path(teacher) if teacher else None,
        planned=updates_of(state),
        saves=True,
        updates=updates_of(state),
        best_loss=_best_loss(state),
        storage_mb=None,
        is_finished=True,  # it was taken as it is
    )


def _read_run(folder: Path) -> Run:
    path = folder / CONFIG_FILE
    try:
        config = OmegaConf.create(yaml.load(path.read_text(), _YAML_LOADER))
    except (OSError, yaml.YAMLError) as error:
        raise LowbitError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    settings = _settings(config, path)
    settings["planned"] = _updates_of_last_stage(config) or settings["planned"]
    checkpoints = folder / OmegaConf.select(config, "checkpoint.save_dir", default="checkpoints")
    updates, best_loss, problem = _progress(checkpoints / LAST_CHECKPOINT)
    return Run(
        folder=folder,
        overrides=tuple(_overrides(folder / OVERRIDES_FILE)),
        checkpoint=checkpoints / LAST_CHECKPOINT,
        updates=updates,
        best_loss=best_loss,
        storage_mb=_stored_mb(checkpoints),
        failure=_read(folder / FAILURE_FILE).strip() or problem,
        is_finished=has_finished(checkpoints, updates, settings["planned"]),
        **settings,
    )


def _updates_of_last_stage(config: DictConfig) -> int | None:
    """A run is the last stage of its schedule; None without one, or without an own number."""
    stages = OmegaConf.select(config, "task.stages")
    last = stages[-1] if OmegaConf.is_list(stages) and len(stages) else None
    return last.get("updates") if OmegaConf.is_dict(last) else None


def _settings(config: DictConfig, path: Path) -> dict[str, Any]:
    """The fields of :class:`Run` that the configuration in ``path`` decides."""

    def select(key: str) -> Any:
        return OmegaConf.select(config, key, throw_on_missing=True)

    try:
        teacher = select("task.teacher") or select("task.init_from")
        data, criterion = select("task.data"), str(select("criterion._name"))
        return {
            "precision": str(select("model.precision.name")),
            "rules": len(select("model.precision.rules") or ()),
            "loss": LOSSES.get(criterion, criterion),
            "data": Path(data) if data else None,
            "teacher": Path(teacher) if teacher else None,
            "planned": int(select("optimization.max_update")),
            "saves": not select("checkpoint.no_save"),
        }
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise LowbitError(f"{path} is not the configuration of a training run: {reason}") from error


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


def _stored_mb(folder: Path) -> float | None:
    with suppress(ValueError, KeyError):
        return json.loads(_read(folder / PLAN_FILE))["bytes"] / 1e6
    return None


def _overrides(path: Path) -> list[str]:
    with suppress(yaml.YAMLError):
        return [str(override) for override in yaml.safe_load(_read(path)) or ()]
    return []


def read_health(folder: Path) -> list[dict[str, Any]]:
    """The health records beside checkpoints."""
    return _read_records(folder / HEALTH_FILE)


def read_progress(folder: Path) -> list[dict[str, Any]]:
    """What was logged of the updates behind checkpoints: a record for every logged interval of
    training and for every validation, in the order of the updates.

    Each has ``update``, ``epoch``, ``phase`` (``train`` or ``valid``), ``split``, ``wall_seconds``
    since the run was started last, and ``terms``, the means of what the criterion logs; those of
    training also ``lr``, ``grad_norm`` and ``updates_per_second``.
    """
    return _read_records(folder / PROGRESS_FILE)


def _read_records(path: Path) -> list[dict[str, Any]]:
    """One for each line, without the half of a line that a kill may leave."""
    records = []
    for line in _read(path).splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _read(path: Path) -> str:
    """Empty for a file that is not there."""
    with suppress(OSError):
        return path.read_text()
    return ""
