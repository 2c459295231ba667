"""Many runs as plain data: what each was, how far it came, and its measured quality."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_lowbit.errors import describe
from fairseq_lowbit.interop.huggingface_directory import is_model_directory
from fairseq_lowbit.precision.rules import with_form
from fairseq_lowbit.profiling.paper import paper_wer
from fairseq_lowbit.runs.columns import (
    COSINE,
    MASKED_ACCURACY,
    PAPER_WER,
    PHONE_ERROR,
    PROBES,
    SNR,
    STORAGE,
    VALIDATION_LOSS,
    ModelRecord,
)
from fairseq_lowbit.runs.folder import checkpoint_name, display_name, find_runs, job_folder
from fairseq_lowbit.runs.run import CALIBRATION, Run, read_run
from fairseq_lowbit.runs.run_quality import RunQuality

# What every record holds, in the order of the CSV file's columns.
FIELDS = (
    *("name", "status", "message", "precision", "rules", "form", "loss", "overrides"),
    *("updates", "planned", "best_loss", "storage_mb", "masked_accuracy", "masked_chance"),
    *("cosine", "snr_db"),
    *(f"{column.key}{part}" for column in PROBES for part in ("", "_margin")),
    *("paper_wer", "cosine_layers", "snr_db_layers"),
    *("teacher", "data", "folder"),
)
# What a table can be sorted by, the best first.
_SORT_COLUMNS = {
    "storage": STORAGE,
    "valid": VALIDATION_LOSS,
    "masked": MASKED_ACCURACY,
    "cosine": COSINE,
    "snr": SNR,
    "probe": PHONE_ERROR,
    "paper": PAPER_WER,
}
SORTS = (*_SORT_COLUMNS, "name", "updates", "status")
# The status of an entry without a readable model.
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Entry:
    """A run that was found, or a place where none could be read.

    Attributes:
        problem: why there is no run, or why its quality could not be measured.
    """

    name: str
    run: Run | None = None
    problem: str | None = None
    quality: RunQuality | None = None


def collect(places: Sequence[Path]) -> list[Entry]:
    """Finds the runs in folders and their subfolders, and single checkpoints, each once.

    Runs are named by their path below the folder that all have in common. A place without a run
    gives an entry with a problem. Runs with ``checkpoint.no_save`` are left out.
    """
    paths, entries = [], []
    for place in places:
        is_model = place.is_file() or is_model_directory(place)
        found = [path.resolve() for path in ([place] if is_model else find_runs(place))]
        paths += [path for path in found if path not in paths]
        if not found:
            what = "no run in this folder" if place.is_dir() else "there is no such file or folder"
            entries.append(Entry(str(place), problem=what))
    base = os.path.commonpath([path.parent for path in paths]) if paths else ""
    entries += [_entry(display_name(path.relative_to(base)), path) for path in paths]
    return [entry for entry in entries if entry.run is None or entry.run.saves]


def _entry(name: str, path: Path) -> Entry:
    try:
        return Entry(name, read_run(path))
    except Exception as error:  # one broken run must not hide the others
        return Entry(name, problem=describe(error))


def model_records(entries: Sequence[Entry], sort: str) -> list[list[ModelRecord]]:
    """Plain data of every entry, grouped by teacher and data; a group's teacher comes first.

    Args:
        sort: one of :data:`SORTS`; ties are broken by storage, then name.
    """
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        run = entry.run
        key = (False, str(run.teacher or ""), str(run.data)) if run else (True, "", "")
        groups.setdefault(key, []).append(entry)
    return [_group(members, sort) for _, members in sorted(groups.items())]


def _group(members: Sequence[Entry], sort: str) -> list[ModelRecord]:
    common = _common_overrides(members)
    lines = _sorted((_record(entry, common) for entry in members), sort)
    return [*_teacher_records(members), *lines]


def _record(entry: Entry, common: set[str]) -> ModelRecord:
    run, quality = entry.run, entry.quality
    if run is None:
        return _blank(name=entry.name, status=UNREADABLE, message=entry.problem)
    is_trained = run.loss != CALIBRATION
    has_paper = not run.rules and is_trained
    record = _blank(
        name=entry.name,
        status=status_of(run),
        message=run.failure or entry.problem,
        precision=run.precision,
        rules=run.rules,
        form=run.form,
        loss=run.loss,
        overrides=tuple(text for text in run.overrides if text not in common),
        updates=run.updates if is_trained else None,  # the teacher's otherwise
        planned=run.planned if is_trained else None,
        best_loss=run.best_loss,
        storage_mb=run.storage_mb,
        paper_wer=paper_wer(run.precision, run.loss) if has_paper else None,
        teacher=run.teacher,
        data=run.data,
        folder=run.folder,
    )
    return record | quality.own.figures() if quality else record


def status_of(run: Run) -> str:
    """How far a run has come, in a word or two."""
    if run.failure is not None:
        return "failed"
    if run.updates is None:
        return "no checkpoint"
    return "finished" if run.is_finished else "unfinished"


def _teacher_records(members: Sequence[Entry]) -> list[ModelRecord]:
    """The record of the teacher that these runs share; only its name if it was not measured."""
    run = members[0].run
    if run is None or run.teacher is None:
        return []
    known = [e.quality.teacher for e in members if e.quality and e.quality.teacher]
    record = _blank(
        name=f"teacher {checkpoint_name(run.teacher)}", data=run.data, folder=run.teacher
    )
    if known:
        name = known[0].name
        record |= {"precision": name, "rules": 0, "paper_wer": paper_wer(name, "hubert")}
        record |= known[0].figures()
    return [record]


def _blank(**known: Any) -> ModelRecord:
    return dict.fromkeys(FIELDS) | known


def _sorted(lines: Iterable[ModelRecord], sort: str) -> list[ModelRecord]:
    """Sorts records; those without the value come last."""

    def rank(record: ModelRecord) -> tuple:
        value, size = _rank(record, sort), record["storage_mb"]
        return value is None, value or 0, size is None, size or 0, record["name"]

    return sorted(lines, key=rank)


def _rank(record: ModelRecord, sort: str) -> str | float | None:
    """A value by which the best record is the smallest."""
    if sort in ("name", "status"):
        return record[sort]
    merit = record[sort] if sort == "updates" else _SORT_COLUMNS[sort].merit(record)
    return None if merit is None else -merit


def _common_overrides(entries: Iterable[Entry]) -> set[str]:
    """Overrides that all runs of a group share and that therefore distinguish none, if there are
    several runs. Stages have no overrides of their own."""
    runs = [entry.run for entry in entries if entry.run is not None and entry.run.overrides]
    counts = Counter(override for run in runs for override in set(run.overrides))
    return {text for text, count in counts.items() if count == len(runs) > 1}


def unnamed_overrides(record: ModelRecord) -> list[str]:
    """The overrides that are not part of the name; the folders of a sweep are named by theirs."""
    return [t for t in record["overrides"] or () if job_folder([t]) not in record["name"]]


def precision_text(record: ModelRecord) -> str:
    """Name, number of rules, form if it is not the usual one, and how it was trained where that is
    not distillation; empty if nothing is known."""
    precision, rules, loss = (record[key] for key in ("precision", "rules", "loss"))
    if rules:
        precision = f"{precision} + {rules} rule{'s' if rules > 1 else ''}"
    if precision:
        precision = with_form(precision, record["form"])
    is_usual = loss == "distillation" or (record["precision"] == "float" and not rules)
    return ", ".join(filter(None, (precision, None if is_usual else loss)))
