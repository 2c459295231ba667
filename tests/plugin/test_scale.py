"""Where a run trains changes nothing of what it trains, and a student takes its teacher's shape."""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from fairseq_lowbit.configurations import compose_config, config_dir
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import Architecture
from fairseq_lowbit.plugin.callback import _make_paths_absolute
from fairseq_lowbit.plugin.continuing import _is_refused
from fairseq_lowbit.plugin.teacher_shape import AS_TEACHER, SHAPE
from tests.plugin.conftest import SMALL, Run, Trainer

SMALL_SHAPE = tuple(text for text in SMALL if text.startswith("model."))


def batch(*overrides: str, config: str = "bitla_w2a2") -> list[int]:
    """optimization.update_freq, resolved."""
    given = ["task.data=x", "task.teacher=x", *overrides]
    return list(compose_config(config, given).optimization.update_freq)


def refusal(*overrides: str) -> str:
    with pytest.raises(InterpolationResolutionError) as error:
        batch(*overrides)
    return str(error.value)


PROCESSES = "distributed_training.distributed_world_size"


def test_the_effective_batch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert batch() == [8]
    assert batch(config="hubert_fastconv") == [32]
    assert batch(f"{PROCESSES}=4") == [2]
    assert batch(f"{PROCESSES}=4", "dataset.max_tokens=700000") == [4]
    assert batch("task.seconds_per_update=87.5") == [1]
    assert batch("run=demo_student", f"{PROCESSES}=4") == [1]
    monkeypatch.setenv("WORLD_SIZE", "8")  # torchrun
    assert batch() == [1]
    # Whoever says it himself is right.
    assert batch("optimization.update_freq=[3]", f"{PROCESSES}=5") == [3]


def test_a_batch_that_does_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    message = refusal(f"{PROCESSES}=3")
    for part in ("seconds_per_update=700", "87.5 s", "max_tokens=1400000", "times 3", PROCESSES):
        assert part in message
    # More processes than an update has batches.
    assert "times 16" in refusal(f"{PROCESSES}=16")
    assert "optimization.update_freq=[N]" in refusal("dataset.max_tokens=null")


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert batch("run=gpu1") == [8]
    assert batch("run=gpu8") == [1]
    assert batch("run=gpu8", f"{PROCESSES}=4") == [2]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert "asks for 8 GPUs and this machine has 4" in refusal("run=gpu8")
    # Two machines of four each, by torchrun.
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert batch("run=gpu8") == [1]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "torchrun has started 4 processes" in refusal("run=gpu8")


@pytest.mark.parametrize("run", ["gpu1", "gpu8"])
def test_a_machine_without_gpus(run: str, trainer: Trainer, teacher: Path, tmp_path: Path) -> None:
    done = trainer.fork(tmp_path / "run", "bitla_w2a2", f"task.teacher={teacher}", f"run={run}")
    message = done.message()
    for part in (f"asks for {run[3:]} GPU", "has none", "run=local"):
        assert part in message


# What a run says first


