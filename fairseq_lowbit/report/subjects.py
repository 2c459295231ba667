"""The models that a report tells of: what is known of each, and what each costs."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fairseq_lowbit.errors import LowbitError, describe
from fairseq_lowbit.models import WithoutWeights, load_without_weights
from fairseq_lowbit.models.protocols import SpeechModel
from fairseq_lowbit.precision import Plan
from fairseq_lowbit.profiling import Profile, profile
from fairseq_lowbit.profiling.cost import CONVERSION_RATE
from fairseq_lowbit.runs.collection import UNREADABLE, Record
from fairseq_lowbit.runs.folder import read_run

SECONDS = 10.0
FLOAT = "float"
# What was measured of a model, and how far apart two measurements of the same one may be: threads
# and processors add numbers in another order.
_TOLERANCES = {"storage_mb": 0.0, "masked_accuracy": 1e-3, "cosine": 1e-4, "snr_db": 1e-2}


@dataclass(frozen=True)
class Costs:
    """What a model costs for 10 s of audio.

    Attributes:
        runtime: an estimate, relative to the float model that most models have the shape of.
        reference: what that is, in words.
    """

    plan: Plan
    profile: Profile
    runtime: float
    reference: str


@dataclass(frozen=True)
class Subject:
    """One model: a row of the report's table.

    Attributes:
        name: unique in a report.
        record: see :data:`fairseq_lowbit.runs.collection.FIELDS`.
        checkpoint: None for a row that is known from a table only, or without one yet.
        costs: None without a readable checkpoint.
        problem: why there are none.
        aliases: names of the same model in tables made before.
    """

    name: str
    record: Record
    checkpoint: Path | None = None
    costs: Costs | None = None
    problem: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def is_float(self) -> bool:
        return self.record["precision"] == FLOAT and not self.record["rules"]

    @property
    def is_measured(self) -> bool:
        return any(self.record[key] is not None for key in ("masked_accuracy", "cosine"))

    @property
    def is_readable(self) -> bool:
        return self.record["status"] != UNREADABLE

    @property
    def folder(self) -> Path | None:
        """Of its run, if that is still there."""
        folder = self.record["folder"]
        return folder if folder is not None and folder.is_dir() else None

    @property
    def storage_mb(self) -> float | None:
        if self.costs is not None:
            return self.costs.profile.storage_bytes / 1e6
        return self.value("storage_mb")

    def value(self, key: str) -> Any:
        """A measured or recorded figure; None where it is not known."""
        value = self.record[key]
        return None if isinstance(value, float) and math.isnan(value) else value


def gather(own: Iterable[Record], others: Iterable[Record]) -> list[Subject]:
    """The subjects of records, each model once, float ones first and then by storage.

    Args:
        own: of runs and checkpoints. A teacher known through its students gives way to its own run.
        others: of tables made before; they give way to records of the same run, or of the same
            measurements.
    """
    subjects = [Subject(r["name"], r, checkpoint_of(r["folder"])) for r in own]
    trained = {s.checkpoint for s in subjects if s.record["status"]} - {None}
    subjects = [s for s in subjects if s.record["status"] or s.checkpoint not in trained]
    for record in others:
        known = [index for index, s in enumerate(subjects) if _are_same(record, s.record)]
        if known:
            subject = subjects[known[0]]
            subjects[known[0]] = replace(subject, aliases=(*subject.aliases, record["name"]))
        else:
            subjects.append(Subject(record["name"], record, checkpoint_of(record["folder"])))
    return sorted(_with_costs(_with_unique_names(subjects)), key=_rank)


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell each from the others; a stage keeps its run's.

    >>> short_names(["exp/a/w1a1", "exp/b/w1a1", "exp/b/w2a2", "exp/b/w2a2/stage1_w8a8"])
    ['a/w1a1', 'b/w1a1', 'w2a2', 'w2a2/stage1_w8a8']
    """

    def ends(name: str) -> list[str]:
        parts = name.split("/")
        fewest = 2 if parts[-1].startswith("stage") else 1
        return ["/".join(parts[-count:]) for count in range(fewest, len(parts) + 1)] or [name]

    def is_told_apart(end: str) -> bool:
        return sum(f"/{name}".endswith(f"/{end}") for name in names) == 1

    return [next(filter(is_told_apart, ends(name)), name) for name in names]


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
    return checkpoint.resolve() if checkpoint.is_file() else None


