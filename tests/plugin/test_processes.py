"""Several processes of one run, on CPUs: they train what one trains, and stop together."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.plugin import register
from fairseq_lowbit.plugin.compat import infer_on_cpu
from fairseq_lowbit.plugin.interruption import STOPPED
from tests.plugin.conftest import Run, free_port, user_environment

UPDATES = 8
# 6 updates per epoch of one process with two micro-batches each; no masks, which would be drawn
# from every process's own random numbers.
OPTIONS = (
    f"optimization.max_update={UPDATES}",
    "optimization.lr=[0.0005]",
    "dataset.max_tokens=48000",
    "dataset.validate_interval_updates=4",
    "checkpoint.save_interval_updates=4",
)
TERMS = ("loss", "loss_final", "loss_layers", "loss_attention")


def weights(run, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(run.folder / f"weights{rank}.pt")


@pytest.fixture(scope="module")
def alone(trainer, teacher: Path, tmp_path_factory: pytest.TempPathFactory):
    """One process that sums the gradients of two micro-batches."""
    run = trainer.fork(
        tmp_path_factory.mktemp("alone") / "run",
        "bitla_w2a2",
        f"task.teacher={teacher}",
        *OPTIONS,
        "optimization.update_freq=[2]",
        accident=("keep_weights", 1),
    )
    assert run.status == 0, run.output
    return run


def assert_same_training(run, alone) -> None:
    """To float tolerance: losses as printed, with four digits, and weights."""
    for term in TERMS:
        assert run.logged(term) == pytest.approx(alone.logged(term), rel=1e-3, abs=2e-4), term
    for name, value in alone.state()["model"].items():
        torch.testing.assert_close(run.state()["model"][name], value, rtol=1e-3, atol=1e-5)
    assert open_model(run.last).updates == UPDATES


def test_two_processes_do_what_one_does(alone, trainer, teacher: Path, tmp_path: Path) -> None:
    options = (f"task.teacher={teacher}", *OPTIONS)
    keep = ("keep_weights", 1)
    first, second = trainer.fork_ranks(
        tmp_path / "run", "bitla_w2a2", *options, accidents=(keep, keep)
    )
    assert (first.status, second.status) == (0, 0), first.output + second.output
    assert_same_training(first, alone)
    # Calibration gave every process the scales that one alone finds.
    calibrated = weights(alone, 0)
    assert sum("log_scale" in name for name in calibrated) == 2 * 14
    for rank in (0, 1):
        own = weights(first, rank)
        assert all(torch.equal(own[name], value) for name, value in calibrated.items())
    # One of them speaks and writes.
    for said in ("precision bitla_w2a2", "health at update 5", "num_updates=4,"):
        assert first.output.count(said) == 1
        assert said not in second.output
    assert len((first.folder / "hydra_train.log").read_text().splitlines()) > 50
    assert [record["update"] for record in first.health()] == [0, 5]
    updates = [(record["phase"], record["update"]) for record in first.progress()]
    assert updates == [(record["phase"], record["update"]) for record in alone.progress()]


@pytest.mark.full
def test_one_command_spawns_them_and_hands_signals_on(
    trainer, teacher: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The command of docs/training.md, preempted: the signal goes to the process that waits."""
    folder = tmp_path / "run"
    command = trainer.command(
        folder,
        "bitla_w2a2",
        f"task.teacher={teacher}",
        "optimization.max_update=1000",
        "dataset.disable_validation=true",
        "distributed_training.distributed_world_size=2",
    )
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    lines = []
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipe) as process:
        for line in process.stdout:
            lines.append(line)
            if "num_updates=2," in line:
                process.terminate()
    output = "".join(lines)
    assert process.returncode == STOPPED, output
    assert "Traceback" not in output
    updates = open_model(folder / "checkpoints" / "checkpoint_last.pt").updates
    assert 2 < updates < 1000
    assert f"stopped by SIGTERM and saved at update {updates}: run the same command" in output
    assert sum(line.startswith("precision bitla_w2a2") for line in lines) == 1
    assert output.count(f"num_updates={updates},") == 1
    assert (folder / "tensorboard" / "train_inner").is_dir()


