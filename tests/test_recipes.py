"""What the recipes read from a run's progress; a whole recipe takes minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "progress.py"


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    """A slow first interval, then two updates a second, and a validation of 4 s."""
    records = [("train", 4, 10.0), ("train", 8, 12.0), ("train", 12, 14.0), ("valid", 12, 18.0)]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("dataset: {validate_interval_updates: 200}\n")
    (tmp_path / "checkpoints" / "progress.jsonl").write_text(
        "".join(line(phase, update, wall_seconds=wall) for phase, update, wall in records)
    )
    return tmp_path


def line(phase: str, update: int, **more: object) -> str:
    record = {"update": update, "epoch": 1, "phase": phase, "split": phase, "terms": {"loss": 1.5}}
    return json.dumps({**record, **more}) + "\n"


def read(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_updates_that_fit_into_a_time(trial: Path) -> None:
    assert read("rate", trial).stdout == "2.00\n"
    # 4 s for the last validation; 200 updates and a validation take 104 s. The end is at 110 %.
    planned = read("plan", trial, 4 + 3 * 104).stdout
    assert planned == "optimization.max_update=600 optimization.stop_time_hours=0.09656\n"
    # However short the time, some updates, which take 24.8 s.
    planned = read("plan", trial, -5).stdout
    assert planned == "optimization.max_update=40 optimization.stop_time_hours=0.00758\n"


def test_a_trial_that_came_to_nothing(trial: Path) -> None:
    (trial / "checkpoints" / "progress.jsonl").write_text(line("train", 4, wall_seconds=1.0))
    done = read("plan", trial, 100)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: the trial in {trial} has no two intervals")


def test_the_screen_shows_what_is_new(trial: Path) -> None:
    """Of a resumed run that has taken the last records back, in a stage of a schedule too."""
    log, records = trial / "run.log", trial / "checkpoints" / "progress.jsonl"
    stage = trial / "checkpoints" / "stage1_float" / "progress.jsonl"
    stage.parent.mkdir()
    command = [sys.executable, SCRIPT, "show", "teacher", log, trial]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, **pipes) as shown:
        shown.stdin.write("[2026-11-24][fairseq][WARNING] - a warning\n")
        assert shown.stdout.readline().endswith("a warning\n")
        records.write_text(line("train", 4))
        shown.stdin.write("[2026-11-24][fairseq][INFO] - loaded\n")
        # Only a line that is shown tells that the one before was read.
        shown.stdin.write("[2026-11-24][fairseq][ERROR] - an error\n")
        assert shown.stdout.readline().endswith("an error\n")
        records.write_text(line("train", 4) + line("train", 8, updates_per_second=2.0))
        stage.write_text(line("valid", 8) + '{"update": 12, "ep')
        rest, _ = shown.communicate("[2026-11-24][train_inner][INFO] - loss 1.5\n")
    assert rest.splitlines() == [
        "  teacher: update 8, epoch 1, 2.00 updates/s: loss 1.5",
        "  teacher: update 8, epoch 1, valid on valid: loss 1.5",
    ]
    assert log.read_text().count("\n") == 4
