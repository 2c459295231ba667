"""Progress as data: what fairseq logs of training and of validations, one JSON line each, in a file
beside the checkpoints.

fairseq hands every logged interval to a progress bar, whatever the task, the criterion and the
format of the log, and has its numbers on the host by then.
"""

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from fairseq.logging import metrics, progress_bar

from fairseq_lowbit.files import atomic_write, writing
from fairseq_lowbit.plugin.processes import is_first, together
from fairseq_lowbit.runs.folder import HEALTH_FILE, PROGRESS_FILE, read_health, read_progress

_TRAINING_INTERVAL = "train_inner"
_NAMES = {"lr": "lr", "gnorm": "grad_norm", "ups": "updates_per_second"}
# Logged by fairseq itself; whatever else is logged is a term of the criterion.
_NOT_TERMS = {"num_updates", "wps", "wpb", "bsz", "clip", "loss_scale", "gb_free", "gb_total"}
_NOT_TERMS |= {"train_wall", "wall"}


# Where the tensors of the run are.
_device = torch.device("cpu")


def apply() -> None:
    """Records what the bars of training are told, once."""
    build = progress_bar.progress_bar

    @wraps(build)
    def built(*args: Any, **kwargs: Any) -> Any:
        bar = build(*args, **kwargs)
        # Only training and its validations name the folder of their checkpoints.
        folder = kwargs.get("aim_param_checkpoint_dir")
        return bar if folder is None else _RecordingBar(bar, Path(folder), **kwargs)

    progress_bar.progress_bar = built


def train_on(device: torch.device) -> None:
    """From now on the memory that counts is that of ``device``."""
    global _device
    _device = device


def forget_after(folder: Path, update: int) -> None:
    """Drops what a killed run recorded after the checkpoint of ``update``, from which this one goes
    on. Health is recorded before an update, so that of ``update`` itself will be recorded again."""
    if not is_first():
        return
    progress = [record for record in read_progress(folder) if record["update"] <= update]
    health = [record for record in read_health(folder) if record["update"] < update]
    for name, kept in ((PROGRESS_FILE, progress), (HEALTH_FILE, health)):
        if (folder / name).exists():
            with atomic_write(folder / name) as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)


class _RecordingBar(progress_bar.BaseProgressBar):
    """One of fairseq's bars, which records before it logs. Only validations have a ``prefix``."""

    def __init__(
        self,
        bar: progress_bar.BaseProgressBar,
        folder: Path,
        epoch: int | None = None,
        prefix: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._bar = bar
        self._path = folder / PROGRESS_FILE
        self._epoch = epoch
        self._is_validation = prefix is not None

    def __len__(self) -> int:
        return len(self._bar)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._bar)

    def update_config(self, config: Any) -> None:
        self._bar.update_config(config)

    def log(self, stats: dict[str, Any], tag: str | None = None, step: int | None = None) -> None:
        if tag == _TRAINING_INTERVAL:
            self._record(stats, "train", step)
        self._bar.log(stats, tag=tag, step=step)

    def print(self, stats: dict[str, Any], tag: str | None = None, step: int | None = None) -> None:
        # What training prints are the means of an epoch, whose intervals are recorded.
        if self._is_validation:
            self._record(stats, tag, step)
        self._bar.print(stats, tag=tag, step=step)

    def _record(self, stats: dict[str, Any], split: str | None, step: int | None) -> None:
        phase = "valid" if self._is_validation else "train"
        record = {"update": step, "epoch": self._epoch, "phase": phase, "split": split}
        # A process that cannot write stops the others too.
        with together(), writing(self._path):
            if is_first():
                with open(self._path, "a") as file:
                    file.write(json.dumps({**record, **_measured(stats)}) + "\n")


def _measured(stats: dict[str, Any]) -> dict[str, Any]:
    numbers = dict(_numbers(stats))
    measured: dict[str, Any] = {
        own: numbers[name] for name, own in _NAMES.items() if name in numbers
    }
    wall = metrics.get_meter("default", "wall")
    if wall is not None:
        measured["wall_seconds"] = round(wall.elapsed_time, 3)
    measured["peak_memory_bytes"] = _peak_memory()
    measured["terms"] = {
        name: value
        for name, value in numbers.items()
        if name not in _NAMES and name not in _NOT_TERMS and not name.startswith(("best_", "lr_"))
    }
    return measured


def _peak_memory() -> int:
    """Bytes at most: of tensors on this process's GPU, or on the CPU, of the process itself."""
    if _device.type == "cuda":
        return torch.cuda.max_memory_allocated(_device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _numbers(stats: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in stats.items():
        with suppress(TypeError, ValueError, RuntimeError):  # not a number, or several
            yield name, float(value)
