"""Peak memory of what is run."""

import sys
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.profiling import memory
from fairseq_lowbit.profiling.memory import peak_resident_bytes, resident_bytes

MB = 2**20
BLOCK = 200 * MB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells, others do not")


def use(size: int) -> None:
    torch.ones(size, dtype=torch.uint8)


def test_the_peak_is_that_of_the_run_alone() -> None:
    before = resident_bytes()
    large = peak_resident_bytes(lambda: use(BLOCK))
    small = peak_resident_bytes(lambda: use(MB))
    assert before + 0.9 * BLOCK < large < before + 1.3 * BLOCK
    assert small < before + 0.3 * BLOCK  # what was freed before it is no part of it


def test_what_is_held_counts() -> None:
    before = resident_bytes()
    held = torch.ones(BLOCK, dtype=torch.uint8)
    assert peak_resident_bytes(lambda: None) > before + 0.9 * BLOCK
    assert resident_bytes() > before + 0.9 * BLOCK
    del held
    assert resident_bytes() < before + 0.1 * BLOCK


def test_a_system_that_does_not_tell_gives_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "gone" / "clear_refs")
    assert peak_resident_bytes(lambda: calls.append(1)) is None
    assert calls == [1]
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "gone")
    assert resident_bytes() is None
