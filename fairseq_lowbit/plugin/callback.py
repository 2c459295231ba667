"""The Hydra callback that makes fairseq-hydra-train know this package and behave in sweeps."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.logging import progress_bar
from fairseq_cli import train
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from torch.multiprocessing import ProcessRaisedException

import fairseq_lowbit
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.runs import forget_failure, write_failure
from fairseq_lowbit.plugin import register
from fairseq_lowbit.plugin.run_files import print_summary
from fairseq_lowbit.plugin.sweeps import fixed_keys, refuse_shadowed, report_failed_job

logger = logging.getLogger(__name__)

PACKAGE_DIR = Path(fairseq_lowbit.__file__).parent
USER_DIR = "common.user_dir"
PATHS = (USER_DIR, "task.data", "task.label_dir", "task.teacher", "task.init_from")


class FairseqJob(Callback):
    """Configured in config/base as ``hydra.callbacks.fairseq_lowbit``."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Hydra changes into the run folder before anybody opens these.
        with read_write(config), open_dict(config):
            for key in PATHS:
                value = OmegaConf.select(config, key)
                if value:
                    OmegaConf.update(config, key, absolute(key, value))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        given = config.hydra.overrides
        fixed = fixed_keys(given.task)
        try:
            refuse_shadowed(fixed, OmegaConf.select(config, "hydra.sweeper.params") or ())
        except LowbitError as mistake:
            logger.error(mistake)
            sys.exit(2)
        # Jobs are composed again from their overrides, so the overrides themselves are rewritten.
        unnamed = [*config.hydra.job.config.override_dirname.exclude_keys, *fixed]
        keys = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(unnamed)}]"
        with read_write(config):
            given.hydra = [*given.hydra, keys]
            given.task = [_absolute_override(override) for override in given.task]

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        register()
        _forget_last_job()
        forget_failure(Path(config.hydra.runtime.output_dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        error = job_return._return_value
        folder = Path(config.hydra.runtime.output_dir)
        if isinstance(error, BaseException):
            mistake = user_mistake(error)
            message = mistake or f"{type(error).__name__}: {error}"
            write_failure(folder, message)
            if config.hydra.mode == RunMode.MULTIRUN:
                surprise = None if mistake else error
                job_return.return_value = report_failed_job(message, folder, surprise)
            return
        # fairseq's hydra_main returns None; sweepers need the best validation loss.
        job_return.return_value = getattr(checkpoint_utils.save_checkpoint, "best", None)
        if int(os.environ.get("RANK", "0")) == 0:
            print_summary(Path(config.checkpoint.save_dir))

    def on_run_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # A user's mistake deserves its one message, not a traceback through Hydra and fairseq.
        mistake = user_mistake(job_return._return_value)
        if mistake is not None:
            logger.error(mistake)
            sys.exit(2)


def absolute(key: str, value: str) -> str:
    """A path from the command line, against the folder the command was started in."""
    path = Path(value).expanduser()
    if key == USER_DIR and path.name == PACKAGE_DIR.name:
        return str(PACKAGE_DIR)
    return str(path.absolute())


def _absolute_override(override: str) -> str:
    key, _, value = override.lstrip("+").partition("=")
    if key not in PATHS or not value or value == "null":
        return override
    return f"{key}={','.join(absolute(key, choice) for choice in value.split(','))}"


def _forget_last_job() -> None:
    """fairseq keeps these on functions and modules, where the next job of a sweep finds them."""
    for function in (checkpoint_utils.save_checkpoint, train.should_stop_early):
        if hasattr(function, "best"):
            del function.best
    for writer in progress_bar._tensorboard_writers.values():
        writer.close()
    progress_bar._tensorboard_writers.clear()


def user_mistake(error: Any) -> str | None:
    """The message of a mistake somewhere in an exception chain; None for any other failure.

    fairseq wraps what loading raises; processes it spawned and data workers hand over a traceback
    as text, whose last line is the message.
    """
    while isinstance(error, BaseException):
        if isinstance(error, (LowbitError, OmegaConfBaseException)):
            return _without_traceback(str(error))
        if isinstance(error, ProcessRaisedException) and LowbitError.__name__ in str(error):
            return _without_traceback(str(error))
        error = error.__cause__ or error.__context__
    return None


def _without_traceback(message: str) -> str:
    if "Traceback (most recent call last)" not in message:
        return message
    return message.strip().splitlines()[-1].removeprefix(f"{LowbitError.__module__}.LowbitError: ")
