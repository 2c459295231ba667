"""Transcripts beside a manifest."""

from pathlib import Path

import pytest

from fairseq_lowbit.data.manifest import read_manifest, write_manifest
from fairseq_lowbit.data.transcripts import read_transcripts
from fairseq_lowbit.errors import LowbitError


@pytest.fixture
def manifest(tmp_path: Path):
    write_manifest(tmp_path / "test.tsv", tmp_path, [("a.wav", 100), ("b.wav", 200)])
    return read_manifest(tmp_path / "test.tsv")


def test_one_line_for_each_file(manifest):
    manifest.path.with_suffix(".wrd").write_text("in the  beginning \n \n")
    assert read_transcripts(manifest) == ["in the beginning", ""]


def test_transcripts_that_are_missing_or_of_other_files_are_refused(manifest):
    with pytest.raises(LowbitError, match="no transcripts .*test.phn"):
        read_transcripts(manifest, "phn")
    words = manifest.path.with_suffix(".wrd")
    words.write_text("in\nthe\nbeginning\n")
    with pytest.raises(LowbitError, match="3 lines and .* 2 files"):
        read_transcripts(manifest)
    words.write_bytes("schön\nwar's\n".encode("latin-1"))
    with pytest.raises(LowbitError, match="test.wrd is no text in UTF-8"):
        read_transcripts(manifest)
    words.write_text("\n \n")
    with pytest.raises(LowbitError, match="no word"):
        read_transcripts(manifest)
