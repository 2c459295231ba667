"""From archives to manifests, on a few tones in LibriSpeech's layout."""

import errno
import gzip
import hashlib
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.data import archives, librispeech
from fairseq_lowbit.data.librispeech import unpack_subsets
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.data.transcripts import read_transcripts
from fairseq_lowbit.errors import LowbitError

SUBSETS = ("train-clean-100", "dev-clean", "test-clean")
ARGUMENTS = ["--train", "train-clean-100", "--valid", "dev-clean", "--test", "test-clean"]


def write_subset(top: Path, subset: str, speakers: tuple[int, ...] = (19, 26)) -> Path:
    """Two utterances of each of two chapters of each speaker."""
    rng = np.random.default_rng(len(subset))
    for speaker in speakers:
        for chapter in (198, 227):
            folder = top / subset / str(speaker) / str(chapter)
            folder.mkdir(parents=True)
            names = [f"{speaker}-{chapter}-{number:04d}" for number in range(2)]
            for number, name in enumerate(names):
                noise = rng.uniform(-0.3, 0.3, 1600 * (number + 1))
                soundfile.write(folder / f"{name}.flac", noise, 16000)
            lines = [f"{name} SOME WORDS\n" for name in names]
            (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return top / subset


def archive(folder: Path, out: Path) -> Path:
    path = out / f"{folder.name}.tar.gz"
    notes = folder.parent / "SPEAKERS.TXT"
    notes.write_text("; who speaks")
    with tarfile.open(path, "w:gz") as tar:
        for member in (notes, folder):
            tar.add(member, f"LibriSpeech/{member.name}")
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    for subset in SUBSETS:
        archive(write_subset(made, subset), source)
    return source


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "source")


