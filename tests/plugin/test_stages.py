"""Which stages a schedule has, which of them comes next, and what contradicts what."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.logging import progress_bar
from omegaconf import DictConfig, OmegaConf

from fairseq_lowbit.configurations import compose_config
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.plugin import callback
from fairseq_lowbit.plugin.continuing import adopt_stored_form
from fairseq_lowbit.plugin.stages import Schedule, read_stages, stage_configs, stops_early
from fairseq_lowbit.runs.folder import write_finished

THREE = [
    {"precision": "w8a8", "updates": 30},
    {"precision": "w4a4", "teacher": "previous", "lr": 0.001},
    {"precision": "w2a2"},
]


@cache
def _composed() -> DictConfig:
    given = ["task.data=/data", "task.teacher=/t.pt", "optimization.max_update=100"]
    return compose_config("bitla_w2a2", ["model=fastconv_tiny", *given])


def config(stages: object, **changes: Any) -> DictConfig:
    """A run of BiT-LA W2A2 of 100 updates. ``changes`` have ``__`` for the dots of their keys."""
    made = copy.deepcopy(_composed())
    OmegaConf.set_struct(made, False)
    made.task.stages = stages
    for key, value in changes.items():
        OmegaConf.update(made, key.replace("__", "."), value)
    return made


def at(folder: Path, stages: list[dict] = THREE) -> Schedule:
    return Schedule.from_config(config(stages, checkpoint__save_dir=str(folder)))


def make_checkpoint(schedule: Schedule, index: int, updates: int = 1) -> None:
    save(schedule.checkpoint(index), updates)


def save(path: Path, updates: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"cfg": {"model": {}}, "model": {}, "optimizer_history": [{"num_updates": updates}]}
    torch.save(state, path)


def finish(schedule: Schedule, *indices: int) -> None:
    for index in indices:
        make_checkpoint(schedule, index, updates=5)
        folder = schedule.checkpoint(index).parent
        write_finished(folder, 5, 100, asdict(schedule.stages[index]))


@pytest.fixture
def schedule(tmp_path: Path) -> Schedule:
    return at(tmp_path)


def test_names_are_completed_by_the_method_of_the_run() -> None:
    assert [stage.precision for stage in read_stages(config(THREE))] == [
        "bitla_w8a8",
        "bitla_w4a4",
        "bitla_w2a2",
    ]
    mixed = [{"precision": "bitl_w2a2"}, {"precision": "w2a2"}]
    assert [stage.precision for stage in read_stages(config(mixed))] == ["bitl_w2a2", "bitla_w2a2"]
    squashed = config([{"precision": "w8"}, {"precision": "w2"}], model__precision__name="sqwq_w2")
    assert [stage.precision for stage in read_stages(squashed)] == ["sqwq_w8", "sqwq_w2"]


def test_no_stages_without_a_schedule() -> None:
    assert read_stages(config([])) == []
    assert read_stages(compose_config("hubert_fastconv", ["task.data=/data"])) == []


@pytest.mark.parametrize(
    "method, name",
    [
        ("bitl", "w8a8_w4a4_w2a2_w1a1"),
        ("bitla", "w8a8_w4a4_w2a2_w1a1"),
        ("bitl", "w1a2_w1a1"),
        ("bitla", "w1a2_w1a1"),
        ("sqwq", "w8_w4_w2_w1"),
    ],
)
def test_schedules_that_come_with_the_package(method: str, name: str) -> None:
    given = ["task.data=/data", "task.teacher=/t.pt", f"schedule={name}"]
    last = f"{method}_{name.split('_')[-1]}"
    composed = compose_config(last, [*given, "task.stages.1.teacher=previous"])
    stages = read_stages(composed)
    assert [stage.precision for stage in stages] == [f"{method}_{bits}" for bits in name.split("_")]
    assert [stage.teacher for stage in stages][:2] == ["original", "previous"]


def test_the_configuration_of_each_stage(tmp_path: Path) -> None:
    run = config(THREE, checkpoint__save_dir=str(tmp_path), optimization__lr=[0.5])
    first, second, third = stage_configs(run, Schedule.from_config(run))
    assert [c.model.precision.name for c in (first, second, third)] == [
        "bitla_w8a8",
        "bitla_w4a4",
        "bitla_w2a2",
    ]
    assert [c.optimization.max_update for c in (first, second, third)] == [30, 100, 100]
    assert [c.lr_scheduler.total_num_update for c in (first, second, third)] == [30, 100, 100]
    assert [list(c.optimization.lr) for c in (first, second, third)] == [[0.5], [0.001], [0.5]]
    one, two = tmp_path / "stage1_bitla_w8a8", tmp_path / "stage2_bitla_w4a4"
    assert [c.checkpoint.save_dir for c in (first, second, third)] == [
        *map(str, (one, two, tmp_path))
    ]
    assert second.common.tensorboard_logdir == "tensorboard/stage2_bitla_w4a4"
    assert third.common.tensorboard_logdir == "tensorboard"
    assert first.task.init_from is None
    assert second.task.init_from == str(one / "checkpoint_last.pt")
    assert third.task.init_from == str(two / "checkpoint_last.pt")
    assert [c.task.teacher for c in (first, second, third)] == [
        "/t.pt",
        second.task.init_from,
        "/t.pt",
    ]
    assert run.model.precision.name == "bitla_w2a2"


def test_a_schedule_that_an_earlier_version_began_ends_in_its_form(tmp_path: Path) -> None:
    run = config(THREE, checkpoint__save_dir=str(tmp_path))
    adopt_stored_form(run, tmp_path)
    assert run.model.precision.form == "asymmetric"
    schedule = Schedule.from_config(run)
    finish(schedule, 0)  # with checkpoints that know no form
    adopt_stored_form(run, tmp_path)
    assert [c.model.precision.form for c in stage_configs(run, schedule)] == ["paper"] * 3


def test_a_start_of_its_own_is_the_first_stages(tmp_path: Path) -> None:
    run = config(THREE, checkpoint__save_dir=str(tmp_path), task__init_from="/start.pt")
    first, second, _ = stage_configs(run, Schedule.from_config(run))
    assert first.task.init_from == "/start.pt"
    assert second.task.init_from != "/start.pt"


def test_rules_hold_in_every_stage() -> None:
    rules = [{"match": "encoder.layers.0.*", "weight_bits": 8}]
    run = config(THREE, model__precision__rules=rules)
    for own in stage_configs(run, Schedule.from_config(run)):
        assert own.model.precision.rules == rules
    run = config(THREE, model__precision__rules=[{"match": "encoder.layer.*", "weight_bits": 8}])
    with pytest.raises(LowbitError, match=r"stage 1 of 3 \(bitla_w8a8\).*encoder\.layer\.\*"):
        stage_configs(run, Schedule.from_config(run))


W2 = {"precision": "w2a2"}


@pytest.mark.parametrize(
    "stages, named",
    [
        ([{"precision": "w9a9"}, W2], ["task.stages.0.precision", "bitla_w9a9", "9 bits"]),
        ([{"precision": "int8"}, W2], ["task.stages.0.precision", "int8", "bitla_wNaM"]),
        ([{"updates": 5}, W2], ["task.stages.0.precision", "mandatory"]),
        ([{"precision": "w8a8", "updates": 0}, W2], ["task.stages.0.updates 0", "at least one"]),
        ([{"precision": "w8a8"}, {**W2, "updates": -3}], ["task.stages.1.updates -3"]),
        ([{"precision": "w8a8", "updates": "many"}, W2], ["task.stages.0.updates", "many"]),
        ([{"precision": "w8a8", "lr": 0.0}, W2], ["task.stages.0.lr 0.0", "positive"]),
        ([{"precision": "w8a8", "steps": 5}, W2], ["task.stages.0.steps", "precision, updates"]),
        ([{"precision": "w8a8"}, {**W2, "teacher": "last"}], ["stages.1.teacher", "'last'"]),
        ([{"precision": "w8a8", "teacher": "previous"}, W2], ["stages.0.teacher", "original"]),
        ([{"precision": "w8"}, W2], ["stages.0.precision", "bitla_w8'", "write bitla_w8aM"]),
        ([{"precision": "w4a4"}, {"precision": "w1a1"}], ["this is a run of bitla_w2a2"]),
        ("w8a8", ["task.stages", "w8a8"]),
        (["w8a8", "w2a2"], ["task.stages", "w8a8"]),
    ],
)  # fmt: skip
def test_contradictory_stages(stages: object, named: list[str]) -> None:
    with pytest.raises(LowbitError) as refused:
        read_stages(config(stages))
    for part in named:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("checkpoint.no_save", True),
        ("checkpoint.no_last_checkpoints", True),
        ("checkpoint.restore_file", "/other.pt"),
        ("checkpoint.finetune_from_model", "/other.pt"),
    ],
)
def test_settings_that_stages_rule_out(key: str, value: object) -> None:
    with pytest.raises(LowbitError, match=key):
        read_stages(config(THREE, **{key.replace(".", "__"): value}))


def test_stages_follow_each_other(schedule: Schedule, tmp_path: Path) -> None:
    assert schedule.first_unfinished() == 0
    make_checkpoint(schedule, 0)
    assert schedule.first_unfinished() == 0
    finish(schedule, 0)
    assert schedule.first_unfinished() == 1
    finish(schedule, 1)
    assert schedule.first_unfinished() == 2
    make_checkpoint(schedule, 2)
    assert schedule.first_unfinished() == 2
    assert schedule.checkpoint(2) == tmp_path / "checkpoint_last.pt"


def test_what_no_later_stage_needs_may_be_deleted(schedule: Schedule) -> None:
    finish(schedule, 0, 1)
    schedule.checkpoint(0).unlink()
    assert schedule.first_unfinished() == 2


def test_a_stage_that_is_gone_as_a_whole(schedule: Schedule, tmp_path: Path) -> None:
    finish(schedule, 0, 1)
    for path in (tmp_path / "stage1_bitla_w8a8").iterdir():
        path.unlink()
    with pytest.raises(LowbitError) as refused:
        schedule.first_unfinished()
    for part in (
        "stage 1 of 3 (bitla_w8a8)",
        "restore",
    ):
        assert part in str(refused.value)


def test_a_folder_with_other_stages(schedule: Schedule, tmp_path: Path) -> None:
    finish(schedule, 0, 1)
    for stages in ([THREE[1] | {"teacher": "original"}, THREE[2]], []):
        with pytest.raises(LowbitError, match=r"stage1_bitla_w8a8.*hydra\.run\.dir"):
            at(tmp_path, stages).refuse_other_stages()
    changed = [THREE[0] | {"updates": 60}, *THREE[1:]]
    with pytest.raises(LowbitError, match=r"stage 1 of 3.*updates 30.*not with 60"):
        at(tmp_path, changed).first_unfinished()
    # What is yet to be trained may change, as in any run.
    assert at(tmp_path, [*THREE[:2], THREE[2] | {"updates": 500}]).first_unfinished() == 2


def test_a_folder_of_a_run_without_stages(schedule: Schedule, tmp_path: Path) -> None:
    make_checkpoint(schedule, 2)
    with pytest.raises(LowbitError, match=r"hydra\.run\.dir"):
        schedule.first_unfinished()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """``trained(updates)``: the precisions that a run trains when each training ends after as many
    updates, or by an exception."""

    def run(end: int | BaseException, **changes: Any) -> list[str]:
        precisions = []

        def train(own: DictConfig) -> None:
            precisions.append(own.model.precision.name)
            if isinstance(end, BaseException):
                raise end
            folder = Path(own.checkpoint.save_dir)
            save(folder / "checkpoint_last.pt", end)

        monkeypatch.setattr(callback, "_hydra_main", train)
        own = {"checkpoint__save_dir": str(tmp_path)}
        made = config(THREE, **own, **(NO_EARLY_STOP | changes))
        callback.train_in_stages(made)
        return precisions

    return run


NO_EARLY_STOP = {
    "checkpoint__patience": -1,
    "optimization__max_epoch": 0,
    "optimization__stop_time_hours": 0,
    "optimization__stop_min_lr": -1.0,
}


def test_only_a_finished_stage_is_followed_by_the_next(trained: Callable, tmp_path: Path) -> None:
    assert trained(29) == ["bitla_w8a8"]
    with pytest.raises(SystemExit):
        trained(SystemExit(75))
    assert not list(tmp_path.rglob("finished.json"))
    assert trained(30) == ["bitla_w8a8", "bitla_w4a4"]
    mark = json.loads((tmp_path / "stage1_bitla_w8a8" / "finished.json").read_text())
    assert mark == {**asdict(read_stages(config(THREE))[0]), "made_updates": 30, "max_update": 30}
    assert not (tmp_path / "stage2_bitla_w4a4" / "finished.json").exists()
    assert trained(29, checkpoint__patience=3) == ["bitla_w4a4", "bitla_w2a2"]
    assert json.loads((tmp_path / "finished.json").read_text())["made_updates"] == 29


def test_each_stage_is_a_wandb_run_of_its_own(
    trained: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stays open refuses the next stage's configuration."""
    wandb = SimpleNamespace(run=object())
    wandb.finish = lambda: setattr(wandb, "run", None)
    monkeypatch.setattr(progress_bar, "wandb", wandb)
    trained(30)
    assert wandb.run is None


def test_stopping_before_the_last_update() -> None:
    none = config([], **NO_EARLY_STOP)
    assert not stops_early(none)
    for key in NO_EARLY_STOP:
        assert stops_early(config([], **(NO_EARLY_STOP | {key: 1}))), key
