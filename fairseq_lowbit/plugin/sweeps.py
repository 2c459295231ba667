"""What fairseq-hydra-train -m needs beyond a single run: folders of jobs, and jobs that fail."""

import logging
from collections.abc import Iterable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from fairseq_lowbit.evaluation.runs import folder_name

logger = logging.getLogger(__name__)


class JobFailed(CompactHydraException):
    """Stands for a job's exception in a sweep: Hydra prints its message and no traceback. Unlike
    the original it can be sent between processes and does not keep the job's model alive."""


def leave_out_of_names(overrides: Iterable[str]) -> str:
    """The override that keeps what a sweep does not vary out of the names of its jobs' folders."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [override.key_or_group for override in parsed if not override.is_sweep_override()]
    return f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"


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
OmegaConf.register_new_resolver("fairseq_lowbit.job_folder", folder_name, replace=True)