def librispeech_command(source: Path, out: Path, *options: str) -> int:
    return main(["librispeech", str(source), str(out), *ARGUMENTS, *options])


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_archives_become_manifests(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert librispeech_command(source, out) == 0
    train = read_manifest(out / "train.tsv")
    assert train.root == (out / "LibriSpeech").resolve()
    assert train.names[:3] == [
        "train-clean-100/19/198/19-198-0000.flac",
        "train-clean-100/19/198/19-198-0001.flac",
        "train-clean-100/19/227/19-227-0000.flac",
    ]
    assert train.sizes.tolist() == [1600, 3200] * 4
    assert all(path.is_file() for path in train.files())
    assert [len(read_manifest(out / f"{s}.tsv")) for s in ("valid", "test")] == [8, 8]
    assert read_transcripts(train) == ["SOME WORDS"] * 8
    assert sorted(p.name for p in (out / "LibriSpeech").iterdir()) == sorted(
        (*SUBSETS, "SPEAKERS.TXT")
    )


def test_unpacking_is_a_step_of_its_own_and_is_not_repeated(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert librispeech_command(source, out, "--unpack-only") == 0
    assert not list(out.glob("*.tsv"))
    before = contents(out)
    shutil.rmtree(source)
    source.mkdir()
    assert librispeech_command(source, out) == 0
    assert before.items() <= contents(out).items()
    assert (out / "train.tsv").is_file()


@pytest.mark.parametrize("top", [".", "LibriSpeech"])
def test_unpacked_folders_are_read_where_they_are(tmp_path: Path, top: str) -> None:
    for subset in SUBSETS:
        write_subset(tmp_path / "in" / top, subset)
    assert librispeech_command(tmp_path / "in", tmp_path / "out") == 0
    manifest = read_manifest(tmp_path / "out" / "train.tsv")
    assert manifest.root == (tmp_path / "in" / top).resolve()
    assert not (tmp_path / "out" / "LibriSpeech").exists()


def test_folders_and_archives_share_a_root(source: Path, tmp_path: Path) -> None:
    write_subset(source, "train-other-500")
    names = ["--train", "train-clean-100", "train-other-500", "--valid", "--test"]
    assert main(["librispeech", str(source), str(tmp_path / "out"), *names]) == 0
    manifest = read_manifest(tmp_path / "out" / "train.tsv")
    assert len(manifest) == 16
    assert all(path.is_file() for path in manifest.files())
    assert not (tmp_path / "out" / "valid.tsv").exists()


def test_a_killed_unpacking_is_taken_up_where_it_was(source: Path, tmp_path: Path) -> None:
    """Killed in the middle of the second archive, as nothing but a signal 9 can be."""
    program = (
        "import sys, tarfile, time\n"
        "from fairseq_lowbit.cli.main import main\n"
        "extract = tarfile.TarFile.extract\n"
        "def slow(self, member, *args, **kwargs):\n"
        "    extract(self, member, *args, **kwargs)\n"
        "    if member.name.endswith('26-198-0000.flac') and 'dev-clean' in member.name:\n"
        "        print('here', flush=True)\n"
        "        time.sleep(60)\n"
        "tarfile.TarFile.extract = slow\n"
        "main(sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, "librispeech", str(source), str(out), *ARGUMENTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    top = out / "LibriSpeech"
    assert (top / "train-clean-100").is_dir()
    assert not (top / "dev-clean").exists()
    finished = contents(top / "train-clean-100")
    assert librispeech_command(source, out) == 0
    assert contents(top / "train-clean-100") == finished
    assert len(read_manifest(out / "valid.tsv")) == 8
    assert not list(top.glob(".*"))


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    elif how == "a bit off":
        data[len(data) // 2] ^= 1
    else:
        data[:] = b"<html>not found</html>"
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "a bit off", "another file"])
def test_a_damaged_archive_is_named(source: Path, tmp_path: Path, how: str) -> None:
    damaged(source / "dev-clean.tar.gz", how)
    with pytest.raises(LowbitError, match=r"dev-clean\.tar\.gz is truncated or corrupt"):
        unpack_subsets(source, tmp_path / "out", SUBSETS)
    assert [p.name for p in (tmp_path / "out" / "LibriSpeech").glob("*-clean*")] == [
        "train-clean-100"
    ]


def test_a_damaged_tar_header_does_not_pass_for_the_end(source: Path, tmp_path: Path) -> None:
    """tarfile stops there without a word; the checksum of the archive still tells."""
    path = source / "dev-clean.tar.gz"
    packed = path.read_bytes()
    plain = bytearray(gzip.decompress(packed))
    header = plain.index(b"LibriSpeech/dev-clean/26/227/26-227-0001.flac")
    plain[header : header + 4] = b"\xff" * 4
    # The damaged content under the checksum of the whole one.
    path.write_bytes(gzip.compress(bytes(plain))[:-8] + packed[-8:])
    with pytest.raises(LowbitError, match=r"dev-clean\.tar\.gz is truncated or corrupt"):
        unpack_subsets(source, tmp_path / "out", SUBSETS)


def test_an_archive_may_not_write_elsewhere(source: Path, tmp_path: Path) -> None:
    with tarfile.open(source / "dev-clean.tar.gz", "w:gz") as tar:
        tar.add(source / "test-clean.tar.gz", "../../../escaped")
    with pytest.raises(LowbitError, match=r"dev-clean\.tar\.gz is not safe to unpack"):
        unpack_subsets(source, tmp_path / "out", SUBSETS)
    assert not list(tmp_path.rglob("escaped"))


def test_an_archive_of_something_else(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "test-clean.tar.gz", source / "dev-clean.tar.gz")
    with pytest.raises(LowbitError, match=r"dev-clean\.tar\.gz holds no folder LibriSpeech/dev"):
        unpack_subsets(source, tmp_path / "out", SUBSETS)


def test_md5_sums_beside_the_archives_are_checked(source: Path, tmp_path: Path) -> None:
    sums = {name: hashlib.md5((source / name).read_bytes()).hexdigest() for name in _names()}
    listed = source / "md5sum.txt"
    listed.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    assert len(unpack_subsets(source, tmp_path / "good", SUBSETS)) == 3
    listed.write_text(listed.read_text().replace(sums["dev-clean.tar.gz"], 32 * "0"))
    with pytest.raises(LowbitError, match=r"dev-clean\.tar\.gz is not the published one.*0000"):
        unpack_subsets(source, tmp_path / "bad", SUBSETS)
    assert not list((tmp_path / "bad" / "LibriSpeech").iterdir())


def _names() -> list[str]:
    return [f"{subset}.tar.gz" for subset in SUBSETS]


def test_too_little_room_is_told_before_anything_is_unpacked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum((source / name).stat().st_size for name in _names())
    usage = shutil.disk_usage(tmp_path)._replace(free=size)  # no room for the blocks
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        LowbitError, match="unpacking takes about .* GB and the disk has .* GB left"
    ):
        unpack_subsets(source, tmp_path / "out", SUBSETS)
    assert not list((tmp_path / "out" / "LibriSpeech").iterdir())


def test_a_disk_that_fills_up_on_the_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "copyfileobj", full)
        with pytest.raises(LowbitError, match="cannot write .*No space left on device"):
            unpack_subsets(source, tmp_path / "out", SUBSETS)
    assert not list((tmp_path / "out" / "LibriSpeech").iterdir())
    assert len(unpack_subsets(source, tmp_path / "out", SUBSETS)) == 3


