"""Whether a run goes on with what its folder holds, or would pass it off as its own.

fairseq resumes any checkpoint it finds, whatever it was trained from and for.
"""

import copy
import filecmp
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairseq.dataclass.initialize import add_defaults
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from fairseq_lowbit.configurations import fold_rules
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import read_checkpoint, updates_of
from fairseq_lowbit.plugin.stages import OWN_DIR, Schedule, read_stages, stage_configs
from fairseq_lowbit.precision.rules import BEFORE_THE_KEY
from fairseq_lowbit.runs.folder import LAST_CHECKPOINT, has_finished

MODELS = ("task.teacher", "task.init_from")  # paths, or ids of Hugging Face's hub
UNITS = "task.units"  # a path, or letters
PATHS = ("task.data", "task.label_dir", UNITS, *MODELS)
# What a run is: with another value it is another run, however far it has come.
_MODEL = ("model",)
_IDENTITY = (*_MODEL, "criterion", "task")
# What its result depends on, but what it may be resumed with: to save a run that diverges, on
# other hardware, from a copy of the data.
_COURSE = (
    "task.data",
    "task.label_dir",
    "optimization.lr",
    "optimization.clip_norm",
    "optimization.update_freq",
    "optimizer",
    "lr_scheduler",
    "dataset.max_tokens",
    "dataset.batch_size",
    "dataset.train_subset",
    "common.seed",
    "common.fp16",
    "common.bf16",
)
# Copies of other settings, what optimization.update_freq and max_update say too, what is only
# watched, how it is executed, and the stages, which are compared one by one.
_IGNORED = (
    "optimizer.lr",
    "lr_scheduler.lr",
    "lr_scheduler.max_update",
    "lr_scheduler.total_num_update",
    "task.train_subset",
    "task.max_tokens",
    "task.seed",
    "task.output_dir",
    "task.tensorboard_logdir",
    "task.health_interval",
    "task.compile",
    "task.max_unusable",
    "task.seconds_per_update",
    "task.stages",
)
_NAMED = 3
_ABSENT = object()

Change = tuple[str, Any, Any]


class OtherRun(LowbitError):
    """A folder holds a run of other settings; nothing in it was touched."""


def refuse_other_run(config: DictConfig, folder: Path) -> list[str]:
    """Compares a run with the checkpoints in its folder.

    Args:
        config: of the whole run, with absolute paths.
        folder: of its checkpoints.

    Returns:
        what has changed since they were written, in words, where the run may go on all the same.

    Raises:
        OtherRun: they are a finished run whose result came about otherwise, or an unfinished one of
            another model, loss or teacher.
    """
    try:
        stages = list(_stages(config, folder.absolute()))
    except OtherRun:
        raise
    except (LowbitError, OmegaConfBaseException):
        return []  # the run itself will say what is wrong with its settings
    changes = []
    for index, (own, place) in enumerate(stages):
        changes += _changes(own, place, is_last=index == len(stages) - 1)
    return ["{} was {} and is {} now".format(*change) for change in changes]


def _stages(config: DictConfig, folder: Path) -> Iterator[tuple[DictConfig, Path]]:
    """The configuration and the folder of each stage; a run without any is its own."""
    schedule = Schedule(read_stages(config), folder)
    if not schedule.stages:
        try:
            schedule.refuse_other_stages()
        except LowbitError as mistake:
            raise OtherRun(mistake) from None
        own = copy.deepcopy(config)
        fold_rules(own.model)
        yield own, folder
        return
    for index, own in enumerate(stage_configs(config, schedule)):
        yield own, schedule.checkpoint(index).parent


