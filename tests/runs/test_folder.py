"""Finding and reading runs, and the folders of a sweep's jobs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.runs.folder import (
    find_runs,
    forget_failure,
    job_folder,
    write_failure,
    write_finished,
)
from fairseq_lowbit.runs.run import read_run


@pytest.mark.parametrize(
    "overrides, name",
    [
        (["quant=bitla_w1a1"], "quant-bitla_w1a1"),
        (["quant=b", "common.seed=2"], "common.seed-2+quant-b"),
        (["common.seed=2", "quant=b"], "common.seed-2+quant-b"),
        (["+task.fresh=1.5e-05"], "task.fresh-1.5e-05"),
        (["task.data=/d", "quant=b"], "quant-b"),
        (["task.data=/d"], "job"),
    ],
)
def test_folders_say_what_a_job_varies(overrides: list[str], name: str) -> None:
    assert job_folder(overrides, ["task.data"]) == name


def test_different_jobs_never_share_a_folder() -> None:
    rules = "model.precision.rules=[{{match:encoder.layers.{},weight_bits:{}}}]"
    names = {
        job_folder([rules.format(match, bits)])
        for match in ("*", "0.*", "'*'", "1" * 200, "1" * 199 + "2")
        for bits in (1, 2)
    }
    names |= {job_folder([f"a=1{separator}b-2"]) for separator in ("+", "-", "_", " ", "/", "")}
    names |= {job_folder(["a=1", "b=2"]), job_folder(["a=[1]"]), job_folder(["a=1"])}
    assert len(names) == 10 + 6 + 3
    # Nothing that a shell, Hydra's grammar or a file system would take for something else.
    assert not any(set(name) & set(" ,=[]{}'\"/*:") for name in names)
    assert max(map(len, names)) < 120


def test_word_of_a_failure(make_run: Callable, model: Hubert) -> None:
    folder = make_run("run", model)
    write_failure(folder, "no more disk")
    assert read_run(folder).failure == "no more disk"
    forget_failure(folder)
    forget_failure(folder)
    assert read_run(folder).failure is None


def test_runs_and_stages_are_found(make_run: Callable, model: Hubert, tmp_path: Path) -> None:
    run = make_run("sweep/a", model, stages=[{"updates": 4}, {"updates": 6}])
    make_run("sweep/a/checkpoints/stage1_bitla_w8a8", model, planned=4, updates=4, is_stage=True)
    make_run("sweep/b", None)
    (tmp_path / "sweep" / "stage_of_nothing").mkdir()
    (tmp_path / "sweep" / "a" / "tensorboard" / ".hydra").mkdir(parents=True)
    stage = run / "checkpoints" / "stage1_bitla_w8a8"
    assert find_runs(tmp_path / "sweep") == [run, stage, tmp_path / "sweep" / "b"]
    assert find_runs(tmp_path / "gone") == []
    assert (read_run(run).planned, read_run(stage).planned) == (6, 4)
    assert read_run(stage).checkpoint == stage / "checkpoint_last.pt"
    # Stages that training refused.
    assert read_run(make_run("refused", None, stages=["w8a8", "w1a1"])).planned == 10


def test_what_a_run_tells(make_run: Callable, model: Hubert) -> None:
    given = {"updates": 7, "best": 0.25, "overrides": ["quant=x", "+sweep=optuna"]}
    run = read_run(make_run("run", model, loss="lowbit_hubert", **given))
    assert (run.updates, run.planned, run.best_loss, run.loss) == (7, 10, 0.25, "hubert")
    assert (run.precision, run.rules, run.overrides) == ("float", 0, ("quant=x", "+sweep=optuna"))
    assert run.storage_mb == pytest.approx(model.plan.bytes / 1e6)


@pytest.mark.parametrize(
    "updates, told, is_finished",
    [
        (10, None, True),
        (7, None, False),
        (7, (7, 10), True),
        (7, (7, 8), False),  # prolonged since
        (7, (5, 10), False),  # gone on since, without patience
        (7, "", False),
        (7, "[7, 10]", False),
        (7, "{}", False),
    ],
)
def test_where_training_ends(
    updates: int, told: object, is_finished: bool, make_run: Callable, model: Hubert
) -> None:
    run = make_run("run", model, updates=updates)
    stage = make_run("run/checkpoints/stage1_float", model, updates=updates, is_stage=True)
    for folder, checkpoints in ((run, run / "checkpoints"), (stage, stage)):
        if isinstance(told, tuple):
            write_finished(checkpoints, *told)
        elif told is not None:
            (checkpoints / "finished.json").write_text(told)
        assert read_run(folder).is_finished is is_finished


def test_a_run_without_a_last_update(make_run: Callable, model: Hubert) -> None:
    """optimization.max_update=0: it ends by something else."""
    run = make_run("run", model, planned=0)
    assert not read_run(run).is_finished
    write_finished(run / "checkpoints", 10, 0)
    assert read_run(run).is_finished


@pytest.mark.parametrize(
    "text, named",
    [
        ("", "not the configuration of a training run"),
        ("a: [", "cannot be read"),
        ("- a\n- b\n", "not the configuration of a training run"),
        ("task:\n  data: ???\n", "not the configuration of a training run"),
        ("db: {driver: mysql}", "not the configuration of a training run"),
    ],
)
def test_configurations_that_are_none(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(text)
    with pytest.raises(LowbitError, match=named) as caught:
        read_run(tmp_path)
    assert str(tmp_path / ".hydra" / "config.yaml") in str(caught.value)
