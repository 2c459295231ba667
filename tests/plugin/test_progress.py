"""What a run records of its progress; how interruptions leave it, test_resume.py compares."""

import json
from pathlib import Path

import pytest
from fairseq.logging import progress_bar

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.plugin import register
from fairseq_lowbit.plugin.progress import forget_after

STATS = {"nll_loss": 2.5, "ppl": 5.66, "wps": 900, "ups": 1.5, "lr": 0.1, "num_updates": 20}


def test_every_logged_interval_and_every_validation(student_run) -> None:
    records = student_run.progress()
    train = [record for record in records if record["phase"] == "train"]
    valid = [record for record in records if record["phase"] == "valid"]
    assert [record["update"] for record in train] == list(range(1, 31))
    assert [record["update"] for record in valid] == list(range(5, 31, 5))
    assert [record["epoch"] for record in train[:6]] == [1, 1, 1, 1, 1, 2]
    assert {record["split"] for record in valid} == {"valid"}
    terms = ["loss", "loss_final", "loss_layers", "loss_attention"]
    assert all(list(record["terms"]) == terms for record in records)
    for name in ("loss", "loss_attention"):
        logged = [record["terms"][name] for record in train]
        assert logged == pytest.approx(student_run.logged(name), rel=1e-4)
    assert [r["lr"] for r in train] == pytest.approx(student_run.logged("lr"), rel=1e-4)
    assert all(record["grad_norm"] > 0 for record in train)
    path = student_run.checkpoints / "progress.jsonl"
    walls = [json.loads(line)["wall_seconds"] for line in path.read_text().splitlines()]
    assert walls == sorted(walls)


@pytest.mark.parametrize("log_format", ["simple", "json", "none", "tqdm"])
def test_any_criterion_and_any_format(log_format: str, tmp_path: Path) -> None:
    """As fairseq's own tasks and criterions log."""
    register()
    options = {"log_format": log_format, "epoch": 3, "aim_param_checkpoint_dir": str(tmp_path)}
    bar = progress_bar.progress_bar(range(2), **options)
    assert list(bar) == [0, 1]
    bar.log(STATS, tag="train_inner", step=20)
    bar.print(STATS, tag="train", step=20)
    bar = progress_bar.progress_bar([], prefix="valid on 'dev' subset", **options)
    bar.print({"nll_loss": 2.0, "best_nll_loss": 1.0}, tag="dev", step=20)
    train, valid = map(json.loads, (tmp_path / "progress.jsonl").read_text().splitlines())
    assert train.pop("peak_memory_bytes") > 1e6
    train.pop("wall_seconds", None)
    assert train == {
        **{"update": 20, "epoch": 3, "phase": "train", "split": "train"},
        **{"lr": 0.1, "updates_per_second": 1.5, "terms": {"nll_loss": 2.5, "ppl": 5.66}},
    }
    assert (valid["phase"], valid["split"], valid["terms"]) == ("valid", "dev", {"nll_loss": 2.0})


def test_a_full_disk_gives_one_message(tmp_path: Path) -> None:
    register()
    (tmp_path / "progress.jsonl").symlink_to("/dev/full")
    bar = progress_bar.progress_bar([], epoch=1, aim_param_checkpoint_dir=str(tmp_path))
    with pytest.raises(LowbitError, match=r"cannot write .*progress.jsonl: No space left"):
        bar.log(STATS, tag="train_inner", step=20)


def test_half_a_line_is_dropped_with_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text('{"update": 5}\n{"update": 10}\n{"update": 11}\n{"update": 15, "ep')
    forget_after(tmp_path, 10)
    assert path.read_text() == '{"update": 5}\n{"update": 10}\n'
