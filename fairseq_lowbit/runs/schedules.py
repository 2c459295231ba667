"""Training in stages against one step: the curves of the paper's figure, from collected runs."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TextIO

from rich.table import Table

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.precision import parse_precision
from fairseq_lowbit.runs.collection import Entry, status_of
from fairseq_lowbit.runs.columns import UNKNOWN, Column
from fairseq_lowbit.runs.run import CALIBRATION, Run

ONE_STEP = "one step"
CAPTION = "Means over seeds, with bars of one standard deviation; updates since the teacher:"
# In what the runs of one figure may not differ.
_SHARED = {
    "teacher": lambda run: run.teacher,
    "data": lambda run: run.data,
    "method": lambda run: run.precision.partition("_")[0],
    "loss": lambda run: run.loss,
    "number of rules": lambda run: run.rules,
    "form": lambda run: run.form,
}
_Seed = int | None
_Members = dict[tuple[str, str], dict[_Seed, Entry]]


@dataclass(frozen=True)
class Point:
    """Students of one precision, trained in the same way but for their seeds.

    Attributes:
        bits: the precision without its method.
        updates: that a student has made since the teacher, all stages together; None without one.
        measured: those that are finished and measured.
        gaps: why other seeds are not.
    """

    bits: str
    updates: int | None
    measured: Mapping[_Seed, Entry]
    gaps: Mapping[_Seed, str]

    def values(self, column: Column) -> list[float]:
        """The figure of every seed that has it, in the column's unit."""
        values = [column.value(entry.quality.own.figures()) for entry in self.measured.values()]
        return [value for value in values if value is not None]

    def mean(self, column: Column) -> float | None:
        """Over the seeds; None for a gap."""
        values = self.values(column)
        return mean(values) if values else None

    def spread(self, column: Column) -> float | None:
        """The standard deviation of the sample of seeds; None with fewer than two."""
        values = self.values(column)
        return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Curve:
    """One way from the teacher down to low precision: one step, or a schedule by its stages, with
    a point for every precision, the highest first."""

    name: str
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        """The name with the updates of every point that is there: what is held equal, and what is
        not."""
        updates = [str(point.updates) for point in self.points if point.updates is not None]
        if not updates:
            return self.name
        told = f"{updates[0]} at each" if len(set(updates)) == 1 else " > ".join(updates)
        return f"{self.name}: {told}"


@dataclass(frozen=True)
class Schedules:
    """The curves of one figure.

    Attributes:
        bits: all precisions of the curves, the highest first.
        teacher: figures of the teacher.
    """

    curves: tuple[Curve, ...]
    bits: tuple[str, ...]
    teacher: Mapping[str, float]

    def knows(self, column: Column) -> bool:
        """Whether any point has this figure."""
        return any(point.values(column) for curve in self.curves for point in curve.points)

    @property
    def gaps(self) -> list[str]:
        """What is missing and why, one sentence each."""
        return [
            f"{curve.name}, {point.bits}, seed {seed}: {reason}"
            for curve in self.curves
            for point in curve.points
            for seed, reason in point.gaps.items()
        ]


def check_comparable(entries: Iterable[Entry]) -> None:
    """Refuses runs that one figure cannot compare, before time is spent on measuring them.

    Raises:
        LowbitError: no run of a student; runs of different teachers, data, methods, losses or
            rules; two runs of one seed, or of different lengths, for the same point.
    """
    entries = list(entries)
    students = students_of(entries)
    if not students:
        found = "; ".join(f"{e.name}: {e.problem or e.run.precision}" for e in entries)
        raise LowbitError(f"there is no run of a quantized student among these: {found}")
    first = students[0]
    for what, find in _SHARED.items():
        own = find(first.run)
        other = next((entry for entry in students if find(entry.run) != own), None)
        if other is not None:
            raise LowbitError(
                f"{first.name} has {what} {own}, {other.name} has {find(other.run)}: a figure "
                f"compares runs of one {what}, so name only those"
            )
    _members(students)


def read_schedules(entries: Iterable[Entry]) -> Schedules:
    """Curves from measured runs and their stages. Models in float, such as the teacher, and models
    that are calibrated only are left out.

    Raises:
        LowbitError: see :func:`check_comparable`; no run is finished and measured.
    """
    entries = list(entries)
    check_comparable(entries)
    students = students_of(entries)
    if all(_obstacle(entry) for entry in students):
        reasons = "; ".join(f"{entry.name}: {_obstacle(entry)}" for entry in students)
        raise LowbitError(f"no run is finished and measured: {reasons}")
    members, seeds = _members(students), sorted({e.run.seed for e in students}, key=str)
    precisions = sorted({entry.run.precision for entry in students}, key=_rank)
    bits = tuple(dict.fromkeys(map(_bits, precisions)))
    ways = {way_of(e.run): [_bits(s.precision) for s in e.run.stages] or bits for e in students}
    curves = (
        Curve(way, tuple(_point(own, members.get((way, own), {}), seeds) for own in path))
        for way, path in sorted(ways.items(), key=lambda item: item[0] != ONE_STEP)
    )
    measured = (entry.quality.teacher for entry in students if entry.quality)
    teacher = next((quality.figures() for quality in measured if quality), {})
    return Schedules(tuple(curves), bits, teacher)


