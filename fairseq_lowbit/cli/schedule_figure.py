"""``fairseq-lowbit schedule-figure``: training in stages against one step."""

import argparse
import logging
import sys
from pathlib import Path

from fairseq_lowbit.cli.quality_options import (
    add_measuring_arguments,
    check_measuring_arguments,
    measure_entries,
    with_places,
)
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write, check_writable
from fairseq_lowbit.report.overview.schedule_figure import draw_schedules
from fairseq_lowbit.report.style import as_bytes
from fairseq_lowbit.runs.collection import collect
from fairseq_lowbit.runs.columns import SCHEDULE_FIGURES
from fairseq_lowbit.runs.schedules import (
    check_comparable,
    read_schedules,
    schedule_table,
    write_points,
)
from fairseq_lowbit.terminal import print_table

HELP = "draw training in stages against one step, from the folders of runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "places",
        nargs="+",
        metavar="DIR",
        type=Path,
        help="a run, or runs below; those that differ only in their seed are one point",
    )
    add_measuring_arguments(parser, "a point lacks a seed, which is said")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for schedule.png and schedule.csv"
    )


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_measuring_arguments(args)
    figure, numbers = args.out / "schedule.png", args.out / "schedule.csv"
    check_writable(figure)
    entries = with_places(collect(args.places), args)
    check_comparable(entries)
    measure_entries(entries, args)
    schedules = read_schedules(entries)
    columns = [column for column in SCHEDULE_FIGURES if schedules.knows(column)]
    unknown = [column.label for column in SCHEDULE_FIGURES if column not in columns]
    if not columns:
        raise LowbitError(f"no run has any of {', '.join(unknown)}: nothing to draw")
    with atomic_write(figure, "wb") as file:
        file.write(as_bytes(draw_schedules(schedules, columns), "png"))
    with atomic_write(numbers) as file:
        write_points(schedules, columns, file)
    print_table(schedule_table(schedules, columns))
    if unknown:
        print(f"no panel, as no run has it: {', '.join(unknown)}")
    unreadable = [f"{entry.name}: {entry.problem}" for entry in entries if entry.run is None]
    for gap in (*schedules.gaps, *unreadable):
        print(f"missing: {gap}", file=sys.stderr)
    print(f"figure {figure}, numbers {numbers}")
    return int(bool(schedules.gaps or unreadable))
