"""How wide a table is printed."""

import sys

import pytest
from rich.table import Table

from fairseq_lowbit.terminal import print_table


@pytest.mark.parametrize(("wide", "is_whole"), [(False, False), (True, True)])
def test_a_wide_table_keeps_its_figures_on_a_narrow_terminal(
    wide: bool, is_whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    figures = [f"{number}.2345" for number in range(9)]
    table = Table(*(figure[0] for figure in figures))
    table.add_row(*figures)
    print_table(table, wide)
    printed = capsys.readouterr().out
    assert all(figure in printed for figure in figures) == is_whole
