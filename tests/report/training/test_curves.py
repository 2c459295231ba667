"""Curves from logs as fairseq writes them, in each format, in stages and after interruptions."""

import json
import math
from collections.abc import Callable

import pytest

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.report.training.curves import (
    Curve,
    Training,
    parse_log,
    read_bands,
    read_training,
)
from tests.report.conftest import log_line, write_log

# As a run with fairseq 0.12.3 left them.
SIMPLE = """\
[2026-11-21 12:00:21,000][fairseq.trainer][INFO] - begin training epoch 1
[2026-11-21 12:00:21,912][train_inner][INFO] - epoch 001:     50 / 62 loss=2.5227, loss_final=2.0685, loss_layers=0.4118, loss_attention=0.0424, wps=1152.6, ups=1.01, wpb=1138, bsz=19.1, num_updates=50, lr=0.0005, gnorm=1.223, clip=0, loss_scale=128, train_wall=49, wall=56
[2026-11-21 12:00:32,856][train][INFO] - epoch 001 | loss 2.4407 | loss_final 1.9948 | loss_layers 0.404 | loss_attention 0.042 | wps 1155.8 | ups 1.03 | wpb 1124.2 | bsz 18.9 | num_updates 62 | lr 0.00062 | gnorm 1.156 | clip 0 | train_wall 60 | wall 67
[2026-11-21 12:01:05,052][train_inner][INFO] - epoch 002:     38 / 62 loss=1.8706, loss_final=1.4938, loss_layers=0.3367, loss_attention=0.0401, wps=1273.4, ups=1.16, wpb=1098.3, bsz=18.5, num_updates=100, lr=0.001, gnorm=0.741, clip=0, train_wall=43, wall=99
[2026-11-21 12:02:37,660][valid][INFO] - epoch 002 | valid on 'valid' subset | loss 1.39 | loss_final 1.0816 | loss_layers 0.2569 | loss_attention 0.0516 | wps 2367.3 | wpb 820.3 | bsz 21.8 | num_updates 100
[2026-11-21 12:02:39,660][valid][INFO] - epoch 002 | valid on 'valid' subset | loss 1.2 | loss_final 1.0 | loss_layers 0.2 | loss_attention 0.05 | wps 2367.3 | wpb 820.3 | bsz 21.8 | num_updates 124 | best_loss 1.2
[2026-11-21 12:02:39,900][fairseq.checkpoint_utils][INFO] - Saved checkpoint checkpoints/checkpoint_best.pt (epoch 2 @ 124 updates, score 1.2) (writing took 0.1 seconds)
"""  # noqa: E501
JSON = """\
[2026-11-21 12:00:21,912][train_inner][INFO] - {"epoch": 1, "update": 0.806, "loss": "2.5227", "loss_final": "2.0685", "wps": "1152.6", "num_updates": "50", "lr": "0.0005", "gnorm": "1.223"}
[2026-11-21 12:00:32,856][train][INFO] - {"epoch": 1, "train_loss": "2.4407", "train_loss_final": "1.9948", "train_num_updates": "62", "train_wall": "67"}
[2026-11-21 12:01:05,052][train_inner][INFO] - {"epoch": 2, "update": 1.613, "loss": "1.8706", "loss_final": "1.4938", "wps": "1273.4", "num_updates": "100", "lr": "0.001", "gnorm": "nan"}
[2026-11-21 12:02:37,660][valid][INFO] - {"epoch": 2, "valid_loss": "1.39", "valid_loss_final": "1.0816", "valid_num_updates": "100"}
[2026-11-21 12:02:39,660][valid][INFO] - {"epoch": 2, "valid_loss": "1.2", "valid_loss_final": "1", "valid_num_updates": "124", "valid_best_loss": "1.2"}
"""  # noqa: E501


def parse(text: str) -> dict[str, Training]:
    return parse_log(text.splitlines())


