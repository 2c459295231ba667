"""``fairseq-lowbit profile``: counted costs, and the paper's beside them."""

import csv
import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.evaluation.paper import CELLS, TABLE
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


@pytest.fixture(scope="module")
def paper_cells() -> list[dict]:
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["profile", "--paper", "--json"]) == 0
    return json.loads(printed.getvalue())


def test_the_paper_cell_by_cell(paper_cells: list[dict], tmp_path: Path, capsys) -> None:
    known = [(row.name, key) for row in TABLE for key in row.cells]
    assert [(cell["name"], cell["cell"]) for cell in paper_cells] == known
    assert main(["profile", "--paper", f"--csv={tmp_path / 'paper.csv'}"]) == 0
    output = capsys.readouterr().out
    form = r"│ (\S.*?) +│ (\S.*?) +│ +(\S.*?) │ +(\S+) │ +(\S.*?) │ (\w+) +│"
    printed = re.findall(form, output)
    shown = [(c["name"], CELLS[c["cell"]], c["origin"]) for c in paper_cells]
    assert [(name, cell, origin) for name, cell, *_, origin in printed] == shown
    assert ("HuBERT Base", "storage MB", "189.1 to 189.4", "189.14") in [p[:4] for p in printed]
    assert ("BiT-L W1A1", "GFLOPs", "82.29", "20.87", "-61.42 (-74.6%)", "published") in printed
    assert ("SqWQ W2", "WER %", "12.56", "-", "-", "published") in printed
    for cell in paper_cells:
        if cell["note"]:
            (line,) = [line for line in output.splitlines() if cell["note"] in line]
            assert CELLS[cell["cell"]] in line.partition(": ")[0]
            assert cell["name"] in line.partition(": ")[0]
    rows = list(csv.DictReader((tmp_path / "paper.csv").open()))
    assert [row["note"] for row in rows] == [cell["note"] or "" for cell in paper_cells]


def test_storage_is_the_papers(paper_cells: list[dict]) -> None:
    storage = [cell for cell in paper_cells if cell["cell"] == "storage_mb"]
    assert len(storage) == len(TABLE)
    for cell in storage:
        assert abs(cell["difference"]) <= 0.01, cell["name"]


def test_every_difference_has_its_reason(paper_cells: list[dict]) -> None:
    counted = [cell for cell in paper_cells if cell["ours"] is not None]
    assert {cell["cell"] for cell in counted} == {"storage_mb", "gflops", "gquantops", "runtime"}
    for cell in counted:
        differs = abs(cell["difference"]) > 0.01 * cell["paper"]
        assert differs == (cell["note"] is not None), cell


def test_one_bad_target_leaves_the_others(checkpoint: Path, tmp_path: Path, capsys) -> None:
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(checkpoint.read_bytes()[:1000])
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(3)}, other)
    targets = [str(truncated), "bitl_w9a1", str(other), "bitla_w1a1", str(tmp_path / "gone.pt")]
    assert main(["profile", *targets]) == 1
    output, errors = capsys.readouterr()
    assert "bitla_w1a1" in output
    messages = errors.strip().splitlines()
    assert len(messages) == 4
    for message, part in zip(
        messages, ("truncated", "9 bits", "not a fairseq checkpoint", "does not exist"), strict=True
    ):
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
        (("--paper", "--per-module"), "--paper has its own models"),
    ],
)
def test_contradictions(arguments: tuple, message: str, capsys) -> None:
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err
