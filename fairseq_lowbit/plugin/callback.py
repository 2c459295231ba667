"""The Hydra callback that makes fairseq-hydra-train know this package and behave in sweeps."""

import copy
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.logging import progress_bar
from fairseq_cli import train
from fairseq_cli.hydra_train import _hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import fairseq_lowbit
from fairseq_lowbit.configurations import fold_rules
from fairseq_lowbit.data.units import LETTERS
from fairseq_lowbit.errors import LowbitError, describe_config_error
from fairseq_lowbit.files import writing
from fairseq_lowbit.interop import read_checkpoint, updates_of
from fairseq_lowbit.interop.huggingface_directory import is_hub_id
from fairseq_lowbit.plugin import register
from fairseq_lowbit.plugin.continuing import (
    MODELS,
    PATHS,
    UNITS,
    OtherRun,
    adopt_stored_form,
    refuse_other_run,
)
from fairseq_lowbit.plugin.processes import SharedError, gather, is_first, rank, together
from fairseq_lowbit.plugin.run_files import print_summary
from fairseq_lowbit.plugin.stages import Schedule, Stage, stage_configs, stops_early
from fairseq_lowbit.plugin.sweeps import (
    fixed_keys,
    refuse_shadowed,
    report_failed_job,
)
from fairseq_lowbit.plugin.teacher_shape import adopt_teacher
from fairseq_lowbit.runs.folder import (
    CONFIG_FILE,
    HYDRA_FILE,
    LAST_CHECKPOINT,
    OVERRIDES_FILE,
    forget_failure,
    write_failure,
    write_finished,
)

logger = logging.getLogger(__name__)

PACKAGE_DIR = Path(fairseq_lowbit.__file__).parent
USER_DIR = "common.user_dir"
# How the last line of a traceback begins that came as text.
_MISTAKE = re.compile(r"^fairseq_lowbit\.[\w.]+\.(LowbitError|SharedError): ", re.MULTILINE)
_LOST_PEER = re.compile(r"Connection (closed|reset) by peer")


