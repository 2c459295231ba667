"""The layout of a run folder: names of files, where they lie, and the marks that runs leave.

A run is a folder that Hydra made. Its checkpoints lie in ``checkpoint.save_dir``, with what
training records of the model beside them. The earlier stages of a schedule have a folder each
below those checkpoints, with checkpoints and records of their own.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.interop.huggingface_directory import is_model_directory

# In the folder of the run.
CONFIG_FILE = Path(".hydra", "config.yaml")
HYDRA_FILE = Path(".hydra", "hydra.yaml")
OVERRIDES_FILE = Path(".hydra", "overrides.yaml")
FAILURE_FILE = "failure.txt"
CHECKPOINTS = "checkpoints"  # the default of checkpoint.save_dir
# Beside the checkpoints.
LAST_CHECKPOINT = "checkpoint_last.pt"
FINISHED_FILE = "finished.json"
PLAN_FILE = "precision_plan.json"
HEALTH_FILE = "health.jsonl"
PROGRESS_FILE = "progress.jsonl"
UNUSABLE_FILE = "skipped_files.tsv"
# Of a run, a stage or a checkpoint.
QUALITY_FILE = "evaluation.json"
_STAGE = re.compile(r"stage\d+_")
_NOT_RUNS = {"tensorboard", ".hydra", ".submitit"}
_JOB_LENGTH = 100


def stage_name(number: int, precision: str) -> str:
    """The folder of an earlier stage, counted from 1, among the checkpoints of its run."""
    return f"stage{number}_{precision}"


def stage_folders(checkpoints: Path) -> list[Path]:
    """The folders of earlier stages among the checkpoints of a run."""
    return sorted(path for path in checkpoints.glob("stage*/") if _STAGE.match(path.name))


def is_run(folder: Path) -> bool:
    """Whether training was started in this folder."""
    return (folder / CONFIG_FILE).is_file()


def find_runs(root: Path) -> list[Path]:
    """Folders of runs, and of their stages, at and below ``root``, in the order of their names."""
    return [folder for folder in _folders(root) if is_run(folder) or _is_stage(folder)]


def _folders(root: Path) -> Iterator[Path]:
    for name, children, _ in os.walk(root):
        children[:] = sorted(set(children) - _NOT_RUNS)
        yield Path(name)


def _is_stage(folder: Path) -> bool:
    return bool(_STAGE.match(folder.name)) and (folder / LAST_CHECKPOINT).is_file()


def display_name(path: Path) -> str:
    """A path as a table shows it: a stage stands right below its run.

    >>> display_name(Path("exp/run/checkpoints/stage1_bitla_w8a8"))
    'exp/run/stage1_bitla_w8a8'
    """
    return "/".join(part for part in path.parts if part != CHECKPOINTS)


def checkpoint_name(checkpoint: Path) -> str:
    """A checkpoint by the last two parts of its run's path, or of its own outside of any run.

    >>> checkpoint_name(Path("exp/run/checkpoints/checkpoint_last.pt"))
    'exp/run'
    """
    is_in_run = checkpoint.parent.name == CHECKPOINTS
    return "/".join((checkpoint.parent.parent if is_in_run else checkpoint).parts[-2:])


def quality_file(place: Path) -> Path:
    """Where measured quality is kept: in a run's folder, or next to a checkpoint outside of any."""
    is_run_folder = place.is_dir() and not is_model_directory(place)
    return place / QUALITY_FILE if is_run_folder else place.with_suffix(f".{QUALITY_FILE}")


def job_folder(overrides: Iterable[str], leave_out: Iterable[str] = (), alone: str = "job") -> str:
    """A folder for one job of a sweep: its overrides, without those of the keys ``leave_out``.
    ``alone`` is the folder of a job without any.

    Equal overrides give equal names and different ones different names, so a job finds its folder
    again and no other's. Characters with a meaning in a shell or in Hydra are replaced, and long
    names are cut; a hash keeps different names different.

    >>> job_folder(["task.data=/data", "quant=bitla_w1a1", "common.seed=2"], ["task.data"])
    'common.seed-2+quant-bitla_w1a1'
    """
    left_out = set(leave_out)
    pairs = [override.lstrip("+").partition("=") for override in overrides]
    kept = sorted(f"{key}-{value}" for key, _, value in pairs if key not in left_out)
    exact = "+".join(kept)
    name = "+".join(re.sub(r"-*[^\w.-]+-*", "-", text).strip("-") for text in kept)
    if name != exact or len(name) > _JOB_LENGTH:
        digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()[:8]
        name = f"{name[:_JOB_LENGTH]}-{digest}"
    return name or alone


def write_failure(folder: Path, message: str) -> None:
    """Records why the job in ``folder`` failed."""
    with atomic_write(folder / FAILURE_FILE) as file:
        file.write(f"{message}\n")


def read_failure(folder: Path) -> str | None:
    """Why the last job in ``folder`` failed; None if it did not."""
    return read_text(folder / FAILURE_FILE).strip() or None


def forget_failure(folder: Path) -> None:
    """Removes the record of a failure when a job starts."""
    (folder / FAILURE_FILE).unlink(missing_ok=True)


def write_finished(
    checkpoints: Path, made_updates: int, max_update: int, stage: Mapping[str, Any] | None = None
) -> None:
    """Marks a training as finished, which ``checkpoint.patience`` and the like may cause before the
    last update.

    Args:
        made_updates: of the last checkpoint.
        max_update: ``optimization.max_update`` of the run.
        stage: the settings of a stage.
    """
    mark = {**(stage or {}), "made_updates": made_updates, "max_update": max_update}
    with atomic_write(checkpoints / FINISHED_FILE) as file:
        json.dump(mark, file)


def has_finished(checkpoints: Path, updates: int | None, planned: int) -> bool:
    """Whether training is finished with ``updates`` made of ``planned`` ones."""
    if updates is not None and updates >= planned > 0:
        return True
    with suppress(ValueError, KeyError, TypeError):
        mark = json.loads(read_text(checkpoints / FINISHED_FILE))
        return (mark["made_updates"], mark["max_update"]) == (updates, planned)
    return False


def read_storage_mb(checkpoints: Path) -> float | None:
    """Planned size of the stored model in MB; None before the model was built."""
    with suppress(ValueError, KeyError):
        return json.loads(read_text(checkpoints / PLAN_FILE))["bytes"] / 1e6
    return None


def read_health(checkpoints: Path) -> list[dict[str, Any]]:
    """The health records beside checkpoints."""
    return _read_records(checkpoints / HEALTH_FILE)


def read_progress(checkpoints: Path) -> list[dict[str, Any]]:
    """What was logged of the updates behind checkpoints: a record for every logged interval of
    training and for every validation, in the order of the updates.

    Each has ``update``, ``epoch``, ``phase`` (``train`` or ``valid``), ``split``, ``wall_seconds``
    since the run was started last, ``peak_memory_bytes`` of the first process or its GPU, and
    ``terms``, the means of what the criterion logs; those of training also ``lr``, ``grad_norm``
    and ``updates_per_second``.
    """
    return _read_records(checkpoints / PROGRESS_FILE)


def _read_records(path: Path) -> list[dict[str, Any]]:
    """One for each line, without a last line that an interruption cut."""
    records = []
    for line in read_text(path).splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def read_text(path: Path) -> str:
    """The text of a file; empty if the file is not there."""
    with suppress(OSError):
        return path.read_text(errors="replace")
    return ""
