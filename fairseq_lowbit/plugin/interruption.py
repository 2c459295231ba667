"""SIGTERM, SIGUSR1 and SIGUSR2, with which clusters announce preemption: they ask a run to save and
stop."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from torch.utils.data import get_worker_info

# EX_TEMPFAIL of sysexits.h: not finished, run the same command again.
STOPPED = 75
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_received: signal.Signals | None = None
# What submitit does when a job's time is out: it queues the job again, and exits at once.
_queue_again: Callable[[int, FrameType | None], object] | None = None


def listen() -> None:
    """From now on the signals only leave a note. A program that handles one itself keeps it, except
    SIGUSR2: its handler is called by :func:`leave`, when the run is saved."""
    global _queue_again
    for number in _handled():
        handler = signal.getsignal(number)
        if number == signal.SIGUSR2 and callable(handler) and handler is not _note:
            _queue_again = handler
        elif handler != signal.SIG_DFL:
            continue
        signal.signal(number, _note)


def received() -> str | None:
    """Name of the signal that has come since :func:`listen`."""
    return None if _received is None else _received.name


def leave() -> NoReturn:
    """Ends a process whose run has stopped and is saved."""
    if _received == signal.SIGUSR2 and _queue_again is not None:
        _queue_again(_received, None)
    sys.exit(STOPPED)


@contextmanager
def forwarding() -> Iterator[None]:
    """Around waiting for processes that this one has spawned: hands the signals on to them."""
    global _queue_again
    before = {number: signal.signal(number, _forward) for number in _handled()}
    if callable(before.get(signal.SIGUSR2)):
        _queue_again = before[signal.SIGUSR2]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def detach_data_worker() -> None:
    """Called in a data worker, takes it out of its trainer's process group: launchers signal whole
    groups, and without its workers a trainer could not finish its update. They end with it all the
    same."""
    if get_worker_info() is not None and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


def _handled() -> tuple[signal.Signals, ...]:
    """Python lets nothing but the main thread set handlers."""
    return _SIGNALS if threading.current_thread() is threading.main_thread() else ()


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)


def _forward(number: int, frame: FrameType | None) -> None:
    _note(number, frame)
    for child in multiprocessing.active_children():
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)
