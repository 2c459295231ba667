"""What fairseq-hydra-train -m needs beyond a single run: folders of jobs, and jobs that fail."""

import logging
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.runs.folder import job_folder

logger = logging.getLogger(__name__)


class JobFailed(CompactHydraException):
    """Stands for a job's exception in a sweep: Hydra prints its message and no traceback. Unlike
    the original it can be sent between processes and does not keep the job's model alive."""


def fixed_keys(overrides: Iterable[str]) -> list[str]:
    """The keys of those overrides that give one value, the same to all jobs."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [override.key_or_group for override in parsed if not override.is_sweep_override()]


def refuse_shadowed(fixed: Iterable[str], searched: Iterable[str]) -> None:
    """A sweeper gives jobs what it searches first and what is fixed last: a fixed list would
    silently replace the element of it that is searched.

    Raises:
        LowbitError: with both keys.
    """
    for key, own in product(fixed, searched):
        if own.startswith(f"{key}."):
            raise LowbitError(
                f"{key} is given on the command line and {own} is searched (hydra.sweeper.params): "
                f"leave {key} out, or give {own} to keep it fixed"
            )


def report_failed_job(message: str, folder: Path, surprise: BaseException | None) -> JobFailed:
    """Logs why the job in ``folder`` failed, with the traceback of what is no user's mistake.

    Returns:
        what to put in the place of the job's exception.
    """
    logger.error(message, exc_info=surprise)
    return JobFailed(
        f"the job in {folder} failed: {message}\n"
        f"fairseq-lowbit sweep-table {folder.parent} shows the jobs side by side"
    )


# Config: the folder of a job of a sweep, ${fairseq_lowbit.job_folder:OVERRIDES,KEYS TO LEAVE OUT}.
OmegaConf.register_new_resolver("fairseq_lowbit.job_folder", job_folder, replace=True)
