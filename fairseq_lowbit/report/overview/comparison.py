"""The tables of a report: the comparison, and what each run was."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from fairseq_lowbit.models import read_checkpoint
from fairseq_lowbit.precision.plan_table import PLAN_HEADS, plan_rows
from fairseq_lowbit.report.overview.columns import COLUMNS, FLOAT_MODEL, runtime_reference
from fairseq_lowbit.report.page.page import Details, Head, Line
from fairseq_lowbit.report.subjects import Subject
from fairseq_lowbit.runs.folder import CONFIG_FILE
from fairseq_lowbit.runs.sweep_table import untold_overrides

# Of a configuration's values; where more differ from any other's it is printed whole.
_MOST_DIFFERENT = 0.25
# In the comparison; the problems tell the whole.
_LONGEST_MESSAGE = 100


def summary_of(subjects: Sequence[Subject]) -> str:
    """One line below the title."""
    models = [subject for subject in subjects if subject.is_readable]
    quantized = sum(not subject.is_float for subject in models)
    count = f"{len(models)} model{'s' if len(models) != 1 else ''}"
    if 0 < quantized < len(models):
        count = f"{count}, {quantized} of them quantized"
    others = len(subjects) - len(models)
    return f"{count}; {others} could not be read" if others else count


def problems_of(subjects: Iterable[Subject]) -> list[str]:
    """Why runs failed or could not be measured or read, each once."""
    found = []
    for subject in subjects:
        messages = dict.fromkeys(filter(None, (subject.record["message"], subject.problem)))
        found += [f"{subject.name}: {message}" for message in messages]
    return found


def comparison(
    subjects: Sequence[Subject], colors: Mapping[str, str]
) -> tuple[list[Head], list[Line]]:
    """The table: a column for every number that is known of some subject."""
    columns = [c for c in COLUMNS if any(c.value(subject) is not None for subject in subjects)]
    reference = runtime_reference(subjects)
    heads = [Head(c.head, c.unit, c.note.replace(FLOAT_MODEL, reference)) for c in columns]
    teachers = {s.record["teacher"] for s in subjects} - {None}
    lines = []
    for index, subject in enumerate(subjects):
        record = subject.record
        details = [f"also {alias}" for alias in subject.aliases if alias != subject.name]
        details.append(" ".join(untold_overrides(record)))
        if len(teachers) > 1 and record["teacher"]:
            details.append(f"teacher {record['teacher']}")
        lines.append(
            Line(
                name=subject.name,
                anchor=_anchor(index) if _has_details(subject) else None,
                color=colors[subject.name],
                precision=precision_of(subject),
                details=", ".join(filter(None, details)),
                status=_status(subject),
                message=_begin(record["message"] or subject.problem or ""),
                cells=[column.text(subject) for column in columns],
            )
        )
    return heads, lines


def precision_of(subject: Subject) -> str:
    """Name, number of rules, and how it was trained where that is not distillation."""
    record = subject.record
    precision, rules = record["precision"], record["rules"]
    if rules:
        precision = f"{precision} + {rules} rule{'s' if rules > 1 else ''}"
    is_usual = record["loss"] in (None, "distillation") or subject.is_float
    return ", ".join(filter(None, (precision, None if is_usual else record["loss"]))) or "–"


def _begin(message: str) -> str:
    if len(message) <= _LONGEST_MESSAGE:
        return message
    return f"{message[:_LONGEST_MESSAGE]}…"


def _status(subject: Subject) -> str:
    record = subject.record
    if record["status"] in (None, "finished"):
        return ""
    if record["status"] == "unfinished":
        return f"{record['updates']} of {record['planned']} updates"
    return record["status"]


def _has_details(subject: Subject) -> bool:
    return subject.costs is not None or subject.folder is not None


def all_details(subjects: Sequence[Subject]) -> list[Details]:
    """Of those that have any."""
    known = ((index, s) for index, s in enumerate(subjects) if _has_details(s))
    return _with_differences([_details(subject, _anchor(index)) for index, subject in known])


def _with_differences(details: Iterable[Details]) -> list[Details]:
    """On paper a configuration that is nearly another one's is told by what differs."""
    told, whole = [], {}
    for one in details:
        own = _flat(one.configuration)
        found = [(name, _differences(own, other)) for name, other in whole.items()] if own else []
        name, nearest = min(found, key=lambda pair: len(pair[1]), default=("", None))
        if nearest is None or len(nearest) > _MOST_DIFFERENT * len(own):
            if own:
                whole[one.name] = own
            told.append(one)
            continue
        fact = f"that of {name}" + (f" but for {', '.join(nearest)}" if nearest else "")
        facts = [*one.facts, ("configuration", fact)]
        told.append(replace(one, facts=facts, is_told_by_another=True))
    return told


def _flat(configuration: str) -> dict[str, str]:
    """Values by dotted key; empty for what is no YAML of a mapping."""
    found: dict[str, str] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                visit(inner, f"{path}.{key}" if path else str(key))
        elif path:
            found[path] = str(value)

    with suppress(Exception):
        visit(OmegaConf.to_container(OmegaConf.create(configuration)), "")
    return found


def _differences(own: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What is missing is None, as fairseq fills it in."""
    keys = dict.fromkeys([*own, *other])
    pairs = {key: (own.get(key, "None"), other.get(key, "None")) for key in keys}
    return [f"{key}={value}" for key, (value, known) in pairs.items() if value != known]


def _anchor(index: int) -> str:
    return f"run-{index + 1}"


def _details(subject: Subject, anchor: str) -> Details:
    """Where a run is, what decided its bits, and its configuration."""
    record = subject.record
    made = None if record["updates"] is None else f"{record['updates']:,}"
    facts = {
        "status": record["status"],
        "updates": made and f"{made} of {record['planned']:,}",
        "folder": record["folder"],
        "checkpoint": subject.checkpoint,
        "teacher": record["teacher"],
        "data": record["data"],
        "overrides": " ".join(record["overrides"] or ()),
        "problem": record["message"] or subject.problem,
    }
    return Details(
        anchor=anchor,
        name=subject.name,
        summary=", ".join(filter(None, (precision_of(subject), _status(subject)))),
        facts=[(what, str(value)) for what, value in facts.items() if value],
        plan_heads=PLAN_HEADS,
        plan_rows=plan_rows(subject.costs.plan) if subject.costs else (),
        configuration=_configuration(subject),
    )


def _configuration(subject: Subject) -> str:
    """YAML: of the run as it was started, or what the checkpoint says of itself."""
    if subject.folder is not None:
        with suppress(OSError):
            return (subject.folder / CONFIG_FILE).read_text(errors="replace")
    if subject.checkpoint is not None:
        with suppress(Exception):  # what is wrong with it is told as the problem of its row
            return OmegaConf.to_yaml(
                OmegaConf.create(read_checkpoint(subject.checkpoint, mmap=True)["cfg"])
            )
    return ""
