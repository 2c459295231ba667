import numpy as np
import pytest
import soundfile

from fairseq_lowbit.data.manifest import (
    Manifest,
    atomic_write,
    check_manifest,
    read_manifest,
    write_manifest,
)
from fairseq_lowbit.errors import LowbitError


def corpus(root, count, rate=16000, channels=1):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (1600, channels))
    names = [f"{i:03d}.wav" for i in range(count)]
    for name in names:
        soundfile.write(root / name, samples, rate)
    write_manifest(root / "train.tsv", root, [(name, 1600) for name in names])
    return read_manifest(root / "train.tsv")


def test_round_trip(tmp_path):
    items = [("a/b c.flac", 16000), ("\u2028odd.flac", 7)]
    write_manifest(tmp_path / "train.tsv", tmp_path, items)
    manifest = read_manifest(tmp_path / "train.tsv")
    assert manifest.root == tmp_path.resolve()
    assert list(zip(manifest.names, manifest.sizes, strict=True)) == items
    assert manifest.sizes.dtype == np.int64
    assert len(manifest) == 2
    assert next(manifest.files()) == tmp_path / "a" / "b c.flac"


def test_missing_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(LowbitError, match="fairseq-lowbit prepare"):
        read_manifest(tmp_path / "train.tsv")


@pytest.mark.parametrize("text", ["", "\n", "{root}\n", "{root}"])
def test_empty(tmp_path, text):
    path = tmp_path / "train.tsv"
    path.write_text(text.format(root=tmp_path))
    with pytest.raises(LowbitError, match="train.tsv is empty"):
        read_manifest(path)


@pytest.mark.parametrize(
    "line", ["b.wav", "b.wav 5", "b.wav\tfive", "\t5", "b.wav\t0", "b\t-1", ""]
)
def test_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "train.tsv"
    path.write_text(f"{tmp_path}\na.wav\t5\n{line}\nc.wav\t5\n")
    with pytest.raises(LowbitError, match=r"train.tsv:3: expected"):
        read_manifest(path)


def test_missing_root(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text(f"{tmp_path / 'gone'}\na.wav\t5\n")
    with pytest.raises(LowbitError, match="train.tsv:1: .*gone does not exist"):
        read_manifest(path)


def test_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("before")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines(["half", None])
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_good_corpus_has_nothing_to_report(tmp_path):
    assert check_manifest(corpus(tmp_path, 100), 16000, probe=10) == []


@pytest.mark.parametrize("rate, channels", [(8000, 1), (16000, 2)])
def test_wrong_format_stops_the_run(tmp_path, rate, channels):
    with pytest.raises(LowbitError, match="000.wav has .* `fairseq-lowbit prepare` converts"):
        check_manifest(corpus(tmp_path, 3, rate, channels), 16000)


def test_a_few_unreadable_files_are_reported(tmp_path):
    manifest = corpus(tmp_path, 30)
    (tmp_path / "004.wav").unlink()
    (tmp_path / "009.wav").write_bytes(b"broken")
    missing, broken = check_manifest(manifest, 16000)
    assert "004.wav: no such file" in missing
    assert "009.wav: unreadable" in broken


def test_many_unreadable_files_stop_the_run(tmp_path):
    manifest = corpus(tmp_path, 30)
    for i in range(4):
        (tmp_path / f"{i:03d}.wav").unlink()
    with pytest.raises(LowbitError, match="4 of 30 probed files cannot be read.*000.wav"):
        check_manifest(manifest, 16000)


def test_only_the_probe_is_opened_first_and_last_included(tmp_path):
    manifest = corpus(tmp_path, 50)
    names = [*manifest.names[:-1], "gone.wav"]
    with pytest.raises(LowbitError, match="1 of 5 probed.*gone.wav"):
        check_manifest(Manifest(manifest.path, tmp_path, names, manifest.sizes), 16000, probe=5)
