"""Measuring the quality of the runs that a command was given: options, and progress on stderr."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from fairseq_lowbit.cli.device_option import add_device_argument, read_device
from fairseq_lowbit.errors import LowbitError, require_number
from fairseq_lowbit.evaluation.quality import SECONDS
from fairseq_lowbit.interop import huggingface_directory
from fairseq_lowbit.runs.collection import Entry
from fairseq_lowbit.runs.run import Run
from fairseq_lowbit.runs.run_quality import measure_quality, stored_quality


def add_measuring_arguments(parser: argparse.ArgumentParser, problem: str) -> None:
    """Options, and an epilog.

    Args:
        problem: that the command ends with status 1 for.
    """
    parser.epilog = (
        "What is measured of a run is kept beside it and taken from there the next time. Exit "
        f"status: 0; 1 if {problem}; 2 if there is nothing to show; 130 if interrupted."
    )
    parser.add_argument("--data", type=Path, help="folder with test.tsv (default: the run's own)")
    parser.add_argument("--teacher", type=Path, help="compare with this (default: the run's own)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="audio to measure on (default %(default)g)"
    )
    parser.add_argument(
        "--no-evaluate", action="store_true", help="measure nothing; show what is known already"
    )
    add_device_argument(parser)


def check_measuring_arguments(args: argparse.Namespace) -> None:
    """Raises LowbitError for a path that does not exist, an id of a hub that cannot be fetched, an
    impossible amount of audio, or a device that is not there."""
    read_device(args)
    require_number("--seconds", args.seconds, 0, excluded=True)
    if args.data and not (args.data / "test.tsv").is_file():
        raise LowbitError(f"--data {args.data} holds no test.tsv")
    if args.teacher and not (args.teacher.is_file() or huggingface_directory.find(args.teacher)):
        raise LowbitError(f"--teacher {args.teacher} does not exist")


def with_places(entries: Sequence[Entry], args: argparse.Namespace) -> list[Entry]:
    """Sets the data and the teacher of the command line, if they are given; the run of that teacher
    itself gets no teacher."""
    given = {"data": args.data, "teacher": args.teacher}
    given = {key: path for key, path in given.items() if path is not None}

    def place(run: Run) -> Run:
        is_teacher = args.teacher and run.checkpoint.resolve() == args.teacher.resolve()
        return replace(run, **given | {"teacher": None} if is_teacher else given)

    return [replace(e, run=place(e.run)) if e.run else e for e in entries]


def measure_entries(entries: list[Entry], args: argparse.Namespace) -> None:
    """Replaces entries by measured ones, one by one; what an earlier command measured is kept, and
    with ``--no-evaluate`` is all there is.

    Raises:
        KeyboardInterrupt: after a message that it was interrupted.
    """
    places = {}
    for index, entry in enumerate(entries):
        if entry.run is None or entry.run.updates is None:
            continue
        known = stored_quality(entry.run, args.seconds)
        entries[index] = replace(entry, quality=known)
        if known is None:
            places[entry.run] = index
    if args.no_evaluate or not places:
        return
    started = count(1)

    def announce(run: Run) -> None:
        name = entries[places[run]].name
        print(f"measuring {next(started)} of {len(places)}: {name}", file=sys.stderr, flush=True)

    try:
        for run, result in measure_quality(places, args.seconds, read_device(args), announce):
            index = places[run]
            known = {"problem" if isinstance(result, str) else "quality": result}
            entries[index] = replace(entries[index], **known)
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, the same command goes on", file=sys.stderr)
        raise
