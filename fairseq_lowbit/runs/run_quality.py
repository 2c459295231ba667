"""Measuring the quality of many runs, each once.

The result is kept beside a run and holds until the run, its teacher or the data change.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
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
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.interop.huggingface_directory import weight_file
from fairseq_lowbit.runs.folder import quality_file
from fairseq_lowbit.runs.run import Run

logger = logging.getLogger(__name__)

_Referred = tuple[Reference, Quality]
_HELD_OUT = (
    "test.km",
    *(
        f"{name}.{extension}"
        for name in ("train", "test", "words_train", "words_test")
        for extension in ("tsv", "wrd", "phn", "spk", "acc")
    ),
)


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
    runs: Iterable[Run], seconds: float, device: str, progress: Callable[[Run], None]
) -> Iterator[tuple[Run, RunQuality | str]]:
    """Measures runs and stores the results beside them.

    Args:
        runs: each with a checkpoint.
        seconds: audio to measure on.
        device: that models run on.
        progress: called with each run before it is measured.

    Yields:
        each run with its quality, or with a message why it could not be measured.
    """
    # Runs of one teacher and data folder come after each other, and share what is loaded of both.
    refer_to = lru_cache(maxsize=1)(partial(_refer_to, seconds=seconds, device=device))
    for run in sorted(runs, key=lambda run: (str(run.data or ""), str(run.teacher or ""))):
        progress(run)
        # Taken before measuring, since training may replace the checkpoint meanwhile.
        fingerprint = _fingerprint(run, seconds)
        try:
            with torch.inference_mode():
                quality = _measure(run, device, refer_to)
        except Exception as error:  # one broken run must not hide the others
            logger.debug("cannot measure %s", run.folder, exc_info=True)
            yield run, describe(error)
        else:
            _store(run, fingerprint, quality)
            yield run, quality


def _measure(run: Run, device: str, refer_to: Callable[[Path, Path], _Referred]) -> RunQuality:
    if run.data is None:
        raise LowbitError("its configuration names no data to measure on: give --data")
    reference, quality = refer_to(run.teacher or run.checkpoint, run.data)
    if run.teacher is None:
        return RunQuality(quality, None)
    candidate = Candidate.of(open_model(run.checkpoint, device))
    return RunQuality(reference.measure(candidate), quality)


def _refer_to(checkpoint: Path, data: Path, seconds: float, device: str) -> _Referred:
    """A model as a reference for others, and its own quality."""
    loaded = open_model(checkpoint, device)
    reference = Reference(loaded, read_held_out(data, loaded, seconds))
    return reference, reference.measure_teacher(loaded.model.plan.precision.name)


def _store(run: Run, fingerprint: dict[str, Any], quality: RunQuality) -> None:
    stored = {
        "of": fingerprint,
        "row": asdict(quality.own),
        "teacher": quality.teacher and asdict(quality.teacher),
    }
    # Where the folder cannot be written, the next command measures again.
    with suppress(LowbitError), atomic_write(quality_file(run.folder)) as file:
        json.dump(stored, file, indent=1)


def _fingerprint(run: Run, seconds: float) -> dict[str, Any]:
    """Everything that a measurement depends on; it stays the same when folders are moved."""
    return {
        "version": __version__,
        "seconds": seconds,
        "checkpoint": _stamp(run.checkpoint),
        "teacher": run.teacher and _stamp(run.teacher),
        "data": run.data and {name: _stamp(run.data / name) for name in _HELD_OUT},
    }


def _stamp(path: Path) -> list[int] | None:
    """Size and time of the last change, of a Hugging Face folder those of its weights; None for
    what is not there."""
    with suppress(OSError):
        status = (weight_file(path) or path).stat()
        return [status.st_size, status.st_mtime_ns]
    return None
