"""Many runs side by side, as plain data: what each was, how far it came, what was measured."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_lowbit.errors import describe
from fairseq_lowbit.evaluation.quality import Quality
from fairseq_lowbit.profiling.paper import paper_wer
from fairseq_lowbit.runs.folder import CALIBRATION, Run, find_runs, read_run, read_single
from fairseq_lowbit.runs.measured import Measurement

# What every record holds, in the order of the CSV file's columns.
FIELDS = (
    *("name", "status", "message", "precision", "rules", "loss", "overrides"),
    *("updates", "planned", "best_loss", "storage_mb", "masked_accuracy", "masked_chance"),
    *("cosine", "snr_db", "word_probe", "word_probe_std", "paper_wer"),
    *("cosine_layers", "snr_db_layers", "word_probe_layers", "word_probe_std_layers"),
    *("teacher", "data", "folder"),
)
# What a table can be sorted by; a minus: the greatest value first.
SORTS = {
    "storage": "storage_mb",
    "name": "name",
    "valid": "best_loss",
    "masked": "-masked_accuracy",
    "cosine": "-cosine",
    "snr": "-snr_db",
    "probe": "-word_probe",
    "paper": "paper_wer",
    "updates": "-updates",
    "status": "status",
}
# Overrides that say where things are, what another field says, or what goes with it.
_TOLD_ELSEWHERE = (
    *("task.data", "task.teacher", "task.init_from"),
    *("optimization.max_update", "lr_scheduler.warmup_updates", "sweep"),
)
Record = dict[str, Any]
# Status of what holds no model.
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Entry:
    """A line of the table: a run, or a folder where none could be read.

    Attributes:
        problem: why there is no run, or no measurement of it.
    """

    name: str
    run: Run | None = None
    problem: str | None = None
    measurement: Measurement | None = None


def collect(places: Sequence[Path]) -> list[Entry]:
    """The runs at and below folders and the checkpoints among ``places``, each once, named from
    their common parent on; a folder without any is an entry that says so.

    Left out are runs that were told to save nothing.
    """
    paths, entries = [], []
    for place in places:
        found = [path.resolve() for path in ([place] if place.is_file() else find_runs(place))]
        paths += [path for path in found if path not in paths]
        if not found:
            what = "no run in this folder" if place.is_dir() else "there is no such file or folder"
            entries.append(Entry(str(place), problem=what))
    base = os.path.commonpath([path.parent for path in paths]) if paths else ""
    entries += [_entry(_name(path.relative_to(base)), path) for path in paths]
    return [entry for entry in entries if entry.run is None or entry.run.saves]


def _name(path: Path) -> str:
    return "/".join(part for part in path.parts if part != "checkpoints")


def _entry(name: str, path: Path) -> Entry:
    try:
        return Entry(name, read_single(path) if path.is_file() else read_run(path))
    except Exception as error:  # one broken run must not cost the others their rows
        return Entry(name, problem=describe(error))


def records(entries: Sequence[Entry], sort: str) -> list[list[Record]]:
    """Plain data of every entry, grouped by teacher and data; a group's teacher comes first.

    Args:
        sort: a key of :data:`SORTS`; ties are broken by storage, then name.
    """
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        run = entry.run
        key = (False, str(run.teacher or ""), str(run.data)) if run else (True, "", "")
        groups.setdefault(key, []).append(entry)
    return [_group(members, sort) for _, members in sorted(groups.items())]


def _group(members: Sequence[Entry], sort: str) -> list[Record]:
    common = _common_overrides(members)
    lines = _sorted((_record(entry, common) for entry in members), sort)
    return [*_teacher_records(members), *lines]


def _record(entry: Entry, common: set[str]) -> Record:
    run, measurement = entry.run, entry.measurement
    if run is None:
        return _blank(name=entry.name, status=UNREADABLE, message=entry.problem)
    is_trained = run.loss != CALIBRATION
    has_paper = not run.rules and is_trained
    told = common | {text for text in run.overrides if _key(text) in _TOLD_ELSEWHERE}
    record = _blank(
        name=entry.name,
        status=_status(run),
        message=run.failure or entry.problem,
        precision=run.precision,
        rules=run.rules,
        loss=run.loss,
        overrides=tuple(text for text in run.overrides if text not in told),
        updates=run.updates if is_trained else None,  # the teacher's otherwise
        planned=run.planned if is_trained else None,
        best_loss=run.best_loss,
        storage_mb=run.storage_mb,
        paper_wer=paper_wer(run.precision, run.loss) if has_paper else None,
        teacher=run.teacher,
        data=run.data,
        folder=run.folder,
    )
    return record | _measured(measurement.row) if measurement else record


def _status(run: Run) -> str:
    if run.failure is not None:
        return "failed"
    if run.updates is None:
        return "no checkpoint"
    return "finished" if run.is_finished else "unfinished"


def _teacher_records(members: Sequence[Entry]) -> list[Record]:
    """What was measured of the one teacher of these runs; its name alone if nothing was."""
    run = members[0].run
    if run is None or run.teacher is None:
        return []
    rows = [e.measurement.teacher for e in members if e.measurement and e.measurement.teacher]
    record = _blank(name=f"teacher {_short(run.teacher)}", data=run.data, folder=run.teacher)
    if rows:
        row = rows[0]
        known = {"precision": row.name, "rules": 0, "paper_wer": paper_wer(row.name, "hubert")}
        record |= {**known, **_measured(row)}
    return [record]


def _measured(row: Quality) -> Record:
    close, masked, probe = row.agreement, row.masked, row.probe
    found: Record = {"storage_mb": row.storage_mb}
    if masked is not None:
        found |= {"masked_accuracy": masked.accuracy, "masked_chance": masked.chance}
    layers = {}
    if close is not None:
        layers |= {"cosine": close.cosine, "snr_db": close.snr_db}
    if probe is not None:
        layers |= {"word_probe": probe.mean, "word_probe_std": probe.std}
    for key, values in layers.items():
        found |= {key: values[-1], f"{key}_layers": " ".join(f"{v:.6g}" for v in values)}
    return found


def record_of_row(row: Quality, **known: Any) -> Record:
    """A record of what was measured of a model, and of what else is known of it."""
    return _blank(name=row.name) | known | _measured(row)


def _blank(**known: Any) -> Record:
    return dict.fromkeys(FIELDS) | known


def _sorted(lines: Iterable[Record], sort: str) -> list[Record]:
    """Records without the value come last, whichever end is first."""
    key = SORTS[sort]
    field, sign = key.lstrip("-"), -1 if key.startswith("-") else 1

    def rank(record: Record) -> tuple:
        value, size = record[field], record["storage_mb"]
        is_missing = value is None or value != value
        signed = value if isinstance(value, str) else sign * (0 if is_missing else value)
        return is_missing, signed, size is None, size or 0, record["name"]

    return sorted(lines, key=rank)


def _common_overrides(entries: Iterable[Entry]) -> set[str]:
    """What all runs of a group were given tells none from another, as long as there are several.
    Stages were given nothing."""
    runs = [entry.run for entry in entries if entry.run is not None and entry.run.overrides]
    counts = Counter(override for run in runs for override in set(run.overrides))
    return {text for text, count in counts.items() if count == len(runs) > 1}


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _short(checkpoint: Path) -> str:
    """``exp/run/checkpoints/checkpoint_last.pt`` -> ``exp/run``; its last two parts elsewhere."""
    path = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    return "/".join(path.parts[-2:])
