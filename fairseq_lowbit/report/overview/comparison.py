"""The tables of a report: the comparison, and the details of each run."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from omegaconf import OmegaConf

from fairseq_lowbit.interop import read_checkpoint
from fairseq_lowbit.precision.plan_table import PLAN_HEADS, plan_rows
from fairseq_lowbit.report.page.page import Details, Line
from fairseq_lowbit.report.subjects import Subject
from fairseq_lowbit.runs.collection import precision_text, unnamed_overrides
from fairseq_lowbit.runs.columns import COSTS, QUALITIES, UNKNOWN, VALIDATION_LOSS, Column
from fairseq_lowbit.runs.folder import CONFIG_FILE, read_text

_COLUMNS = (*COSTS, VALIDATION_LOSS, *QUALITIES)


def summary_of(subjects: Sequence[Subject]) -> str:
    """The line below the title: how many models there are."""
    models = [subject for subject in subjects if subject.is_readable]
    quantized = sum(not subject.is_float for subject in models)
    count = f"{len(models)} model{'s' if len(models) != 1 else ''}"
    if 0 < quantized < len(models):
        count = f"{count}, {quantized} of them quantized"
    others = len(subjects) - len(models)
    return f"{count}; {others} could not be read" if others else count


def problems_of(subjects: Iterable[Subject]) -> list[str]:
    """The reasons why runs failed or could not be measured or read, each once."""
    found = []
    for subject in subjects:
        messages = dict.fromkeys(filter(None, (subject.record["message"], subject.problem)))
        found += [f"{subject.name}: {message}" for message in messages]
    return found


def comparison(
    subjects: Sequence[Subject], colors: Mapping[str, str]
) -> tuple[list[Column], list[Line]]:
    """The table, with a column for every figure that is known of some subject."""
    columns = [c for c in _COLUMNS if any(c.value(s.record) is not None for s in subjects)]
    teachers = {s.record["teacher"] for s in subjects} - {None}
    lines = []
    for index, subject in enumerate(subjects):
        record = subject.record
        details = [" ".join(unnamed_overrides(record))]
        if len(teachers) > 1 and record["teacher"]:
            details.append(f"teacher {record['teacher']}")
        lines.append(
            Line(
                name=subject.name,
                anchor=_anchor(index),
                color=colors[subject.name],
                precision=precision_text(record) or UNKNOWN,
                details=", ".join(filter(None, details)),
                status=_status(subject),
                message=record["message"] or subject.problem or "",
                cells=[column.text(record) for column in columns],
            )
        )
    return columns, lines


def _status(subject: Subject) -> str:
    record = subject.record
    if record["status"] in (None, "finished"):
        return ""
    if record["status"] == "unfinished":
        return f"{record['updates']} of {record['planned']} updates"
    return record["status"]


def all_details(subjects: Sequence[Subject]) -> list[Details]:
    """What is known of every subject."""
    return [_details(subject, _anchor(index)) for index, subject in enumerate(subjects)]


def _anchor(index: int) -> str:
    return f"run-{index + 1}"


def _details(subject: Subject, anchor: str) -> Details:
    """The paths of a run, its resolved precision, and its configuration."""
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
        summary=", ".join(filter(None, (precision_text(record), _status(subject)))),
        facts=[(what, str(value)) for what, value in facts.items() if value],
        plan_heads=PLAN_HEADS,
        plan_rows=plan_rows(subject.plan) if subject.plan else (),
        configuration=_configuration(subject),
    )


def _configuration(subject: Subject) -> str:
    """YAML, of the run as it was started or else from its checkpoint."""
    if subject.folder is not None and (started := read_text(subject.folder / CONFIG_FILE)):
        return started
    if subject.checkpoint is not None:
        with suppress(Exception):  # its row reports what is wrong with it
            return OmegaConf.to_yaml(
                OmegaConf.create(read_checkpoint(subject.checkpoint, mmap=True)["cfg"])
            )
    return ""
