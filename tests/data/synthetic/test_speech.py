import inspect
import sys
from collections import Counter

import pytest

from fairseq_lowbit.data.audio import read_audio
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.data.synthetic import speech
from fairseq_lowbit.data.synthetic.speech import VOICES, WORDS, sentence, synthesize_corpus
from fairseq_lowbit.errors import LowbitError

SPLITS = ("train", "valid", "test")
TABLES = (*SPLITS, "words_train", "words_test")
MINUTES = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    return synthesize_corpus(tmp_path_factory.mktemp("demo"), minutes=MINUTES)


def transcripts(root, table):
    return (root / f"{table}.wrd").read_text().splitlines()


def voices(root, table):
    return {name.split("/")[1] for name in read_manifest(root / f"{table}.tsv").names}


def test_as_much_speech_as_was_asked_for(corpus):
    samples = read_manifest(corpus.root / "train.tsv").sizes.sum()
    assert MINUTES <= samples / 16000 / 60 <= 2 * MINUTES + 3  # every voice says a minimum
    assert corpus.minutes["train"] == pytest.approx(samples / 16000 / 60)
    assert inspect.signature(synthesize_corpus).parameters["minutes"].default >= 20


def test_every_file_is_usable_and_as_long_as_its_manifest_says(corpus):
    for split in SPLITS:
        manifest = read_manifest(corpus.root / f"{split}.tsv")
        assert corpus.files[split] == len(manifest)
        for path, size in zip(manifest.files(), manifest.sizes, strict=True):
            samples = read_audio(path)  # raises for silence and wrong formats
            assert len(samples) == size
            assert 0.1 < abs(samples).max() <= 1
            assert 0.3 < len(samples) / 16000 < 12


def test_pauses_are_short_and_not_digitally_clean(corpus):
    for path in list(read_manifest(corpus.root / "train.tsv").files())[::20]:
        samples = abs(read_audio(path))
        assert samples[:1600].any()
        loud = (samples > 0.1 * samples.max()).nonzero()[0]
        assert loud[0] < 0.5 * 16000
        assert len(samples) - loud[-1] < 0.6 * 16000


def test_held_out_voices_are_new(corpus):
    train, valid, test = (voices(corpus.root, split) for split in SPLITS)
    assert len(train) >= 20
    assert len(valid) >= 3
    assert len(test) >= 6
    assert len(train | valid | test) == len(train) + len(valid) + len(test)
    variants = [voice.variant for split in SPLITS for voice in VOICES[split]]
    assert len(set(variants)) == len(variants)


def test_transcripts_match_their_manifests(corpus):
    for table in TABLES:
        manifest = read_manifest(corpus.root / f"{table}.tsv")
        texts = transcripts(corpus.root, table)
        assert len(texts) == len(manifest)
        for name, text in zip(manifest.names, texts, strict=True):
            assert (f"/word_{text}_" in name) == (text in WORDS)
            assert text == text.lower()


def test_phones_speakers_and_accents(corpus):
    for table in TABLES:
        names = read_manifest(corpus.root / f"{table}.tsv").names
        spoken, speakers, accents = (
            (corpus.root / f"{table}.{extension}").read_text().splitlines()
            for extension in ("phn", "spk", "acc")
        )
        assert speakers == [name.split("/")[1] for name in names]
        assert all(s.startswith(f"{a}_") for s, a in zip(speakers, accents, strict=True))
        assert len(spoken) == len(names)
        assert all(spoken)
    assert len(set(" ".join(spoken).split())) > 30
    # Stress and length are no phones.
    assert not {"'", ",", ":", ";", ""} & {phone for line in spoken for phone in line.split(" ")}
    # An r at the end of a word is heard in some accents only.
    ends = {
        accent: line.split()[-1]
        for text, accent, line in zip(transcripts(corpus.root, table), accents, spoken, strict=True)
        if text == "four"
    }
    assert len(set(ends.values())) > 1


def test_word_probe(corpus):
    train = Counter(transcripts(corpus.root, "words_train"))
    test = Counter(transcripts(corpus.root, "words_test"))
    assert set(train) == set(test) == set(WORDS)
    assert min(train.values()) >= 2
    assert min(test.values()) >= 8
    assert corpus.word_files == {"train": train.total(), "test": test.total()}
    assert voices(corpus.root, "words_test") <= voices(corpus.root, "test")
    for split in ("train", "test"):
        all_names = read_manifest(corpus.root / f"{split}.tsv").names
        assert set(read_manifest(corpus.root / f"words_{split}.tsv").names) <= set(all_names)


def test_no_sentence_is_said_twice(corpus):
    texts = [text for split in SPLITS for text in transcripts(corpus.root, split)]
    sentences = [text for text in texts if text not in WORDS]
    assert len(sentences) > 60
    assert len(set(sentences)) == len(sentences)


def test_equal_seeds_give_equal_files(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    # f1 to f3 are breathy: eSpeak NG itself draws their noise.
    few = {"train": VOICES["train"][6:9], "valid": VOICES["valid"][:1], "test": VOICES["test"][:1]}
    monkeypatch.setattr(speech, "VOICES", few)
    monkeypatch.setattr(speech, "_TEST_TAKES", 2)
    roots = [tmp_path / name for name in ("a", "b", "c")]
    for root, seed in zip(roots, (0, 0, 1), strict=True):
        synthesize_corpus(root, minutes=0.1, seed=seed)
    files = [contents(root) for root in roots]
    assert files[0] == files[1]
    assert files[0] != files[2]


def contents(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.suffix in (".flac", ".wrd", ".phn", ".spk", ".acc")
    }


def test_sentences_are_distinct():
    assert len({sentence(number) for number in range(20_000)}) == 20_000


@pytest.mark.parametrize("minutes", [0, -1, 1e9])
def test_impossible_lengths(tmp_path, minutes):
    with pytest.raises(LowbitError, match="minutes"):
        synthesize_corpus(tmp_path, minutes=minutes)


def test_without_espeak_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(LowbitError, match=r"pip install fairseq-lowbit\[demo\]"):
        synthesize_corpus(tmp_path, minutes=1)