def test_a_run_says_how_large_it_is(trainer: Trainer, teacher: Path, tmp_path: Path) -> None:
    options = (
        f"task.teacher={teacher}",
        "dataset.max_tokens=48000",
        "optimization.update_freq=[2]",
        "optimization.max_update=12",
        "dataset.disable_validation=true",
    )
    first, second = trainer.fork_ranks(tmp_path / "run", "bitla_w2a2", *options)
    assert (first.status, second.status) == (0, 0), first.output
    said = "2 processes x 3 s of audio x update_freq 2 = 12 s of audio per update, at most"
    assert first.output.count(said) == 1
    assert said not in second.output
    hours, updates, epochs = re.search(
        r"(\S+) h of audio per epoch, (\d+) updates: 12 updates are (\S+) epochs", first.output
    ).groups()
    lines = (trainer.data / "train.tsv").read_text().splitlines()[1:]
    seconds = sum(int(line.split("\t")[1]) for line in lines) / 16000
    assert float(hours) == pytest.approx(seconds / 3600, rel=0.01)
    assert float(epochs) == pytest.approx(12 / int(updates), rel=0.01)
    assert first.progress()[-1]["epoch"] == -(-12 // int(updates))
    begin = first.output.index(said)
    assert begin < first.output.index("num_updates=1,")


# model=as_teacher


def as_teacher(trainer: Trainer, folder: Path, source: object, *overrides: str) -> Run:
    """A run whose shape is nowhere given."""
    arguments = [
        text
        for text in trainer.arguments(folder, "bitla_w2a2", f"task.teacher={source}", *overrides)
        if text not in SMALL_SHAPE
    ]
    return trainer.fork_arguments(folder, [*arguments, "model=as_teacher"])


def test_the_file_leaves_the_whole_shape_to_the_teacher() -> None:
    model = compose_config("bitla_w2a2", ["model=as_teacher"]).model
    left = {name for name, value in model.items() if value == AS_TEACHER}
    assert left <= set(SHAPE)
    given = {field.name for field in fields(Architecture) if field.name in model} - left
    assert not given & set(SHAPE)


@pytest.fixture(scope="module")
def normalizing(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, as if trained on normalized audio."""
    state = torch.load(teacher, weights_only=False)
    state["cfg"]["task"]["normalize"] = True
    path = tmp_path_factory.mktemp("normalizing") / "teacher.pt"
    torch.save(state, path)
    return path


def test_a_student_of_its_teachers_shape(
    trainer: Trainer, normalizing: Path, tmp_path: Path
) -> None:
    source = tmp_path / "teacher.pt"
    shutil.copy(normalizing, source)
    folder = tmp_path / "run"
    done = as_teacher(trainer, folder, source)
    assert done.status == 0, done.output
    expected = open_model(normalizing).model.shape
    kept = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text())
    for config in (kept, done.state()["cfg"]):
        assert {name: config["model"][name] for name in SHAPE} == {
            name: getattr(expected, name) for name in SHAPE
        }
        assert config["task"]["normalize"] is True
        assert config["model"]["dropout"] == 0  # the loss's, not the teacher's
    # Nobody needs the teacher for the shape again: what is missed is the teacher itself.
    source.unlink()
    assert open_model(done.last).model.shape.encoder_layers == expected.encoder_layers
    message = as_teacher(trainer, folder, source).message()
    assert message == f"checkpoint {source} does not exist"


def test_as_teacher_in_a_job_of_a_sweep(trainer: Trainer, teacher: Path, tmp_path: Path) -> None:
    sweep = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    done = as_teacher(trainer, tmp_path / "unused", teacher, "-m", sweep, "common.seed=2,3")
    assert done.status == 0, done.output
    for seed in (2, 3):
        job = tmp_path / "sweep" / f"common.seed-{seed}"
        kept = yaml.safe_load((job / ".hydra" / "config.yaml").read_text())
        assert kept["model"]["encoder_embed_dim"] == 32


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.encoder_layers=3", ("model.encoder_layers=3", "model=as_teacher", "leave it out")),
        ("task.teacher=null", ("task.teacher is not set", "model=as_teacher")),
        ("task.teacher=/no/such.pt", ("/no/such.pt does not exist",)),
    ],
)
def test_shapes_that_are_refused(
    override: str, parts: tuple[str, ...], trainer: Trainer, teacher: Path, tmp_path: Path
) -> None:
    message = as_teacher(trainer, tmp_path / "run", teacher, override).message()
    assert all(part in message for part in parts)


def test_a_teacher_of_other_audio_is_told(
    trainer: Trainer, normalizing: Path, tmp_path: Path
) -> None:
    done = trainer.fork(tmp_path / "run", "bitla_w2a2", f"task.teacher={normalizing}")
    assert done.status == 0, done.output
    (said,) = [line for line in done.output.splitlines() if "task.normalize" in line]
    for part in ("WARNING", str(normalizing), "task.normalize=true"):
        assert part in said


def test_paths_and_ids_of_teachers(tmp_path: Path) -> None:
    def absolute(value: str, key: str = "teacher") -> str:
        config = OmegaConf.create({"common": {"user_dir": None}, "task": {key: value}})
        _make_paths_absolute(config, str(tmp_path))
        return config.task[key]

    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert absolute("facebook/hubert-base-ls960") == "facebook/hubert-base-ls960"
    assert absolute("facebook/hubert-base-ls960", "init_from") == "facebook/hubert-base-ls960"
    for path in ("mine/model", "exp/teacher.pt", "teacher", "a/b/c", "./a/b", "../b"):
        assert absolute(path) == str(tmp_path / path), path
    assert absolute("a/b", "data") == str(tmp_path / "a/b")


def test_another_model_of_a_hub_is_another_teacher() -> None:
    """A path may have moved, an id does not."""
    moved = ("task.teacher", "/old/teacher.pt", "/new/teacher.pt")
    assert not _is_refused(moved, is_done=False)
    assert _is_refused(("task.teacher", "org/one", "org/other"), is_done=False)
    assert _is_refused(("task.teacher", "/old/teacher.pt", "org/one"), is_done=False)


# SLURM, rehearsed in a process of this machine

SLURM = ("run=slurm", "hydra/launcher=submitit_local", "hydra.launcher.gpus_per_node=0")


@pytest.mark.full
def test_a_job_of_submitit(trainer: Trainer, teacher: Path, tmp_path: Path) -> None:
    """Where the run would be without it, and resumed by the same command."""
    folder = tmp_path / "run"
    options = (
        f"task.teacher={teacher}",
        *SLURM,
        f"{PROCESSES}=2",
        "common.bf16=false",
        "dataset.max_tokens=48000",
    )
    done = trainer.fork(folder, "bitla_w2a2", *options)
    assert done.status == 0, done.output
    assert open_model(done.last).updates == 5
    assert (folder / ".hydra" / "config.yaml").is_file()
    assert "2 processes x 3 s of audio" in told_by_jobs(folder)
    done = trainer.fork(folder, "bitla_w2a2", *options, "optimization.max_update=8")
    assert done.status == 0, done.output
    assert open_model(done.last).updates == 8


@pytest.mark.full
def test_a_job_out_of_time_is_saved_and_queued_again(
    trainer: Trainer, teacher: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """SLURM's announcement, which submitit answers; here its local executor starts the job anew."""
    folder = tmp_path / "run"
    options = (
        f"task.teacher={teacher}",
        *SLURM,
        f"{PROCESSES}=1",
        "common.bf16=false",
        "optimization.max_update=60",
        "checkpoint.save_interval_updates=1000",
        "dataset.validate_interval_updates=1000",
    )
    command = trainer.command(folder, "bitla_w2a2", *options)
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
        while "num_updates=3," not in told_by_jobs(folder):
            assert process.poll() is None, told_by_jobs(folder)
            time.sleep(0.05)
        for job in pids_with("submitit.core._submit", str(folder)):
            os.kill(job, signal.SIGUSR2)
    said = told_by_jobs(folder)
    assert process.returncode == 0, said
    stop = re.search(r"stopped by SIGUSR2 and saved at update (\d+)", said)
    assert 3 <= int(stop[1]) < 60
    assert f"num_updates={int(stop[1]) + 1}," in said
    assert open_model(folder / "checkpoints" / "checkpoint_last.pt").updates == 60


def told_by_jobs(folder: Path) -> str:
    logs = (folder / ".submitit").rglob("*_log.*")
    return "\n".join(path.read_text() for path in sorted(logs))


def pids_with(*words: str) -> list[int]:
    """Processes whose command line has all of them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended since
            line = path.read_bytes().decode(errors="replace")
            if all(word in line for word in words):
                found.append(int(path.parent.name))
    return found


def test_slurm_asks_for_what_it_trains_on() -> None:
    pytest.importorskip("submitit")
    given = ["run=slurm", "hydra.launcher.gpus_per_node=4", "hydra.launcher.partition=fast"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose("bitla_w1a1", given, return_hydra_config=True)
    asked = OmegaConf.to_container(composed, resolve=False)
    launcher = composed.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.gpus_per_node, launcher.nodes, launcher.partition) == (4, 1, "fast")
    assert launcher.max_num_timeout > 0  # it is queued again and resumes
    assert composed.hydra.mode == RunMode.MULTIRUN
    assert asked["hydra"]["sweep"]["dir"] == "${hydra.run.dir}"
    assert "launcher.gpus_per_node" in asked["distributed_training"]["distributed_world_size"]
