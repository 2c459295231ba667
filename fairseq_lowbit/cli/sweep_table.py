"""``fairseq-lowbit sweep-table``: any set of runs in one table."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from fairseq_lowbit.cli.quality_options import (
    add_measuring_arguments,
    check_measuring_arguments,
    measure_entries,
    with_places,
)
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write, check_writable
from fairseq_lowbit.runs.collection import SORTS, collect, model_records
from fairseq_lowbit.runs.columns import Column, ModelRecord
from fairseq_lowbit.runs.pairs import PAIR_LEGEND, Pair, find_pairs
from fairseq_lowbit.runs.tables import (
    legend,
    markdown,
    pair_markdown,
    pair_table,
    run_columns,
    run_table,
    write_csv,
)
from fairseq_lowbit.terminal import print_table

HELP = "collect runs into one table: sweeps, single runs, the stages of a schedule"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "places", nargs="+", metavar="DIR", type=Path, help="a run, runs below, or a checkpoint"
    )
    add_measuring_arguments(parser, "a run failed or could not be measured, which its row says")
    parser.add_argument(
        "--sort", choices=SORTS, default="storage", help="best first (default storage, then name)"
    )
    parser.add_argument("--paper", action="store_true", help="a column of published WER")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="all numbers, of all layers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table for a README")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _check_paths(args)
    entries = with_places(collect(args.places), args)
    if not any(entry.run for entry in entries):
        raise LowbitError("; ".join(f"{entry.name}: {entry.problem}" for entry in entries))
    was_interrupted = False
    try:
        measure_entries(entries, args)
    except KeyboardInterrupt:
        was_interrupted = True
    groups, columns = model_records(entries, args.sort), run_columns(args.paper)
    print_table(run_table(groups, columns), wide=True)
    print(legend(columns))
    pairs = find_pairs(entries)
    if pairs:
        print_table(pair_table(pairs))
        print(PAIR_LEGEND)
    _write(groups, columns, pairs, args)
    has_problem = any(record["message"] for group in groups for record in group)
    return 130 if was_interrupted else int(has_problem)


def _check_paths(args: argparse.Namespace) -> None:
    """Checks that paths exist or can be written before time is spent."""
    check_measuring_arguments(args)
    for path in filter(None, (args.csv, args.markdown)):
        check_writable(path)


def _write(
    groups: list[list[ModelRecord]],
    columns: Sequence[Column],
    pairs: Sequence[Pair],
    args: argparse.Namespace,
) -> None:
    if args.csv:
        with atomic_write(args.csv) as file:
            write_csv(groups, file)
    if args.markdown:
        with atomic_write(args.markdown) as file:
            file.write(markdown(groups, columns))
            if pairs:
                file.write(f"\n{pair_markdown(pairs)}")
