"""Printing tables on a terminal and into a log."""

import sys

from rich.console import Console
from rich.table import Table

_LOG_WIDTH = 150


def print_table(table: Table) -> None:
    """As wide as the terminal; in a log wide enough that nothing is cut."""
    # Names and patterns have brackets of their own, which are no markup.
    Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, markup=False).print(table)
