"""Models taken apart: on which audio, and beside which teacher."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fairseq_lowbit.data.manifest import write_manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.report.inside import dissection
from fairseq_lowbit.report.inside.dissection import dissect_all, held_out_utterance
from fairseq_lowbit.report.subjects import Subject, gather
from fairseq_lowbit.runs.collection import Entry, model_records
from fairseq_lowbit.runs.run import read_run
from tests.evaluation.conftest import calibrated


def subjects_of(*folders: Path) -> list[Subject]:
    entries = [Entry(folder.name, read_run(folder)) for folder in folders]
    known = gather((record for group in model_records(entries, "name") for record in group), ())
    return [subject for subject in known if subject.record["status"] is not None]


def test_beside_a_teacher_or_alone(
    make_run: Callable, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = calibrated("bitla_w1a1")
    folders = [
        make_run("a", student),
        make_run("b", student, teacher=str(tmp_path / "gone.pt")),
        make_run("c", student, teacher=None),
        make_run("d", student, data=None),
    ]
    teachers = []

    def drawings(name: str, anatomy: object) -> list[str]:
        return [name]

    def dissect(student: object, teacher: object, waveform: object) -> None:
        teachers.append(teacher and teacher.source)

    monkeypatch.setattr(dissection, "anatomy_drawings", drawings)
    monkeypatch.setattr(dissection, "dissect", dissect)
    seen: list[str] = []
    subjects = subjects_of(*folders)
    *shown, deaf = dissect_all(subjects, "cpu", lambda subject: seen.append(subject.name))
    assert seen == ["a", "b", "c", "d"]
    assert teachers == [str(tmp_path / "teacher.pt"), None, None]
    assert [one.drawings for one in shown] == [["a"], ["b"], ["c"]]
    assert f"beside its teacher {tmp_path}/teacher.pt" in shown[0].note
    assert f"without a teacher: checkpoint {tmp_path}/gone.pt does not exist" in shown[1].note
    assert "without a teacher: its run names no teacher" in shown[2].note
    assert deaf.has_failed
    assert "--data" in deaf.note


def test_the_insides_are_those_of_the_model(make_run: Callable) -> None:
    """For real: every kind of figure is there."""
    (subject,) = subjects_of(make_run("run", calibrated("bitla_w2a2")))
    (one,) = dissect_all([subject], "cpu", lambda subject: None)
    names = [drawing.name for drawing in one.drawings]
    assert len(set(names)) == len(names) >= 5
    assert all(name.startswith("run_") for name in names)


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """A test set of 1, 3, 5 and 9 s, and a validation set of 2 s."""
    for split, lengths in (("test", (1, 9, 3, 5)), ("valid", (2,))):
        items = []
        for seconds in lengths:
            noise = np.random.default_rng(0).standard_normal(16000 * seconds)
            audio = (0.01 * seconds + 0.01 * noise).astype(np.float32)
            name = f"{split}{seconds}.wav"
            soundfile.write(tmp_path / name, audio, 16000)
            items.append((name, len(audio)))
        write_manifest(tmp_path / f"{split}.tsv", tmp_path, items)
    return tmp_path


def test_an_utterance_of_a_few_seconds(spoken: Path) -> None:
    waveform, name = held_out_utterance(spoken, normalize=False)
    assert (name, tuple(waveform.shape)) == ("test3.wav", (1, 48000))
    assert float(waveform.mean()) == pytest.approx(0.03, abs=1e-3)
    # One that cannot be read is passed over.
    (spoken / "test3.wav").write_bytes(b"noise")
    waveform, name = held_out_utterance(spoken, normalize=False)
    assert (name, tuple(waveform.shape)) == ("test5.wav", (1, 64000))
    normalized, _ = held_out_utterance(spoken, normalize=True)
    assert float(normalized.std()) == pytest.approx(1, abs=0.05)
    (spoken / "test.tsv").unlink()
    assert held_out_utterance(spoken, normalize=False)[1] == "valid2.wav"


def test_without_audio(spoken: Path) -> None:
    for path in spoken.glob("*.wav"):
        path.unlink()
    with pytest.raises(LowbitError, match="none of the files is usable"):
        held_out_utterance(spoken, normalize=False)
    for path in spoken.glob("*.tsv"):
        path.unlink()
    with pytest.raises(LowbitError, match="no manifest .*test.tsv"):
        held_out_utterance(spoken, normalize=False)


def test_another_model_is_no_student_of_its_teacher(make_run: Callable, model: Hubert) -> None:
    shallow = Hubert(replace(model.shape, encoder_layers=1))
    (one,) = dissect_all(subjects_of(make_run("run", shallow)), "cpu", lambda subject: None)
    assert one.has_failed
    assert "layers" in one.note


def test_whatever_goes_wrong_with_one_is_its_own(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise TypeError("no\nnumber")

    monkeypatch.setattr(dissection, "dissect", fail)
    student = calibrated("bitla_w1a1")
    subjects = subjects_of(make_run("a", student), make_run("b", student))
    shown = list(dissect_all(subjects, "cpu", lambda subject: None))
    assert [one.note for one in shown] == ["TypeError: no number"] * 2