def _changes(config: DictConfig, folder: Path, is_last: bool) -> list[Change]:
    """What has changed and may; raises OtherRun for what may not."""
    try:
        state = read_checkpoint(folder / LAST_CHECKPOINT, mmap=True)
        own = _settings(config)
    except (LowbitError, OmegaConfBaseException):
        return []  # none yet, or the run itself will say what is wrong with it
    # An earlier stage is done with, but the rates of the one that follows may have to change.
    is_done = is_last and has_finished(folder, updates_of(state), config.optimization.max_update)
    changes = list(_differences(state["cfg"], own))
    if OmegaConf.select(config, "checkpoint.restore_file", default=LAST_CHECKPOINT) != (
        LAST_CHECKPOINT
    ):
        # The user starts from another checkpoint than those in the folder, which will be replaced:
        # by another model's only by mistake.
        is_done, changes = False, [change for change in changes if _is_among(change[0], _MODEL)]
    refused = [change for change in changes if _is_refused(change, is_done)]
    if refused:
        named = ", ".join("{} {}, not {}".format(*change) for change in refused[:_NAMED])
        more = f" (and {len(refused) - _NAMED} more)" if len(refused) > _NAMED else ""
        kind = "a finished run" if is_done else "a run"
        raise OtherRun(f"{folder} holds {kind} with {named}{more}: give it as it was, or {OWN_DIR}")
    return changes if is_last else []


def adopt_stored_form(config: DictConfig, folder: Path) -> None:
    """A run that an earlier version began goes on in its form, all stages of it: defaults that have
    changed since are those that it was begun with.

    Args:
        config: of the whole run, which is changed.
        folder: of its checkpoints.
    """
    if OmegaConf.select(config, "model.precision") is None:
        return
    try:
        schedule = Schedule(read_stages(config), folder)
        begun = schedule.checkpoint(0) if schedule.stages else folder / LAST_CHECKPOINT
        stored = read_checkpoint(begun, mmap=True)["cfg"]["model"].get("precision") or {}
    except (LowbitError, OmegaConfBaseException):
        return  # none yet, or the run itself will say what is wrong with it
    missing = {key: value for key, value in BEFORE_THE_KEY.items() if key not in stored}
    with read_write(config), open_dict(config):
        precision = config.model.precision
        precision.update(missing)
        if "rules_decide" in missing and precision.get("squash_std") is None:
            precision.squash_std = stored.get("squash_std")


def _settings(config: DictConfig) -> dict[str, Any]:
    """As a checkpoint keeps them: with fairseq's defaults, resolved."""
    with read_write(config), open_dict(config):
        add_defaults(config)
    names = dict.fromkeys(key.partition(".")[0] for key in (*_IDENTITY, *_COURSE))
    sections = {name: config.get(name) for name in names}
    return {
        name: OmegaConf.to_container(section, resolve=True, enum_to_str=True)
        for name, section in sections.items()
        if OmegaConf.is_config(section)
    }


def _differences(stored: dict[str, Any], own: dict[str, Any]) -> Iterator[Change]:
    before = dict(_flat(stored))
    for key, now in _flat(own):
        # A checkpoint of an earlier version lacks what has been added since.
        then = before.get(key, _ABSENT)
        if not _is_among(key, (*_IDENTITY, *_COURSE)) or _is_among(key, _IGNORED):
            continue
        if then is _ABSENT or now == "???" or then == now:
            continue
        if not (key in PATHS and then and now and _same_content(then, now)):
            yield key, then, now


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"{prefix}{name}", [_given(entry) for entry in value]
        else:
            yield f"{prefix}{name}", value


def _given(entry: Any) -> Any:
    """Of a rule, what it says."""
    if not isinstance(entry, dict):
        return entry
    return {name: value for name, value in entry.items() if value is not None}


def _is_among(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def _same_content(before: str, now: str) -> bool:
    if not (os.path.exists(before) and os.path.exists(now)):
        return False
    if os.path.samefile(before, now):
        return True
    return os.path.isfile(before) and os.path.isfile(now) and filecmp.cmp(before, now, False)


def _is_path(value: Any) -> bool:
    """Not the id of a model on a hub."""
    return bool(value) and os.path.isabs(value)


def _is_refused(change: Change, is_done: bool) -> bool:
    key, before, now = change
    are_paths = key in PATHS and _is_path(before) and _is_path(now)
    if are_paths and not (os.path.exists(before) and os.path.exists(now)):
        return False  # moved, as far as anybody can tell; what is gone the run itself will miss
    return is_done or not _is_among(key, _COURSE)
