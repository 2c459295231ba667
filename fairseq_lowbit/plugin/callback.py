"""The Hydra callback that makes fairseq-hydra-train know this package and behave in sweeps."""

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.logging import progress_bar
from fairseq_cli import train
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import fairseq_lowbit
from fairseq_lowbit.errors import LowbitError, writing
from fairseq_lowbit.plugin import register
from fairseq_lowbit.plugin.processes import SharedError, is_first, rank
from fairseq_lowbit.plugin.run_files import print_summary

logger = logging.getLogger(__name__)

PACKAGE_DIR = Path(fairseq_lowbit.__file__).parent
USER_DIR = "common.user_dir"
# How the last line of a traceback begins that came as text.
_MISTAKE = re.compile(r"^fairseq_lowbit\.[\w.]+\.(LowbitError|SharedError): ", re.MULTILINE)
_LOST_PEER = re.compile(r"Connection (closed|reset) by peer")
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
            if not is_first():
                # Every process that torchrun starts would write the first one's files again.
                config.hydra.output_subdir = None
                config.hydra.job_logging.root.handlers = ["console"]
                config.hydra.job_logging.root.level = "WARNING"
        _make_folder(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Jobs are composed again from their overrides, so the overrides themselves are rewritten.
        with read_write(config):
            config.hydra.overrides.task = [
                _absolute_override(override) for override in config.hydra.overrides.task
            ]
        _make_folder(config, "hydra.sweep.dir")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        register()
        _forget_last_job()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # fairseq's hydra_main returns None; sweepers need the best validation loss.
        if not isinstance(job_return._return_value, BaseException):
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
    for cause in _chain(error):
        if isinstance(cause, (LowbitError, OmegaConfBaseException)):
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
