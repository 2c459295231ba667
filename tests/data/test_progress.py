"""Long work in a log: whole lines with the time left, and not thousands of them."""

import re

import pytest
from tqdm import tqdm

from fairseq_lowbit.data import progress


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    list(tqdm(range(4), "files", **progress.tqdm_options()))
    said = capsys.readouterr().err
    assert re.search(r"^files: 2 of 4 \(50 %\), 00:00 gone, 00:00 left$", said, re.MULTILINE)
    assert "\r" not in said
    assert "\n\n" not in said


def test_short_work_says_nothing_in_a_log(capsys: pytest.CaptureFixture) -> None:
    list(tqdm(range(1000), "files", **progress.tqdm_options()))
    assert capsys.readouterr().err == ""
