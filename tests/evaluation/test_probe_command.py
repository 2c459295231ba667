"""``fairseq-lowbit probe`` on words that their pitch tells apart."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fairseq_lowbit.cli import probe
from fairseq_lowbit.cli.main import main
from fairseq_lowbit.models import Hubert
from tests.evaluation.conftest import RATE, WORDS, calibrated, tone, write_split

TARGETS = {
    "wrd": WORDS,
    "phn": ("l oU", "m I", "h aI"),
    "spk": ("anna", "bert", "carl"),
    "acc": ("north", "south", "west"),
}


@pytest.fixture
def models(save: Callable, model: Hubert) -> list[str]:
    return [f"fp={save('fp', model)}", f"low={save('low', calibrated('bitla_w1a1'))}"]


@pytest.fixture
def spoken(data: Path) -> Path:
    """The words in train and test too, with phones, and a voice and an accent for each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        pitches = [hertz for hertz in (150, 600, 2400) for _ in range(count)]
        write_split(data, split, pitches, rng)
        for name in (split, f"words_{split}"):
            for kind, targets in TARGETS.items():
                lines = [f"{target}\n" * count for target in targets]
                (data / f"{name}.{kind}").write_text("".join(lines))
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recordings of 0.4 s in folders that are named by their label, in two formats."""
    rng = np.random.default_rng(0)
    for label, hertz, suffix in (("low", 150, "wav"), ("high", 2400, "flac")):
        (tmp_path / "own" / label).mkdir(parents=True)
        for number in range(10):
            path = tmp_path / "own" / label / f"{number}.{suffix}"
            soundfile.write(path, tone(rng, hertz, 6400), RATE)
    return tmp_path / "own"


def rows_of(out: Path) -> dict:
    return json.loads((out / probe.PROBES_FILE).read_text())["rows"]


def test_all_tasks_of_a_data_folder(
    models: list[str], spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "out"
    assert main(["probe", *models, f"--data={spoken}", f"--out={out}", "--seeds=1"]) == 0
    rows = rows_of(out)
    assert list(rows) == ["fp", "low", "untrained"]
    measures = [
        "phone_error",
        "letter_error",
        "word_error",
        "keyword_error",
        "speaker_error",
        "accent_error",
    ]
    assert all(list(row["probes"]) == measures for row in rows.values())
    assert rows["fp"]["probes"]["keyword_error"]["layer_weights"] != []
    assert (out / "probes.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for text in ("fp", "low", "untrained", "keyword error", "fp and low", str(out)):
        assert text in printed


def test_what_the_folder_has_no_targets_for(
    models: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["probe", models[0], f"--data={data}", f"--out={tmp_path / 'out'}", "--seeds=1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "phones left out: there is no" in printed
    assert "train.phn" in printed
    assert list(rows_of(tmp_path / "out")["fp"]["probes"]) == ["keyword_error"]
    assert main([*command, "--tasks=phones,speakers"]) == 2
    assert "has the targets of none of the tasks" in capsys.readouterr().err


def test_finished_rows_stay(
    models: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    options = [f"--data={data}", f"--out={out}", "--tasks=words"]
    assert main(["probe", models[0], *options]) == 0
    before = rows_of(out)
    capsys.readouterr()
    assert main(["probe", *models, *options]) == 0
    printed = capsys.readouterr().out
    assert "fp: measured before" in printed
    assert "untrained: measured before" in printed
    assert "probing low" in printed
    assert {name: rows_of(out)[name] for name in before} == before
    # A model that was trained on since is another one.
    os.utime(models[0].partition("=")[2], (0, 0))
    assert main(["probe", models[0], *options]) == 0
    printed = capsys.readouterr().out
    assert "probing fp" in printed
    assert "low" in printed


def test_rows_of_another_protocol(
    models: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    command = ["probe", models[0], f"--data={data}", f"--out={out}", "--tasks=words"]
    assert main([*command, "--seeds=1"]) == 0
    before = (out / probe.PROBES_FILE).read_bytes()
    assert main([*command, "--seeds=2"]) == 2
    assert "another protocol (its seeds differ)" in capsys.readouterr().err
    assert main([*command, "--seeds=1", "--seconds=3"]) == 2
    assert "another protocol (its tasks differ)" in capsys.readouterr().err
    assert (out / probe.PROBES_FILE).read_bytes() == before
    (out / probe.PROBES_FILE).write_text("[]")
    assert main([*command, "--seeds=1"]) == 2
    assert "holds no probes" in capsys.readouterr().err


def test_recordings_of_ones_own(
    models: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / "low" / "broken.wav").write_bytes(b"no audio")
    out = tmp_path / "out"
    assert main(["probe", models[0], f"--audio={folder}", f"--out={out}"]) == 0
    (label_error,) = rows_of(out)["fp"]["probes"].values()
    assert label_error["sizes"] == [1] * 6
    # A front-end of random weights may take one of the six for another.
    assert sum(label_error["errors"]) <= 1
    assert "label error" in capsys.readouterr().out


def test_recordings_of_ones_own_with_transcripts(
    models: list[str], folder: Path, tmp_path: Path
) -> None:
    lines = [f"{path.relative_to(folder)}\t{path.parent.name}" for path in folder.rglob("*.*")]
    (tmp_path / "said.tsv").write_text("\n".join(lines) + "\n")
    options = [f"--transcripts={tmp_path / 'said.tsv'}", f"--out={tmp_path / 'out'}"]
    assert main(["probe", models[0], f"--audio={folder}", *options]) == 0
    probes = rows_of(tmp_path / "out")["fp"]["probes"]
    assert list(probes) == ["letter_error", "word_error"]
    assert set(probes["letter_error"]["sizes"]) == {3, 4}


def test_mistakes(
    models: list[str], data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, said = tmp_path / "out", tmp_path / "said.tsv"

    def refused(*options: str, rows: Sequence[str] = models[:1]) -> str:
        assert main(["probe", *rows, f"--out={out}", *options]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert not (out / probe.PROBES_FILE).exists()
        return message

    (tmp_path / "empty").mkdir()
    assert "no audio in" in refused(f"--audio={tmp_path / 'empty'}")
    assert "is not a folder" in refused(f"--audio={tmp_path / 'gone'}")
    assert "no task 'speech'" in refused(f"--data={data}", "--tasks=speech")
    assert "--transcripts belongs to --audio" in refused(f"--data={data}", f"--transcripts={said}")
    assert "--seeds" in refused(f"--data={data}", "--seeds=0")
    assert "the name fp" in refused(f"--data={data}", rows=[models[0], models[0]])
    assert "the name untrained" in refused(f"--data={data}", rows=["untrained=x.pt"])
    assert "there are no transcripts" in refused(f"--audio={folder}", f"--transcripts={said}")
    said.write_text("low/0.wav\tlow\nlow/none.wav\tlow\n")
    message = refused(f"--audio={folder}", f"--transcripts={said}")
    assert "low/none.wav" in message
    assert "no such recording" in message
    said.write_text("low/0.wav\tlow\n")
    message = refused(f"--audio={folder}", f"--transcripts={said}")
    assert "no line for it, and 18 more" in message
    said.write_text("low/0.wav low\n")
    message = refused(f"--audio={folder}", f"--transcripts={said}")
    assert "said.tsv:1: expected `path<TAB>text`" in message
    (folder / "low" / "0.wav").rename(folder / "loose.wav")
    assert "loose.wav has no label" in refused(f"--audio={folder}")
    (folder / "loose.wav").unlink()
    for path in list((folder / "low").iterdir())[3:]:
        path.unlink()
    assert "the label 'low' has 3 usable recordings" in refused(f"--audio={folder}")
    for path in (folder / "low").iterdir():
        path.unlink()
    assert "all recordings have the label 'high'" in refused(f"--audio={folder}")
    (data / "words_test.wrd").write_text("low high\n")
    assert "words_test.wrd has 1 lines" in refused(f"--data={data}", "--tasks=words")
