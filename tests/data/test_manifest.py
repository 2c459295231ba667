import numpy as np
import pytest
import soundfile

from fairseq_lowbit.data.manifest import (
    atomic_write,
    check_format,
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


@pytest.mark.parametrize("rate, channels", [(8000, 1), (16000, 2)])
def test_wrong_format_stops_the_run(tmp_path, rate, channels):
    with pytest.raises(LowbitError, match="000.wav has .* `fairseq-lowbit prepare` converts"):
        check_format(corpus(tmp_path, 3, rate, channels), 16000)


def test_a_good_corpus_and_damaged_files_pass(tmp_path):
    manifest = corpus(tmp_path, 30)
    check_format(manifest, 16000)
    (tmp_path / "000.wav").unlink()
    (tmp_path / "029.wav").write_bytes(b"broken")
    check_format(manifest, 16000)


def test_the_last_file_is_opened_too(tmp_path):
    manifest = corpus(tmp_path, 100)
    soundfile.write(tmp_path / "099.wav", np.zeros(1600), 8000)
    with pytest.raises(LowbitError, match="099.wav has 8000 Hz"):
        check_format(manifest, 16000)
