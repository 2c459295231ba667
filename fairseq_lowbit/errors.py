"""The one exception that a user's mistake raises, and words for those of other libraries."""

import math
import re
from dataclasses import fields

_INTERNALS = re.compile(r"\s*(full_key: |object_type=|reference_type=)")
# Of an object in a list OmegaConf forgets where the list is.
_LISTS = {"Rule": "model.precision.rules"}


class LowbitError(Exception):
    """A mistake in a user's input, said in one message that names the file, key or value and what
    would be right."""


def describe(error: Exception) -> str:
    """Of one thing among many that could not be read: a mistake as it says itself, anything else by
    its kind too."""
    if isinstance(error, LowbitError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def describe_config_error(error: Exception, section: str = "") -> str:
    """What OmegaConf or Hydra says of a configuration, on one line that begins with the full key.

    Args:
        section: where the configuration is that the error's own key belongs to.
    """
    lines = [line.strip() for line in str(error).splitlines() if not _INTERNALS.match(line)]
    kind = getattr(error, "object_type", None)
    place = _LISTS.get(getattr(kind, "__name__", ""))
    if place is not None:
        known = ", ".join(entry.name for entry in fields(kind))
        lines.append(f"(each entry has fields among {known})")
    keys = [key for key in (place or section, getattr(error, "full_key", None)) if key]
    return ": ".join(filter(None, [".".join(keys), " ".join(filter(None, lines))]))


def require_number(key: str, value: float, least: float, excluded: bool = False) -> None:
    """Refuses a setting that is not finite or too small.

    Args:
        least: smallest allowed value; with ``excluded``, the value has to be above it.

    Raises:
        LowbitError: with the key, the value and what is allowed.
    """
    if math.isfinite(value) and (value > least if excluded else value >= least):
        return
    allowed = f"above {least:g}" if excluded else f"from {least:g} up"
    raise LowbitError(f"{key} {value}: give a number {allowed}")