def test_both_stop_in_the_same_update(alone, trainer, teacher: Path, tmp_path: Path) -> None:
    """The signal reaches the processes at different updates, the second not at all."""
    options = (f"task.teacher={teacher}", *OPTIONS)
    folder = tmp_path / "run"
    stopped = trainer.fork_ranks(
        folder, "bitla_w2a2", *options, accidents=(("signal_in_update", 5), ("signal_in_update", 3))
    )
    assert [run.status for run in stopped] == [STOPPED, STOPPED], stopped[0].output
    # After the gradients of update 3 were summed, so update 4 brings it to the other, and is due a
    # validation that has to be made up for.
    assert open_model(stopped[0].last).updates == 4
    assert "valid on" not in stopped[0].output
    first, second = trainer.fork_ranks(folder, "bitla_w2a2", *options)
    assert (first.status, second.status) == (0, 0), first.output + second.output
    assert open_model(first.last).updates == UPDATES
    for name, value in alone.state()["model"].items():
        torch.testing.assert_close(first.state()["model"][name], value, rtol=1e-3, atol=1e-5)
    best = alone.state()["extra_state"]["best"]
    assert first.state()["extra_state"]["best"] == pytest.approx(best, rel=1e-3)


def refused(runs: list) -> str:
    """The one message of processes that do not start."""
    first, *others = runs
    assert all(run.status == 2 and "ERROR" not in run.output for run in others)
    assert not first.last.exists()
    assert first.output.count("num_updates=") == 0
    return first.message()


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def test_different_data(trainer, corpus: Path, broken: Path, tmp_path: Path) -> None:
    def run() -> str:
        each = ((f"task.data={corpus}",), (f"task.data={broken}",))
        return refused(trainer.fork_ranks(tmp_path / "run", "hubert_fastconv", each=each))

    labels = (broken / "train.km").read_text()
    edit(broken / "train.km", lambda lines: [lines[0][::-1], *lines[1:]])
    message = run()
    for part in ("files or labels of split train", "rank 1"):
        assert part in message
    (broken / "train.km").write_text(labels)
    edit(broken / "valid.tsv", lambda lines: lines[:-1])
    edit(broken / "valid.km", lambda lines: lines[:-1])
    message = run()
    for part in ("files or labels of split valid", "rank 1"):
        assert part in message
    (broken / "valid.tsv").unlink()
    message = run()
    assert message.startswith("rank 1: ")
    assert str(broken / "valid.tsv") in message


@pytest.mark.parametrize("key", ["task.teacher", "task.init_from"])
def test_a_mistake_that_all_meet_is_told_once(
    key: str, trainer, teacher: Path, tmp_path: Path
) -> None:
    options = (f"task.teacher={teacher}", f"{key}=/no/such.pt")
    message = refused(trainer.fork_ranks(tmp_path / "run", "bitla_w2a2", *options))
    assert message == "checkpoint /no/such.pt does not exist"


