#!/usr/bin/env python
"""Accuracy at equal bits, data and updates: this package beside torchao's and Brevitas'
quantization-aware training, and a float student.

    python scripts/bench_accuracy.py                       # about 70 minutes on 2 cores
    python scripts/bench_accuracy.py --rows float 'ours_*' 'torchao_*' --seeds 1
    python scripts/bench_accuracy.py --teacher TEACHER.pt --data DIR --out exp/mine

A row is a method at a width, see scripts/accuracy/rows.py. Each student starts as a copy of the
teacher whose encoder linears, and nothing else, are quantized by one of the libraries, is
calibrated, and then learns from the teacher: with the same batches, loss, optimizer, schedule and
updates in every row. Every row is trained at the same few rates with the first seed; the rate that
is best on the valid split is trained with the other seeds, and what is printed is measured on the
test split. A seed draws the audio to calibrate and to train on.

Printed is the signal-to-noise ratio of the last layer against the teacher's, in dB, by calibration
alone and after the last update: mean and standard deviation over the seeds.

Without --teacher two corpora are synthesized, of other sentences and of voices that they do not
share, and a teacher is pre-trained on each.

Interrupted, the same command goes on. OUT has results.json, with every run, and table.md.
"""

import argparse
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from accuracy.results import Plan, Results
from accuracy.rows import PEERS, Row, chosen_rows
from accuracy.table import as_markdown, as_table, cells, differences
from accuracy.teachers import own_teachers
from accuracy.training import REPORT, SPLITS, Outcome, Run, Setting, Teacher, measure

from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write, check_writable
from fairseq_lowbit.machine import this_machine, usable_cores
from fairseq_lowbit.terminal import print_table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive, whole = _positive(float), _positive(int)
    own = parser.add_argument_group("teachers")
    own.add_argument(
        "--teacher", action="append", type=Path, help="checkpoint of a float model; repeatable"
    )
    own.add_argument(
        "--data", action="append", type=Path, help="of each teacher: a folder with manifests"
    )
    own.add_argument("--minutes", type=positive, default=20, help="of speech of a corpus (20)")
    own.add_argument("--teacher-updates", type=whole, default=1000, help="of its teacher (1000)")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--rows", nargs="+", default=["*"], metavar="ROW", help="names, * for any")
    what.add_argument("--rates", nargs="+", type=positive, default=[3e-4, 1e-3, 3e-3])
    what.add_argument("--seeds", type=whole, default=3, help="1 to so many (3)")
    what.add_argument("--updates", type=whole, default=150, help="of a student (150)")
    what.add_argument("--batch", type=whole, default=6, help="utterances of an update (6)")
    what.add_argument("--seconds", type=positive, default=3.0, help="of each of those (3)")
    what.add_argument("--held-out", type=positive, default=60.0, help="seconds of a split (60)")
    parser.add_argument("--jobs", type=whole, default=usable_cores(), help="runs at once (cores)")
    parser.add_argument("--out", type=Path, default=Path("exp/bench_accuracy"), metavar="DIR")
    given = parser.parse_args(arguments)
    if len(given.teacher or ()) != len(given.data or ()):
        parser.error("--teacher and --data go together: give the data of every teacher")
    given.rates = sorted(set(given.rates))
    return given