def students_of(entries: Iterable[Entry]) -> list[Entry]:
    """The runs that train in low precision."""
    return [
        e for e in entries if e.run and e.run.precision != "float" and e.run.loss != CALIBRATION
    ]


def _members(students: Iterable[Entry]) -> _Members:
    """The runs of each point by seed; points by way and bits."""
    found: _Members = {}
    for entry in students:
        way, bits, seed = way_of(entry.run), _bits(entry.run.precision), entry.run.seed
        others = found.setdefault((way, bits), {})
        if seed in others:
            raise LowbitError(
                f"{others[seed].name} and {entry.name} both reach {bits} by {way} with seed "
                f"{seed}: a point is a mean over seeds, so name one of them"
            )
        for other in others.values():
            lengths = updates_since_teacher(other.run), updates_since_teacher(entry.run)
            if lengths[0] != lengths[1]:
                raise LowbitError(
                    f"{other.name} is at {bits} after {lengths[0]} updates, {entry.name} after "
                    f"{lengths[1]}: a point is a mean over runs of one length"
                )
        others[seed] = entry
    return found


def _point(bits: str, members: Mapping[_Seed, Entry], seeds: Iterable[_Seed]) -> Point:
    reasons = {seed: _obstacle(members.get(seed)) for seed in seeds}
    return Point(
        bits,
        next((updates_since_teacher(entry.run) for entry in members.values()), None),
        {seed: members[seed] for seed, reason in reasons.items() if reason is None},
        {seed: reason for seed, reason in reasons.items() if reason},
    )


def way_of(run: Run) -> str:
    """The name of a curve: one step, or its stages, and in brackets who teaches all but the
    first."""
    if not run.stages:
        return ONE_STEP
    path = " > ".join(_bits(stage.precision) for stage in run.stages)
    teachers = dict.fromkeys(stage.teacher for stage in run.stages[1:])
    return f"{path} ({' and '.join(teachers)})" if teachers else path


def _bits(precision: str) -> str:
    """A precision without its method.

    >>> _bits("bitla_w2a2"), _bits("w8a8")
    ('w2a2', 'w8a8')
    """
    return precision.rpartition("_")[2]


def _rank(precision: str) -> tuple[int, int]:
    """Sorts the highest precision first."""
    preset = parse_precision(precision)
    return -preset.weight_bits, -preset.activation_bits


def updates_since_teacher(run: Run) -> int:
    """Planned updates, those of earlier stages too."""
    if not run.stages:
        return run.planned
    path = [_bits(stage.precision) for stage in run.stages]
    return sum(stage.updates for stage in run.stages[: path.index(_bits(run.precision)) + 1])


def _obstacle(entry: Entry | None) -> str | None:
    """Why there is no quality of a finished run; None if there is."""
    if entry is None:
        return "no run"
    run = entry.run
    if not run.is_finished:
        return run.failure or f"{status_of(run)}, {run.updates or 0} of {run.planned} updates"
    return None if entry.quality else entry.problem or "not measured"


def schedule_table(schedules: Schedules, columns: Sequence[Column]) -> Table:
    """For a terminal: a row for every point."""
    table = Table()
    for head in ("curve", "precision", "updates", "seeds", *(column.head for column in columns)):
        justify = "left" if head in ("curve", "precision") else "right"
        table.add_column(head, justify=justify, overflow="fold")
    # Without the interval of its recordings: the spreads here are those of seeds.
    teacher = (_text(column.value(schedules.teacher), None, column) for column in columns)
    table.add_row("teacher", "float", UNKNOWN, UNKNOWN, *teacher)
    for curve in schedules.curves:
        table.add_section()
        for point in curve.points:
            updates = UNKNOWN if point.updates is None else str(point.updates)
            cells = (_text(point.mean(column), point.spread(column), column) for column in columns)
            table.add_row(curve.name, point.bits, updates, str(len(point.measured)), *cells)
    return table


def _text(value: float | None, spread: float | None, column: Column) -> str:
    if value is None:
        return UNKNOWN
    text = f"{value:.{column.digits}f}"
    return text if spread is None else f"{text}±{spread:.{column.digits}f}"


def write_points(schedules: Schedules, columns: Sequence[Column], file: TextIO) -> None:
    """What the figure shows as CSV: a line for every figure of every point, in the unit of the
    figure; the values of the seeds with spaces between."""
    writer = csv.writer(file)
    heads = ("figure", "unit", "curve", "precision", "updates", "mean", "std", "seeds", "values")
    writer.writerow(heads)
    for column in columns:
        own = (column.label, column.unit)
        writer.writerow((*own, "teacher", "float", "", column.value(schedules.teacher), "", "", ""))
        for curve in schedules.curves:
            for point in curve.points:
                figures = (point.mean(column), point.spread(column))
                seeds, values = point.measured, point.values(column)
                lists = (" ".join(map(str, each)) for each in (seeds, values))
                writer.writerow((*own, curve.name, point.bits, point.updates, *figures, *lists))
