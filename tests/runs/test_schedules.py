"""Curves of training in stages and in one step, from runs as training leaves them."""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert, LoadedModel
from fairseq_lowbit.runs.collection import Entry
from fairseq_lowbit.runs.columns import PHONE_ERROR, SNR
from fairseq_lowbit.runs.run import PlannedStage, Run, read_run
from fairseq_lowbit.runs.schedules import check_comparable, read_schedules, schedule_table
from tests.evaluation.conftest import calibrated

BITS = ("w8a8", "w2a2", "w1a1")
ORIGINAL = tuple(PlannedStage(bits, "original", 20) for bits in BITS)
PREVIOUS = (ORIGINAL[0], *(PlannedStage(bits, "previous", 20) for bits in BITS[1:]))


def quality(**figures: float) -> SimpleNamespace:
    """As much of a quality as curves read."""
    return SimpleNamespace(figures=lambda: figures)


def entry(bits: str, snr: float | None, seed: int = 1, stages: tuple = (), **more: object) -> Entry:
    """A measured run, or for None one that was not measured."""
    known = {
        "precision": f"bitla_{bits}",
        "rules": 0,
        "form": "asymmetric",
        "loss": "distillation",
        "data": Path("data"),
        "teacher": Path("teacher.pt"),
        "planned": 20 if stages else 60,
        "updates": 20 if stages else 60,
        "is_finished": True,
    }
    name = f"{bits}_{seed}_of_{len(stages)}"
    run = Run(
        folder=Path(name),
        checkpoint=Path(name),
        saves=True,
        best_loss=None,
        storage_mb=None,
        seed=seed,
        stages=stages,
        **known | more,
    )
    both = SimpleNamespace(own=quality(snr_db=snr), teacher=quality(storage_mb=4.0))
    return Entry(name, run, quality=None if snr is None else both)


def whole(seeds: Iterable[int] = (1, 2)) -> list[Entry]:
    """Both ways at all precisions. In one step seed 2 is 2 dB better; in stages both are equal."""
    found = []
    for seed in seeds:
        for snr, bits in zip((30.0, 10.0, 4.0), BITS, strict=True):
            found += [entry(bits, snr + 2 * (seed == 2), seed), entry(bits, snr, seed, ORIGINAL)]
    return found[::-1]  # in any order


def test_means_and_bars_over_seeds() -> None:
    schedules = read_schedules(whole())
    assert schedules.bits == BITS
    one_step, in_stages = schedules.curves
    assert one_step.name == "one step"
    assert in_stages.name == "w8a8 > w2a2 > w1a1 (original)"
    assert [p.mean(SNR) for p in one_step.points] == [31.0, 11.0, 5.0]
    assert [p.spread(SNR) for p in one_step.points] == pytest.approx([2**0.5] * 3)
    assert [p.spread(SNR) for p in in_stages.points] == [0.0] * 3
    # A schedule has come to a stage by all those before it.
    assert [p.updates for p in one_step.points] == [60, 60, 60]
    assert [p.updates for p in in_stages.points] == [20, 40, 60]
    assert schedules.gaps == []
    assert one_step.label == "one step: 60 at each"
    assert in_stages.label == f"{in_stages.name}: 20 > 40 > 60"


def test_a_label_tells_of_the_points_that_are_there() -> None:
    some = [entry("w8a8", 30.0), entry("w1a1", 4.0, planned=50)]
    one_step, _ = read_schedules([*some, entry("w2a2", 10.0, stages=ORIGINAL)]).curves
    assert [point.updates for point in one_step.points] == [60, None, 50]
    assert one_step.label == "one step: 60 > 50"


def test_one_seed_has_no_bar() -> None:
    (one_step, _) = read_schedules(whole(seeds=[1])).curves
    assert {p.spread(SNR) for p in one_step.points} == {None}


def test_teachers_make_different_curves() -> None:
    curves = read_schedules([entry("w1a1", 4.0, 1, s) for s in ((), ORIGINAL, PREVIOUS)]).curves
    assert [curve.name for curve in curves] == [
        "one step",
        "w8a8 > w2a2 > w1a1 (original)",
        "w8a8 > w2a2 > w1a1 (previous)",
    ]
    assert [p.mean(SNR) for p in curves[2].points] == [None, None, 4.0]


def test_what_is_missing_is_said() -> None:
    entries = [
        *whole(seeds=[1]),
        entry("w8a8", 31.0, 2),
        entry("w2a2", None, 2),
        entry("w1a1", 5.0, 2, is_finished=False, updates=7),
    ]
    schedules = read_schedules(entries)
    points = {point.bits: point for point in schedules.curves[0].points}
    assert [len(points[bits].measured) for bits in BITS] == [2, 1, 1]
    assert schedules.gaps == [
        "one step, w2a2, seed 2: not measured",
        "one step, w1a1, seed 2: unfinished, 7 of 60 updates",
        *(f"w8a8 > w2a2 > w1a1 (original), {bits}, seed 2: no run" for bits in BITS),
    ]


