"""The ``wer`` command, and what it says about recognizers."""

import json
import re

import numpy as np
import pytest
import soundfile
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.data.manifest import read_manifest, write_manifest
from fairseq_lowbit.data.transcripts import read_speakers
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.recognition import Recognition, Recognizer
from fairseq_lowbit.interop.checkpoint import as_checkpoint
from fairseq_lowbit.models import Hubert, LoadedModel
from tests.shapes import TINY

UNITS = ("", "|", *"abcdefghij")
TEXTS = ("a bad cab", "face", "i hid a bag")


@pytest.fixture(autouse=True)
def _jiwer():
    pytest.importorskip("jiwer")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    files = [("ann/a.wav", 3000), ("bob/b.wav", 4000), ("ann/c.wav", 5000)]
    for name, samples in files:
        (root / name).parent.mkdir(exist_ok=True)
        soundfile.write(root / name, 0.1 * rng.standard_normal(samples), 16000)
    write_manifest(root / "test.tsv", root, files)
    (root / "test.wrd").write_text("".join(f"{text}\n" for text in TEXTS))
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, units) in enumerate({"one": UNITS, "two": UNITS, "encoder": ()}.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Hubert(TINY, units=len(units)).eval()
            if units:
                torch.nn.init.normal_(model.ctc_proj.weight)
        loaded = LoadedModel(model, name, 0, True, normalize=True, units=units)
        torch.save(as_checkpoint(loaded), folder / f"{name}.pt")
    return folder


def wer(*arguments):
    return main(["wer", *map(str, arguments)])


def test_models_side_by_side(data, models, tmp_path, capsys):
    named = [f"{name}={models / name}.pt" for name in ("one", "two")]
    assert wer(*named, f"again={models / 'one.pt'}", "--data", data, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "3 sentences of 8 words, 2 speakers" in shown
    assert "UNINFORMATIVE: one gets" in shown
    assert "again: +0.0 points to one" in shown
    result = json.loads((tmp_path / "wer.json").read_text())
    one, two, again = result["rows"]
    assert one["difference"] is None
    assert again["difference"]["value"] == 0
    assert again["pairs"]["p"] == 1
    assert two["precision"] == "float"
    assert two["storage_mb"] > 0
    counts = result["utterances"]["substitutions_deletions_insertions"]["two"]
    assert np.sum(counts) / 8 == pytest.approx(two["wer"]["value"])
    assert np.sum(counts, 0).tolist() == [two["substitutions"], two["deletions"], two["insertions"]]
    assert result["utterances"]["speakers"] == ["ann", "bob", "ann"]
    assert (tmp_path / "wer.png").stat().st_size > 10_000
    # The written transcripts give the same table, without models.
    texts = tmp_path / "texts"
    hypotheses = [f"{name}={tmp_path / name}.txt" for name in ("one", "two")]
    known = ["--references", tmp_path / "references.txt", "--hypotheses", *hypotheses]
    assert wer(*known, "--out", texts) == 0
    rows = json.loads((texts / "wer.json").read_text())["rows"]
    assert [row["wer"]["value"] for row in rows] == [one["wer"]["value"], two["wer"]["value"]]


def test_decoding_with_a_language_model(data, models, tmp_path, capsys):
    pytest.importorskip("nltk")
    pytest.importorskip("ctc_beam_decoder")
    lm = tmp_path / "lm.arpa"
    assert main(["ngram", str(data / "test.wrd"), str(lm)]) == 0
    one = f"one={models / 'one.pt'}"
    assert wer(one, "--data", data, "--out", tmp_path / "greedy") == 0
    assert wer(one, "--data", data, "--out", tmp_path / "lm", "--lm", lm) == 0
    assert "decoded with" in capsys.readouterr().out
    greedy, decoded = (
        json.loads((tmp_path / name / "wer.json").read_text()) for name in ("greedy", "lm")
    )
    assert (greedy["language_model"], decoded["language_model"]) == ("", str(lm))
    # Noise is heard as letters; the language model makes fewer words of them.
    assert decoded["rows"][0]["insertions"] < greedy["rows"][0]["insertions"]


def test_a_file_that_cannot_be_read_is_left_out_of_all(data, models, tmp_path, caplog):
    files = [*zip(read_manifest(data / "test.tsv").names, (3000, 4000, 5000), strict=True)]
    write_manifest(tmp_path / "test.tsv", data, [*files[:1], ("gone.wav", 9000), *files[2:]])
    (tmp_path / "test.wrd").write_text((data / "test.wrd").read_text())
    assert wer(f"one={models / 'one.pt'}", "--data", tmp_path, "--out", tmp_path / "out") == 0
    assert "left out" in caplog.text
    assert (tmp_path / "out" / "references.txt").read_text() == f"{TEXTS[0]}\n{TEXTS[2]}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one={m}/one.pt", "encoder={m}/encoder.pt", "--data", "{d}"], "encoder.pt has no CTC"),
        (["a={m}/one.pt", "a={m}/two.pt", "--data", "{d}"], "the name 'a' is taken"),
        (["references={m}/one.pt", "--data", "{d}"], "the name 'references' is taken"),
        (["{m}/one.pt", "--data", "{d}"], "write NAME=MODEL"),
        (["one={m}/one.pt", "--data", "{d}", "--split", "dev"], "no manifest .*dev.tsv"),
        (["one={m}/one.pt"], "give both"),
        ([], "give either NAME=MODEL"),
        (["--references", "{d}/test.wrd", "one={m}/one.pt"], "give either NAME=MODEL"),
        (["--references", "{d}/test.wrd", "--lm", "a.arpa"], "--lm decodes models"),
        (["one={m}/one.pt", "--data", "{d}", "--lm", "{d}/a.arpa"], "a.arpa: give an .arpa file"),
        (["--references", "{d}/test.wrd"], "--references and --hypotheses belong together"),
        (["--references", "{d}/test.wrd", "--hypotheses", "a={d}/b"], "no file of transcripts .*b"),
        (
            ["--references", "{d}/test.wrd", "--hypotheses", "a={d}/test.tsv"],
            "test.tsv has 4 lines and .*test.wrd has 3",
        ),
    ],
)
def test_what_cannot_be_compared(arguments, message, data, models, tmp_path, capfd):
    filled = [text.format(m=models, d=data) for text in arguments]
    assert wer(*filled, "--out", tmp_path) == 2
    assert re.search(f"^error: .*{message}", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("transcripts", "message"),
    [
        ("a bad cab\nface\n", "has 2 lines and .* has 3 files"),
        ("A BAD CAB\nFACE\nI HID A BAG\n", "test.wrd and .*one.pt are of different letters"),
    ],
)
def test_transcripts_of_another_kind(transcripts, message, data, models, tmp_path, capsys):
    (tmp_path / "test.tsv").write_text((data / "test.tsv").read_text())
    (tmp_path / "test.wrd").write_text(transcripts)
    assert wer(f"one={models / 'one.pt'}", "--data", tmp_path, "--out", tmp_path / "out") == 2
    assert re.search(message, capsys.readouterr().err)


