"""What a run of days may meet: one message says what it was, and no checkpoint is lost."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fairseq.logging import progress_bar

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.plugin import register
from fairseq_lowbit.plugin.interruption import STOPPED

SCALE = "encoder.layers.1.fc1.input_quantizer"


def last_update(run) -> int:
    return open_model(run.last).updates


# Numbers that are not finite


@pytest.mark.parametrize(
    "options, accident, message, last",
    [
        # Weights of 1e30 after the first update.
        (("optimization.lr=[1e30]",), None, r"first the output of module \S+, whose inputs", 0),
        (
            ("criterion.final_weight=1e35",),
            None,
            r"gradient is not finite at update 0: .* a sum overflowed",
            0,
        ),
        ((), ("poison_update", 7), r"the loss .* at update 7: first parameter \S+ \(", 5),
        # Not found by training, which would have been the next to look at it.
        ((), ("poison_update", 10), r"the validation loss .* at update 10: first parameter", 5),
        (
            ("dataset.disable_validation=true",),
            ("poison_update", 10),
            r"parameter \S+ is not finite; the checkpoints keep the state before",
            5,
        ),
    ],
    ids=["module", "gradient", "training", "validation", "saving"],
)
def test_not_finite(
    options: tuple,
    accident: tuple | None,
    message: str,
    last: int,
    trainer,
    teacher: Path,
    tmp_path: Path,
) -> None:
    options = (f"task.teacher={teacher}", "optimization.max_update=15", *options)
    run = trainer.fork(tmp_path / "run", "bitla_w1a1", *options, accident=accident)
    assert re.search(message, run.message()), run.message()
    assert "optimization.lr" in run.message()
    assert not (run.checkpoints / "crash.pt").exists()
    if not last:
        assert not run.last.exists()
        return
    assert last_update(run) == last
    assert all(torch.isfinite(value).all() for value in open_model(run.last).model.parameters())


# The end


@pytest.mark.parametrize(
    "end",
    [
        ("checkpoint.patience=1",),
        ("optimization.max_epoch=2",),
        ("optimization.stop_time_hours=1e-9",),
    ],
    ids=["patience", "epochs", "time"],
)
def test_a_run_that_ends_before_its_last_update_is_finished(
    end: tuple, trainer, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # With this rate nothing improves.
    lengths = ("optimization.max_update=1000", "optimization.lr=[1e-30]")
    options = ("bitla_w1a1", f"task.teacher={teacher}", *lengths)

    def statuses() -> list[str]:
        assert main(["sweep-table", str(tmp_path), "--no-evaluate"]) == 0
        return re.findall(r"/1000 .*│ (\w+) +│", capsys.readouterr().out)

    run = trainer.fork(tmp_path / "run", *options, *end)
    assert run.status == 0, run.output
    assert last_update(run) < 1000
    assert statuses() == ["finished"]
    # Interrupted, it has not come to its end, and neither has a longer one that goes on from it.
    accident = ("signal_in_update", 3)
    stopped = trainer.fork(run.folder, *options, accident=accident)
    assert stopped.status == STOPPED, stopped.output
    assert statuses() == ["unfinished"]


# Files that cannot be written


def test_a_full_disk(trainer, teacher: Path, tmp_path: Path) -> None:
    options = (f"task.teacher={teacher}", "optimization.max_update=15")
    # The second of three, best so far, at the end of an epoch.
    run = trainer.fork(tmp_path / "run", "bitla_w1a1", *options, accident=("fill_disk", 2))
    message = run.message()
    assert message.startswith(f"cannot write {run.checkpoints}/checkpoint_best.pt: File too large")
    assert {path.name for path in run.checkpoints.iterdir() if path.suffix != ".json"} == {
        "checkpoint_best.pt",
        "checkpoint_last.pt",
        "health.jsonl",
        "progress.jsonl",
    }
    assert open_model(run.checkpoints / "checkpoint_best.pt").updates == last_update(run) == 5
    resumed = trainer.fork(run.folder, "bitla_w1a1", *options)
    assert resumed.status == 0, resumed.output
    assert last_update(resumed) == 15


def test_a_full_disk_while_a_checkpoint_is_copied(trainer, teacher: Path, tmp_path: Path) -> None:
    options = (f"task.teacher={teacher}", "optimization.max_update=10")
    accident = ("fill_disk_while_copying", 2)
    run = trainer.fork(tmp_path / "run", "bitla_w1a1", *options, accident=accident)
    assert run.message().startswith(f"cannot write {run.last}: File too large")
    assert last_update(run) == 5
    assert not list(run.checkpoints.glob("*.tmp"))


@pytest.mark.parametrize("name", ["health.jsonl", "precision_plan.json", "progress.jsonl"])
def test_a_folder_where_a_file_has_to_be(name: str, trainer, teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints" / name / "something").mkdir(parents=True)
    run = trainer.fork(folder, "bitla_w1a1", f"task.teacher={teacher}")
    assert run.message().startswith(f"cannot write {folder}/checkpoints/{name}: ")
    assert "directory" in run.message()
    assert run.output.count("num_updates=") == 0


@pytest.mark.parametrize(
    "key", ["checkpoint.save_dir", "common.tensorboard_logdir", "hydra.run.dir"]
)
def test_a_file_where_a_folder_has_to_be(key: str, trainer, teacher: Path, tmp_path: Path) -> None:
    """It stands for any folder that cannot be made; permissions would not stop root."""
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "folder"
    run = trainer.fork(
        tmp_path / "run", "bitla_w1a1", f"task.teacher={teacher}", f"{key}={blocked}"
    )
    assert run.status == 2, run.output
    assert "Traceback" not in run.output
    assert f"cannot write {blocked}: a file is where a folder has to be" in run.output
    assert run.output.count("num_updates=") == 0


def test_a_full_disk_for_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register()
    bar = progress_bar.TensorboardProgressBarWrapper([], str(tmp_path))
    bar.log = bar._log_to_tensorboard
    bar.log({"loss": 1.0}, "train", 1)
    (writer,) = (w.file_writer.event_writer for w in progress_bar._tensorboard_writers.values())

    def flush() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(writer, "flush", flush)
        with pytest.raises(LowbitError, match=f"cannot write {tmp_path}: No space left on device"):
            bar.log({"loss": 1.0}, "train", 2)
        # Nothing is left to fail again at the end.
        assert not progress_bar._tensorboard_writers
        writer.close()


# Quantizers


def test_a_collapsing_quantizer_is_named_once(train: Callable, trainer, teacher: Path) -> None:
    options = ("bitla_w1a1", f"task.teacher={teacher}")
    run = train(*options)
    assert "collapsed quantizers" not in run.output
    state = run.state()
    state["model"][f"{SCALE}.log_scale"].fill_(-20.0)
    torch.save(state, run.last)
    resumed = trainer.fork(run.folder, *options, "optimization.max_update=20")
    assert resumed.status == 0, resumed.output
    assert [record["update"] for record in resumed.health()] == [0, 5, 10, 15]
    (warning,) = [line for line in resumed.output.splitlines() if "collapsed quantizers" in line]
    for part in (
        "[WARNING]",
        "at update 5",
        f"{SCALE} (scale at its smallest value)",
        "scale_lr_ratio",
    ):
        assert part in warning


# bf16


def test_bf16_goes_on_with_the_weights_it_had(
    train: Callable, trainer, teacher: Path, tmp_path: Path
) -> None:
    options = (
        "bitla_w1a1",
        f"task.teacher={teacher}",
        "common.bf16=true",
        "optimization.max_update=12",
    )
    whole = train(*options)
    losses = whole.logged("loss")
    assert losses[-1] < losses[0]
    killed = trainer.fork(tmp_path / "killed", *options, accident=("kill_in_update", 9))
    assert last_update(killed) == 5
    resumed = trainer.fork(killed.folder, *options)
    assert resumed.status == 0, resumed.output
    assert len(resumed.logged("loss")) == 7
    weights = resumed.state()["model"]
    for name, value in whole.state()["model"].items():
        assert torch.equal(weights[name], value), name
    # What bf16 would have rounded was there to be kept: fp32 weights and quantizers.
    for name in ("encoder.layers.0.fc1.weight", f"{SCALE}.log_scale"):
        assert not torch.equal(weights[name], weights[name].bfloat16().float()), name