def test_the_teacher_is_no_point() -> None:
    teacher = entry("w8a8", 0.0, loss="hubert", precision="float", teacher=None)
    calibrated = entry("w1a1", 1.0, loss="calibration")
    students = whole()
    assert read_schedules([teacher, calibrated, *students]) == read_schedules(students)


@pytest.mark.parametrize(
    "more, named",
    [
        ({"teacher": Path("other.pt")}, "teacher teacher.pt, w4a4_1_of_0 has other.pt"),
        ({"data": Path("elsewhere")}, "data data, w4a4_1_of_0 has elsewhere"),
        ({"loss": "hubert"}, "loss distillation, w4a4_1_of_0 has hubert"),
        ({"rules": 3}, "number of rules 0, w4a4_1_of_0 has 3"),
        ({"form": "paper"}, "form asymmetric, w4a4_1_of_0 has paper"),
        ({"precision": "bitl_w4a4"}, "method bitla, w4a4_1_of_0 has bitl"),
    ],
)
def test_runs_that_do_not_compare(more: dict, named: str) -> None:
    with pytest.raises(LowbitError, match=f"w1a1_2_of_3 has {named}: .* name only those"):
        check_comparable([*whole(), entry("w4a4", 1.0, **more)])


def test_two_runs_of_one_seed() -> None:
    with pytest.raises(
        LowbitError, match="w2a2_1_of_0 and w2a2_1_of_0 both reach w2a2 by one step"
    ):
        check_comparable([*whole(), entry("w2a2", 1.0)])


def test_seeds_of_different_lengths() -> None:
    with pytest.raises(LowbitError, match="w2a2_3_of_0 after 90: .* one length"):
        check_comparable([*whole(), entry("w2a2", 1.0, 3, planned=90)])


def test_nothing_to_draw() -> None:
    with pytest.raises(LowbitError, match="no run of a quantized student among these: gone: none"):
        check_comparable([Entry("gone", problem="none")])
    with pytest.raises(LowbitError, match="w1a1_1_of_0: no checkpoint, 0 of 60 updates"):
        read_schedules([entry("w1a1", None, updates=None, is_finished=False)])


def test_the_spread_of_a_table_is_that_of_seeds() -> None:
    """The teacher has none, though its figure has an interval over recordings."""
    runs = whole([1])
    for run in runs:
        run.quality.teacher = quality(phone_error=0.3, phone_error_margin=0.05)
        run.quality.own = quality(phone_error=0.4, phone_error_margin=0.05)
    *_, figures = schedule_table(read_schedules(runs), [PHONE_ERROR]).columns
    assert [*figures.cells][:2] == ["30.0", "40.0"]


def test_a_stage_is_compared_with_the_teacher_of_its_run(
    make_run: Callable, model: Hubert, teacher: LoadedModel
) -> None:
    """Also where it learned from the stage before."""
    stages = [
        {"precision": "w8a8", "teacher": "original", "updates": None},
        {"precision": "w1a1", "teacher": "previous", "updates": 30},
    ]
    folder = make_run("run", model, stages=stages, seed=5)
    before = str(folder / "checkpoints" / "stage1_bitla_w8a8" / "checkpoint_last.pt")
    stage = make_run("run/checkpoints/stage2_bitla_w4a4", model, is_stage=True, teacher=before)
    told = PlannedStage("w8a8", "original", 10), PlannedStage("w1a1", "previous", 30)
    for place in (folder, stage):
        run = read_run(place)
        assert (str(run.teacher), run.stages) == (teacher.source, told)
    assert read_run(folder).seed == 5


def test_the_command(
    make_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, data: Path
) -> None:
    """Measures what is not measured yet; draws with gaps."""
    (data / "words_test.tsv").unlink()  # what takes time
    for seed in (1, 2):
        make_run(f"exp/w2a2_{seed}", calibrated("bitla_w2a2"), seed=seed)
    make_run("exp/w1a1", calibrated("bitla_w1a1"), updates=3)
    out = tmp_path / "out"
    arguments = ["schedule-figure", str(tmp_path / "exp"), "--out", str(out)]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "missing: one step, w1a1, seed 1: unfinished, 3 of 10 updates" in shown.err
    assert (out / "schedule.png").read_bytes().startswith(b"\x89PNG")
    with open(out / "schedule.csv") as file:
        lines = {(row["figure"], row["precision"]): row for row in csv.DictReader(file)}
    known = lines[SNR.label, "w2a2"]
    values = [float(value) for value in known["values"].split()]
    assert known["seeds"] == "1 2"
    assert float(known["mean"]) == pytest.approx(sum(values) / 2)
    assert f"{float(known['mean']):.1f}±{float(known['std']):.1f}" in shown.out
    assert lines[SNR.label, "w1a1"]["mean"] == ""
    # This data has neither phones nor words.
    assert "no panel, as no run has it: word error, phone error\n" in shown.out

    make_run("exp/other", calibrated("bitla_w1a1"), teacher="/gone.pt", seed=2)
    assert main(arguments) == 2
    refused = capsys.readouterr()
    assert "/gone.pt" in refused.err
    assert "measuring" not in refused.err