def test_a_missing_subset_tells_what_is_there(source: Path, tmp_path: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        unpack_subsets(source, tmp_path / "out", ["train-clean-360"])
    message = str(caught.value)
    for part in (str(source / "train-clean-360.tar.gz"), "dev-clean.tar.gz", "--train"):
        assert part in message


def test_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="there is no folder .*gone"):
        unpack_subsets(tmp_path / "gone", tmp_path / "out", SUBSETS)


def test_a_subset_without_recordings(tmp_path: Path) -> None:
    (tmp_path / "dev-clean" / "19").mkdir(parents=True)
    with pytest.raises(LowbitError, match="dev-clean holds no recordings"):
        unpack_subsets(tmp_path, tmp_path / "out", ["dev-clean"])


def test_a_recording_that_the_transcript_names_is_missing(tmp_path: Path) -> None:
    folder = write_subset(tmp_path, "dev-clean")
    (folder / "26" / "198" / "26-198-0001.flac").unlink()
    with pytest.raises(LowbitError, match=r"26-198\.trans\.txt has the words of 26-198-0001"):
        unpack_subsets(tmp_path, tmp_path / "out", ["dev-clean"])


@pytest.mark.parametrize("kind", ["corrupt", "another rate"])
def test_an_unusable_recording_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    for subset in SUBSETS:
        write_subset(tmp_path / "in", subset)
    path = tmp_path / "in" / "dev-clean" / "26" / "198" / "26-198-0001.flac"
    if kind == "corrupt":
        path.write_bytes(b"broken")
    else:
        soundfile.write(path, np.random.default_rng(0).uniform(-0.3, 0.3, 1600), 8000)
    assert librispeech_command(tmp_path / "in", tmp_path / "out") == 2
    assert "1 of 8 recordings of dev-clean are unusable, first" in (
        error := capsys.readouterr().err
    )
    assert str(path) in error


@pytest.mark.parametrize(
    "options, message",
    [
        (["--valid", "train-clean-100"], "train-clean-100 is named twice"),
        (["--train"], "--train names no subset"),
    ],
)
def test_impossible_splits(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list, message: str
) -> None:
    assert librispeech_command(source, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_of_a_published_subset_shows(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert librispeech_command(source, tmp_path / "out", "--unpack-only") == 0
    row = next(r for r in capsys.readouterr().out.splitlines() if "train-clean-100" in r)
    assert f"{librispeech.PUBLISHED['train-clean-100']:,}" in row
    assert " 8 " in row