def points(curve: Curve) -> list[tuple[int, float]]:
    return list(zip(curve.updates, curve.values, strict=True))


@pytest.mark.parametrize("log", [SIMPLE, JSON], ids=["simple", "json"])
def test_both_formats(log: str) -> None:
    (training,) = parse(log).values()
    assert points(training.train["loss"]) == [(50, 2.5227), (100, 1.8706)]
    assert points(training.train["loss_final"]) == [(50, 2.0685), (100, 1.4938)]
    assert points(training.valid["loss"]) == [(100, 1.39), (124, 1.2)]
    assert points(training.valid["loss_final"]) == [(100, 1.0816), (124, 1.0)]


def test_every_term_and_nothing_else() -> None:
    (training,) = parse(SIMPLE).values()
    terms = ["loss", "loss_final", "loss_layers", "loss_attention"]
    assert training.terms == list(training.train) == list(training.valid) == terms


def test_beside_a_progress_bar_the_means_of_epochs_have_to_do() -> None:
    lines = [line for line in SIMPLE.splitlines() if "train_inner" not in line]
    assert points(parse_log(lines)[""].train["loss"]) == [(62, 2.4407)]


def test_the_total_is_first_and_accuracy_last() -> None:
    message = "epoch 001:  5 / 62 accuracy=0.1, loss_masked=2, loss=3, nll_loss=1, num_updates=5"
    (training,) = parse(log_line("train_inner", message)).values()
    assert training.terms == ["loss", "loss_masked", "nll_loss", "accuracy"]


def inner(update: int, loss: float | str) -> str:
    return log_line("train_inner", f"epoch 001:  {update} / 99 loss={loss}, num_updates={update}")


def test_a_resumed_run_makes_updates_once_more() -> None:
    """Killed behind its last checkpoint; what it did there is not what it went on from."""
    first = [inner(update, update) for update in (10, 20, 30, 40)]
    second = [inner(update, 100 + update) for update in (30, 40, 50)]
    (training,) = parse("".join([*first, *second])).values()
    assert points(training.train["loss"]) == [(10, 10), (20, 20), (30, 130), (40, 140), (50, 150)]
    # Resumed and ended again before it came as far: nothing is left of the way it did not go.
    (shorter,) = parse("".join([*first, inner(30, 1)])).values()
    assert points(shorter.train["loss"]) == [(10, 10), (20, 20), (30, 1)]


def stage(number: int, of: int, precision: str) -> str:
    message = f"stage {number} of {of} ({precision}): 20 updates from /t.pt, teacher: original"
    return log_line("fairseq_lowbit.plugin.callback", message)


def test_stages_begin_anew_in_one_log() -> None:
    log = [
        *(stage(1, 2, "bitla_w2a2"), inner(10, 5), inner(20, 4)),
        *(stage(2, 2, "bitla_w1a1"), inner(10, 3)),
        # Interrupted and resumed.
        *(stage(2, 2, "bitla_w1a1"), inner(20, 2)),
    ]
    found = parse("".join(log))
    assert list(found) == ["stage1_bitla_w2a2", ""]
    assert points(found["stage1_bitla_w2a2"].train["loss"]) == [(10, 5), (20, 4)]
    assert points(found[""].train["loss"]) == [(10, 3), (20, 2)]


def test_noise_in_a_log() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "x.py", line 3, in <module>',
        log_line("train_inner", '{"epoch": 1, "loss": "2.5'),
        log_line("train_inner", "epoch 001:  3 / 99 loss=abc, num_updates=3"),
        log_line("fairseq.tasks", "[train_inner] loss=3, num_updates=4"),
        log_line("valid", "epoch 001 | valid on 'valid' subset | loss 2"),
        "[2026-11-21 12:00:21,912][train_inner][INFO] - epoch 001:     50 / 62 loss=2.52, loss_fi",
    ]
    assert parse_log(lines) == {}


