"""What fairseq-hydra-train -m needs beyond a single run: folders of jobs, and jobs that fail."""

import logging
import re
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Override,
    Quote,
    QuotedString,
    Transformer,
)
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.runs.folder import job_folder

logger = logging.getLogger(__name__)

# What Hydra's grammar reads as text without quotes.
_UNQUOTED = re.compile(r"[\w/.+%@-]+", re.ASCII)


class JobFailed(CompactHydraException):
    """Stands for a job's exception in a sweep: Hydra prints its message and no traceback. Unlike
    the original it can be sent between processes and does not keep the job's model alive."""


def parse_override(override: str) -> Override:
    """One override of the command line, read by Hydra's grammar."""
    return OverridesParser.create().parse_override(override)


def map_texts(override: str, change: Callable[[str], str]) -> str:
    """An override with every text that it gives, alone or among choices, changed by ``change``.

    Interpolations keep their text but gain quotes, without which sweepers would escape what makes
    them one. Other values and globs stay as they are.

    >>> map_texts("task.data='a,b',c,null,${oc.env:DATA}", "/x/{}".format)
    "task.data='/x/a,b',/x/c,null,'${oc.env:DATA}'"
    """
    parsed = parse_override(override)
    value = parsed._value  # value() drops the quotes

    def changed(element: object) -> str:
        text = element.text if isinstance(element, QuotedString) else element
        if not isinstance(text, str) or not text:
            return Transformer.str(element)
        text = text if "${" in text else change(text)
        return text if _UNQUOTED.fullmatch(text) else QuotedString(text, Quote.single).with_quotes()

    if isinstance(value, (str, QuotedString)):
        return f"{parsed.get_key_element()}={changed(value)}"
    if isinstance(value, ChoiceSweep):
        choices = ",".join(map(changed, value.list))
        return f"{parsed.get_key_element()}={_as_given(value, choices)}"
    return override


def _as_given(sweep: ChoiceSweep, choices: str) -> str:
    if sweep.tags:
        choices = f"tag({','.join(sorted(sweep.tags))},choice({choices}))"
    elif len(sweep.list) == 1:
        choices = f"choice({choices})"
    return f"shuffle({choices})" if sweep.shuffle else choices


def fixed_keys(overrides: Iterable[str]) -> list[str]:
    """The keys of those overrides that give one value, the same to all jobs."""
    parsed = map(parse_override, overrides)
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
