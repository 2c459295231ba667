"""Printing tables on a terminal and into a log."""

import sys

from rich.console import Console
from rich.table import Table

_LOG_WIDTH = 150


def print_table(table: Table, wide: bool = False) -> None:
    """As wide as the terminal; in a log wide enough that nothing is cut.

    Args:
        wide: at least as wide as in a log. A narrower terminal breaks the lines, where names and
            digits would be cut off otherwise.
    """
    # Names and patterns have brackets of their own, which are no markup.
    console = Console(markup=False)
    if not sys.stdout.isatty():
        console.width = _LOG_WIDTH
    elif wide:
        console.width = max(console.width, _LOG_WIDTH)
    console.print(table)