def test_unusable_files_of_all_processes_are_listed(
    trainer, broken: Path, teacher: Path, tmp_path: Path
) -> None:
    names = ("train02", "train05", "train11")
    for name in names:
        path = broken / "audio" / f"{name}.flac"
        path.write_bytes(path.read_bytes()[:2000])
    first, second = trainer.fork_ranks(
        tmp_path / "run",
        "bitla_w2a2",
        f"task.teacher={teacher}",
        f"task.data={broken}",
        "task.max_unusable=0.5",
        "dataset.max_tokens=48000",
        "optimization.max_update=6",
        "dataset.validate_interval_updates=6",
    )
    assert (first.status, second.status) == (0, 0), first.output + second.output
    listed = (first.checkpoints / "skipped_files.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == [f"audio/{n}.flac" for n in names]
    said = [line for line in first.output.splitlines() if "skipped unusable file" in line]
    assert len(said) == 3
    assert all(sum(name in line for line in said) == 1 for name in names)
    assert "skipped unusable file" not in second.output


def test_a_killed_process_ends_the_others(trainer, teacher: Path, tmp_path: Path) -> None:
    first, second = trainer.fork_ranks(
        tmp_path / "run",
        "bitla_w2a2",
        f"task.teacher={teacher}",
        *OPTIONS,
        accidents=(None, ("kill_in_update", 5)),
    )
    assert second.status == -signal.SIGKILL
    assert first.status == 1
    assert "Traceback" not in first.output
    assert "rank 0: another process of this run has ended" in first.output
    assert open_model(first.last).updates == 4


# Schedules

STAGES = ("task.stages=[{precision: w2a2, updates: 4}, {precision: w1a1, updates: 4}]", *OPTIONS)
BOTH = ["stage 1 of 2 (bitla_w2a2)", "stage 2 of 2 (bitla_w1a1)"]


def started(run) -> list[str]:
    """Which stages a process has trained, in its own words."""
    return re.findall(r"INFO\] - (stage \d of \d \(\w+\)): \d+ updates", run.output)


@pytest.fixture(scope="module")
def staged(trainer, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A schedule by the command of docs/training.md."""
    folder = tmp_path_factory.mktemp("staged") / "run"
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    launched = [torchrun, "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = trainer.command(folder, "bitla_w1a1", f"task.teacher={teacher}", *STAGES)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = user_environment() | {"PYTHONWARNINGS": ""}
    done = subprocess.run(
        [*launched, *command], cwd=folder.parent, env=environment, check=False, **pipe
    )
    return Run(done.returncode, done.stdout, folder)


@pytest.mark.full
def test_torchrun_goes_through_a_schedule(staged: Run) -> None:
    assert staged.status == 0, staged.output
    assert "Traceback" not in staged.output
    assert "already initialized" not in staged.output
    # Said and written by one process.
    assert started(staged) == BOTH
    for precision in ("bitla_w2a2", "bitla_w1a1"):
        assert staged.output.count(f"\nprecision {precision}") == 1
    first = staged.checkpoints / "stage1_bitla_w2a2"
    for folder, name in ((first, "bitla_w2a2"), (staged.checkpoints, "bitla_w1a1")):
        loaded = open_model(folder / "checkpoint_last.pt")
        assert (loaded.updates, loaded.model.plan.precision.name) == (4, name)
        assert json.loads((folder / "finished.json").read_text())["made_updates"] == 4
    assert staged.state()["cfg"]["task"]["init_from"] == str(first / "checkpoint_last.pt")


@pytest.mark.full
def test_a_schedule_killed_behind_a_switch(
    staged: Run, trainer, teacher: Path, tmp_path: Path
) -> None:
    folder, options = tmp_path / "run", (f"task.teacher={teacher}", *STAGES)
    accident = ("kill_in_update", 6)
    killed = trainer.fork_ranks(folder, "bitla_w1a1", *options, accidents=(accident, accident))
    assert [run.status for run in killed] == [-signal.SIGKILL] * 2, killed[0].output
    assert started(killed[0]) == BOTH
    # A process that does not see the finished stage would train another one than the first.
    elsewhere = ((), (f"hydra.run.dir={tmp_path / 'elsewhere'}",))
    message = refused(trainer.fork_ranks(folder, "bitla_w1a1", *options, each=elsewhere))
    for part in ("rank 1", "different models", "hydra.run.dir"):
        assert part in message
    first, second = trainer.fork_ranks(folder, "bitla_w1a1", *options)
    assert (first.status, second.status) == (0, 0), first.output + second.output
    assert started(first) == BOTH[1:]
    assert not started(second)
    for place in ("stage1_bitla_w2a2/checkpoint_last.pt", "checkpoint_last.pt"):
        own, expected = (
            torch.load(run.checkpoints / place, weights_only=False)["model"]
            for run in (first, staged)
        )
        for name, value in expected.items():
            assert torch.equal(own[name], value), (place, name)


def test_a_mark_that_cannot_be_written_stops_all(trainer, teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    blocked = folder / "checkpoints" / "stage1_bitla_w2a2" / "finished.json" / "in the way"
    blocked.mkdir(parents=True)
    first, second = trainer.fork_ranks(folder, "bitla_w1a1", f"task.teacher={teacher}", *STAGES)
    assert "finished.json" in first.message()
    assert (second.status, "ERROR" in second.output) == (2, False)
    assert open_model(blocked.parents[1] / "checkpoint_last.pt").updates == 4


# Launching without GPUs


def launch(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], **options: object):
    """What the processes of a launcher make of their environment."""
    register()
    for key in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    training = {
        "distributed_world_size": 4,
        "distributed_rank": 0,
        "distributed_backend": "nccl",
        "distributed_init_method": None,
        "distributed_port": -1,
        "distributed_no_spawn": False,
        "ddp_backend": "legacy_ddp",
        "pipeline_model_parallel": False,
        "device_id": 0,
    }
    config = OmegaConf.create(training | options)
    infer_on_cpu(config)
    return config


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Task 3 of 4 on two nodes."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node7\necho node8\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return {
        "SLURM_STEP_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
    }


def test_slurm_on_cpus(monkeypatch: pytest.MonkeyPatch, slurm: dict[str, str]) -> None:
    config = launch(monkeypatch, slurm, distributed_port=12345)
    assert config.distributed_init_method == "tcp://node7:12345"
    assert (config.distributed_rank, config.distributed_world_size) == (3, 4)
    assert (config.distributed_backend, config.device_id) == ("gloo", 0)
    assert config.distributed_no_spawn


def test_slurm_with_one_task_per_node(
    monkeypatch: pytest.MonkeyPatch, slurm: dict[str, str]
) -> None:
    with pytest.raises(LowbitError, match="--ntasks-per-node"):
        launch(monkeypatch, slurm | {"SLURM_NTASKS_PER_NODE": "1"}, distributed_port=12345)


def test_a_backend_that_needs_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LowbitError, match=r"ddp_backend pytorch_ddp .* legacy_ddp"):
        launch(monkeypatch, {}, ddp_backend="pytorch_ddp")