def _positive(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    convert.__name__ = kind.__name__  # argparse names it in its messages
    return convert


def given_teachers(given: argparse.Namespace) -> list[Teacher]:
    """Raises LowbitError for a file that is not there."""
    teachers = []
    for checkpoint, data in zip(given.teacher, given.data, strict=True):
        for path in (checkpoint, *(data / f"{split}.tsv" for split in SPLITS)):
            if not path.is_file():
                raise LowbitError(f"--teacher {checkpoint} --data {data}: there is no {path}")
        name = "teacher" if len(given.teacher) == 1 else f"teacher {len(teachers) + 1}"
        teachers.append(Teacher(name, checkpoint.resolve(), data.resolve()))
    return teachers


def versions(rows: list[Row]) -> dict[str, str]:
    """Of what the rows compute with."""
    names = {"fairseq-lowbit": None, "torch": None}
    names |= {row.library: None for row in rows if row.library in PEERS}
    return {name: version(name) for name in names}


def digest(teacher: Teacher) -> str:
    """Equal for the same weights and the same recordings, wherever they are."""
    known = sha256(teacher.checkpoint.read_bytes())
    for split in SPLITS:
        known.update(read_manifest(teacher.data / f"{split}.tsv").digest().encode())
    return known.hexdigest()[:16]


def run_missing(results: Results, plan: Plan, setting: Setting, jobs: int) -> None:
    """Trains until nothing of the plan is missing; says after every run how far it is."""
    call = partial(run_one, {teacher.name: teacher for teacher in plan.teachers}, setting)
    clock = Clock(plan.runs)
    with workers(jobs) as run_all:
        while missing := results.missing(plan):
            for run, outcome in run_all(call, missing):
                results.add(run, outcome)
                done = len(results.known(plan)) - len(results.missing(plan))
                print(f"{clock.told(done)} {describe(run, outcome)}", flush=True)


class Clock:
    """How much of ``total`` is done, and how long the rest takes at the speed so far."""

    def __init__(self, total: int) -> None:
        self.total, self.start, self.finished = total, time.perf_counter(), 0

    def told(self, done: int) -> str:
        self.finished += 1
        per_run = (time.perf_counter() - self.start) / self.finished
        minutes = (self.total - done) * per_run / 60
        return f"[{done}/{self.total}, {minutes:.0f} min left]"


def describe(run: Run, outcome: Outcome) -> str:
    where = f"{run.teacher}, {run.row}, rate {run.rate:g}, seed {run.seed}"
    after = f"{outcome.trained[REPORT]:.1f} dB" if outcome.trained else "diverged"
    return f"{where}: {outcome.calibrated[REPORT]:.1f} -> {after} in {outcome.seconds:.0f} s"


def run_one(teachers: dict[str, Teacher], setting: Setting, run: Run) -> tuple[Run, Outcome]:
    """In a process of its own; names the run, as they end in any order."""
    return run, measure(teachers[run.teacher], setting, run)


@contextmanager
def workers(jobs: int) -> Iterator[Callable[..., Iterator[tuple[Run, Outcome]]]]:
    """A function like ``map`` that computes in so many processes, of one thread each: models this
    small gain little from a second one."""
    if jobs == 1:
        start_worker()
        yield map
        return
    with get_context("spawn").Pool(jobs, start_worker) as pool:
        yield pool.imap_unordered


def start_worker() -> None:
    torch.set_num_threads(1)
    # Every run would tell again which files are shorter than a cut.
    logging.getLogger("fairseq_lowbit.data.recordings").setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    try:
        bench(given)
    except LowbitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def bench(given: argparse.Namespace) -> None:
    rows = chosen_rows(given.rows)
    out = given.out.resolve()
    check_writable(out / "table.md")
    setting = Setting(given.updates, given.batch, given.seconds, given.held_out)
    if given.teacher:
        teachers = given_teachers(given)
    else:
        teachers = own_teachers(out, given.minutes, given.teacher_updates, given.jobs)
    plan = Plan(teachers, rows, given.rates, given.seeds)
    shared = {**asdict(setting), **versions(rows), **{t.name: digest(t) for t in teachers}}
    results = Results(out / "results.json", shared, str(this_machine()))
    run_missing(results, plan, setting, given.jobs)
    write_table(results, plan, out / "table.md")


def write_table(results: Results, plan: Plan, path: Path) -> None:
    """On the terminal and as Markdown."""
    lines = cells(results, plan)
    shared = ", ".join(f"{name} {value}" for name, value in results.setting.items())
    seeds, rates = f"1 to {plan.seeds}", ", ".join(f"{rate:g}" for rate in plan.rates)
    notes = [
        *differences(results, plan),
        f"{shared}; seeds {seeds}; rates {rates}",
        f"{results.machine}; Python {platform.python_version()}",
    ]
    print_table(as_table(lines), wide=True)
    print("\n".join(notes))
    with atomic_write(path) as file:
        file.write(as_markdown(lines) + "\n" + "".join(f"- {note}.\n" for note in notes))


if __name__ == "__main__":
    sys.exit(main())
