"""``fairseq-lowbit sweep-table``: any set of runs in one table."""

import argparse
import logging
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.collection import SORTS, Entry, Record, collect, records
from fairseq_lowbit.evaluation.measure import SECONDS
from fairseq_lowbit.evaluation.measured_runs import measure_runs, stored_measurement
from fairseq_lowbit.evaluation.paper import SOURCE
from fairseq_lowbit.evaluation.runs import Run
from fairseq_lowbit.evaluation.sweep_table import LEGEND, markdown, rich_table, write_csv
from fairseq_lowbit.evaluation.tables import print_table
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.plugin import register

HELP = "collect runs into one table: sweeps, single runs, the stages of a schedule"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "What is measured of a run is kept beside it and taken from there the next time. Exit "
        "status: 0; 1 if a run failed or could not be measured, which its row says; 2 if there is "
        "nothing to show; 130 if interrupted."
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="a run, or runs below")
    parser.add_argument("--data", type=Path, help="folder with test.tsv (default: the run's own)")
    parser.add_argument("--teacher", type=Path, help="compare with this (default: the run's own)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="audio to measure on (default %(default)g)"
    )
    parser.add_argument(
        "--no-evaluate", action="store_true", help="measure nothing; show what is known already"
    )
    parser.add_argument(
        "--sort", choices=SORTS, default="storage", help="best first (default storage, then name)"
    )
    parser.add_argument("--paper", action="store_true", help="a column of published WER")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="all numbers, of all layers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table for a README")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _check_paths(args)
    entries = [_with_places(entry, args) for entry in collect(args.folders)]
    if not any(entry.run for entry in entries):
        raise LowbitError("; ".join(f"{entry.name}: {entry.problem}" for entry in entries))
    was_interrupted = False
    try:
        _measure(entries, args.seconds, only_known=args.no_evaluate)
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, the same command goes on", file=sys.stderr)
        was_interrupted = True
    groups = records(entries, args.sort)
    print_table(rich_table(groups, args.paper))
    print(f"{LEGEND}\npaper: WER of {SOURCE}." if args.paper else LEGEND)
    _write(groups, args)
    has_problem = any(record["message"] for group in groups for record in group)
    return 130 if was_interrupted else int(has_problem)


def _check_paths(args: argparse.Namespace) -> None:
    """What was given by hand has to be there, and to be writable, before time is spent."""
    if args.data and not (args.data / "test.tsv").is_file():
        raise LowbitError(f"--data {args.data} holds no test.tsv")
    if args.teacher and not args.teacher.is_file():
        raise LowbitError(f"--teacher {args.teacher} does not exist")
    for path in filter(None, (args.csv, args.markdown)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LowbitError(f"{path} cannot be written: {error}") from error
        if path.is_dir():
            raise LowbitError(f"{path} is a folder: name a file")


def _with_places(entry: Entry, args: argparse.Namespace) -> Entry:
    """With the data and the teacher of the command line, where they are given."""
    given = {"data": args.data, "teacher": args.teacher}
    given = {key: path for key, path in given.items() if path is not None}
    return replace(entry, run=replace(entry.run, **given)) if entry.run else entry


def _measure(entries: list[Entry], seconds: float, only_known: bool) -> None:
    """Replaces entries by measured ones, one by one."""
    places = {}
    for index, entry in enumerate(entries):
        if entry.run is None or entry.run.updates is None:
            continue
        known = stored_measurement(entry.run, seconds)
        entries[index] = replace(entry, measurement=known)
        if known is None:
            places[entry.run] = index
    if only_known or not places:
        return
    register()
    started = count(1)

    def announce(run: Run) -> None:
        name = entries[places[run]].name
        print(f"measuring {next(started)} of {len(places)}: {name}", file=sys.stderr, flush=True)

    for run, result in measure_runs(places, seconds, announce):
        index = places[run]
        known = {"problem" if isinstance(result, str) else "measurement": result}
        entries[index] = replace(entries[index], **known)


def _write(groups: list[list[Record]], args: argparse.Namespace) -> None:
    if args.csv:
        with atomic_write(args.csv) as file:
            write_csv(groups, file)
    if args.markdown:
        with atomic_write(args.markdown) as file:
            file.write(markdown(groups, args.paper))
