"""A run that is killed and started again by the same command ends as if nothing had happened."""

import fcntl
import json
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.interop import open_model
from fairseq_lowbit.plugin.interruption import STOPPED

UPDATES = 40
OPTIONS = (
    f"optimization.max_update={UPDATES}",
    "optimizer.scale_lr_ratio=0.5",
    "criterion.mask=true",
    # Equal sizes and worker processes over a dozen epochs: batches and crops have to come back.
    "task.max_sample_size=16000",
    "dataset.num_workers=1",
    # What draws random numbers in a forward has to draw the same ones again.
    "model.dropout=0.1",
)


@pytest.fixture(scope="module")
def uninterrupted(trainer, teacher: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run = trainer.run(folder, "bitla_w1a1", f"task.teacher={teacher}", *OPTIONS)
    assert run.status == 0, run.output
    assert "calibrating" in run.output
    return run


def assert_same_end(run, uninterrupted) -> None:
    """Weights, quantizers, Adam's moments, schedule and random crops: everything but clocks."""
    assert run.status == 0, run.output
    own, expected = run.state(), uninterrupted.state()
    assert own["optimizer_history"][-1]["num_updates"] == UPDATES
    assert own["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(own["model"][name], value), name
    states = own["last_optimizer_state"], expected["last_optimizer_state"]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, moments in states[1]["state"].items():
        for key, value in moments.items():
            assert torch.equal(states[0]["state"][index][key], value), (index, key)
    assert own["extra_state"]["train_iterator"] == expected["extra_state"]["train_iterator"]
    assert own["extra_state"]["best"] == expected["extra_state"]["best"]
    assert run.health() == uninterrupted.health()
    assert run.progress() == uninterrupted.progress()


def kill_at_update(command: list[str], folder: Path, env: dict, update: int) -> None:
    """``kill -9`` as soon as the log shows ``update``. The pipe is short and nothing is read ahead,
    so that the process cannot run far beyond that update."""
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    ) as process:
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        for line in iter(process.stdout.readline, b""):
            if f"num_updates={update},".encode() in line:
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL


@pytest.mark.full
def test_killed_again_and_again(
    trainer, teacher: Path, uninterrupted, environment: dict, tmp_path: Path
) -> None:
    """The real command, at random updates after the first checkpoint, twice in one run."""
    folder, options = tmp_path / "run", (f"task.teacher={teacher}", *OPTIONS)
    command = trainer.command(folder, "bitla_w1a1", *options)
    moments = random.Random(0).sample(range(6, UPDATES - 12), 2)
    for update in sorted(moments):
        kill_at_update(command, tmp_path, environment, update)
    run = trainer.run(folder, "bitla_w1a1", *options)
    assert "calibrating" not in run.output
    assert len(run.logged("loss")) < UPDATES
    assert_same_end(run, uninterrupted)


# Every fifth update is saved once and copied to checkpoint_best.pt and checkpoint_last.pt; the
# fourth time, in the middle of an epoch, under its number first.
@pytest.mark.parametrize(
    "moment",
    [
        ("kill_while_saving", 4),
        ("kill_while_copying", 3),
        ("kill_in_update", 17),
    ],
    ids=lambda moment: "{}-{}".format(*moment),
)
def test_killed_at_the_worst_moment(
    moment: tuple[str, int], trainer, teacher: Path, uninterrupted, tmp_path: Path
) -> None:
    folder, options = tmp_path / "run", (f"task.teacher={teacher}", *OPTIONS)
    killed = trainer.fork(folder, "bitla_w1a1", *options, accident=moment)
    assert killed.status == -signal.SIGKILL, killed.output
    done = len(killed.logged("loss"))
    assert 5 < done < UPDATES
    assert all(open_model(path).updates < UPDATES for path in killed.checkpoints.glob("*.pt"))
    assert killed.last.exists()
    run = trainer.fork(folder, "bitla_w1a1", *options)
    assert "calibrating" not in run.output
    assert len(run.logged("loss")) < UPDATES
    assert_same_end(run, uninterrupted)
    assert not list(run.checkpoints.glob("*.tmp"))


def test_asked_to_stop_again_and_again(
    trainer, teacher: Path, uninterrupted, tmp_path: Path
) -> None:
    """Signals to the whole process group, data workers too, until the run has made its updates."""
    folder, options = tmp_path / "run", (f"task.teacher={teacher}", *OPTIONS)
    moments = [
        (("signal_in_update", 18), 18),  # in the middle of an epoch
        (("signal_in_update", 2, "SIGUSR1"), 20),  # which is due a validation
        (("signal_in_validation", 1), 20),  # while it is made up for
        (("signal_in_validation", 2), 25),  # the first one made up for, the second at update 25
        (("signal_in_update", UPDATES - 25), UPDATES),
    ]
    for moment, last in moments:
        stopped = trainer.fork(folder, "bitla_w1a1", *options, accident=moment)
        assert stopped.status == STOPPED, stopped.output
        assert "Traceback" not in stopped.output
        assert re.search(rf"stopped by SIG\w+ and saved at update {last}:", stopped.output)
        assert open_model(stopped.last).updates == last
        # No time is spent on a validation.
        validations = [line for line in stopped.output.splitlines() if "valid on 'valid'" in line]
        assert not any(f"num_updates {last} " in line for line in validations)
    run = trainer.fork(folder, "bitla_w1a1", *options)
    assert run.logged("loss") == []
    assert_same_end(run, uninterrupted)
    best = torch.load(uninterrupted.checkpoints / "checkpoint_best.pt")["model"]
    own = torch.load(run.checkpoints / "checkpoint_best.pt")["model"]
    assert all(torch.equal(own[name], value) for name, value in best.items())


def test_killed_before_the_first_checkpoint(
    trainer, teacher: Path, uninterrupted, tmp_path: Path
) -> None:
    folder, options = tmp_path / "run", (f"task.teacher={teacher}", *OPTIONS)
    killed = trainer.fork(folder, "bitla_w1a1", *options, accident=("kill_while_saving", 1))
    assert killed.status == -signal.SIGKILL, killed.output
    assert not killed.last.exists()
    run = trainer.fork(folder, "bitla_w1a1", *options)
    assert "calibrating" in run.output
    assert_same_end(run, uninterrupted)


def test_a_finished_run_is_left_alone(trainer, teacher: Path, uninterrupted) -> None:
    before = uninterrupted.last.read_bytes()
    run = trainer.fork(uninterrupted.folder, "bitla_w1a1", f"task.teacher={teacher}", *OPTIONS)
    assert run.status == 0, run.output
    assert run.logged("loss") == []
    assert uninterrupted.last.read_bytes() == before


def test_a_truncated_last_checkpoint(
    train: Callable, trainer, teacher: Path, tmp_path: Path
) -> None:
    options = ("bitla_w1a1", f"task.teacher={teacher}")
    run = train(*options)
    run.last.write_bytes(run.last.read_bytes()[:5000])
    message = trainer.fork(run.folder, *options, "optimization.max_update=10").message()
    assert str(run.last) in message
    assert "truncated" in message


def record(run) -> dict[str, bytes]:
    """What says how the checkpoint came about, and the checkpoint."""
    files = [*(run.folder / ".hydra").iterdir(), run.last, run.checkpoints / "precision_plan.json"]
    return {path.name: path.read_bytes() for path in files}


def test_another_run_in_the_folder_of_a_finished_one(
    train: Callable, trainer, teacher: Path, tmp_path: Path
) -> None:
    run = train("bitla_w1a1", f"task.teacher={teacher}")
    before = record(run)
    copied, other = tmp_path / "copied.pt", tmp_path / "other.pt"
    shutil.copy(teacher, copied)
    other.write_bytes(teacher.read_bytes() + b" ")
    ours = ("bitla_w1a1", f"task.teacher={teacher}")
    rule = "model.precision.rules=[{match: '*.fc1', weight_bits: 2}]"
    result = ("optimization.lr=[0.1]", "common.seed=2", "criterion.mask=true")
    for (config, *options), told in {
        ("bitla_w2a2", ours[1]): "model.precision.name bitla_w1a1, not bitla_w2a2: ",
        (*ours, rule): "model.precision.rules [], not [{'match': '*.fc1', 'weight_bits': 2}]: ",
        ("bitla_w1a1", f"task.teacher={other}", *result): (
            f"criterion.mask False, not True, task.teacher {teacher}, not {other}, "
            "optimization.lr [0.005], not [0.1] (and 1 more): "
        ),
    }.items():
        refused = trainer.fork(run.folder, config, *options).message()
        assert f"{run.checkpoints} holds a finished run with {told}" in refused
        assert "hydra.run.dir" in refused
        assert record(run) == before
    # What does not decide the result may differ.
    same = ("common.log_interval=3", "dataset.num_workers=1", "task.health_interval=2")
    again = trainer.fork(run.folder, "bitla_w1a1", f"task.teacher={copied}", *same)
    assert again.status == 0, again.output
    assert "this run has made its 5 updates" in again.output


def test_another_run_in_the_folder_of_an_unfinished_one(
    train: Callable, trainer, teacher: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.pt"
    shutil.copy(teacher, own)
    run = train("bitla_w1a1", f"task.teacher={own}")
    before = record(run)
    longer = "optimization.max_update=6"
    for option in (f"task.init_from={teacher}", "criterion.layer_weight=2"):
        options = (f"task.teacher={own}", longer, option)
        refused = trainer.fork(run.folder, "bitla_w1a1", *options).message()
        assert f"{run.checkpoints} holds a run with {option.partition('=')[0]} " in refused
        assert record(run) == before
    # The rate may have to change, and the files may have been moved.
    moved = own.rename(tmp_path / "moved.pt")
    options = (f"task.teacher={moved}", longer, "optimization.lr=[0.004]")
    done = trainer.fork(run.folder, "bitla_w1a1", *options)
    assert done.status == 0, done.output
    assert f"going on although task.teacher was {own} and is {moved} now" in done.output
    assert "going on although optimization.lr was [0.005] and is [0.004] now" in done.output
    assert open_model(run.last).updates == 6


def test_another_shape_in_the_same_folder(train: Callable, trainer) -> None:
    run = train("hubert_fastconv")
    refused = trainer.fork(run.folder, "hubert_fastconv", "model.final_dim=8").message()
    assert "model.final_dim 16, not 8" in refused
    # Its own checkpoint is not asked for, but would be replaced.
    elsewhere = ("model.final_dim=8", "checkpoint.restore_file=none.pt")
    refused = trainer.fork(run.folder, "hubert_fastconv", *elsewhere).message()
    assert "model.final_dim 16, not 8" in refused
    assert "hydra.run.dir" in refused


def test_half_a_health_record(train: Callable, trainer, teacher: Path) -> None:
    """What a kill in the middle of a line leaves is neither in the way nor kept."""
    options = ("bitla_w1a1", f"task.teacher={teacher}")
    run = train(*options)
    path = run.checkpoints / "health.jsonl"
    path.write_text(path.read_text() + '{"update": 5, "quantiz')
    resumed = trainer.fork(run.folder, *options, "optimization.max_update=10")
    assert resumed.status == 0, resumed.output
    assert [record["update"] for record in resumed.health()] == [0, 5]


def test_a_run_of_an_earlier_version_goes_on(
    trainer, student_run, teacher: Path, tmp_path: Path
) -> None:
    """Its plan lacks a setting that has been added since."""
    folder = tmp_path / "run"
    shutil.copytree(student_run.folder, folder)
    path = folder / "checkpoints" / "precision_plan.json"
    plan = json.loads(path.read_text())
    del plan["precision"]["squash_std"]
    path.write_text(json.dumps(plan))
    options = (f"task.teacher={teacher}", "optimization.max_update=31")
    run = trainer.fork(folder, "bitla_w1a1", *options)
    assert run.status == 0, run.output
    assert open_model(run.last).updates == 31
