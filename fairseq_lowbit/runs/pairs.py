"""Two ways to train a model of one precision, and whether their errors differ beyond chance."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_lowbit.evaluation.intervals import Interval, difference_interval, rate_interval
from fairseq_lowbit.evaluation.probing.result import Difference
from fairseq_lowbit.precision.rules import with_form
from fairseq_lowbit.profiling.paper import SOURCE, paper_wer
from fairseq_lowbit.runs.collection import Entry
from fairseq_lowbit.runs.columns import PHONE_ERROR, UNKNOWN, WORD_ERROR, Column
from fairseq_lowbit.runs.run import Run
from fairseq_lowbit.runs.schedules import ONE_STEP, students_of, updates_since_teacher, way_of

# Loss and schedule of what all others are compared with.
_USUAL = ("distillation", ONE_STEP)
_COLUMNS = (WORD_ERROR, PHONE_ERROR)
PAIR_LEGEND = (
    "Runs of one teacher, precision and number of updates; distillation: in one step; other: the "
    "other way.\n"
    "In brackets 95 % of a bootstrap over the speakers, of the difference paired.\n"
    "beyond chance: that excludes 0, and the differences of all seeds have one sign.\n"
    f"paper WER: of both, {SOURCE}."
)


@dataclass(frozen=True)
class Pair:
    """Distillation in one step, and another way to the same precision, by one error rate.

    Attributes:
        other: the other way.
        column: of the error rate.
        rates: of both, means over the seeds.
        difference: the first less the second, and that of each seed of training.
        paper: word error rates of both in %; None where the paper has none.
    """

    precision: str
    other: str
    column: Column
    rates: tuple[Interval, Interval]
    difference: Difference
    paper: tuple[float | None, float | None]

    def cells(self) -> dict[str, str]:
        """By the heads of a table."""
        first, second, difference = map(self._text, (*self.rates, self.difference.interval))
        return {
            "precision": self.precision,
            "other way": self.other,
            "error": self.column.head,
            "distillation": first,
            "other": second,
            "difference": difference,
            "by seed": " ".join(
                f"{self.column.factor * value:+.1f}" for value in self.difference.by_seed
            ),
            "beyond chance": "yes" if self.difference.is_beyond_chance else "no",
            "paper WER": " ".join(
                UNKNOWN if cell is None else f"{cell:.2f}" for cell in self.paper
            ),
        }

    def _text(self, interval: Interval) -> str:
        bounds = (interval.value, interval.low, interval.high)
        value, low, high = (f"{self.column.factor * bound:.1f}" for bound in bounds)
        return f"{value} ({low} to {high})"


def find_pairs(entries: Iterable[Entry]) -> list[Pair]:
    """Pairs of measured runs that differ in loss or schedule and in nothing else that a run tells:
    teacher, data, precision, number of rules, form, updates since the teacher.

    They are compared over the seeds that both have. A seed with several such runs is left out: they
    differ in something that is not known here.
    """
    ways: dict[tuple, dict[tuple[str, str], dict[int | None, list[Entry]]]] = {}
    for entry in students_of(entries):
        run = entry.run
        if run.is_finished and entry.quality is not None:
            precision = (run.precision, run.rules, run.form)
            alike = (run.teacher, run.data, precision, updates_since_teacher(run))
            seeds = ways.setdefault(alike, {}).setdefault((run.loss, way_of(run)), {})
            seeds.setdefault(run.seed, []).append(entry)
    return [
        pair
        for found in ways.values()
        for way, seeds in found.items()
        if way != _USUAL
        for pair in _pairs(_shared(found.get(_USUAL, {}), seeds))
    ]


def _shared(
    usual: Mapping[int | None, Sequence[Entry]], other: Mapping[int | None, Sequence[Entry]]
) -> list[tuple[Entry, Entry]]:
    """Both runs of each seed that has one of each."""
    both = ((usual[seed], other[seed]) for seed in usual if seed in other)
    return [(first[0], second[0]) for first, second in both if len(first) == len(second) == 1]


def _pairs(shared: Sequence[tuple[Entry, Entry]]) -> Iterator[Pair]:
    for column in _COLUMNS:
        probes = [[entry.quality.own.probes.get(column.key) for entry in both] for both in shared]
        probes = [both for both in probes if None not in both]
        if not probes:
            continue
        like = probes[0][0]
        # Of each recording the mean over seeds, [2, recordings].
        errors = np.mean([[probe.errors for probe in both] for both in probes], axis=0)
        runs = [entry.run for entry in shared[0]]
        yield Pair(
            precision=with_form(runs[0].precision, runs[0].form),
            other=", ".join(part for part in (runs[1].loss, way_of(runs[1])) if part not in _USUAL),
            column=column,
            rates=tuple(rate_interval(each, like.sizes, like.groups) for each in errors),
            difference=Difference(
                difference_interval(*errors, like.sizes, like.groups),
                tuple(first.less(second).interval.value for first, second in probes),
            ),
            paper=tuple(map(_paper, runs)),
        )


def _paper(run: Run) -> float | None:
    is_known = way_of(run) == ONE_STEP and not run.rules
    return paper_wer(run.precision, run.loss) if is_known else None
