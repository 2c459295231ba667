"""The models of a report: what is known of each, and what each costs."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fairseq_lowbit.errors import LowbitError, describe
from fairseq_lowbit.interop import open_without_weights
from fairseq_lowbit.interop.huggingface_directory import is_model_directory
from fairseq_lowbit.models import WithoutWeights
from fairseq_lowbit.models.protocols import SpeechModel
from fairseq_lowbit.precision import Plan
from fairseq_lowbit.profiling import Profile, profile
from fairseq_lowbit.runs.collection import UNREADABLE
from fairseq_lowbit.runs.columns import (
    COSINE,
    COUNTED_SECONDS,
    MASKED_ACCURACY,
    STORAGE,
    ModelRecord,
)
from fairseq_lowbit.runs.run import read_run

FLOAT = "float"


@dataclass(frozen=True)
class Subject:
    """One model: a row of the report's table.

    Attributes:
        name: unique in a report.
        record: see :data:`fairseq_lowbit.runs.collection.FIELDS`, and with a readable checkpoint
            ``flops``, ``quantops`` and ``runtime`` for 10 s of audio.
        checkpoint: None for a row that is known from a table only, or without one yet.
        plan: None without a readable checkpoint.
        problem: why its checkpoint cannot be read.
    """

    name: str
    record: ModelRecord
    checkpoint: Path | None = None
    plan: Plan | None = None
    problem: str | None = None

    @property
    def is_float(self) -> bool:
        return self.record["precision"] == FLOAT and not self.record["rules"]

    @property
    def is_measured(self) -> bool:
        return any(column.value(self.record) is not None for column in (MASKED_ACCURACY, COSINE))

    @property
    def is_readable(self) -> bool:
        return self.record["status"] != UNREADABLE

    @property
    def folder(self) -> Path | None:
        """The folder of its run, if that still exists."""
        folder = self.record["folder"]
        is_there = folder is not None and folder.is_dir() and not is_model_directory(folder)
        return folder if is_there else None


def gather(own: Iterable[ModelRecord], others: Iterable[ModelRecord]) -> list[Subject]:
    """The subjects of records, each model once, float ones first and then by storage.

    Args:
        own: of runs and checkpoints. The run of a teacher replaces what its students know of it.
        others: of tables; left out are those of a run that is there already.
    """
    subjects = [Subject(r["name"], r, checkpoint_of(r["folder"])) for r in own]
    known = {s.record["folder"] for s in subjects} - {None}
    trained = {s.checkpoint for s in subjects if s.record["status"]} - {None}
    subjects = [s for s in subjects if s.record["status"] or s.checkpoint not in trained]
    for record in others:
        place = record["folder"] or record["name"]
        if place not in known:
            known.add(place)
            subjects.append(Subject(record["name"], record, checkpoint_of(record["folder"])))
    return sorted(_with_costs(list(_with_unique_names(subjects))), key=_rank)


def checkpoint_of(folder: Path | None) -> Path | None:
    """The checkpoint of a run's folder, or the file itself; None where there is none."""
    if folder is None:
        return None
    if folder.is_file():
        return folder.resolve()
    try:
        checkpoint = read_run(folder).checkpoint
    except LowbitError:
        return None
    return checkpoint.resolve() if checkpoint.exists() else None


def _rank(subject: Subject) -> tuple[bool, bool, float, str]:
    size = STORAGE.value(subject.record)
    return not subject.is_float, size is None, size or 0.0, subject.name


def _with_unique_names(subjects: Iterable[Subject]) -> Iterator[Subject]:
    counts: Counter[str] = Counter()
    for subject in subjects:
        counts[subject.name] += 1
        number = counts[subject.name]
        yield subject if number == 1 else replace(subject, name=f"{subject.name} ({number})")


def _with_costs(subjects: Sequence[Subject]) -> list[Subject]:
    """Adds what their models cost, or why a checkpoint cannot be read."""
    models: dict[str, SpeechModel] = {}
    problems: dict[str, str] = {}
    for subject in subjects:
        if subject.checkpoint is not None:
            try:
                models[subject.name] = open_without_weights(subject.checkpoint)
            except Exception as error:  # one broken checkpoint must not prevent the page
                problems[subject.name] = describe(error)
    reference = _reference(models.values())
    found = []
    for subject in subjects:
        if subject.name in problems:
            subject = _unreadable(subject, problems[subject.name])
        elif subject.name in models:
            subject = _with_cost(subject, models[subject.name], reference)
        found.append(subject)
    return found


def _unreadable(subject: Subject, problem: str) -> Subject:
    """A subject without what its configuration claims of a checkpoint that cannot be read; what was
    measured of it before stays."""
    known: dict[str, Any] = {}
    if not subject.is_measured:
        known = dict.fromkeys(("precision", "rules", "loss"))
        if subject.record["status"] != "failed":
            known["status"] = UNREADABLE
    return replace(subject, problem=problem, record={**subject.record, **known})


def _with_cost(subject: Subject, model: SpeechModel, reference: Profile) -> Subject:
    counted = profile(model, model.plan.precision.name, COUNTED_SECONDS)
    record = {
        **subject.record,
        "storage_mb": counted.storage_bytes / 1e6,
        "flops": counted.flops,
        "quantops": counted.quantops,
        "runtime": counted.runtime(reference),
        "form": model.plan.form,
    }
    if record["precision"] is None:  # a teacher that was not measured is known by its path only
        precision = model.plan.precision
        record |= {"precision": precision.name, "rules": len(precision.rules)}
    return replace(subject, plan=model.plan, record=record)


def _reference(models: Collection[SpeechModel]) -> Profile | None:
    """The float model of the shape that most models have, or of several such the one with the
    most operations, so that a model of another shape changes no runtime; None without models."""
    profiles = [_float_profile(model) for model in models]
    counts = Counter(own.flops for own in profiles)
    return max(profiles, key=lambda own: (counts[own.flops], own.flops), default=None)


def _float_profile(model: SpeechModel) -> Profile:
    with WithoutWeights():
        model = model.untrained()
    return profile(model, FLOAT, COUNTED_SECONDS)
