"""``fairseq-lowbit profile``: counted costs, and the paper's beside them."""

import csv
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.evaluation.paper import TABLE
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.precision import Precision
from tests.shapes import TINY


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = Hubert(TINY, classes=5, precision=Precision("bitla_w2a2"))
    config = {**asdict(TINY), "precision": model.plan.precision.to_mapping()}
    state = {"cfg": {"model": config, "task": {}}, "model": model.state_dict()}
    torch.save(state, tmp_path / "student.pt")
    return tmp_path / "student.pt"


def rows(capsys: pytest.CaptureFixture, *arguments: str, status: int = 0) -> list[dict]:
    assert main(["profile", "--json", *arguments]) == status
    return json.loads(capsys.readouterr().out)


def test_any_number_of_names_and_checkpoints(checkpoint: Path, capsys) -> None:
    found = rows(capsys, "bitla_w1a1", "bitl_w3a5", str(checkpoint), "--seconds", "2")
    assert [row["name"] for row in found] == ["bitla_w1a1", "bitl_w3a5", str(checkpoint)]
    for row in found:
        assert {"storage_bytes", "flops", "quantops", "runtime"} <= set(row)
        assert row["seconds"] == 2
    model = Hubert(TINY, classes=5, precision=Precision("bitla_w2a2"))
    assert found[-1]["storage_bytes"] == model.plan.bytes
    assert found[-1]["parameters"] == model.plan.parameters


def test_overrides_and_modules(capsys) -> None:
    (tiny,) = rows(capsys, "bitla_w1a1", "--set", "model=fastconv_tiny", "--per-module")
    assert sum(module["flops"] for module in tiny["modules"]) == tiny["flops"]
    assert {"encoder.layers.3.fc2", "encoder.layers.0.self_attn.scores"} <= {
        module["module"] for module in tiny["modules"]
    }
    assert main(["profile", "bitla_w1a1", "--per-module"]) == 0
    output = capsys.readouterr().out
    assert "encoder.layers.{0-11}.self_attn.context" in output
    assert "K = 66.5" in output


def test_the_conversion_rate_is_a_choice(capsys) -> None:
    (usual,), (slow,) = (
        rows(capsys, "bitla_w1a1", *rate) for rate in ((), ("--conversion-rate", "10"))
    )
    assert slow["runtime"] > usual["runtime"]
    assert (usual["conversion_rate"], slow["conversion_rate"]) == (66.5, 10)


def test_csv(tmp_path: Path, capsys) -> None:
    file = tmp_path / "costs.csv"
    expected = rows(capsys, "float", "bitla_w1a1", "--csv", str(file))
    found = list(csv.DictReader(file.open()))
    assert [row["name"] for row in found] == ["float", "bitla_w1a1"]
    assert [float(row["storage_bytes"]) for row in found] == [r["storage_bytes"] for r in expected]


def test_the_paper_cell_by_cell(capsys) -> None:
    assert main(["profile", "--paper"]) == 0
    output = capsys.readouterr().out
    cells = re.findall(r"│ (\S.*?) +│ (\S.*?) +│ +([\d.]+) │ +([\d.]+) │ +(\S.*?) │", output)
    known = [
        (row.name, cell)
        for row in TABLE
        for cell, value in (
            ("storage MB", row.storage_mb),
            ("GFLOPs", row.gflops),
            ("QuantOps Gbit", row.gquantops),
            ("runtime", row.runtime),
        )
        if value is not None
    ]
    assert [(name, cell) for name, cell, *_ in cells] == known
    storage = {name: (float(p), float(own)) for name, cell, p, own, _ in cells if "MB" in cell}
    assert set(storage) >= {"HuBERT-FastConv", "DistilHuBERT", "SqWQ W8", "BiT-LA W1A1"}
    for name, (paper, own) in storage.items():
        assert own == pytest.approx(paper, abs=0.011), name
    # Where the paper counts otherwise, it is said.
    assert "HuBERT-FastConv: the paper counts" in output
    assert "BiT-L W1A1: FLOPs and QuantOps of the paper" in output


def test_one_bad_target_leaves_the_others(checkpoint: Path, tmp_path: Path, capsys) -> None:
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(checkpoint.read_bytes()[:1000])
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(3)}, other)
    language_model = tmp_path / "lm.pt"
    config = {"model": {"_name": "transformer_lm"}}
    torch.save({"cfg": config, "model": {"decoder.weight": torch.zeros(3)}}, language_model)
    targets = [str(truncated), "bitl_w9a1", str(other), "bitla_w1a1", str(tmp_path / "gone.pt")]
    assert main(["profile", *targets, str(language_model)]) == 1
    output, errors = capsys.readouterr()
    assert "bitla_w1a1" in output
    messages = errors.strip().splitlines()
    parts = ("truncated", "9 bits", "not a fairseq checkpoint", "does not exist", "lm.pt is of ano")
    assert len(messages) == len(parts)
    for message, part in zip(messages, parts, strict=True):
        assert message.startswith("error: ")
        assert part in message


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("float", "--seconds", "0"), "--seconds 0"),
        (("float", "--conversion-rate", "0"), "--conversion-rate 0"),
        (("float", "--conversion-rate", "-3"), "--conversion-rate -3"),
        ((), "name a configuration"),
        (("float", "--paper"), "--paper has its own models"),
    ],
)
def test_contradictions(arguments: tuple, message: str, capsys) -> None:
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err
