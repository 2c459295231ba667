"""What is said in the recordings of a manifest: ``<split>.wrd`` or another extension, one line of
space-separated words (or phones) per file."""

from pathlib import Path

from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.errors import LowbitError


def read_transcripts(manifest: Manifest, extension: str = "wrd") -> list[str]:
    """The transcript of every file of a manifest, with single spaces between words.

    Args:
        extension: of the file beside the manifest: ``wrd`` for words, ``phn`` for phones.

    Raises:
        LowbitError: there is no such file, it has another number of lines than the manifest has
            files, or it is empty.
    """
    path = transcript_path(manifest, extension)
    if not path.is_file():
        raise LowbitError(
            f"there are no transcripts {path}: it needs one line for each of the {len(manifest)} "
            f"files of {manifest.path}"
        )
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(lines) != len(manifest):
        raise LowbitError(
            f"{path} has {len(lines)} lines and {manifest.path} has {len(manifest)} files: they do "
            "not belong together"
        )
    texts = [" ".join(line.split()) for line in lines]
    if not any(texts):
        raise LowbitError(f"{path} holds no word")
    return texts


def transcript_path(manifest: Manifest, extension: str = "wrd") -> Path:
    """Where the transcripts of a manifest lie: beside it, under its name."""
    return manifest.path.with_suffix(f".{extension}")
