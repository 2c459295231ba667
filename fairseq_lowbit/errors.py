"""The one exception that a user's mistake raises."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LowbitError(Exception):
    """A mistake in a user's input, said in one message that names the file, key or value and what
    would be right."""


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
