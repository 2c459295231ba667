"""``fairseq-lowbit superb-table``: results of SUPERB and published ones in one table."""

import argparse
from pathlib import Path

from fairseq_lowbit.files import atomic_write, check_writable
from fairseq_lowbit.runs.superb.results import collect_results
from fairseq_lowbit.runs.superb.table import markdown, superb_table, text, write_csv
from fairseq_lowbit.terminal import print_table

HELP = "results of SUPERB's tasks as a table, with storage, runtime and published rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Results of a task by different settings or vocabularies are refused."
    parser.add_argument(
        "places", nargs="+", metavar="DIR", type=Path, help="of results of superb, or above them"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the figures in full")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table for a README")


def run(args: argparse.Namespace) -> int:
    for path in filter(None, (args.csv, args.markdown)):
        check_writable(path)
    table = superb_table(collect_results(args.places))
    print_table(text(table))
    print("\n".join(table.notes))
    if args.csv:
        with atomic_write(args.csv) as file:
            write_csv(table, file)
    if args.markdown:
        with atomic_write(args.markdown) as file:
            file.write(markdown(table))
    return 0
