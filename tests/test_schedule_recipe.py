"""recipes/grid.sh of chosen rows, and recipes/schedule.sh: what they refuse, and how they end."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin.conftest import make_corpus

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "tests" / "compatibility" / "v0_1" / "teacher.pt"
# Another --run than that of the toy scale, made small by --set.
SMALL = (
    "model=as_teacher dataset.num_workers=0 dataset.max_tokens=96000 task.seconds_per_update=null "
    "optimization.update_freq=[1] task.min_sample_size=4000 task.calibration.batches=1"
)


def recipe(name: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
    }
    command = ["bash", str(ROOT / "recipes" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grid.sh", ["--rows", "bitla_w1a1 bitla"], "--rows bitla: choose one of ptq_"),
        ("grid.sh", ["--rows", " "], "--rows is empty"),
        ("grid.sh", ["--seeds", "0"], "--seeds 0: give a whole number from 1"),
        ("grid.sh", ["--updates", "30"], "--updates 30: give a multiple of 4"),
        ("grid.sh", ["--run", "gpu2"], "--run gpu2: config/run has no such file"),
        ("grid.sh", ["--run", "gpu1"], "--run gpu1: give --updates, --teacher and --data"),
        ("schedule.sh", ["--nj", "no"], "--nj no: give a whole number from 1"),
        ("schedule.sh", ["--teacher", "gone.pt"], "--teacher gone.pt does not exist"),
        ("schedule.sh", ["--rows", "bitla_w1a1"], "unknown option --rows"),
    ],
)
def test_options_that_are_refused(
    name: str, options: list[str], message: str, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    done = recipe(name, "--work", work, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert not work.exists()


@pytest.mark.full
def test_a_figure_with_a_gap_that_is_filled(tmp_path: Path) -> None:
    """By the same command, which trains what has failed and nothing else."""
    corpus, work = make_corpus(tmp_path / "corpus"), tmp_path / "work"
    arguments = [
        *("--teacher", TEACHER, "--data", corpus, "--work", work, "--run", "local"),
        *("--updates", 8, "--seeds", 1, "--set", SMALL),
    ]
    runs = work / "runs"
    runs.mkdir(parents=True)
    (obstacle := runs / "bitla_w2a2").touch()
    first = recipe("schedule.sh", *arguments)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "failed: bitla_w2a2; the same command tries them again" in first.stdout
    assert "missing: one step, w2a2, seed 1: no run" in first.stderr
    assert points(work)["one step", "w2a2"]["mean"] == ""
    trained = {path: path.stat().st_mtime_ns for path in runs.rglob("checkpoint_last.pt")}

    obstacle.unlink()
    again = recipe("schedule.sh", *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    found = points(work)
    del found["teacher", "float"]  # which is not compared with itself
    assert all(point["mean"] for point in found.values())
    updates = {way: [] for way, _ in found}
    for (way, _), point in found.items():
        updates[way].append(point["updates"])
    path = "w8a8 > w4a4 > w2a2 > w1a1"
    assert updates == {
        "one step": ["8"] * 4,
        f"{path} (original)": ["2", "4", "6", "8"],
        f"{path} (previous)": ["2", "4", "6", "8"],
    }
    refused = recipe("schedule.sh", *arguments[:-4], "--updates", 12)
    assert refused.returncode == 2
    assert f"the rows in {work} have" in refused.stderr


def points(work: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Those of the SNR, by curve and precision."""
    with open(work / "schedule.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["unit"] == "dB"]
    return {(row["curve"], row["precision"]): row for row in rows}
