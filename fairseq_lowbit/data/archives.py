"""Unpacking archives of recordings: checked beforehand, safely, and whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from fairseq_lowbit.data.progress import tqdm_options
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import writing

MD5_FILE = "md5sum.txt"
# Compressed audio does not compress again: unpacked, it takes the size of the archive and the
# unused ends of the disk's blocks.
_UNPACKED_SIZE = 1.1
_CHUNK = 1 << 20
_BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)


def check_space(archives: Iterable[Path], out: Path) -> None:
    """Raises LowbitError if what is in ``archives`` will not fit on the disk of the folder
    ``out``."""
    needed = _UNPACKED_SIZE * sum(archive.stat().st_size for archive in archives)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise LowbitError(
            f"{out.absolute()}: unpacking takes about {needed / 1e9:,.1f} GB and the disk has "
            f"{free / 1e9:,.1f} GB left: make room, or name a folder on another disk"
        )


def check_md5(archive: Path) -> bool:
    """Compares an archive with the ``md5sum.txt`` beside it; False where none lists the archive.

    Raises:
        LowbitError: the sums differ.
    """
    listed = _listed_md5(archive)
    if listed is None:
        return False
    digest = hashlib.md5(usedforsecurity=False)
    with _progress(archive, "check") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != listed:
        raise LowbitError(
            f"archive {archive} is not the published one: its MD5 sum is {digest.hexdigest()} and "
            f"{archive.with_name(MD5_FILE)} has {listed}; download it again"
        )
    return True


def _listed_md5(archive: Path) -> str | None:
    sums = archive.with_name(MD5_FILE)
    if not sums.is_file():
        return None
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition(" ")
        if Path(name.strip().lstrip("*")).name == archive.name:
            return digest.lower()
    return None


@contextmanager
def unpacked(archive: Path, temporary: Path) -> Iterator[Path]:
    """Unpacks a ``.tar.gz`` into the folder ``temporary``, which is gone again behind the block:
    what is wanted of it is moved away inside. A folder left by a killed process is replaced.

    Raises:
        LowbitError: a truncated, corrupt or unsafe archive; a full disk.
    """
    # Python 3.11.4 has brought what keeps a member from being written elsewhere.
    if not hasattr(tarfile, "data_filter"):
        raise LowbitError("unpacking needs Python 3.11.4 or later; or unpack by `tar` yourself")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(temporary):
            temporary.mkdir(parents=True)
            _extract(archive, temporary)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> None:
    try:
        with (
            _progress(archive, "unpack") as file,
            gzip.open(file) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            for member in tar:
                tar.extract(member, folder, filter="data")
            # A damaged header ends the archive without a word, but not with the right checksum.
            while stream.read(_CHUNK):
                pass
    except tarfile.FilterError as error:
        raise LowbitError(f"archive {archive} is not safe to unpack: {error}") from error
    except _BROKEN as error:
        raise LowbitError(
            f"archive {archive} is truncated or corrupt ({error}); download it again"
        ) from error


@contextmanager
def _progress(path: Path, action: str) -> Iterator[BinaryIO]:
    """The file, with a bar that knows when its reading will end."""
    size = os.path.getsize(path)
    title = f"{action} {path.name}"
    with (
        open(path, "rb") as file,
        tqdm.wrapattr(file, "read", size, desc=title, **tqdm_options()) as watched,
    ):
        yield watched
