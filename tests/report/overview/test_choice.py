"""Which models have colours, and which are taken apart."""

from dataclasses import replace

from fairseq_lowbit.evaluation.masked import MaskedAccuracy
from fairseq_lowbit.evaluation.quality import Quality
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.report.overview.choice import (
    colors,
    deciding_quality,
    standing_out,
    worth_dissecting,
)
from fairseq_lowbit.report.style import FAINT, PALETTE, TEACHER
from fairseq_lowbit.report.subjects import Subject
from fairseq_lowbit.runs.columns import DISTILLATION_LOSS
from tests.report.conftest import record_of
from tests.shapes import TINY


def subject(name: str, accuracy: float | None, **known: object) -> Subject:
    masked = None if accuracy is None else MaskedAccuracy(accuracy, 0.1)
    row = Quality(name, False, float(name[1:]), None, masked, {})
    usual = {"status": "finished", "precision": "bitla_w1a1", "rules": 0, "loss": "distillation"}
    return Subject(name, record_of(row, **usual | known))


def test_everybody_has_a_colour_while_they_last() -> None:
    teacher = subject("t9", 0.9, precision="float")
    students = [subject(f"m{i}", i / 10) for i in range(1, 1 + len(PALETTE))]
    found = colors([teacher, *students])
    assert found["t9"] == TEACHER
    assert [found[s.name] for s in students] == list(PALETTE)


def test_with_more_the_front_comes_first_and_then_the_best() -> None:
    good = [subject(f"m{i}", 0.1 * i) for i in (1, 2, 3, 4)]
    dear = [subject(f"m{10 + i}", 0.35 - 0.01 * i) for i in range(10)]
    unknown = [subject("m0.5", None), subject("m0.6", None)]
    subjects = [*dear, *good, *unknown]
    shown = standing_out(subjects, colors(subjects))
    assert len(shown) == len(PALETTE)
    # In the order they came, so that the colours follow the table.
    assert [s.name for s in shown] == ["m10", "m11", "m12", "m13", "m1", "m2", "m3", "m4"]
    assert colors(subjects)["m0.5"] == FAINT


def test_the_validation_loss_decides_where_nothing_was_measured() -> None:
    subjects = [subject(f"m{i}", None, best_loss=1.0 / i) for i in (1, 2)]
    assert deciding_quality(subjects) is DISTILLATION_LOSS
    assert deciding_quality([*subjects, subject("m3", 0.5)]).key == "masked_accuracy"
    # A teacher's own does not count.
    teacher = subject("t4", 0.5, precision="float")
    assert deciding_quality([*subjects, teacher]) is DISTILLATION_LOSS


def with_costs(one: Subject, precision: str) -> Subject:
    plan = Hubert(TINY, precision=Precision(precision)).plan
    return replace(one, plan=plan, record={**one.record, "storage_mb": plan.bytes / 1e6})


def test_the_front_is_taken_apart_evenly() -> None:
    # As costs grow, so does quality: all of them are on the front.
    precisions = ("bitla_w1a1", "bitla_w2a2", "bitla_w3a3", "bitla_w4a4", "bitla_w8a8")
    front = [with_costs(subject(f"m{i}", 0.1 * i), p) for i, p in enumerate(precisions, 1)]
    beaten = with_costs(subject("m7", 0.05), "bitla_w8a8")
    teacher = with_costs(subject("t8", 0.9, precision="float"), "float")
    gone = subject("m9", 0.99)
    chosen, why = worth_dissecting([teacher, gone, beaten, *front], 3)
    assert [s.name for s in chosen] == ["m1", "m3", "m5"]
    assert why.startswith("3 of the 6 quantized models with a checkpoint, evenly spaced on the Par")
    chosen, why = worth_dissecting([*front[:2], beaten], 3)
    assert chosen == front[:2]
    assert why.endswith(", on the Pareto front of masked accuracy against storage.")
    assert worth_dissecting([teacher, gone], 3)[0] == []


def test_without_any_quality_the_first_are() -> None:
    known = [with_costs(subject(f"m{i}", None), "bitla_w1a1") for i in (1, 2)]
    chosen, why = worth_dissecting(known, 3)
    assert chosen == known
    assert "no quality is known" in why
