"""The Hydra callback that makes fairseq-hydra-train know this package and behave in sweeps."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq_cli import train
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

import fairseq_lowbit
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.plugin import register
from fairseq_lowbit.plugin.run_files import print_summary

logger = logging.getLogger(__name__)

PACKAGE_DIR = Path(fairseq_lowbit.__file__).parent
_USER_DIR = "common.user_dir"


class FairseqJob(Callback):
    """Configured in config/base as ``hydra.callbacks.fairseq_lowbit``."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Hydra changes into the run folder before fairseq resolves a relative user_dir.
        if Path(OmegaConf.select(config, _USER_DIR) or "").name == PACKAGE_DIR.name:
            with read_write(config), open_dict(config):
                config.common.user_dir = str(PACKAGE_DIR)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Jobs are composed again from their overrides, so the override itself is rewritten.
        with read_write(config):
            config.hydra.overrides.task = [
                f"{_USER_DIR}={PACKAGE_DIR}" if _names_package(override) else override
                for override in config.hydra.overrides.task
            ]

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        register()
        # fairseq keeps these on functions, where the next job of a sweep would find them.
        for function, attribute in (
            (checkpoint_utils.save_checkpoint, "best"),
            (train.should_stop_early, "best"),
        ):
            if hasattr(function, attribute):
                delattr(function, attribute)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # fairseq's hydra_main returns None; sweepers need the best validation loss.
        if not isinstance(job_return._return_value, BaseException):
            job_return.return_value = getattr(checkpoint_utils.save_checkpoint, "best", None)
            if int(os.environ.get("RANK", "0")) == 0:
                print_summary(Path(config.checkpoint.save_dir))

    def on_run_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # A user's mistake deserves its one message, not a traceback through Hydra and fairseq.
        mistake = _user_mistake(job_return._return_value)
        if mistake is not None:
            logger.error(mistake)
            sys.exit(2)


def _user_mistake(error: Any) -> BaseException | None:
    """The mistake at the bottom of an exception chain; fairseq wraps what loading raises."""
    while isinstance(error, BaseException):
        if isinstance(error, (LowbitError, OmegaConfBaseException)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _names_package(override: str) -> bool:
    key, _, value = override.lstrip("+").partition("=")
    return key == _USER_DIR and Path(value).name == PACKAGE_DIR.name
