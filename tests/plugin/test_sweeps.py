"""Sweeps: -m over what makes a run, every launcher, a search, and jobs that fail."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.configurations import config_dir, meta_model, read_model_config
from fairseq_lowbit.quantization.quantizer import SCALE_GROUP, SHIFT_GROUP
from fairseq_lowbit.quantization.squashed import SQUASHED_GROUP

PER_CHANNEL = "{match:encoder.layers.*,granularity:per_channel}"


@pytest.fixture
def sweep(trainer, corpus: Path, teacher: Path, tmp_path: Path) -> Callable[..., Any]:
    """``sweep(*overrides)``: a sweep of 1-bit students from a folder with data and teacher in it,
    both given relative to it. Its jobs are below ``tmp_path/exp``."""
    (tmp_path / "my_data").symlink_to(corpus)
    (tmp_path / "teacher.pt").symlink_to(teacher)

    def run(*overrides: str, config: str = "bitla_w1a1") -> Any:
        given = trainer.arguments(tmp_path / "unused", config, "-m", *overrides)
        # A searched element of it would be replaced by the whole list.
        if any("sweep=optuna" in override for override in overrides):
            given = [text for text in given if not text.startswith("optimization.lr=[")]
        paths = ("task.data=my_data", "task.teacher=teacher.pt")
        keys = [override.partition("=")[0] for override in overrides]
        given += [path for path in paths if path.partition("=")[0] not in keys]
        return trainer.fork_arguments(tmp_path / "unused", given)

    return run


def jobs(tmp_path: Path, name: str = "bitla_w1a1_sweep") -> dict[str, Path]:
    """Folder name -> folder of every job."""
    folders = [path.parents[1] for path in (tmp_path / "exp" / name).rglob(".hydra/config.yaml")]
    return {folder.name: folder for folder in sorted(folders)}


def state(job: Path, which: str = "last") -> dict[str, Any]:
    return torch.load(job / "checkpoints" / f"checkpoint_{which}.pt", weights_only=False)


def best(job: Path) -> float:
    return state(job)["extra_state"]["best"]


def results(tmp_path: Path) -> dict[str, Any]:
    """What the search found."""
    path = tmp_path / "exp" / "bitla_w1a1_sweep" / "optimization_results.yaml"
    return yaml.safe_load(path.read_text())


def errors(output: str) -> list[str]:
    """The messages of the lines that were logged as errors."""
    return re.findall(r"\[ERROR\] - (.+)", output)


def test_rules(sweep: Callable, trainer, teacher: Path, tmp_path: Path) -> None:
    done = sweep(f"model.precision.rules=[],[{PER_CHANNEL}]")
    assert done.status == 0, done.output
    found = {}
    for job in jobs(tmp_path).values():
        config = state(job, "best")["cfg"]
        assert config["task"]["data"] == str(tmp_path / "my_data")
        found[len(config["model"]["precision"]["rules"])] = job
    scale = "encoder.layers.0.fc1.weight_quantizer.log_scale"
    assert state(found[0])["model"][scale].dim() == 0
    assert len(state(found[1])["model"][scale]) == 64

    # The second job is what it is alone: nothing of the first is left in the process.
    rules = f"model.precision.rules=[{PER_CHANNEL}]"
    alone = trainer.fork(tmp_path / "alone", "bitla_w1a1", f"task.teacher={teacher}", rules)
    assert best(found[1]) == best(alone.folder)
    for name, value in state(alone.folder)["model"].items():
        assert torch.equal(state(found[1])["model"][name], value), name


def test_the_same_sweep_resumes_and_another_one_starts_anew(
    sweep: Callable, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "all, again.pt").symlink_to(teacher)
    fixed = (
        "task.teacher='all, again.pt'",
        f"task.data=${{oc.env:NO_SUCH_VARIABLE,{corpus}}}",
    )
    first = sweep("optimizer.scale_lr_ratio=0.3,1", *fixed)
    assert first.status == 0, first.output
    second = sweep("optimizer.scale_lr_ratio=1,3", "optimization.max_update=10", *fixed)
    assert second.status == 0, second.output
    folders = {
        float(name.removeprefix("optimizer.scale_lr_ratio-")): job
        for name, job in jobs(tmp_path).items()
    }
    found = {ratio: state(job) for ratio, job in folders.items()}
    made = {ratio: own["optimizer_history"][-1]["num_updates"] for ratio, own in found.items()}
    assert made == {0.3: 5, 1: 10, 3: 10}
    assert second.output.count("Loaded checkpoint") == 1
    # Each job's own updates are in its log, once each.
    for ratio, job in folders.items():
        told = re.findall(r"num_updates=(\d+)", (job / "hydra_train.log").read_text())
        assert [int(update) for update in told] == list(range(1, made[ratio] + 1))
    for ratio, own in found.items():
        assert own["cfg"]["optimizer"]["scale_lr_ratio"] == ratio


def test_failed_jobs_leave_word_and_the_others_finish(
    sweep: Callable, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ("task.teacher=gone.pt,teacher.pt", "optimizer.adam_betas=[0.9,0.98],[2,0.98]")
    done = sweep(*given)
    assert done.status == 1
    messages = errors(done.output)
    assert len(messages) == 3
    assert messages[0] == messages[1] == f"checkpoint {tmp_path}/gone.pt does not exist"
    # What is no user's mistake keeps its traceback, in the log of its job alone.
    assert "ValueError" in messages[2]
    assert done.output.count("Traceback") == 1
    assert "fairseq-lowbit sweep-table" in done.output

    failures = {}
    for job in jobs(tmp_path).values():
        config = yaml.safe_load((job / ".hydra" / "config.yaml").read_text())
        key = (Path(config["task"]["teacher"]).name, config["optimizer"]["adam_betas"][0])
        failure = job / "failure.txt"
        failures[key] = failure.read_text() if failure.exists() else None
        log = (job / "hydra_train.log").read_text()
        assert (failures[key] is None) == ("[ERROR]" not in log)
        assert ("Traceback" in log) == (key == ("teacher.pt", 2))
    assert failures.pop(("teacher.pt", 0.9)) is None
    assert "gone.pt does not exist" in failures[("gone.pt", 0.9)]
    assert failures[("teacher.pt", 2)].startswith("ValueError: ")

    # The table shows all four.
    assert main(["sweep-table", str(tmp_path / "exp"), "--no-evaluate"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("│ failed") == 3
    assert printed.count("│ finished") == 1
    assert re.sub(r"[\s│]+", " ", printed).count("gone.pt does not exist") == 2

    # Mended, the same job trains and is no longer called failed.
    shutil.copy(teacher, tmp_path / "gone.pt")
    again = sweep("task.teacher=gone.pt,teacher.pt", "optimizer.adam_betas=[0.9,0.98]")
    assert again.status == 0, again.output
    assert len(list((tmp_path / "exp").rglob("failure.txt"))) == 3


def test_a_sweep_into_the_folders_of_another_one(sweep: Callable, tmp_path: Path) -> None:
    """What all jobs share is not in the names of their folders."""
    assert sweep("common.seed=2,3").status == 0

    def files(job: Path) -> dict[str, bytes]:
        kept = [path for path in job.rglob("*") if path.is_file() and path.suffix != ".log"]
        return {str(path.relative_to(job)): path.read_bytes() for path in kept}

    before = {name: files(job) for name, job in jobs(tmp_path).items()}
    assert {".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"} <= set(
        before["common.seed-2"]
    )
    refused = sweep("common.seed=2,4", "criterion.mask=true")
    assert refused.status == 1
    (message,) = errors(refused.output)
    assert "common.seed-2/checkpoints holds a finished run with criterion.mask False" in message
    assert {name: files(jobs(tmp_path)[name]) for name in before} == before
    assert state(jobs(tmp_path)["common.seed-4"])["cfg"]["criterion"]["mask"]


@pytest.mark.full
def test_a_search_that_optimizes(sweep: Callable, tmp_path: Path) -> None:
    search = ("+sweep=optuna", "hydra.sweeper.n_trials=2")
    done = sweep(*search)
    assert done.status == 0, done.output
    first = {name: best(job) for name, job in jobs(tmp_path).items()}
    assert len(set(first.values())) == 2

    # The same command with more trials goes on: it proposes the first ones again, which are done.
    done = sweep("+sweep=optuna", "hydra.sweeper.n_trials=4")
    assert done.status == 0, done.output
    trials = {name: best(job) for name, job in jobs(tmp_path).items()}
    assert len(trials) == 4
    assert first.items() <= trials.items()
    assert done.output.count("this run has made its 5 updates") == 2

    found = results(tmp_path)
    assert found["best_value"] == min(trials.values())
    winner = jobs(tmp_path)[min(trials, key=trials.get)]
    config = state(winner)["cfg"]
    params = found["best_params"]
    assert params["optimization.lr.0"] == config["optimization"]["lr"][0]
    assert params["optimizer.scale_lr_ratio"] == config["optimizer"]["scale_lr_ratio"]
    assert params["optimizer.shift_lr_ratio"] == config["optimizer"]["shift_lr_ratio"]
    assert 1e-4 <= params["optimization.lr.0"] <= 5e-3


@pytest.mark.parametrize(
    "name, search",
    [("bitl_w2a2", "optuna"), ("bitla_w1a1", "optuna"), ("sqwq_w2", "optuna_sqwq")],
)
def test_a_search_is_for_rates_of_what_there_is(name: str, search: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose(name, [f"+sweep={search}"], return_hydra_config=True)
    model = meta_model(read_model_config(config.model))
    groups = {getattr(parameter, "param_group", None) for parameter in model.parameters()}
    rates = {
        "optimizer.scale_lr_ratio": SCALE_GROUP,
        "optimizer.shift_lr_ratio": SHIFT_GROUP,
        "optimizer.squashed_lr_ratio": SQUASHED_GROUP,
    }
    searched = set(config.hydra.sweeper.params) & set(rates)
    assert searched == {key for key, group in rates.items() if group in groups}
    assert "optimization.lr.0" in config.hydra.sweeper.params


def test_a_search_goes_on_behind_a_failed_trial(sweep: Callable, tmp_path: Path) -> None:
    names = "model.precision.name=bitla_w1a1,bitla_w9a9"
    done = sweep("+sweep=optuna", "hydra.sweeper.n_trials=2", names)
    assert done.status == 0, done.output
    assert len(list((tmp_path / "exp").rglob("failure.txt"))) == 1
    assert results(tmp_path)["best_params"]["model.precision.name"] == "bitla_w1a1"


def test_a_fixed_list_around_what_is_searched(trainer, tmp_path: Path) -> None:
    arguments = trainer.arguments(tmp_path / "unused", "bitla_w1a1", "-m", "+sweep=optuna")
    refused = trainer.fork_arguments(tmp_path / "unused", arguments)
    assert refused.status == 2
    assert refused.output.count("optimization.lr is given") == 1
    assert "Traceback" not in refused.output
    assert "optimization.lr.0 is searched" in refused.output
    assert not (tmp_path / "exp").exists()


@pytest.mark.full
def test_joblib(sweep: Callable, tmp_path: Path) -> None:
    """One worker for all, in which fairseq would leave the first job's best loss behind."""
    done = sweep(
        "+sweep=joblib",
        "hydra.launcher.n_jobs=1",
        "model.precision.name=bitla_w8a8,bitla_w9a9,bitla_w1a1",
    )
    assert done.status == 1
    assert "Traceback" not in done.output
    found = {
        name.removeprefix("model.precision.name-"): job for name, job in jobs(tmp_path).items()
    }
    assert "9 bits" in (found["bitla_w9a9"] / "failure.txt").read_text()
    for name in ("bitla_w8a8", "bitla_w1a1"):
        assert state(found[name], "best")["cfg"]["model"]["precision"]["name"] == name
    assert best(found["bitla_w8a8"]) < best(found["bitla_w1a1"])


@pytest.mark.full
def test_submitit(sweep: Callable, tmp_path: Path) -> None:
    done = sweep("+sweep=submitit_local", "quant=bitla_w8a8,bitl_w1a1")
    assert done.status == 0, done.output
    for name, job in jobs(tmp_path).items():
        assert state(job, "best")["cfg"]["model"]["precision"]["name"] == name.removeprefix(
            "quant-"
        )
