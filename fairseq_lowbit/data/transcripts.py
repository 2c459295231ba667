"""What is said in the recordings of a manifest: ``<split>.wrd`` or another extension, one line of
space-separated words (or phones) per file."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write

logger = logging.getLogger(__name__)

_LIBRISPEECH_NAME = re.compile(r"(\d+)-\d+-\d+")


def read_transcripts(manifest: Manifest, extension: str = "wrd") -> list[str]:
    """The transcript of every file of a manifest, with single spaces between words.

    Args:
        extension: of the file beside the manifest: ``wrd`` for words, ``phn`` for phones.

    Raises:
        LowbitError: there is no such file, it is no text, it has another number of lines than the
            manifest has files, or it is empty.
    """
    path = transcript_path(manifest, extension)
    if not path.is_file():
        raise LowbitError(
            f"there are no transcripts {path}: it needs one line for each of the {len(manifest)} "
            f"files of {manifest.path}"
        )
    lines = read_lines(path)
    if len(lines) != len(manifest):
        raise LowbitError(
            f"{path} has {len(lines)} lines and {manifest.path} has {len(manifest)} files: they do "
            "not belong together"
        )
    texts = [" ".join(line.split()) for line in lines]
    if not any(texts):
        raise LowbitError(f"{path} holds no word")
    return texts


def read_lines(path: Path) -> list[str]:
    """The lines of a text in UTF-8; raises LowbitError for another encoding."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise LowbitError(
            f"{path} is no text in UTF-8: convert it, for example by iconv"
        ) from error


def write_transcripts(manifest: Path, names: Sequence[str], texts: Mapping[str, str]) -> None:
    """Writes the words beside a manifest, if they are known of all of its files; else warns.

    Args:
        names: of its files, in order.
        texts: words by name.
    """
    missing = [name for name in names if name not in texts]
    if missing:
        set_aside(manifest)
        logger.warning(
            f"no transcripts beside {manifest}: {len(missing)} of its {len(names)} files have "
            f"none, first {missing[0]}"
        )
        return
    with atomic_write(manifest.with_suffix(".wrd")) as file:
        file.writelines(f"{texts[name]}\n" for name in names)


def set_aside(manifest: Path) -> None:
    """Renames words beside a manifest that was written anew: they may be of other files."""
    path = manifest.with_suffix(".wrd")
    if path.is_file():
        old = path.replace(path.with_suffix(".wrd.old"))
        logger.warning(f"{path} is of an earlier manifest: set aside as {old.name}")


def transcript_path(manifest: Manifest, extension: str = "wrd") -> Path:
    """Where the transcripts of a manifest lie: beside it, under its name."""
    return manifest.path.with_suffix(f".{extension}")


def read_speakers(manifest: Manifest) -> list[str]:
    """Who speaks in every file of a manifest: ``<split>.spk``, one line per file, if it is there;
    else as LibriSpeech names its files, ``speaker-chapter-number``; else the file's folder.

    Raises:
        LowbitError: there is a ``.spk`` that does not belong to the manifest.
    """
    if transcript_path(manifest, "spk").is_file():
        return read_transcripts(manifest, "spk")
    paths = [Path(name) for name in manifest.names]
    found = [_LIBRISPEECH_NAME.fullmatch(path.stem) for path in paths]
    return [
        match[1] if match else path.parent.as_posix()
        for match, path in zip(found, paths, strict=True)
    ]
