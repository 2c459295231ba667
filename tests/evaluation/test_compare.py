"""The comparison and its command, with everything there is to compare and with the least."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.data.recordings import AudioOptions, Recordings
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.compare import Comparison, compare
from fairseq_lowbit.evaluation.masked import MaskedAccuracy
from fairseq_lowbit.evaluation.probing.result import Probe
from fairseq_lowbit.evaluation.ptq import post_training_quantized
from fairseq_lowbit.evaluation.quality import Candidate, Quality, read_held_out
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import Hubert, LoadedModel
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.runs.tables import comparison_table

PNG = b"\x89PNG"


def without(data: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in data.glob(pattern):
            path.unlink()
    return data


def calibrated_on(data: Path, teacher: LoadedModel, precision: str) -> Hubert:
    recordings = Recordings(read_manifest(data / "train.tsv"), AudioOptions())
    return post_training_quantized(teacher, Precision(precision), recordings).model


def run(teacher: LoadedModel, data: Path, *candidates: Candidate) -> Comparison:
    return compare(teacher, candidates, read_held_out(data, teacher, 300.0), lambda name: None)


def test_a_copy_of_the_teacher_and_a_quantized_one(
    teacher: LoadedModel, model: Hubert, data: Path
) -> None:
    quantized = calibrated_on(data, teacher, "bitla_w1a1")
    candidates = [Candidate("copy", model), Candidate("PTQ", quantized, is_calibrated_only=True)]
    comparison = run(teacher, data, *candidates)
    first, copy, ptq = comparison.rows
    assert comparison.teacher is first
    assert [row.name for row in comparison.rows] == ["FP teacher", "copy", "PTQ"]
    assert first.agreement is None
    assert copy.agreement.cosine == pytest.approx((1, 1), abs=1e-5)
    assert (copy.masked, copy.probes) == (first.masked, first.probes)
    assert ptq.agreement.snr_db[-1] < 20 < 100 < copy.agreement.snr_db[-1]
    assert ptq.storage_mb < first.storage_mb == pytest.approx(teacher.model.plan.bytes / 1e6)
    assert list(first.probes) == list(comparison.untrained_probes)
    assert list(first.probes) == ["keyword_error"]
    # Pitch is written all over these words: any network tells them apart.
    assert first.probes["keyword_error"].rate.value < 0.4
    assert len(first.probes["keyword_error"].layer_weights) == 3


def test_without_labels_and_words(teacher: LoadedModel, model: Hubert, data: Path) -> None:
    comparison = run(teacher, without(data, "*.km", "words_*"), Candidate("copy", model))
    assert comparison.untrained_probes == {}
    assert all(row.masked is None and row.probes == {} for row in comparison.rows)
    assert comparison.findings() == []
    assert comparison_table(comparison).row_count == 2


def test_a_teacher_without_label_embeddings(data: Path, save: Callable, model: Hubert) -> None:
    student = Hubert(model.shape)
    comparison = run(open_model(save("student", student)), data)
    assert comparison.teacher.masked is None
    assert comparison.teacher.probes


def test_labels_of_another_kind(teacher: LoadedModel, data: Path) -> None:
    with open(data / "dict.km.txt", "a") as file:
        file.write("99 1\n")
    with pytest.raises(LowbitError, match="8 label classes and the teacher 7"):
        read_held_out(data, teacher, 300.0)


def test_words_that_do_not_fit_their_files(teacher: LoadedModel, data: Path) -> None:
    (data / "words_test.wrd").write_text("low high\n")
    with pytest.raises(
        LowbitError, match=r"words_test\.wrd has 1 lines and .*words_test\.tsv has 15 files"
    ):
        read_held_out(data, teacher, 300.0)


def test_seconds_bound_what_is_measured(teacher: LoadedModel, data: Path) -> None:
    held_out = read_held_out(without(data, "words_*"), teacher, 0.8)
    measured = sum(int(batch.lengths.sum()) for batch in held_out.audio)
    assert 0 < measured <= 0.8 * 16000
    whole = read_held_out(data, teacher, 300.0)
    assert sum(len(batch.lines) for batch in whole.audio) == 5


# Findings


def probe(rate: float, offset: float = 0.0) -> Probe:
    """Errors in every tenth of the recordings, or another share, and ``offset`` in all."""
    errors = tuple(float(i < 100 * rate) + offset for i in range(100))
    return Probe(errors, (1,) * 100, tuple(map(str, range(100))), (rate,) * 3, (0.5, 0.5))


ROW = Quality(
    name="FP teacher",
    is_calibrated_only=False,
    storage_mb=1.0,
    agreement=None,
    masked=MaskedAccuracy(accuracy=0.6, chance=0.1),
    probes={"phone_error": probe(0.1)},
)


def findings(*rows: Quality, untrained: float = 0.5) -> str:
    return "\n".join(Comparison(rows, {"phone_error": probe(untrained)}).findings())


def test_whether_the_teacher_is_trained() -> None:
    assert "6.0 times" in findings(ROW)
    assert "counts as trained" in findings(ROW)
    assert "beats an untrained network in every probe" in findings(ROW)
    poor = replace(ROW, masked=MaskedAccuracy(0.2, 0.1))
    assert "is NOT trained" in findings(poor)
    wanted = "does NOT beat an untrained network in phone error (10.0% against 5.0%)"
    assert wanted in findings(poor, untrained=0.05)


def test_whether_the_probe_separates() -> None:
    close = replace(ROW, name="student", probes={"phone_error": probe(0.11)})
    assert "Not told apart: by phone error FP teacher and student." in findings(ROW, close)
    assert "Not told apart: by phone error any rows." in findings(ROW, close, replace(ROW))
    # The same recordings are harder for one, every one of them: no interval is too wide for that.
    apart = replace(close, probes={"phone_error": probe(0.1, offset=0.01)})
    assert "told apart" not in findings(ROW, apart)
    twins = [replace(apart, name=f"row {index}") for index in range(4)]
    (line,) = [line for line in findings(ROW, *twins).splitlines() if "told apart" in line]
    pairs = "row 0 and row 1, row 0 and row 2, row 0 and row 3"
    assert line == f"Not told apart: by phone error {pairs} and 3 more pairs."


# The command


def evaluate(teacher: LoadedModel, data: Path, out: Path, *options: str) -> int:
    return main(["evaluate", str(teacher.source), f"--data={data}", f"--out={out}", *options])


def test_the_command_writes_a_figure_and_numbers(
    teacher: LoadedModel,
    model: Hubert,
    data: Path,
    save: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    student = calibrated_on(data, teacher, "bitla_w2a2")
    path, out = save("student", student), tmp_path / "new" / "results"
    options = ("--ptq=bitla_w1a1", "--ptq=bitla_w2a2", f"--student=mine={path}")
    assert evaluate(teacher, data, out, *options) == 0
    printed = capsys.readouterr().out
    names = ["FP teacher", "PTQ bitla_w1a1", "PTQ bitla_w2a2", "mine"]
    for name in names:
        assert re.search(rf"^│ {re.escape(name)} +│", printed, re.MULTILINE)
    assert (out / "comparison.png").read_bytes().startswith(PNG)
    numbers = json.loads((out / "comparison.json").read_text())
    assert [row["name"] for row in numbers["rows"]] == names
    assert numbers["rows"][3]["agreement"] == numbers["rows"][2]["agreement"]
    assert "mine against the best PTQ" in printed
    assert all(finding in printed for finding in numbers["findings"])
    assert str(out / "comparison.png") in printed


def test_a_checkpoint_of_ptq_is_no_trained_one(
    teacher: LoadedModel,
    model: Hubert,
    data: Path,
    save: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    ptq, trained, out = tmp_path / "ptq.pt", save("trained", model), tmp_path / "out"
    options = ["--calibration=percentile", "--percentile=99", "--rules=per_channel"]
    precision = "bitla_w4a4"
    command = ["ptq", str(teacher.source), f"--precision={precision}", f"--data={data}"]
    assert main([*command, f"--out={ptq}", *options]) == 0
    students = (f"--student=mine={ptq}", f"--student=trained={trained}")
    assert evaluate(teacher, data, out, *students, f"--ptq={precision}", *options) == 0
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [row["is_calibrated_only"] for row in rows] == [False, True, True, False]
    # With its options a row of --ptq is what ptq writes.
    assert rows[1]["agreement"] == rows[2]["agreement"]
    printed = capsys.readouterr().out
    assert "trained against the best PTQ" in printed
    assert "mine against" not in printed


def test_the_command_with_the_least(
    teacher: LoadedModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = without(data, "train.*", "*.km", "words_*")
    assert evaluate(teacher, data, tmp_path / "out") == 0
    assert "FP teacher" in capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(PNG)


def test_mistakes_of_the_command(
    teacher: LoadedModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refused(*options: str, data: Path = data) -> str:
        assert evaluate(teacher, data, tmp_path / "out", *options) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert not (tmp_path / "out").exists()
        return message

    assert "NAME=CHECKPOINT" in refused("--student=model.pt")
    assert "gone.pt does not exist" in refused(f"--student=mine={tmp_path}/gone.pt")
    assert "bitla_w9a9" in refused("--ptq=bitla_w9a9")
    useless = ("--calibration=mse", "--percentile=99", "--rules=per_channel", "--override=a=b")
    for option in useless:
        assert f"{option.partition('=')[0]} belongs to --ptq" in refused(option)
    assert "no scale of absmax_w8a8" in refused("--ptq=absmax_w8a8", "--calibration=mse")
    assert "test.tsv" in refused(data=tmp_path)
    assert "train.tsv" in refused("--ptq=bitla_w1a1", data=without(data, "train.tsv"))
    for path in data.glob("test*.flac"):
        path.write_bytes(b"no audio")
    assert "test.tsv" in refused()


def test_a_student_of_another_depth(
    teacher: LoadedModel,
    data: Path,
    save: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    shallow = save("shallow", Hubert(replace(teacher.model.shape, encoder_layers=1)))
    assert evaluate(teacher, data, tmp_path / "out", f"--student=mine={shallow}") == 2
    assert "mine has 1 layers of 16 features" in capsys.readouterr().err
