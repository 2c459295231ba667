"""scripts/bench_training.py, through the command: what it measures is another matter."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_training.py"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


def test_measures_both_sides_and_where_the_difference_goes(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    arguments = "--size tiny --batch 1 --seconds 0.5 --updates 2 --threads 1 --repeats 2"
    done = bench(*arguments.split(), "--precision", "bitla_w1a1", "--health", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "bitla_w1a1" in done.stdout
    measured = json.loads(out.read_text())
    assert measured["setting"]["size"] == "tiny"
    assert measured["setting"]["threads"] == 1
    assert measured["setting"]["cpu"]
    (row,) = measured["rows"]
    for side in ("float", "quantized"):
        assert len(row[f"{side}_ms"]) == 2
        assert min(row[f"{side}_ms"]) > 0
        assert row[f"{side}_gb"] > 0
    assert row["memory_ratio"] == pytest.approx(row["quantized_gb"] / row["float_gb"])
    parts = {(entry["part"], entry["phase"]) for entry in row["parts_ms"]}
    operands = {"query", "key", "value", "probabilities"}
    inputs = {f"input of {name}" for name in ("q, k, v", "out_proj", "fc1", "fc2")}
    assert [row["compiled"], row["updates"]] == [False, 2]
    assert {part for part, own in parts if own == "encode"} == {"weights"}
    for phase in ("forward", "backward"):
        assert {part for part, own in parts if own == phase} == {"weights"} | operands | inputs
    assert ("weights", "again") in parts
    health = row["health"]
    assert health["interval"] == 200
    # A pair of times for every repeat; which is larger is up to the machine.
    assert len(health["with_ms"]) == len(health["without_ms"]) == 2
    assert math.isfinite(health["share"])
    assert f"{100 * health['share']:.2f}" in done.stdout
    assert "% of step time" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--precision", "bitla_w9a1"], "9 bits"),
        (["--precision", "w1a1"], "unknown precision 'w1a1'"),
        (["--repeats", "0"], "0 is not positive"),
    ],
    ids=["bits", "name", "repeats"],
)
def test_a_mistake_gets_one_message(arguments: list[str], message: str) -> None:
    done = bench("--size", "tiny", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
