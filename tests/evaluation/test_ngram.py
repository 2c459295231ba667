"""n-gram models of words: what is estimated, and decoding with it."""

import math
import sys
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.ngram import NgramDecoder, estimate
from fairseq_lowbit.evaluation.transcription import greedy

TEXTS = ("the cat sat", "the cat ran", "a dog sat", "", "the dog sat")
UNITS = ("", "|", *"abcdefghijklmnopqrstuvwxyz")


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    pytest.importorskip("nltk")
    path = tmp_path / "lm.arpa"
    estimate(TEXTS, 3, path)
    return path


def read(path: Path) -> dict[str, tuple[float, float]]:
    """Probability and weight of backing off, of every n-gram."""
    rows = [line.split("\t") for line in path.read_text().split("\n") if "\t" in line]
    return {
        words: (10 ** float(p), 10 ** float(rest[0]) if rest else 1) for p, words, *rest in rows
    }


def test_probabilities_are_those_of_witten_and_bell(arpa: Path) -> None:
    """Worked by hand: "the" is said 3 times, before 2 different words."""
    found = read(arpa)
    cat = 2 / (2 + 3) * found["cat"][0] + 3 / 5 * 2 / 3
    assert found["the"][1] == pytest.approx(2 / 5, rel=1e-4)
    assert found["the cat"][0] == pytest.approx(cat, rel=1e-4)
    assert found["the cat sat"][0] == pytest.approx(
        2 / 4 * found["cat sat"][0] + 2 / 4 * 1 / 2, rel=1e-4
    )


@pytest.mark.parametrize("context", ["<s>", "the", "dog", "<s> the", "the cat"])
def test_probabilities_sum_to_one(arpa: Path, context: str) -> None:
    found = read(arpa)
    words = [name for name in found if " " not in name and name not in ("<s>", "<unk>")]

    def probability(context: tuple[str, ...], word: str) -> float:
        name = " ".join((*context, word))
        if name in found:
            return found[name][0]
        weight = found[" ".join(context)][1] if " ".join(context) in found else 1
        return weight * probability(context[1:], word)

    # NLTK takes the begin of a sentence for a word that may follow any other.
    total = sum(probability(tuple(context.split()), word) for word in words)
    begins = 4 / 20
    weights = [found[" ".join(context.split()[i:])][1] for i in range(len(context.split()))]
    assert total == pytest.approx(1 - math.prod(weights) * begins, rel=1e-3)


def test_the_language_model_chooses_among_what_sounds_alike(arpa: Path) -> None:
    pytest.importorskip("ctc_beam_decoder")
    heard, best = "the cat sat", "the kat zat"
    frames = [
        (UNITS.index(a.replace(" ", "|")), UNITS.index(b.replace(" ", "|")))
        for a, b in zip(heard, best, strict=True)
    ]
    scores = torch.full((2 * len(frames), len(UNITS)), 1e-4)
    for place, (said, preferred) in enumerate(frames):
        scores[2 * place, preferred] += 0.5
        scores[2 * place, said] += 0.4
        scores[2 * place + 1, 0] += 1
    scores = (scores / scores.sum(1, keepdim=True)).log()
    assert greedy(scores, UNITS) == best
    assert NgramDecoder(arpa, UNITS)(scores, UNITS) == heard


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("nltk")
    (tmp_path / "train.wrd").write_text("\n".join(TEXTS))
    out = tmp_path / "models" / "lm.arpa"
    assert main(["ngram", str(tmp_path / "train.wrd"), str(out), "--order", "2"]) == 0
    assert "of 4 sentences" in capsys.readouterr().out
    assert "\\2-grams:" in out.read_text()
    assert main(["ngram", str(tmp_path / "train.wrd"), str(tmp_path / "lm")]) == 2
    assert "name the file .arpa" in capsys.readouterr().err
    assert "\\3-grams:" not in out.read_text()
    assert main(["ngram", str(tmp_path / "train.wrd"), str(out), "--order", "1"]) == 2
    assert "--order 1: give a whole number from 2" in capsys.readouterr().err
    assert main(["ngram", str(tmp_path / "none"), str(out)]) == 2
    assert "there is no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "units", "message"),
    [
        ("a.arpa", "no model\n", UNITS, "a.arpa is not a whole ARPA file"),
        ("a.bin", "", UNITS, "a.bin: give an .arpa file"),
        ("a.arpa", None, UNITS, "a.arpa: give an .arpa file"),
        ("a.arpa", "", ("", "▁the", "cat"), "not pieces of words"),
    ],
)
def test_what_cannot_decode(
    name: str, content: str | None, units: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("ctc_beam_decoder")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(LowbitError, match=message):
        NgramDecoder(tmp_path / name, units)


def test_without_the_libraries_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nltk", "nltk.lm", "ctc_beam_decoder"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LowbitError, match=r"pip install fairseq-lowbit\[lm\]"):
        estimate(TEXTS, 3, tmp_path / "lm.arpa")
    (tmp_path / "lm.arpa").touch()
    with pytest.raises(LowbitError, match=r"pip install fairseq-lowbit\[lm\]"):
        NgramDecoder(tmp_path / "lm.arpa", UNITS)
