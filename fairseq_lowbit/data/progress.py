"""How long work tells how far it is: a bar on a terminal, and a line now and then in a log."""

import sys
from typing import Any

_SECONDS_BETWEEN_LINES = 30
_LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {elapsed} gone, {remaining} left"


def tqdm_options() -> dict[str, Any]:
    """For tqdm. Work that is done before its first line is due says nothing in a log."""
    if sys.stderr.isatty():
        return {"leave": False}
    return {
        "leave": False,
        "file": _Lines(),
        "bar_format": _LINE,
        "delay": _SECONDS_BETWEEN_LINES,
        "mininterval": _SECONDS_BETWEEN_LINES,
        "maxinterval": _SECONDS_BETWEEN_LINES,
    }


class _Lines:
    """Makes a line of every state of a bar, where tqdm would overwrite the last one."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
