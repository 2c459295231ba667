"""Writing files: an interruption leaves the old one whole, a full disk gives one clear message."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fairseq_lowbit.errors import LowbitError


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary neighbour of ``path``, which replaces it when the block ends well.

    Raises:
        LowbitError: see :func:`writing`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new temporary neighbour of the folder ``path``, which replaces it when the block ends well.

    Raises:
        LowbitError: see :func:`writing`.
    """
    path = Path(path).absolute()
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{part}") for part in ("new", "old"))
    with writing(path):
        try:
            new.mkdir(parents=True)
            yield new
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            for folder in (new, old):
                shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: str | Path) -> None:
    """Makes the folder of a file that will be written later, before time is spent on it.

    Raises:
        LowbitError: see :func:`writing`; ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise LowbitError(f"{path} is a folder: name a file")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around whatever writes ``path``: says in one message why it cannot be written.

    Raises:
        LowbitError: a full disk, a folder that is none or may not be written, and the like.
    """
    try:
        yield
    except LowbitError:
        raise
    except Exception as error:
        cause = _system_error(error)
        if cause is None:
            raise
        why = cause.strerror or cause
        if isinstance(cause, (FileExistsError, NotADirectoryError)):
            why = "a file is where a folder has to be"
        raise LowbitError(
            f"cannot write {Path(path).absolute()}: {why}. What was written before is whole: make "
            "room or give another folder, and run the same command to go on"
        ) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's refusal somewhere in an exception chain; torch wraps it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
