import itertools

import numpy as np
import pytest
import soundfile

from fairseq_lowbit.data import prepare
from fairseq_lowbit.data.audio import read_audio
from fairseq_lowbit.data.manifest import check_format, read_manifest
from fairseq_lowbit.data.prepare import prepare_directory
from fairseq_lowbit.data.transcripts import read_transcripts
from fairseq_lowbit.errors import LowbitError

SPLITS = ("train", "valid", "test")


def record(path, seconds=1.0, rate=16000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    soundfile.write(path, rng.uniform(-0.3, 0.3, (int(seconds * rate), channels)), rate)


def names(out, split):
    return read_manifest(out / f"{split}.tsv").names


def all_names(out):
    return sorted(itertools.chain.from_iterable(names(out, split) for split in SPLITS))


@pytest.fixture
def messy(tmp_path):
    """A folder as users have them: every kind of file, some of them useless."""
    source = tmp_path / "in"
    record(source / "plain.wav")
    record(source / "plain.flac")
    record(source / "phone.wav", rate=8000)
    record(source / "deep" / "er" / "music.ogg", rate=44100, channels=2)
    record(source / "deep" / "UPPER.WAV", rate=44100)
    record(source / "short.wav", seconds=0.2)
    record(source / "long.wav", seconds=7)
    soundfile.write(source / "silent.wav", np.zeros(16000), 16000)
    (source / "corrupt.flac").write_bytes(b"nothing to hear")
    (source / "notes.txt").write_text("not audio")
    (source / "._plain.wav").write_text("a resource fork")
    return source


def test_everything_usable_is_converted(messy, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SECONDS", 3)
    out = tmp_path / "out"
    summary = prepare_directory(messy, out)
    assert all_names(out) == [
        "audio/deep/UPPER_WAV.flac",
        "audio/deep/er/music_ogg.flac",
        "audio/long_wav-000.flac",
        "audio/long_wav-001.flac",
        "audio/long_wav-002.flac",
        "audio/phone_wav.flac",
        "audio/plain_flac.flac",
        "audio/plain_wav.flac",
    ]
    for split in SPLITS:
        manifest = read_manifest(out / f"{split}.tsv")
        check_format(manifest, 16000)
        assert [len(read_audio(path)) for path in manifest.files()] == manifest.sizes.tolist()
        assert summary.files[split] == len(manifest)
        assert summary.minutes[split] == pytest.approx(manifest.sizes.sum() / 16000 / 60)
    assert sum(summary.minutes.values()) == pytest.approx(12 / 60, rel=1e-3)
    assert summary.converted == 6
    assert not summary.grouped_by_folder


def test_useless_files_are_named_with_the_reason(messy, tmp_path):
    summary = prepare_directory(messy, tmp_path / "out")
    reasons = dict(summary.skipped)
    assert set(reasons) == {"short.wav", "silent.wav", "corrupt.flac"}
    assert "0.20 s" in reasons["short.wav"]
    assert "silent" in reasons["silent.wav"]
    assert "unreadable" in reasons["corrupt.flac"]
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [tuple(line.split("\t")) for line in lines] == summary.skipped


def test_second_run_converts_only_what_is_missing(messy, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SECONDS", 3)
    out = tmp_path / "out"
    prepare_directory(messy, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "audio").rglob("*.flac")}
    tables = [(out / f"{split}.tsv").read_text() for split in SPLITS]
    # An interrupted run: the first piece of the long file is always the last to be written.
    lost = {out / "audio" / "long_wav-000.flac", out / "audio" / "phone_wav.flac"}
    for path in lost:
        path.unlink()
    summary = prepare_directory(messy, out)
    assert (summary.converted, summary.reused) == (2, 4)
    assert [(out / f"{split}.tsv").read_text() for split in SPLITS] == tables
    rewritten = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert rewritten == lost | {out / "audio" / f"long_wav-00{i}.flac" for i in (1, 2)}


def test_output_inside_the_source_is_not_an_input(messy):
    prepare_directory(messy, messy / "out")
    assert prepare_directory(messy, messy / "out").reused == 6


def test_pieces_of_a_file_stay_in_one_split(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SECONDS", 1)
    for i in range(5):
        record(tmp_path / "in" / f"{i}.wav", seconds=4, rate=8000)
    prepare_directory(tmp_path / "in", tmp_path / "out")
    sources = [{name.partition("-")[0] for name in names(tmp_path / "out", s)} for s in SPLITS]
    assert [len(files) for files in sources] == [3, 1, 1]
    assert len(set.union(*sources)) == 5


def test_speakers_are_disjoint_at_the_outermost_level(tmp_path):
    for speaker, chapter, i in itertools.product(range(12), range(2), range(2)):
        record(tmp_path / "in" / f"s{speaker}" / f"c{chapter}" / f"{i}.wav", seconds=0.5)
    summary = prepare_directory(tmp_path / "in", tmp_path / "out", test_fraction=0.2)
    assert summary.grouped_by_folder
    speakers = [{name.split("/")[1] for name in names(tmp_path / "out", s)} for s in SPLITS]
    assert [len(group) for group in speakers] == [8, 1, 3]
    assert len(set.union(*speakers)) == 12


def test_split_depends_on_the_seed_only(tmp_path):
    for i in range(20):
        record(tmp_path / "in" / f"{i}.wav", seconds=0.5)
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        prepare_directory(tmp_path / "in", out, seed=seed)
    assert names(outs[0], "test") == names(outs[1], "test")
    assert names(outs[0], "test") != names(outs[2], "test")
    assert all_names(outs[0]) == all_names(outs[2])


def test_silent_pieces_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SECONDS", 1)
    rng = np.random.default_rng(0)
    noise, silence = rng.uniform(-0.3, 0.3, 16000), np.zeros(16000)
    (tmp_path / "in").mkdir()
    for i in range(3):
        soundfile.write(
            tmp_path / "in" / f"{i}.wav", np.concatenate([noise, silence, noise]), 16000
        )
    prepare_directory(tmp_path / "in", tmp_path / "out")
    assert [name[-8:-5] for name in all_names(tmp_path / "out")] == ["000", "002"] * 3


def test_nothing_usable(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(LowbitError, match="no audio in"):
        prepare_directory(tmp_path / "in", tmp_path / "out")
    record(tmp_path / "in" / "short.wav", seconds=0.1)
    with pytest.raises(LowbitError, match="no usable audio.*short.wav: 0.10 s"):
        prepare_directory(tmp_path / "in", tmp_path / "out")


def test_too_little_for_three_splits(tmp_path):
    for i in range(2):
        record(tmp_path / "in" / f"{i}.wav")
    with pytest.raises(LowbitError, match="three usable files or more, found 2"):
        prepare_directory(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"valid_fraction": 0}, "fractions"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "fractions"),
    ],
)
def test_impossible_options(tmp_path, options, message):
    record(tmp_path / "in" / "a.wav")
    with pytest.raises(LowbitError, match=message):
        prepare_directory(tmp_path / "in", tmp_path / "out", **options)


def test_words_beside_recordings_are_kept(tmp_path, caplog):
    source, out = tmp_path / "in", tmp_path / "out"
    for index in range(6):
        record(source / f"talk{index}.wav")
        (source / f"talk{index}.txt").write_text(f"this is\ntalk {index}\n")
    prepare_directory(source, out)
    for split in SPLITS:
        manifest = read_manifest(out / f"{split}.tsv")
        numbers = [name.removeprefix("audio/talk")[0] for name in manifest.names]
        assert read_transcripts(manifest) == [f"this is talk {number}" for number in numbers]
    # Words of some files only would leave the others as silence.
    first = names(out, "train")[0].removeprefix("audio/").removesuffix("_wav.flac")
    (source / f"{first}.txt").unlink()
    prepare_directory(source, out)
    assert not (out / "train.wrd").exists()
    assert f"first audio/{first}_wav.flac" in caplog.text
    # Those of other splits would be left where their files had moved elsewhere.
    caplog.clear()
    words = (out / "test.wrd").read_text()
    for text in source.glob("*.txt"):
        text.unlink()
    prepare_directory(source, out)
    assert not list(out.glob("*.wrd"))
    assert (out / "test.wrd.old").read_text() == words
    assert f"{out / 'test.wrd'} is of an earlier manifest: set aside as test.wrd.old" in caplog.text
    assert "no transcripts" not in caplog.text
