"""What a report says, from the models it tells of: tables, figures, and what was missing."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.runs import CONFIG_FILE
from fairseq_lowbit.evaluation.sweep_table import untold_overrides
from fairseq_lowbit.evaluation.tables import PLAN_HEADS, plan_rows
from fairseq_lowbit.models import read_checkpoint
from fairseq_lowbit.report.columns import COLUMNS
from fairseq_lowbit.report.curve_figures import (
    Trained,
    health_drawings,
    loss_drawings,
    silent_terms,
)
from fairseq_lowbit.report.curves import Training, read_bands, read_training
from fairseq_lowbit.report.dissection import Dissected
from fairseq_lowbit.report.drawing import Drawing, slug
from fairseq_lowbit.report.layer_figures import layer_drawings
from fairseq_lowbit.report.page import Details, Group, Head, Line, Pictures, Section
from fairseq_lowbit.report.subjects import Subject
from fairseq_lowbit.report.tradeoff_figures import tradeoff_drawings

# In the table; the problems tell the whole.
_LONGEST_MESSAGE = 100
_LOSS_TITLES = {"distillation": "Distillation", "hubert": "HuBERT loss"}


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
    heads = [Head(column.head, column.unit, column.note) for column in columns]
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
                anchor=_anchor(index) if has_details(subject) else None,
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


@dataclass
class Sections:
    """Draws the parts of the page with figures, and collects what was missing.

    Args:
        progress: called with what is drawn next.
    """

    subjects: Sequence[Subject]
    colors: Mapping[str, str]
    pictures: Pictures
    progress: Callable[[str], None]
    problems: list[str] = field(default_factory=list)

    def build(self, dissected: Iterable[Dissected], note: str) -> list[Section]:
        """Those that have something to show.

        Args:
            dissected: one after the other, so that only one is in memory.
            note: why these.
        """
        sections = [self._quality(), self._training(), self._inside(dissected, note)]
        return [section for section in sections if section is not None]

    def _quality(self) -> Section | None:
        tradeoffs = tradeoff_drawings(self.subjects, self.colors)
        layers = layer_drawings(self.subjects, self.colors)
        if not tradeoffs and not layers:
            return None
        notes = []
        teachers = {s.record["teacher"] for s in self.subjects} - {None}
        if len(teachers) > 1:
            notes.append(
                f"These models have {len(teachers)} teachers. Cosine and SNR are against a model's "
                "own one: compare them between students of the same teacher only."
            )
        groups = [self._group(tradeoffs), self._group(layers, "Layer by layer")]
        groups = [group for group in groups if group.pictures]
        return Section("quality", "Quality and cost", groups, notes)

    def _training(self) -> Section | None:
        runs = [run for subject in self.subjects if (run := self._trained(subject)) is not None]
        groups = []
        for loss in dict.fromkeys(run.subject.record["loss"] for run in runs):
            members = [run for run in runs if run.subject.record["loss"] == loss]
            drawings = loss_drawings(members, self.colors, slug(loss or "other"))
            notes = []
            if len(members) == 1:
                notes.append(f"Of one run: {members[0].subject.name}.")
            silent = silent_terms(members)
            if silent:
                notes.append(f"Not drawn, 0 all along: {', '.join(silent)}.")
            title = _LOSS_TITLES.get(loss, loss)
            groups.append(self._group(drawings, title, [" ".join(notes)] if notes else []))
        health = health_drawings(runs, self.colors)
        if health:
            groups.append(self._group(health, "Health of layers and quantizers"))
        groups = [group for group in groups if group.pictures]
        return Section("training", "Training", groups) if groups else None

    def _trained(self, subject: Subject) -> Trained | None:
        """None for what is no run, or left nothing."""
        if subject.folder is None:
            return None
        training = Training()
        try:
            training = read_training(subject.folder)
        except LowbitError as error:
            if subject.checkpoint is not None:  # else it has not come that far
                self.problems.append(f"{subject.name}: {error}")
        bands = read_bands(subject.checkpoint.parent) if subject.checkpoint else {}
        return Trained(subject, training, bands) if training.terms or bands else None

    def _inside(self, dissected: Iterable[Dissected], note: str) -> Section | None:
        groups = []
        for one in dissected:
            if one.has_failed:
                self.problems.append(f"{one.subject.name} could not be taken apart: {one.note}")
            groups.append(self._group(one.drawings, one.subject.name, [one.note]))
        return Section("inside", "Inside the models", groups, [note]) if groups else None

    def _group(
        self, drawings: Sequence[Drawing], title: str | None = None, notes: Sequence[str] = ()
    ) -> Group:
        if drawings:
            self.progress(f"{len(drawings)} figures{f' ({title})' if title else ''}")
        return Group([self.pictures.add(drawing) for drawing in drawings], title, notes)


def has_details(subject: Subject) -> bool:
    return subject.costs is not None or subject.folder is not None


def all_details(subjects: Sequence[Subject]) -> list[Details]:
    """Of those that have any."""
    known = ((index, s) for index, s in enumerate(subjects) if has_details(s))
    return [_details(subject, _anchor(index)) for index, subject in known]


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
        with suppress(LowbitError):
            return OmegaConf.to_yaml(
                OmegaConf.create(read_checkpoint(subject.checkpoint, mmap=True)["cfg"])
            )
    return ""


def summary_of(subjects: Sequence[Subject]) -> str:
    """One line below the title."""
    quantized = sum(not subject.is_float for subject in subjects)
    count = f"{len(subjects)} model{'s' if len(subjects) != 1 else ''}"
    return f"{count}, {quantized} of them quantized" if 0 < quantized < len(subjects) else count


def figures_folder(page: Path) -> Path:
    """Beside the page: ``report.html`` -> ``report_figures``."""
    return page.with_name(f"{page.stem}_figures")
