"""task.compile: layers run compiled where there is a compiler, and eagerly where there is none."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.models import Hubert
from fairseq_lowbit.plugin.compiling import compile_layers
from tests.shapes import TINY


def test_without_a_compiler_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> Callable:
        raise RuntimeError("Failed to find C compiler.\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", broken)
    model, x = Hubert(TINY).eval(), torch.randn(1, 5, 16)
    expected = model.layers[0](x).x
    with caplog.at_level(logging.WARNING):
        assert not compile_layers(model)
    assert [record.getMessage() for record in caplog.records] == [
        "task.compile=true, but torch.compile does not work here (Failed to find C compiler.): "
        "training goes on without it"
    ]
    assert torch.equal(model.layers[0](x).x, expected)


@pytest.mark.full
def test_compiled_training_learns_what_eager_training_learns(
    train: Callable, teacher: Path
) -> None:
    options = ("bitla_w2a2", f"task.teacher={teacher}", "optimization.max_update=10")
    eager, compiled = train(*options), train(*options, "task.compile=true")
    assert "without it" not in compiled.output
    assert "calibrating" in compiled.output
    assert compiled.logged("loss") == pytest.approx(eager.logged("loss"), rel=0.02)
    # Health is measured through hooks of inner modules.
    records = [
        [entry["name"] for record in run.health() for entry in record["quantizers"]]
        for run in (eager, compiled)
    ]
    assert records[0] == records[1]
