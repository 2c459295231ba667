"""Memory of this process, as Linux counts it."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
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
