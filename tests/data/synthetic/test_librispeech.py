"""The synthesized corpus in LibriSpeech's layout, through the command that reads it."""

from pathlib import Path

import pytest

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.data.librispeech import PUBLISHED
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.data.synthetic import librispeech
from fairseq_lowbit.data.synthetic.speech import VOICES


@pytest.fixture
def download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Archives of a few seconds: three training voices, and two of each held-out split."""
    pytest.importorskip("espeakng_loader")
    few = {"train": VOICES["train"][:3], "valid": VOICES["valid"][:2], "test": VOICES["test"][:2]}
    monkeypatch.setattr(librispeech, "VOICES", few)
    arguments = ["--layout", "librispeech", "--archives", "--minutes", "0.1"]
    assert main(["synthesize", str(tmp_path / "download"), *arguments]) == 0
    return tmp_path / "download"


def test_it_reads_as_librispeech_does(download: Path, tmp_path: Path) -> None:
    names = {path.name for path in download.iterdir()}
    assert names == {f"{subset}.tar.gz" for subset in PUBLISHED} | {"md5sum.txt"}
    assert main(["librispeech", str(download), str(tmp_path / "out")]) == 0
    top = tmp_path / "out" / "LibriSpeech"
    speakers = (top / "SPEAKERS.TXT").read_text()
    for split, voices in (("train", 3), ("valid", 2), ("test", 2)):
        manifest = read_manifest(tmp_path / "out" / f"{split}.tsv")
        assert len({name.split("/")[1] for name in manifest.names}) == voices
        for name in manifest.names:
            subset, speaker, chapter, file = name.split("/")
            assert file.startswith(f"{speaker}-{chapter}-")
            transcript = top / subset / speaker / chapter / f"{speaker}-{chapter}.trans.txt"
            (words,) = (
                line.partition(" ")[2]
                for line in transcript.read_text().splitlines()
                if line.startswith(file.removesuffix(".flac"))
            )
            assert words
            assert words == words.upper()
            row = next(r for r in speakers.splitlines() if r.startswith(speaker))
            assert row.split("|")[2].strip() == subset


def test_archives_are_for_one_layout_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synthesize", str(tmp_path / "out"), "--archives"]) == 2
    assert "--archives belongs to --layout librispeech" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