def test_findings_say_what_differs():
    said = ["a bad cab hid a face"] * 60
    worse = ["a bad cab hid a fade" if i % 2 else text for i, text in enumerate(said)]
    rows = Recognition(
        said, said, None, [Recognizer("fp", said), Recognizer("w1", worse), Recognizer("w2", said)]
    )
    first, second = rows.findings()
    assert "w1: +8.3 points to fp" in first
    assert (
        ", beyond chance; MAPSSWE p <0.001 in 30 segments, too few for more than a rough p."
        in first
    )
    assert "w2: +0.0 points" in second
    assert "NOT beyond chance; MAPSSWE p 1 in 0 segments" in second
    with pytest.raises(LowbitError, match="1 transcripts for 60"):
        Recognition(said, said, None, [Recognizer("fp", said[:1])])


def test_speakers(tmp_path):
    names = ["84/121123/84-121123-0000.flac", "audio/en_m1/x.flac"]
    write_manifest(tmp_path / "test.tsv", tmp_path, [(name, 1) for name in names])
    manifest = read_manifest(tmp_path / "test.tsv")
    assert read_speakers(manifest) == ["84", "audio/en_m1"]
    (tmp_path / "test.spk").write_text("ann\nbob\n")
    assert read_speakers(manifest) == ["ann", "bob"]
    (tmp_path / "test.spk").write_text("ann\n")
    with pytest.raises(LowbitError, match=r"test\.spk has 1 lines"):
        read_speakers(manifest)
