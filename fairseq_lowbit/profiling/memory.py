"""Memory of this process, as Linux counts it."""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fairseq_lowbit.errors import LowbitError

_STATUS = Path("/proc/self/status")
_SYSTEM = Path("/proc/meminfo")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def resident_bytes() -> int | None:
    """Resident memory of this process, without freed blocks that the allocator keeps for reuse;
    None where the system does not report it."""
    _give_back()
    return _bytes(_STATUS, "VmRSS")


def peak_resident_bytes(run: Callable[[], object]) -> int | None:
    """Most resident memory that this process has while ``run`` runs.

    All of the process counts: interpreter, libraries, whatever is loaded. It repeats to a few per
    cent, because of the blocks that the allocator keeps meanwhile. None where the system does not
    report it.
    """
    _give_back()
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        run()
        return None
    run()
    return _bytes(_STATUS, "VmHWM")


@contextmanager
def within_free_memory(what: str) -> Iterator[None]:
    """Makes allocations beyond the memory that is free on entry fail. Otherwise the system would
    swap, which spoils every measured time, or kill the process.

    Args:
        what: what needs the memory, for the message.

    Raises:
        LowbitError: an allocation in the block failed.
    """
    free = _bytes(_SYSTEM, "MemAvailable")
    try:
        with _limited_growth(free):
            yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        known = "there is" if free is None else f"the {free / 1e9:.1f} GB that are free"
        raise LowbitError(f"{what} needs more memory than {known}") from error


@contextmanager
def _limited_growth(size: int | None) -> Iterator[None]:
    """Lets this process take ``size`` more bytes; without limit when None."""
    held = _bytes(_STATUS, "VmData")
    if size is None or held is None:
        yield
        return
    import resource  # not available on every system

    soft, hard = before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held + size if soft == resource.RLIM_INFINITY else min(held + size, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _is_out_of_memory(error: Exception) -> bool:
    torch_messages = ("can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(words in str(error) for words in torch_messages)


def _give_back() -> None:
    """Returns freed blocks to the system."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _bytes(file: Path, key: str) -> int | None:
    """A value that ``file`` gives in kB."""
    if not file.exists():
        return None
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    return None