class FairseqJob(Callback):
    """Configured in config/base as ``hydra.callbacks.fairseq_lowbit``."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        start = config.hydra.runtime.cwd
        _make_paths_absolute(config, start)
        if not is_first():
            with read_write(config), open_dict(config):
                # Every process that torchrun starts would write the first one's files again.
                config.hydra.output_subdir = None
                config.hydra.job_logging.root.handlers = ["console"]
                config.hydra.job_logging.root.level = "WARNING"
        _make_folder(config, "hydra.run.dir")
        register()
        folder = Path(start, config.hydra.run.dir, config.checkpoint.save_dir)
        try:
            adopt_teacher(config, folder)
            adopt_stored_form(config, folder)
            # Before Hydra replaces the record of what has made the checkpoints.
            refuse_other_run(config, folder)
        except LowbitError as mistake:
            if is_first():
                logger.error(mistake)
            sys.exit(2)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # As they were given: interpolations wait for their job.
        given = OmegaConf.to_container(config.hydra.overrides)
        fixed = fixed_keys(given["task"])
        try:
            refuse_shadowed(fixed, OmegaConf.select(config, "hydra.sweeper.params") or ())
        except LowbitError as mistake:
            logger.error(mistake)
            sys.exit(2)
        unnamed = [*config.hydra.job.config.override_dirname.exclude_keys, *fixed]
        keys = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(unnamed)}]"
        with read_write(config):
            # Hydra would write a job's record before anybody can compare it with the one there.
            config.hydra.overrides.hydra = [*given["hydra"], keys, "hydra.output_subdir=null"]
        _make_folder(config, "hydra.sweep.dir")

    def on_job_start(
        self, config: DictConfig, *, task_function: TaskFunction, **kwargs: Any
    ) -> None:
        register()
        _forget_last_job()
        # By this name fairseq's hydra_main calls what trains. Launchers hand a copy of hydra_main
        # to their processes, with globals of its own.
        start = config.hydra.runtime.cwd
        task_function.__globals__["_hydra_main"] = partial(_train_job, start)
        folder = Path(config.hydra.runtime.output_dir)
        try:
            _settle(config, start, folder)
            changes = refuse_other_run(config, folder / config.checkpoint.save_dir)
        except (LowbitError, OmegaConfBaseException) as mistake:
            # Hydra swallows what a callback raises.
            task_function.__globals__["_hydra_main"] = partial(_refuse, mistake)
            return
        if is_first():
            for change in changes:
                logger.warning(f"going on although {change}")
            forget_failure(folder)
            if config.hydra.mode == RunMode.MULTIRUN:
                _write_record(config, folder)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        error = job_return._return_value
        folder = Path(config.hydra.runtime.output_dir)
        if isinstance(error, BaseException):
            mistake = user_mistake(error)
            message = mistake or f"{type(error).__name__}: {error}"
            if is_first() and not isinstance(error, OtherRun):  # which is as whole as it was
                write_failure(folder, message)
            if config.hydra.mode == RunMode.MULTIRUN:
                surprise = None if mistake else error
                job_return.return_value = report_failed_job(message, folder, surprise)
            return
        # fairseq's hydra_main returns None; sweepers need the best validation loss.
        job_return.return_value = getattr(checkpoint_utils.save_checkpoint, "best", None)
        if is_first():
            print_summary(Path(config.checkpoint.save_dir))

    def on_run_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # A user's mistake deserves its one message, not a traceback through Hydra and fairseq.
        mistake = user_mistake(job_return._return_value)
        if mistake is not None:
            if is_first():
                logger.error(mistake)
            elif not any(isinstance(e, SharedError) for e in _chain(job_return._return_value)):
                logger.error(f"rank {rank()}: {mistake}")
            sys.exit(2)
        loss = lost_process(job_return._return_value)
        if loss is not None:
            logger.error(loss)
            sys.exit(1)


def _refuse(mistake: Exception, config: DictConfig) -> None:
    raise mistake


def _train_job(start: str, config: DictConfig) -> None:
    _settle(config, start, Path.cwd())
    train_in_stages(config)


def _settle(config: DictConfig, start: str, folder: Path) -> None:
    """Replaces what depends on the place where the command was started, ``start``, and on files: a
    job of a sweep gets its own configuration, which nobody has seen before."""
    _make_paths_absolute(config, start)
    adopt_teacher(config, folder / config.checkpoint.save_dir)
    adopt_stored_form(config, folder / config.checkpoint.save_dir)


def _write_record(config: DictConfig, folder: Path) -> None:
    """What Hydra leaves of a single run in its folder."""
    own = copy.deepcopy(config)
    with read_write(own), open_dict(own):
        del own["hydra"]
    with writing(folder / CONFIG_FILE.parent):
        (folder / CONFIG_FILE.parent).mkdir(exist_ok=True)
        OmegaConf.save(own, folder / CONFIG_FILE)
        OmegaConf.save(OmegaConf.masked_copy(config, "hydra"), folder / HYDRA_FILE)
        OmegaConf.save(config.hydra.overrides.task, folder / OVERRIDES_FILE)


def _make_folder(config: DictConfig, key: str) -> None:
    """Makes a run's folder before Hydra does, which would answer with a traceback if it cannot."""
    HydraConfig.instance().set_config(config)  # a folder's name may ask for it
    folder = OmegaConf.select(config, key)
    try:
        with writing(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
    except LowbitError as mistake:
        logger.error(mistake)
        sys.exit(2)


def train_in_stages(config: DictConfig) -> None:
    """fairseq's training, once or stage by stage, in one process and one job of a sweep.

    Stages share their process: replacing it for each would part the ranks of torchrun, which meet
    once by the addresses they leave in its store, and would end launchers that run several jobs.
    """
    schedule = Schedule.from_config(config)
    if not schedule.stages:
        schedule.refuse_other_stages()
        fold_rules(config.model)
        _train_to_end(config)
        return
    configs = stage_configs(config, schedule)
    for index in range(schedule.first_unfinished(), len(configs)):
        own = configs[index]
        logger.info(
            f"{schedule.describe(index)}: {own.optimization.max_update} updates from "
            f"{own.task.init_from or own.task.teacher or 'scratch'}, teacher: "
            f"{schedule.stages[index].teacher}"
        )
        _forget_last_job()
        if not _train_to_end(own, schedule.stages[index]):
            logger.warning(f"{schedule.describe(index)} was interrupted: run the same command")
            break


def _train_to_end(config: DictConfig, stage: Stage | None = None) -> bool:
    """fairseq's training, once.

    Returns:
        whether it came to its own end, and the last checkpoint with it; the same on every process.

    Raises:
        SharedError: no word of its end could be left.
    """
    _hydra_main(config)
    # The first process decides and writes: others may not see its checkpoint yet.
    with together():
        is_finished = is_first() and _leave_word(config, stage)
    return gather(is_finished)[0]


def _leave_word(config: DictConfig, stage: Stage | None) -> bool:
    folder, planned = Path(config.checkpoint.save_dir), config.optimization.max_update
    if not (folder / LAST_CHECKPOINT).is_file():  # checkpoint.no_save
        return False
    made = updates_of(read_checkpoint(folder / LAST_CHECKPOINT, mmap=True))
    if made < planned and not stops_early(config):
        return False
    write_finished(folder, made, planned, stage and asdict(stage))
    return True


def _make_paths_absolute(config: DictConfig, start: str) -> None:
    """Paths are meant from ``start``, where the command was started; Hydra changes into the run's
    folder before anybody opens them."""
    with read_write(config), open_dict(config):
        for key in (USER_DIR, *PATHS):
            value = OmegaConf.select(config, key)
            is_name = (key in MODELS and is_hub_id(value, start)) or (key, value) == (
                UNITS,
                LETTERS,
            )
            if value and not is_name:
                OmegaConf.update(config, key, _absolute(key, value, start))


def _absolute(key: str, value: str, start: str) -> str:
    path = Path(value).expanduser()
    if key == USER_DIR and path.name == PACKAGE_DIR.name:
        return str(PACKAGE_DIR)
    return str(start / path)


def _forget_last_job() -> None:
    """fairseq keeps these on functions and modules, where the next job of a sweep finds them."""
    for function in (checkpoint_utils.save_checkpoint, train.should_stop_early):
        if hasattr(function, "best"):
            del function.best
    for writer in progress_bar._tensorboard_writers.values():
        writer.close()
    progress_bar._tensorboard_writers.clear()
    # wandb refuses another configuration, and steps that begin anew, in a run that is still open.
    if getattr(progress_bar.wandb, "run", None) is not None:
        progress_bar.wandb.finish()


def user_mistake(error: Any) -> str | None:
    """The message of a mistake somewhere in an exception chain; None for any other failure.

    fairseq wraps what loading raises; processes it spawned and data workers hand over a traceback
    as text, whose last line is the message.
    """
    for cause in _chain(error):
        if isinstance(cause, OmegaConfBaseException):
            return describe_config_error(cause)
        if isinstance(cause, LowbitError):
            return _without_traceback(str(cause))
        if isinstance(cause, ProcessRaisedException) and _MISTAKE.search(str(cause)):
            return _without_traceback(str(cause))
    return None


def lost_process(error: Any) -> str | None:
    """What to say when a process has ended without a word, for example for lack of memory; None
    for any other failure."""
    for cause in _chain(error):
        if isinstance(cause, ProcessExitedException):
            return f"{cause}. The same command resumes from the last checkpoint"
        if isinstance(cause, RuntimeError) and _LOST_PEER.search(str(cause)):
            return f"rank {rank()}: another process of this run has ended; see what it said"
    return None


def _chain(error: Any) -> Iterator[BaseException]:
    """An exception, what it was raised from, and so on."""
    while isinstance(error, BaseException):
        yield error
        error = error.__cause__ or error.__context__


def _without_traceback(message: str) -> str:
    if "Traceback (most recent call last)" not in message:
        return message
    return _MISTAKE.sub("", message.strip().splitlines()[-1])
