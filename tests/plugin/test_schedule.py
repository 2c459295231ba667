"""Runs in stages by one command: what they leave, and that an interruption leaves no trace."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_lowbit.interop import open_model
from fairseq_lowbit.runs.folder import read_progress

STAGES = (
    "task.stages=["
    "{precision: w4a4, updates: 6},"
    "{precision: w2a2, updates: 8, teacher: previous, lr: 0.002},"
    "{precision: w1a1, lr: 1e-30}]"
)
FOLDERS = ("stage1_bitla_w4a4", "stage2_bitla_w2a2", "")
UPDATES = (6, 8, 5)


def checkpoint(run, index: int) -> Path:
    return run.checkpoints / FOLDERS[index] / "checkpoint_last.pt"


def state(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=False)


def scales(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state(path)["model"].items() if "log_scale" in name}


def started(run) -> list[str]:
    """Which stages a command has trained, in its own words."""
    return re.findall(r"INFO\] - (stage \d of \d \(\w+\)): \d+ updates", run.output)


def assert_same_weights(one: Path, other: Path) -> None:
    own, expected = state(one), state(other)
    assert own["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(own["model"][name], value), name
    for key in ("train_iterator", "best"):
        assert own["extra_state"][key] == expected["extra_state"][key]
    history = [s["optimizer_history"][-1]["num_updates"] for s in (own, expected)]
    assert history[0] == history[1]


@pytest.fixture(scope="module")
def uninterrupted(trainer, teacher: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("schedule") / "run"
    run = trainer.run(folder, "bitla_w1a1", f"task.teacher={teacher}", STAGES)
    assert run.status == 0, run.output
    return run


def test_one_command_runs_all_stages(uninterrupted, teacher: Path) -> None:
    assert started(uninterrupted) == [
        "stage 1 of 3 (bitla_w4a4)",
        "stage 2 of 3 (bitla_w2a2)",
        "stage 3 of 3 (bitla_w1a1)",
    ]
    for index, updates in enumerate(UPDATES):
        loaded = open_model(checkpoint(uninterrupted, index))
        assert loaded.updates == updates
        assert loaded.model.plan.precision.name == ("bitla_w4a4", "bitla_w2a2", "bitla_w1a1")[index]
    configs = [state(checkpoint(uninterrupted, index))["cfg"]["task"] for index in range(3)]
    assert [c["init_from"] for c in configs] == [
        None,
        str(checkpoint(uninterrupted, 0)),
        str(checkpoint(uninterrupted, 1)),
    ]
    assert [c["teacher"] for c in configs] == [
        str(teacher),
        str(checkpoint(uninterrupted, 0)),
        str(teacher),
    ]
    # The table at the end is the last stage's, and so is what lies where a plain run puts it.
    assert len(uninterrupted.health()) == 1
    assert uninterrupted.output.count("health at update") == 1
    for folder, updates in zip(FOLDERS, UPDATES, strict=True):
        assert (uninterrupted.checkpoints / folder / "checkpoint_best.pt").is_file()
        records = read_progress(uninterrupted.checkpoints / folder)
        trained = [record["update"] for record in records if record["phase"] == "train"]
        assert trained == list(range(1, updates + 1))
        events = uninterrupted.folder / "tensorboard" / folder / "train_inner"
        assert list(events.glob("events*"))


def test_a_stage_is_the_run_one_would_type(uninterrupted, train: Callable) -> None:
    """Nothing of one stage reaches the next through the process that they share."""
    first = checkpoint(uninterrupted, 0)
    by_hand = train(
        "bitla_w2a2",
        f"task.teacher={first}",
        f"task.init_from={first}",
        "optimization.max_update=8",
        "optimization.lr=[0.002]",
    )
    assert_same_weights(checkpoint(uninterrupted, 1), by_hand.last)
    rates = re.findall(r"\blr=([^,\s]+)", by_hand.output)
    assert len(rates) == 8
    assert re.findall(r"\blr=([^,\s]+)", uninterrupted.output)[6:14] == rates


@pytest.mark.parametrize(
    "moment, marked, resumed",
    [
        (("kill_in_update", UPDATES[0] + 7), True, "stage 2 of 3 (bitla_w2a2)"),
        # Each stage saves at its 5th and at its last update.
        (("kill_while_saving", 3), True, "stage 2 of 3 (bitla_w2a2)"),
        (("kill_while_saving", 3), False, "stage 1 of 3 (bitla_w4a4)"),
    ],
    ids=["in-stage-2", "before-stage-2-saves", "before-stage-1-is-marked"],
)
def test_killed(
    moment: tuple[str, int],
    marked: bool,
    resumed: str,
    trainer,
    teacher: Path,
    uninterrupted,
    tmp_path: Path,
) -> None:
    folder, options = tmp_path / "run", (f"task.teacher={teacher}", STAGES)
    killed = trainer.fork(folder, "bitla_w1a1", *options, accident=moment)
    assert killed.status == -signal.SIGKILL, killed.output
    assert started(killed)[-1] == "stage 2 of 3 (bitla_w2a2)"
    mark = checkpoint(killed, 0).with_name("finished.json")
    if not marked:
        mark.unlink()
    run = trainer.fork(folder, "bitla_w1a1", *options)
    assert run.status == 0, run.output
    assert started(run)[0] == resumed
    assert mark.is_file()
    for index in range(3):
        assert_same_weights(checkpoint(run, index), checkpoint(uninterrupted, index))
    assert run.health() == uninterrupted.health()


def test_a_finished_schedule_can_be_prolonged(
    trainer, teacher: Path, uninterrupted, tmp_path: Path
) -> None:
    folder, options = tmp_path / "run", (f"task.teacher={teacher}", STAGES)
    shutil.copytree(uninterrupted.folder, folder)
    longer = trainer.fork(folder, "bitla_w1a1", *options, "optimization.max_update=7")
    assert longer.status == 0, longer.output
    assert started(longer) == ["stage 3 of 3 (bitla_w1a1)"]
    assert len(longer.logged("loss")) == 7 - UPDATES[2]
    assert open_model(longer.last).updates == 7
    refused = trainer.fork(folder, "bitla_w1a1", f"task.teacher={teacher}").message()
    assert FOLDERS[0] in refused
    assert "hydra.run.dir" in refused


def test_scales_are_calibrated_anew_in_every_stage(
    uninterrupted, train: Callable, teacher: Path
) -> None:
    """A scale belongs to a bit width: the next stage fits its own to the weights it takes over.
    Stage 3 does not move: what it saved is what it began with."""
    before, after = scales(checkpoint(uninterrupted, 1)), scales(uninterrupted.last)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], value) for name, value in after.items())
    start = f"task.init_from={checkpoint(uninterrupted, 1)}"
    calibrated = train("bitla_w1a1", f"task.teacher={teacher}", start, "optimization.lr=[1e-30]")
    for name, value in scales(calibrated.last).items():
        assert torch.equal(after[name], value), name


def test_a_stage_that_stops_early_is_finished(train: Callable, teacher: Path) -> None:
    run = train(
        "bitla_w1a1",
        f"task.teacher={teacher}",
        "task.stages=[{precision: w1a2, updates: 1000, lr: 1e-30}, {precision: w1a1}]",
        "checkpoint.patience=1",
    )
    assert started(run) == ["stage 1 of 2 (bitla_w1a2)", "stage 2 of 2 (bitla_w1a1)"]
    stage = run.checkpoints / "stage1_bitla_w1a2"
    assert open_model(stage / "checkpoint_last.pt").updates == 10
    assert '"made_updates": 10' in (stage / "finished.json").read_text()


def test_a_sweep_over_schedules(trainer, teacher: Path, tmp_path: Path) -> None:
    run = trainer.fork(
        tmp_path / "unused",
        "bitl_w1a1",
        "-m",
        f"hydra.sweep.dir={tmp_path}/sweep",
        f"task.teacher={teacher}",
        "schedule=w1a2_w1a1,none",
        "optimization.max_update=2",
    )
    assert run.status == 0, run.output
    last = "checkpoints/checkpoint_last.pt"
    sweep = tmp_path / "sweep"
    jobs = ("schedule-w1a2_w1a1", "schedule-none")
    staged, plain = (state(sweep / job / last)["cfg"] for job in jobs)
    first = sweep / jobs[0] / "checkpoints/stage1_bitl_w1a2/checkpoint_last.pt"
    assert staged["task"]["init_from"] == str(first)
    assert open_model(first).updates == 2
    assert plain["task"]["init_from"] is None


def test_a_stage_whose_checkpoint_is_gone(
    trainer, teacher: Path, uninterrupted, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.folder, folder)
    gone = folder / "checkpoints" / FOLDERS[1] / "checkpoint_last.pt"
    gone.unlink()
    run = trainer.fork(folder, "bitla_w1a1", f"task.teacher={teacher}", STAGES)
    assert run.message() == f"checkpoint {gone} does not exist"


def test_contradictions_are_told_before_training(trainer, teacher: Path, tmp_path: Path) -> None:
    stages = "task.stages=[{precision: w8a8}, {precision: w1a2}]"
    run = trainer.fork(tmp_path / "run", "bitla_w1a1", f"task.teacher={teacher}", stages)
    assert "bitla_w1a2" in run.message()
    assert not run.checkpoints.exists()
