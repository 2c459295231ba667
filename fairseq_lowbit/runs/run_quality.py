"""Measuring the quality of many runs, each once.

The result is kept beside a run and holds until the run, its teacher or the data change.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from fairseq_lowbit import __version__
from fairseq_lowbit.errors import LowbitError, describe
from fairseq_lowbit.evaluation.quality import (
    Candidate,
    Quality,
    Reference,
    read_held_out,
    read_quality,
)
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.models import load_model
from fairseq_lowbit.runs.folder import quality_file
from fairseq_lowbit.runs.run import Run

logger = logging.getLogger(__name__)

_HELD_OUT = ("test.tsv", "test.km", "words_train.tsv", "words_test.tsv")


@dataclass(frozen=True)
class RunQuality:
    """The quality of a run, and of its teacher on the same audio (None without one), both under the
    name of their precision."""

    own: Quality
    teacher: Quality | None


def stored_quality(run: Run, seconds: float) -> RunQuality | None:
    """What was measured before, if run, teacher, data and ``seconds`` are still the same."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(quality_file(run.folder).read_text())
        if stored["of"] == _fingerprint(run, seconds):
            teacher = stored["teacher"]
            return RunQuality(read_quality(stored["row"]), teacher and read_quality(teacher))
    return None


def measure_quality(
    runs: Iterable[Run], seconds: float, progress: Callable[[Run], None]
) -> Iterator[tuple[Run, RunQuality | str]]:
    """Measures runs, those of one teacher and data folder after each other, and stores the results
    beside them.

    Args:
        runs: each with a checkpoint.
        seconds: audio to measure on.
        progress: called with each run before it is measured.

    Yields:
        each run with its quality, or with a message why it could not be measured.
    """
    for (data, teacher), members in groupby(sorted(runs, key=_group), key=_group):
        bench = _Bench(data, teacher, seconds)
        for run in members:
            progress(run)
            # Of the files as they are now: a run may go on while it is measured.
            fingerprint = _fingerprint(run, seconds)
            try:
                quality = bench.measure(run)
            except Exception as error:  # one broken run must not cost the others their rows
                logger.debug("cannot measure %s", run.folder, exc_info=True)
                yield run, describe(error)
            else:
                _store(run, fingerprint, quality)
                yield run, quality


def _group(run: Run) -> tuple[str, str]:
    return str(run.data or ""), str(run.teacher or "")


class _Bench:
    """One teacher and one data folder, loaded when the first run asks for them."""

    def __init__(self, data: str, teacher: str, seconds: float) -> None:
        self._data, self._teacher, self._seconds = data, teacher, seconds
        self._reference: Reference | None = None
        self._teacher_quality: Quality | None = None
        self._mistake: LowbitError | None = None

    def measure(self, run: Run) -> RunQuality:
        with torch.inference_mode():
            if not self._teacher:
                return RunQuality(self._refer_to(run.checkpoint)[1], None)
            self._load_teacher()
            candidate = Candidate.of(load_model(run.checkpoint))
            return RunQuality(self._reference.measure(candidate), self._teacher_quality)

    def _load_teacher(self) -> None:
        """Once; what is wrong with the teacher or the data is wrong for every run."""
        if self._mistake is not None:
            raise self._mistake
        if self._reference is None:
            try:
                self._reference, self._teacher_quality = self._refer_to(self._teacher)
            except LowbitError as error:
                self._mistake = error
                raise

    def _refer_to(self, checkpoint: str | Path) -> tuple[Reference, Quality]:
        """A model as the measure of others, and its own row."""
        if not self._data:
            raise LowbitError("its configuration names no data to measure on: give --data")
        loaded = load_model(checkpoint)
        reference = Reference(loaded, read_held_out(Path(self._data), loaded, self._seconds))
        return reference, reference.measure_teacher(loaded.model.plan.precision.name)


def _store(run: Run, fingerprint: dict[str, Any], quality: RunQuality) -> None:
    stored = {
        "of": fingerprint,
        "row": asdict(quality.own),
        "teacher": quality.teacher and asdict(quality.teacher),
    }
    # In a folder that is not ours to write to, the next command measures again.
    with suppress(LowbitError), atomic_write(quality_file(run.folder)) as file:
        json.dump(stored, file, indent=1)


def _fingerprint(run: Run, seconds: float) -> dict[str, Any]:
    """Changes with whatever a measurement depends on, but not when folders are moved."""
    return {
        "version": __version__,
        "seconds": seconds,
        "checkpoint": _stamp(run.checkpoint),
        "teacher": run.teacher and _stamp(run.teacher),
        "data": run.data and {name: _stamp(run.data / name) for name in _HELD_OUT},
    }


def _stamp(path: Path) -> list[int] | None:
    """Size and time of the last change; None for a file that is not there."""
    with suppress(OSError):
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]
    return None
