"""What the recipes read from a run's progress, and their stages; a whole recipe takes minutes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

from fairseq_lowbit.configurations import build_model, model_config
from fairseq_lowbit.interop import LoadedModel, open_model, write_model

RECIPES = Path(__file__).parents[1] / "recipes"
SCRIPT = RECIPES / "progress.py"
LIBRISPEECH = RECIPES / "librispeech960.sh"
# Stages on recipes/lib.sh. The second tells its process id and waits; the others behind it are
# light, and the last is only run if it is asked for.
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
add_light_stage 3 echo "repeat what was said" step echo repeated
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
    assert "next: stage 1 nap" in first.stdout
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


def test_a_finished_stage_is_refused_when_one_before_it_runs_again(staged: list[str]) -> None:
    run(staged)
    stamp = Path(staged[-1], "stamps", "0_greet.done")
    stamp.unlink()
    refused = run(staged)
    assert refused.returncode == 2
    assert "stage 1 nap was finished before stage 0 greet: take another --work" in refused.stderr
    assert not stamp.exists()
    # Also when that has run meanwhile; a light stage runs again.
    assert run(staged, "--stop-stage", "0").returncode == 0
    assert run(staged).returncode == 2
    light = run(staged, "--stage", "2")
    assert light.returncode == 0
    assert "hello world" in light.stdout


def test_what_is_light_is_made_again_with_what_it_is_made_from(staged: list[str]) -> None:
    assert "repeated" in run(staged, "--stop-stage", "3").stdout
    assert "repeated" not in run(staged, "--stop-stage", "3").stdout
    other = run(staged, "--name", "moon", "--stage", "2", "--stop-stage", "3")
    assert other.returncode == 0
    assert "hello moon" in other.stdout
    assert "repeated" in other.stdout


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
    # What a killed recipe leaves running counts too.
    resting.recipe.kill()
    resting.recipe.wait()
    assert is_alive(resting.child)
    assert run(staged).returncode == 2


@pytest.fixture
def librispeech(tmp_path: Path) -> list[str]:
    """The command of the recipe with an empty --data and a --work."""
    (tmp_path / "data").mkdir()
    paths = ["--data", str(tmp_path / "data"), "--work", str(tmp_path / "work")]
    return ["bash", str(LIBRISPEECH), *paths]


def shown_stages(dry_run: str) -> dict[str, list[list[str]]]:
    """The commands of each stage, by its number and name."""
    stages: dict[str, list[list[str]]] = {}
    for line in dry_run.splitlines():
        if line.startswith("# stage "):
            commands = stages.setdefault(line.removeprefix("# stage ").partition(":")[0], [])
        else:
            commands.append(shlex.split(line))
    return stages


def test_librispeech_is_trained_as_hubert_base_was(librispeech: list[str]) -> None:
    """arXiv 2106.07447, section IV: two iterations, each on labels of its own."""
    done = run(librispeech, "--dry-run", "--nj", "12")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    stages = shown_stages(done.stdout)
    (first,), (second,) = stages["3 iteration1"], stages["5 iteration2"]
    assert {"optimization.max_update=250000", "lr_scheduler.warmup_updates=20000"} <= {*first}
    assert {"optimization.max_update=400000", "lr_scheduler.warmup_updates=32000"} <= {*second}
    for command in first, second:
        assert {"optimization.lr=[0.0005]", "run=gpu1"} <= {*command}
    (labels,) = stages["4 labels"]
    model = labels[labels.index("--model") + 1]
    assert f"hydra.run.dir={Path(model).parents[1]}" in first
    assert f"task.labels=[{labels[labels.index('--name') + 1]}]" in second
    for option, value in (("--clusters", "500"), ("--layer", "6"), ("--workers", "12")):
        assert labels[labels.index(option) + 1] == value
    assert not Path(librispeech[-1]).exists()


def test_librispeech_by_every_schedule_that_fits(librispeech: list[str]) -> None:
    precisions = "bitla_w2a2 bitla_w1a1 sqwq_w1 bitla_w3a5"
    shown = run(librispeech, "--dry-run", "--schedule", "all", "--precisions", precisions)
    students = {
        name: commands for name, commands in shown_stages(shown.stdout).items() if name[0] == "6"
    }
    assert {name.removeprefix("6 ") for name in students} == {
        "bitla_w2a2_one_step",
        "bitla_w1a1_one_step",
        "bitla_w1a1_by_w1a2_w1a1",
        "bitla_w1a1_by_w8a8_w4a4_w2a2_w1a1",
        "sqwq_w1_one_step",
        "sqwq_w1_by_w8_w4_w2_w1",
        "bitla_w3a5_one_step",
    }
    # As many updates in all, however many stages.
    (in_two,) = students["6 bitla_w1a1_by_w1a2_w1a1"]
    assert {"schedule=w1a2_w1a1", "optimization.max_update=50000"} <= {*in_two}
    (in_one,) = students["6 bitla_w1a1_one_step"]
    assert "optimization.max_update=100000" in in_one
    # A precision without a configuration of its own.
    assert "model.precision.name=bitla_w3a5" in students["6 bitla_w3a5_one_step"][0]


def test_librispeech_with_a_hubert_that_is_there(librispeech: list[str], tmp_path: Path) -> None:
    (tmp_path / "hubert.pt").touch()
    shown = run(librispeech, "--dry-run", "--adapt", str(tmp_path / "hubert.pt"))
    stages = shown_stages(shown.stdout)
    assert [name for name in stages if name[0] in "2345"] == ["5 adapted"]
    (adapted,) = stages["5 adapted"]
    assert f"task.teacher={tmp_path / 'hubert.pt'}" in adapted
    (student,) = stages["6 bitla_w2a2_one_step"]
    run_folder = adapted[-1].removeprefix("hydra.run.dir=")
    assert f"task.teacher={run_folder}/checkpoints/checkpoint_last.pt" in student


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "--size huge: choose one of base tiny"),
        (["--run", "gpu2"], "--run gpu2: choose one of gpu1 gpu8 slurm"),
        (["--nj", "0"], "--nj 0: give a whole number from 1"),
        (["--data", "nowhere"], "--data nowhere is not a folder"),
        (["--stage", "5", "--stop-stage", "4"], "--stage 5 lies behind --stop-stage 4"),
        (["--stop-stage", "10"], "--stop-stage 10: the last stage is 9"),
        (["--precisions", " "], "--precisions is empty"),
        (["--valid", ""], "--valid is empty"),
        (["--precisions", "w2a2"], "--precisions: w2a2 is none"),
        (["--precisions", "bitla_w2a2 bitla_w2a2"], "--precisions names bitla_w2a2 twice"),
        (["--schedule", "slow"], "--schedule slow: choose one of one_step all w1a2_w1a1 "),
        (
            ["--schedule", "w1a2_w1a1"],
            "--schedule w1a2_w1a1 does not end with bitla_w2a2: leave that out",
        ),
        (["--size", "tiny", "--run", "gpu8"], "--run gpu8: --size tiny runs on any machine"),
        (["--layer"], "unknown option --layer; see --help"),
        (["--work"], "--work needs a value"),
    ],
)
def test_librispeech_refuses(librispeech: list[str], arguments: list[str], message: str) -> None:
    refused = run(librispeech, *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {message}")
    assert refused.stderr.count("\n") == 1
    assert refused.stdout == ""


def test_librispeech_needs_data() -> None:
    refused = run(["bash", str(LIBRISPEECH)])
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --data DIR is missing")


def test_librispeech_asks_the_package_about_precisions(librispeech: list[str]) -> None:
    refused = run(librispeech, "--size", "tiny", "--precisions", "bitla_w2a2 bitla_w9a9")
    assert refused.returncode == 2
    assert "bitla_w9a9" in refused.stderr.splitlines()[0]
    assert refused.stderr.splitlines()[-1] == "error: --precisions: bitla_w9a9 is none, see above"
    assert not Path(librispeech[-1], "logs").exists()


def test_librispeech_without_room(librispeech: list[str], tmp_path: Path) -> None:
    """What the disk has is what df says."""
    (tmp_path / "df").write_text("#!/bin/sh\nprintf 'head\\n/dev/sda 9 9 3000000 9%% /\\n'\n")
    (tmp_path / "df").chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    refused = subprocess.run(librispeech, env=path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: {librispeech[-1]} has 3 GB free; 4 trainings and their exports need about 21 GB\n"
    )


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """A corpus of synthetic speech as LibriSpeech is published."""
    pytest.importorskip("espeakng_loader")
    out = tmp_path / "archives"
    synthesize = ["fairseq-lowbit", "synthesize", str(out), "--layout", "librispeech"]
    subprocess.run([*synthesize, "--minutes", "2", "--archives"], check=True)
    return out


@pytest.mark.full
def test_librispeech_at_tiny_size_survives_a_kill(archives: Path, tmp_path: Path) -> None:
    """From archives to exports; killed in the first pre-training, finished by the same command."""
    work = tmp_path / "work"
    paths = ["--data", str(archives), "--work", str(work)]
    command = ["bash", str(LIBRISPEECH), "--size", "tiny", *paths]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as recipe:
        saved = work / "iteration1" / "checkpoints" / "checkpoint_last.pt"
        while not saved.is_file():
            assert recipe.poll() is None, "ended before it could be killed"
            time.sleep(0.1)
        os.killpg(recipe.pid, signal.SIGKILL)
    stamps = work / "stamps"
    finished = {path: path.stat().st_mtime_ns for path in stamps.glob("*.done")}
    assert {path.stem for path in finished} == {"0_unpack", "1_manifests", "2_labels"}
    assert (stamps / "3_iteration1.begun").is_file()

    resumed = run(command)
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    first_update = re.search(r"iteration1: update (\d+)", resumed.stdout)
    assert int(first_update[1]) > 10, "the pre-training was begun anew"
    for name in ("iteration2", "bitla_w2a2_one_step", "bitla_w1a1_one_step"):
        assert f"{work / name}/checkpoints/checkpoint_last.pt" in resumed.stdout  # the profile
        assert (work / "exports" / f"{name}.safetensors").is_file()
        assert (work / "exports" / name / "config.json").is_file()
        assert (work / "exports" / f"{name}.onnx").is_file()

    again = run(command)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == len(list(stamps.glob("*.done"))) == 19


def write_hubert(path: Path, front_end: str) -> None:
    """A tiny HuBERT of random weights, as if trained on normalized audio."""
    other = f"model.conv_feature_layers='{front_end}'"
    model = build_model(model_config("hubert_fastconv", ["run=demo_pretraining", other]))
    write_model(path, model, LoadedModel(model, "random", 0, True, True), path.parent)


@pytest.mark.parametrize(
    ("front_end", "message"),
    [
        ("[(16,10,5)]+[(16,3,2)]*4+[(64,2,2)]*2", "layer_norm.weight is (64,) where (128,)"),
        ("[(16,10,5)]+[(16,3,2)]*4+[(128,2,2)]", "a frame every 320 samples"),
    ],
)
def test_librispeech_asks_whether_a_hubert_fits(
    librispeech: list[str], front_end: str, message: str, tmp_path: Path
) -> None:
    hubert = tmp_path / "hubert.safetensors"
    write_hubert(hubert, front_end)
    options = ["--size", "tiny", "--stop-stage", "5", "--adapt", str(hubert)]
    refused = run(librispeech, *options)
    assert refused.returncode == 2
    first, last = refused.stderr.splitlines()
    assert message in first
    assert last == f"error: --adapt {hubert} cannot be taken, see above"
    assert not Path(librispeech[-1], "logs").exists()


@pytest.mark.full
def test_librispeech_at_tiny_size_from_a_hubert(archives: Path, tmp_path: Path) -> None:
    """The front-end of a HuBERT that is there is replaced, and the result quantized in stages."""
    hubert, work = tmp_path / "hubert.safetensors", tmp_path / "work"
    write_hubert(hubert, "[(16,10,5)]+[(16,3,2)]*4+[(128,2,2)]*2")
    options = ["--size", "tiny", "--adapt", str(hubert), "--precisions", "bitla_w1a1"]
    paths = ["--data", str(archives), "--work", str(work)]
    command = ["bash", str(LIBRISPEECH), *options, "--schedule", "w1a2_w1a1", *paths]
    done = run(command, "--stop-stage", "7")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert {path.stem for path in (work / "stamps").glob("*.done")} == {
        "0_unpack",
        "1_manifests",
        "5_adapted",
        "6_bitla_w1a1_by_w1a2_w1a1",
        "7_profile",
    }
    student = work / "bitla_w1a1_by_w1a2_w1a1" / "checkpoints"
    assert (student / "stage1_bitla_w1a2" / "checkpoint_last.pt").is_file()
    made = open_model(student / "checkpoint_last.pt")
    assert made.model.conv_layers[0] == (32, 10, 5)
    assert made.normalize  # as the HuBERT was


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("asr.sh", ["--text", "nowhere"], "--text nowhere: give kjv, or a file with one sentence"),
        ("asr.sh", ["--teacher", "gone.pt"], "--teacher gone.pt: there is no such checkpoint"),
        ("asr.sh", ["--minutes", "two"], "--minutes two: give a whole number from 3"),
        ("demo.sh", ["--asr", "--minutes", "2"], "--minutes 2: give a whole number from 3"),
        ("demo.sh", ["--asr", "--audio", "."], "--asr reads a text aloud and takes no --audio"),
        ("probe.sh", [], "name a model or more, before the options"),
        ("probe.sh", ["a.pt", "--data", ".", "--audio", "."], "exclude each other"),
        ("probe.sh", ["a.pt", "--transcripts", "said.tsv"], "--transcripts needs --audio"),
    ],
)
def test_measuring_refuses_before_it_sets_up(
    recipe: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = run(["bash", str(RECIPES / recipe)], *arguments, "--work", str(tmp_path / "work"))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "work").exists()
