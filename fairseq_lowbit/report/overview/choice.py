"""Which of many models are shown in colour and taken apart: those that are worth their cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from fairseq_lowbit.report.style import FAINT, PALETTE, TEACHER
from fairseq_lowbit.report.subjects import Subject
from fairseq_lowbit.runs.columns import (
    COSINE,
    DISTILLATION_LOSS,
    MASKED_ACCURACY,
    PHONE_ERROR,
    STORAGE,
    Column,
)

Item = TypeVar("Item")
# The signal-to-noise ratio ranks models as the cosine does.
_DECIDING = (MASKED_ACCURACY, COSINE, PHONE_ERROR)


def deciding_quality(subjects: Sequence[Subject]) -> Column:
    """The quality that is known of most quantized models; the validation loss if there is none."""

    def count(column: Column) -> int:
        return sum(column.value(s.record) is not None for s in subjects if not s.is_float)

    best = max(_DECIDING, key=count)
    return best if count(best) else DISTILLATION_LOSS


def front(subjects: Sequence[Subject], cost: Column, quality: Column) -> list[Subject]:
    """The subjects on the Pareto front, cheapest first."""
    known = placed(subjects, cost, quality)
    costs = [cost.value(subject.record) for subject in known]
    qualities = [quality.merit(subject.record) for subject in known]
    return [known[index] for index in pareto_front(costs, qualities)]


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """The points to which no other is superior: cheaper and no worse, or better and no dearer.

    Args:
        costs: less is better.
        qualities: more is better; one for each cost.

    Returns:
        indices, cheapest first; equal points are on the front together.

    >>> pareto_front([1, 2, 2, 3], [0.5, 0.9, 0.8, 0.9])
    [0, 1]
    """
    points, front = list(zip(costs, qualities, strict=True)), []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        last = points[front[-1]] if front else None
        if last is None or points[index] == last or points[index][1] > last[1]:
            front.append(index)
    return front


def placed(subjects: Sequence[Subject], *columns: Column) -> list[Subject]:
    """The subjects whose values are known in all columns."""
    return [s for s in subjects if all(column.value(s.record) is not None for column in columns)]


def colors(subjects: Sequence[Subject]) -> dict[str, str]:
    """A colour for every subject, the same in all figures of a report.

    Only a few colours can be distinguished: with more models the Pareto front and then the best
    have them, and the others are grey, as is what could not be read. The first float model is dark.
    """
    teacher = next((s for s in subjects if s.is_float), None)
    others = [s for s in subjects if s is not teacher and s.is_readable]
    if len(others) > len(PALETTE):
        others = _by_merit(others)[: len(PALETTE)]
        others = [s for s in subjects if s in others]
    found = {subject.name: FAINT for subject in subjects}
    found |= {s.name: color for s, color in zip(others, PALETTE, strict=False)}
    return found if teacher is None else found | {teacher.name: TEACHER}


def standing_out(subjects: Sequence[Subject], colors: Mapping[str, str]) -> list[Subject]:
    """The subjects with a colour of their own."""
    return [subject for subject in subjects if colors[subject.name] != FAINT]


def grey_first(items: Iterable[Item], color: Callable[[Item], str]) -> list[Item]:
    """The items in the order of drawing: grey ones lie below the others."""
    return sorted(items, key=lambda item: color(item) != FAINT)


def note_on_grey(subjects: Sequence[Subject], colors: Mapping[str, str]) -> str:
    """How many subjects are grey, for a caption; empty if none is."""
    others = len(subjects) - len(standing_out(subjects, colors))
    return f" Grey: {others} more." if others else ""


def worth_dissecting(subjects: Sequence[Subject], most: int) -> tuple[list[Subject], str]:
    """Quantized models with a checkpoint on the Pareto front, from the cheapest to the best, and
    why these; evenly spaced ones if there are more than ``most``."""
    able = [s for s in subjects if s.plan is not None and not s.is_float]
    quality = deciding_quality(able)
    best = front(able, STORAGE, quality)
    why = f"on the Pareto front of {quality.label} against {STORAGE.label}"
    if not best:
        best, why = able, "in the order of the table, since no quality is known"
    if len(best) > most:
        best = [best[round(i * (len(best) - 1) / (most - 1))] for i in range(most)]
        why = f"evenly spaced {why}"
    return best, f"{len(best)} of the {len(able)} quantized models with a checkpoint, {why}."


def _by_merit(subjects: Sequence[Subject]) -> list[Subject]:
    """Sorted: the Pareto front, then by quality, then those whose quality is not known."""
    quality = deciding_quality(subjects)
    best = front(subjects, STORAGE, quality)

    def rank(subject: Subject) -> tuple[bool, bool, float]:
        merit = quality.merit(subject.record)
        return subject not in best, merit is None, -(merit or 0.0)

    return sorted(subjects, key=rank)