def test_thinning_keeps_the_mean_and_the_end() -> None:
    curve = Curve()
    for update in range(1, 1001):
        curve.add(update, float(update % 10))
    thin = curve.thinned(100)
    assert len(thin.updates) == 100
    assert thin.updates[-1] == 1000
    assert thin.values == [4.5] * 100
    assert curve.thinned(5000).values == curve.values
    assert Curve().thinned() == Curve()


def test_values_that_are_not_finite_leave_a_gap() -> None:
    (training,) = parse("".join([inner(1, 3), inner(2, "nan"), inner(3, "inf")])).values()
    assert math.isnan(training.train["loss"].values[1])
    assert points(training.train["loss"].thinned()) == [(1, 3.0)]


def test_runs_and_their_stages_share_a_log(make_run: Callable, model: Hubert) -> None:
    folder = make_run("exp/run", model)
    early = make_run("exp/run/checkpoints/stage1_float", model, is_stage=True)
    log = "".join([stage(1, 2, "float"), inner(1, 5), stage(2, 2, "float"), inner(1, 3)])
    (folder / "hydra_train.log").write_text(log)
    assert read_training(folder).train["loss"].values == [3]
    assert read_training(early).train["loss"].values == [5]


def test_runs_without_a_log(make_run: Callable, model: Hubert) -> None:
    folder = make_run("exp/run", model)
    with pytest.raises(LowbitError, match=r"run holds no training log \(hydra_train.log\)"):
        read_training(folder)
    (folder / "hydra_train.log").write_text(log_line("fairseq.trainer", "begin training epoch 1"))
    with pytest.raises(LowbitError, match="no losses yet"):
        read_training(folder)
    write_log(folder, 3)
    assert read_training(folder).train["loss"].updates == [1, 2, 3]


def test_health_over_updates(make_run: Callable, model: Hubert) -> None:
    folder = make_run("exp/run", model) / "checkpoints"
    assert read_bands(folder) == {}
    values = [{"sqnr_db": float(i), "clipped": i / 10, "levels_used": 1.0} for i in range(5)]
    entries = [{"name": f"q{i}", "bits": 1, **each} for i, each in enumerate(values)]
    record = {"quantizers": entries, "centered_std": [0.9, 0.5, 0.7]}
    lines = [json.dumps({"update": update, **record}) for update in (0, 5)]
    # A kill may leave half of a line.
    (folder / "health.jsonl").write_text("\n".join([*lines, '{"update": 10, "quant']))
    bands = read_bands(folder)
    assert bands["sqnr_db"].updates == (0, 5)
    assert (bands["sqnr_db"].low[0], bands["sqnr_db"].middle[0], bands["sqnr_db"].high[0]) == (
        1.0,
        2.0,
        3.0,
    )
    assert bands["clipped"].middle == (0.2, 0.2)
    # The one that collapsed.
    assert bands["sqnr_db"].worst == (0.0, 0.0)
    assert bands["clipped"].worst == (0.4, 0.4)
    std = bands["centered_std"]
    assert (std.low[1], std.middle[1], std.high[1]) == (0.5, 0.7, 0.9)


def test_health_of_a_task_that_does_not_know_its_layers(make_run: Callable, model: Hubert) -> None:
    folder = make_run("exp/run", model) / "checkpoints"
    entries = [{"sqnr_db": 3.0, "clipped": 0.0, "levels_used": 1.0}] * 2
    record = {"update": 0, "quantizers": entries, "centered_std": []}
    (folder / "health.jsonl").write_text(json.dumps(record) + "\n")
    assert list(read_bands(folder)) == ["sqnr_db", "clipped", "levels_used"]


def test_health_of_a_float_model(make_run: Callable, model: Hubert) -> None:
    folder = make_run("exp/run", model) / "checkpoints"
    record = {"update": 0, "quantizers": [], "centered_std": [0.9, 0.8]}
    (folder / "health.jsonl").write_text(json.dumps(record) + "\n")
    assert list(read_bands(folder)) == ["centered_std"]
