"""recipes/quantize.sh: what it shows and refuses first, its plan, and the whole of it."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fairseq_lowbit.interop import open_model
from tests.plugin.conftest import make_corpus

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quantize.sh"
OLD_TEACHER = ROOT / "tests" / "compatibility" / "v0_1" / "teacher.pt"
UPDATES = 12


def command(*arguments: object) -> list[str]:
    return ["bash", str(RECIPE), *map(str, arguments)]


def recipe(*arguments: object) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "VIRTUAL_ENV": sys.prefix,
    }
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.tsv").write_text("/\na.flac\t16000\n")
    return folder


def test_a_dry_run_shows_the_stages(data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options = ("--teacher", "org/name", "--precision", "bitla_w3a5", "--work", work, "--dry-run")
    shown = recipe("--data", data, "--run", "gpu8", "--updates", 300, *options)
    assert shown.returncode == 0, shown.stderr
    assert not work.exists()
    lines = shown.stdout.splitlines()
    assert f"fairseq-lowbit import-teacher org/name {work}/teacher.safetensors" in lines
    trial, training = (line for line in lines if line.startswith("fairseq-hydra-train"))
    for part in (
        "model.precision.name=bitla_w3a5 model=as_teacher run=gpu8",
        f"task.data={data} task.teacher={work}/teacher.safetensors",
        "task.seconds_per_update=700 dataset.max_tokens=1400000",
    ):
        assert part in trial
        assert part in training
    assert "checkpoint.no_save=true" in trial
    assert "optimization.max_update=300" in training
    # A folder of audio gets its manifests first.
    (audio := tmp_path / "audio").mkdir()
    shown = recipe("--data", audio, *options)
    assert f"fairseq-lowbit prepare {audio} {work}/data" in shown.stdout.splitlines()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--data": "no/such"}, "--data no/such is not a folder"),
        ({"--precision": "two bits"}, "--precision two bits: bitla_w2a2 is one"),
        ({"--updates": "0"}, "--updates 0: give a whole number from 1"),
        ({"--updates": "9", "--minutes": "9"}, "--updates and --minutes contradict each other"),
        ({"--run": "gpu2"}, "--run gpu2: choose one of local gpu1 gpu8 slurm"),
        ({"--batch-seconds": "much"}, "--batch-seconds much: give seconds"),
        ({"--batch-seconds": "0"}, "--batch-seconds 0: give seconds"),
        ({"--stage": "9", "--stop-stage": "9"}, "--stop-stage 9: the last stage is 8"),
    ],
)
def test_options_that_are_refused(given: dict[str, str], message: str, data: Path) -> None:
    options = {"--teacher": "t.pt", "--data": data, "--precision": "bitla_w2a2"} | given
    words = [word for pair in options.items() for word in pair]
    done = recipe(*words, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {message}\n"


def test_manifests_without_held_out_audio(data: Path) -> None:
    options = ("--teacher", "t.pt", "--precision", "bitla_w2a2", "--dry-run")
    (data / "test.tsv").write_text("/\n")
    done = recipe("--data", data, *options)
    assert done.stderr == f"error: --data: {data}/test.tsv lists no file\n"
    (data / "test.tsv").unlink()
    done = recipe("--data", data, *options)
    assert done.stderr == f"error: --data {data} has manifests, but no test.tsv\n"


@pytest.mark.parametrize(
    ("teacher", "precision", "message"),
    [
        ("/no/such.pt", "bitla_w2a2", "/no/such.pt does not exist"),
        (OLD_TEACHER, "bitla_w0a2", "bitla_w0a2"),
    ],
)
def test_models_that_are_refused(
    teacher: object, precision: str, message: str, data: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    options = ("--data", data, "--work", work)
    done = recipe("--teacher", teacher, "--precision", precision, *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (work / "stamps").exists()


# The plan


@pytest.fixture
def trial(data: Path, tmp_path: Path) -> Path:
    """2 s an update, 10 s a validation, 3 GB; 2000 s of audio, of which an update takes 700."""
    (data / "train.tsv").write_text("/\n" + "a.flac\t16000000\n" * 2)
    folder = tmp_path / "trial"
    for place in ("checkpoints", ".hydra"):
        (folder / place).mkdir(parents=True)
    task = {"data": str(data), "seconds_per_update": 700.0}
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"task": task}))
    records = [("train", 1, 9.0), ("train", 2, 11.0), ("train", 6, 19.0), ("valid", 6, 29.0)]
    with open(folder / "checkpoints" / "progress.jsonl", "w") as file:
        for phase, update, wall in records:
            record = {"update": update, "phase": phase, "wall_seconds": wall, "terms": {}}
            file.write(json.dumps({**record, "peak_memory_bytes": 3e9}) + "\n")
    return folder


def planned(trial: Path, *length: object) -> tuple[str, dict[str, int]]:
    """What it prints, and the settings it writes."""
    out = trial / "plan"
    arguments = [trial, out, *length, "--warmup", 4, "--validations", 20]
    script = [sys.executable, RECIPE.with_name("quantize_plan.py"), *arguments]
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pairs = (line.split("=") for line in out.read_text().splitlines())
    return done.stdout, {key: int(value) for key, value in pairs}


def test_the_plan(trial: Path) -> None:
    said, settings = planned(trial, "--updates", 20000)
    for part in ("updates  20000, not tuned", "audio    3.89e+03 h", "memory   3 GB"):
        assert part in said
    # 20000 x 2 s and 20 x 10 s.
    assert "time     11 h 10 min" in said
    assert settings == {
        "optimization.max_update": 20000,
        "lr_scheduler.warmup_updates": 800,
        "dataset.validate_interval_updates": 1000,
        "checkpoint.save_interval_updates": 1000,
    }


def test_a_plan_for_a_time(trial: Path) -> None:
    said, settings = planned(trial, "--minutes", 10)
    # 600 s, of which 20 validations take 200.
    assert settings["optimization.max_update"] == 200
    assert "time     10 min 0 s" in said
    # However short the time, an update.
    assert planned(trial, "--minutes", 1)[1]["optimization.max_update"] == 1


def test_durations() -> None:
    sys.path.insert(0, str(RECIPE.parent))
    try:
        duration = runpy.run_path(str(RECIPE.with_name("quantize_plan.py")))["duration"]
    finally:
        sys.path.remove(str(RECIPE.parent))
    expected = {183845: "2 days 3 h", 247: "4 min 7 s", 3600: "1 h 0 min", 12: "12 s", 0.3: "0 s"}
    assert {seconds: duration(seconds) for seconds in expected} == expected


# The whole recipe


def hugging_face(folder: Path) -> Path:
    """A HuBERT Base in small, with random weights."""
    import torch
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    HubertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("kind", ["hugging_face", "own"])
def test_from_a_teacher_to_exports_and_a_page(kind: str, tmp_path: Path) -> None:
    """Killed in its training, then run to the end."""
    pytest.importorskip("transformers")
    teacher = hugging_face(tmp_path / "hf") if kind == "hugging_face" else OLD_TEACHER
    corpus, work = make_corpus(tmp_path / "corpus"), tmp_path / "work"
    arguments = [
        *("--teacher", teacher, "--data", corpus, "--precision", "bitla_w2a2"),
        *("--updates", UPDATES, "--work", work, "--run", "local"),
        # Its workers would hold the lock of the folder for some seconds more.
        *("--override", "dataset.num_workers=0"),
    ]
    last = work / "bitla_w2a2" / "checkpoints" / "checkpoint_last.pt"
    kill_when(last, command(*arguments))
    assert 0 < open_model(last).updates < UPDATES

    done = recipe(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("0 teacher", "2 trial", "3 plan"):
        assert f"stage {stage}: finished before" in done.stdout
    assert "Loaded checkpoint" in (work / "logs" / "4_training.log").read_text()
    student = open_model(last)
    assert student.updates == UPDATES
    assert (
        student.model.shape.conv_feature_layers
        == open_model(teacher).model.shape.conv_feature_layers
    )
    exported = open_model(work / "export" / "bitla_w2a2.safetensors")
    assert exported.model.plan.precision.name == "bitla_w2a2"
    assert (work / "report.html").stat().st_size > 10_000
    rows = json.loads((work / "evaluation" / "comparison.json").read_text())
    assert "QAT bitla_w2a2" in str(rows)
    assert "PTQ bitla_w2a2" in str(rows)

    # Once more: nothing is done twice.
    before = last.stat().st_mtime_ns
    again = recipe(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("finished before") == again.stdout.count("] stage ")
    assert last.stat().st_mtime_ns == before


def kill_when(path: Path, words: list[str]) -> None:
    """``kill -9`` of everything that a command has started, as soon as a file is there."""
    with subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        while not path.exists():
            assert process.poll() is None, "it ended before"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
