"""Curves of what runs record of their progress and of their health."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.report.training.curves import Curve, Training, read_health_curves, read_training
from tests.report.conftest import progress, write_progress


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Training]:
    """``read(*lines)``: the curves of a run that recorded these."""

    def curves(*lines: str) -> Training:
        (tmp_path / "progress.jsonl").write_text("".join(lines))
        return read_training(tmp_path)

    return curves


def points(curve: Curve) -> list[tuple[int, float]]:
    return list(zip(curve.updates, curve.values, strict=True))


def test_terms_of_training_and_of_the_first_validation_set(read: Callable) -> None:
    training = read(
        progress("train", 50, {"loss": 2.5, "loss_final": 2.0}),
        progress("train", 100, {"loss": 1.9, "loss_final": 1.5}),
        progress("valid", 100, {"loss": 1.4, "loss_final": 1.1}, "dev"),
        progress("valid", 100, {"loss": 9.0, "loss_final": 9.0}, "other"),
        progress("valid", 124, {"loss": 1.2, "loss_final": 1.0}, "dev"),
    )
    assert points(training.train["loss"]) == [(50, 2.5), (100, 1.9)]
    assert points(training.train["loss_final"]) == [(50, 2.0), (100, 1.5)]
    assert points(training.valid["loss"]) == [(100, 1.4), (124, 1.2)]
    assert points(training.valid["loss_final"]) == [(100, 1.1), (124, 1.0)]


def test_the_total_is_first_and_accuracy_last(read: Callable) -> None:
    """Whatever else a criterion logs is no term of its loss."""
    terms = {"accuracy": 0.1, "loss_masked": 2.0, "ppl": 8.0, "loss": 3.0, "nll_loss": 1.0}
    training = read(progress("train", 5, terms))
    assert training.terms == ["loss", "loss_masked", "nll_loss", "accuracy"]


def test_thinning_keeps_the_mean_and_the_end() -> None:
    updates = range(1, 1001)
    curve = Curve(list(updates), [float(update % 10) for update in updates])
    thin = curve.thinned(100)
    assert len(thin.updates) == 100
    assert thin.updates[-1] == 1000
    assert thin.values == [4.5] * 100
    assert curve.thinned(5000).values == curve.values
    assert Curve().thinned() == Curve()


def test_values_that_are_not_finite_leave_a_gap(read: Callable) -> None:
    values = [3.0, math.nan, math.inf]
    training = read(*(progress("train", u, {"loss": v}) for u, v in enumerate(values, 1)))
    assert math.isnan(training.train["loss"].values[1])
    assert points(training.train["loss"].thinned()) == [(1, 3.0)]


def test_half_a_line_is_left_out(read: Callable) -> None:
    whole = progress("train", 1, {"loss": 3.0})
    training = read(whole, progress("train", 2, {"loss": 2.0})[:-9])
    assert points(training.train["loss"]) == [(1, 3.0)]


def test_a_run_that_recorded_nothing(make_run: Callable, model: Hubert) -> None:
    """An earlier version left a log only."""
    folder = make_run("exp/run", model)
    (folder / "hydra_train.log").write_text("[train_inner] loss=2.5, num_updates=50\n")
    with pytest.raises(
        LowbitError, match=r"no progress\.jsonl .* earlier version .* hydra_train.log"
    ):
        read_training(folder / "checkpoints")
    write_progress(folder, 3)
    assert read_training(folder / "checkpoints").train["loss"].updates == [1, 2, 3]


def test_health_over_updates(make_run: Callable, model: Hubert) -> None:
    folder = make_run("exp/run", model) / "checkpoints"
    assert read_health_curves(folder) == {}
    values = [{"sqnr_db": float(i), "clipped": i / 10, "levels_used": 1.0} for i in range(5)]
    entries = [{"name": f"q{i}", "bits": 1, **each} for i, each in enumerate(values)]
    record = {"quantizers": entries, "centered_std": [0.9, 0.5, 0.7]}
    lines = [json.dumps({"update": update, **record}) for update in (0, 5)]
    # A kill may leave half of a line.
    (folder / "health.jsonl").write_text("\n".join([*lines, '{"update": 10, "quant']))
    curves = read_health_curves(folder)
    assert curves["sqnr_db"].updates == (0, 5)
    assert curves["sqnr_db"].median == (2.0, 2.0)
    assert curves["clipped"].median == (0.2, 0.2)
    # The one that collapsed.
    assert curves["sqnr_db"].worst == (0.0, 0.0)
    assert curves["clipped"].worst == (0.4, 0.4)
    std = curves["centered_std"]
    assert (std.median[1], std.worst[1]) == (0.7, 0.5)


def test_health_of_a_task_that_does_not_know_its_layers(make_run: Callable, model: Hubert) -> None:
    folder = make_run("exp/run", model) / "checkpoints"
    entries = [{"sqnr_db": 3.0, "clipped": 0.0, "levels_used": 1.0}] * 2
    record = {"update": 0, "quantizers": entries, "centered_std": []}
    (folder / "health.jsonl").write_text(json.dumps(record) + "\n")
    assert list(read_health_curves(folder)) == ["sqnr_db", "clipped", "levels_used"]


def test_health_of_a_float_model(make_run: Callable, model: Hubert) -> None:
    folder = make_run("exp/run", model) / "checkpoints"
    record = {"update": 0, "quantizers": [], "centered_std": [0.9, 0.8]}
    (folder / "health.jsonl").write_text(json.dumps(record) + "\n")
    assert list(read_health_curves(folder)) == ["centered_std"]