def _are_same(first: Record, second: Record) -> bool:
    """Whether they are of the same run, or tell the same measurements: no two models are that much
    alike."""
    if first["folder"] is not None and first["folder"] == second["folder"]:
        return True
    if first["masked_accuracy"] is first["cosine"] is None:
        return False
    pairs = [(first[key], second[key], gap) for key, gap in _TOLERANCES.items()]
    return all(
        a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-9, abs_tol=gap)
        for a, b, gap in pairs
    )


def _rank(subject: Subject) -> tuple[bool, bool, float, str]:
    size = subject.storage_mb
    return not subject.is_float, size is None, size or 0.0, subject.name


def _with_unique_names(subjects: Sequence[Subject]) -> list[Subject]:
    counts: Counter[str] = Counter()
    unique = []
    for subject in subjects:
        counts[subject.name] += 1
        number = counts[subject.name]
        name = subject.name if number == 1 else f"{subject.name} ({number})"
        unique.append(replace(subject, name=name))
    return unique


def _with_costs(subjects: Sequence[Subject]) -> list[Subject]:
    """With what their checkpoints' shapes and precisions cost, or why that is not known."""
    models: dict[str, SpeechModel] = {}
    problems: dict[str, str] = {}
    for subject in subjects:
        if subject.checkpoint is not None:
            try:
                models[subject.name] = load_without_weights(subject.checkpoint)
            except Exception as error:  # one broken checkpoint must not cost the others the page
                problems[subject.name] = describe(error)
    reference = _reference(subjects, models)
    costs = {name: _costs(model, reference) for name, model in models.items()}
    return [
        _unreadable(s, problems[s.name])
        if s.name in problems
        else _with_precision(s, costs.get(s.name))
        for s in subjects
    ]


def _unreadable(subject: Subject, problem: str) -> Subject:
    """What its configuration says of a checkpoint that is no model of ours, or none at all, is not
    to be trusted; what was measured of it once is."""
    known: Record = {}
    if not subject.is_measured:
        known = dict.fromkeys(("precision", "rules", "loss"))
        if subject.record["status"] != "failed":
            known["status"] = UNREADABLE
    return replace(subject, problem=problem, record=subject.record | known)


def _with_precision(subject: Subject, costs: Costs | None) -> Subject:
    """A teacher that was not measured is known by its path only; its checkpoint says more."""
    if costs is None or subject.record["precision"] is not None:
        return replace(subject, costs=costs)
    precision = costs.plan.precision
    known = {"precision": precision.name, "rules": len(precision.rules)}
    return replace(subject, costs=costs, record=subject.record | known)


def _costs(model: SpeechModel, reference: Profile) -> Costs:
    counted = profile(model, model.plan.precision.name, SECONDS)
    runtime = counted.runtime(reference, CONVERSION_RATE)
    return Costs(model.plan, counted, runtime, reference.name)


def _reference(subjects: Sequence[Subject], models: Mapping[str, SpeechModel]) -> Profile | None:
    """Of a float model of the shape that most models have, of several such the one with the most
    work, so that a model of another shape rescales none of the others; None without any model."""
    if not models:
        return None
    profiles = {name: _float_profile(model) for name, model in models.items()}
    counts = Counter(p.flops for p in profiles.values())
    usual = max(counts, key=lambda flops: (counts[flops], flops))
    named = [s for s in subjects if s.name in profiles and profiles[s.name].flops == usual]
    for subject in named:
        precision = models[subject.name].plan.precision
        if precision.name == FLOAT and not precision.rules:
            return replace(profiles[subject.name], name=subject.name)
    return replace(profiles[named[0].name], name=f"{named[0].name} in float")


def _float_profile(model: SpeechModel) -> Profile:
    with WithoutWeights():
        model = model.untrained()
    return profile(model, FLOAT, SECONDS)
