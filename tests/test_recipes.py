"""What the recipes read from a run's progress, and their stages; a whole recipe takes minutes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
SCRIPT = RECIPES / "progress.py"
LIBRISPEECH = RECIPES / "librispeech960.sh"
# Three stages on recipes/lib.sh. The second tells its process id and waits; the third is light.
STAGED = f"""#!/usr/bin/env bash
# Greets.
set -euo pipefail
source {shlex.quote(str(RECIPES / "lib.sh"))}
work="" name=world nj=1 wait=0 stage=0 stop_stage=2 dry_run=""
options "work name nj wait stage stop-stage dry-run!" "$@"
no_settings=(nj wait)
greet() {{ step echo "hello $name" --jobs "$nj"; }}
nap() {{ step bash -c 'echo "pid $$ $1"; exec sleep "$0"' "$wait" "$name"; }}
add_stage 0 greet "say hello" greet
add_stage 1 nap "rest" nap
add_light_stage 2 bye "say it again" greet
run_stages
"""


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


@pytest.fixture
def staged(tmp_path: Path) -> list[str]:
    """The command of a small recipe in stages, with its --work."""
    (tmp_path / "staged.sh").write_text(STAGED)
    return ["bash", str(tmp_path / "staged.sh"), "--work", str(tmp_path / "work dir")]


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def stamps(staged: list[str]) -> set[str]:
    return {path.name for path in Path(staged[-1], "stamps").iterdir()} - {"lock"}


def test_stages_run_once(staged: list[str]) -> None:
    first = run(staged)
    assert first.returncode == 0, first.stderr
    assert "stage 0 greet: say hello; log" in first.stdout
    assert "hello world --jobs 1\n" in first.stdout
    assert "next: rest" in first.stdout
    assert Path(staged[-1], "logs", "0_greet.log").read_text() == "hello world --jobs 1\n"
    assert stamps(staged) == {"0_greet.done", "1_nap.done", "2_bye.done"}
    again = run(staged, "--nj", "4")  # which does not change what is made
    assert again.returncode == 0
    assert again.stdout.count("finished before") == 3
    assert "hello" not in again.stdout


def test_a_range_of_stages(staged: list[str]) -> None:
    assert run(staged, "--stage", "1", "--stop-stage", "1").returncode == 0
    assert stamps(staged) == {"1_nap.done"}


def test_a_dry_run_shows_a_script_and_runs_nothing(staged: list[str]) -> None:
    shown = run(staged, "--dry-run", "--stop-stage", "0", "--name", 'it\'s "$HOME" [0]')
    assert not Path(staged[-1]).exists()
    assert shown.stdout.startswith("# stage 0 greet: say hello\n")
    assert run(["bash", "-c", shown.stdout]).stdout == 'hello it\'s "$HOME" [0] --jobs 1\n'


def test_a_finished_stage_of_other_settings_is_refused(staged: list[str]) -> None:
    run(staged)
    other = run(staged, "--name", "moon")
    assert other.returncode == 2
    assert "stage 0 greet was finished with other settings" in other.stderr
    assert "world" in other.stderr
    assert "moon" in other.stderr
    assert "hello" not in other.stdout
    # A light stage is run again instead.
    light = run(staged, "--name", "moon", "--stage", "2")
    assert light.returncode == 0
    assert "hello moon" in light.stdout


def test_a_stage_that_fails_names_its_log(staged: list[str]) -> None:
    failed = run(staged, "--wait", "long")
    assert failed.returncode == 2
    log = Path(staged[-1], "logs", "1_nap.log")
    assert failed.stderr.endswith(f"error: bash -c failed; the log is {log}\n")
    assert "invalid time interval" in log.read_text()
    assert stamps(staged) == {"0_greet.done", "1_nap.begun"}


class Resting(NamedTuple):
    recipe: subprocess.Popen
    child: int  # the process that its second stage waits for

    def kill(self) -> None:
        os.killpg(self.recipe.pid, signal.SIGKILL)
        self.recipe.wait()


@pytest.fixture
def resting(staged: list[str]) -> Iterator[Resting]:
    """The recipe in its second stage, started as a shell starts it."""
    command = [*staged, "--wait", "60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as recipe:
        (line,) = islice((line for line in recipe.stdout if line.startswith("pid ")), 1)
        yield Resting(recipe, int(line.split()[1]))
        with suppress(ProcessLookupError):
            os.killpg(recipe.pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_stage_is_run_again_and_no_other(staged: list[str], resting: Resting) -> None:
    resting.kill()
    assert stamps(staged) == {"0_greet.done", "1_nap.begun"}
    again = run(staged, "--stop-stage", "1")
    assert again.returncode == 0
    assert "stage 0 greet: finished before" in again.stdout
    assert "hello" not in again.stdout
    assert stamps(staged) == {"0_greet.done", "1_nap.done"}


def test_what_was_begun_with_other_settings_says_so(staged: list[str], resting: Resting) -> None:
    resting.kill()
    other = run(staged, "--stage", "1", "--stop-stage", "1", "--name", "moon")
    assert other.returncode == 0
    assert "stage 1 nap was begun with other settings: was world, is moon" in other.stdout


def test_an_interrupt_ends_what_runs(staged: list[str], resting: Resting) -> None:
    assert is_alive(resting.child)
    os.killpg(resting.recipe.pid, signal.SIGINT)
    rest, _ = resting.recipe.communicate(timeout=20)
    assert resting.recipe.returncode == 130
    assert rest.endswith("interrupted; the same command goes on where it stopped\n")
    assert not is_alive(resting.child)
    assert stamps(staged) == {"0_greet.done", "1_nap.begun"}


def test_two_starts_at_once_are_refused(staged: list[str], resting: Resting) -> None:
    second = run(staged)
    assert second.returncode == 2
    assert "work dir is in use by another start" in second.stderr
