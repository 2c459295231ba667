"""``fairseq-lowbit report``: runs, checkpoints and tables on one page."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fairseq_lowbit.cli.device_option import read_device
from fairseq_lowbit.cli.doctor import (
    check_fairseq,
    check_hydra,
    check_machine,
    check_python,
    check_torch,
)
from fairseq_lowbit.cli.quality_options import (
    add_measuring_arguments,
    check_measuring_arguments,
    measure_entries,
    with_places,
)
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import check_writable
from fairseq_lowbit.report.inside.dissection import dissect_all
from fairseq_lowbit.report.overview.choice import colors, worth_dissecting
from fairseq_lowbit.report.overview.comparison import (
    all_details,
    comparison,
    problems_of,
    summary_of,
)
from fairseq_lowbit.report.overview.superb_section import superb_section
from fairseq_lowbit.report.page.page import Page, Pictures, write_page
from fairseq_lowbit.report.sections import Sections
from fairseq_lowbit.report.subjects import Subject, gather
from fairseq_lowbit.runs.collection import Entry, collect, model_records
from fairseq_lowbit.runs.columns import ModelRecord
from fairseq_lowbit.runs.superb.results import collect_results
from fairseq_lowbit.runs.superb.table import superb_table
from fairseq_lowbit.runs.tables import read_csv

HELP = "one page from runs, checkpoints and tables: costs, quality, curves, the insides of models"
MOST_DISSECTED = 3
_ENVIRONMENT = (check_python, check_torch, check_fairseq, check_hydra, check_machine)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        type=Path,
        help="a run, a folder with runs, a checkpoint (.pt, .safetensors), a folder of Hugging "
        "Face, or a table of sweep-table --csv",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page (report.html), which needs no network and no other file",
    )
    add_measuring_arguments(parser, "something could not be read or measured, which the page says")
    parser.add_argument(
        "--dissect",
        action="append",
        default=[],
        metavar="NAME",
        help=f"show the inside of this model (default: up to {MOST_DISSECTED} of the best)",
    )
    parser.add_argument(
        "--superb",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="with the table of these results of SUPERB",
    )
    parser.add_argument("--no-dissect", action="store_true", help="show the inside of no model")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    figures = args.out.with_name(f"{args.out.stem}_figures")
    check_measuring_arguments(args)
    if args.dissect and args.no_dissect:
        raise LowbitError("--dissect and --no-dissect contradict each other")
    superb = [superb_section(superb_table(collect_results(args.superb)))] if args.superb else []
    tables = [path for path in args.sources if path.suffix == ".csv"]
    places = [path for path in args.sources if path not in tables]
    known, problems = _read_tables(tables)
    entries = with_places(collect(places), args)
    if not known and not any(entry.run for entry in entries):
        raise LowbitError("; ".join([*problems, *(f"{e.name}: {e.problem}" for e in entries)]))
    _check_dissect(entries, args.dissect)
    for path in (args.out, figures / "any"):
        check_writable(path)
    measure_entries(entries, args)
    groups = model_records(entries, "storage")
    subjects = gather([r for group in groups for r in group], known)
    page = _page(args, problems, subjects, Pictures(figures))
    page = replace(page, sections=[*superb, *page.sections])
    write_page(page, args.out)
    for problem in page.problems:
        print(f"problem: {problem}", file=sys.stderr)
    size = args.out.stat().st_size / 1e6
    print(f"page {args.out} ({size:.1f} MB), figures in {figures}")
    return int(bool(page.problems))


def _read_tables(paths: Sequence[Path]) -> tuple[list[ModelRecord], list[str]]:
    """The rows of tables, and why a table cannot be read."""
    records, problems = [], []
    for path in paths:
        try:
            records += read_csv(path)
        except LowbitError as error:
            problems.append(str(error))
    return records, problems


def _check_dissect(entries: Sequence[Entry], dissect: Sequence[str]) -> None:
    """Raises LowbitError if --dissect names an unknown run."""
    names = [entry.name for entry in entries if entry.run and entry.run.updates is not None]
    unknown = [name for name in dissect if name not in names]
    if unknown:
        raise LowbitError(
            f"--dissect {unknown[0]}: there is no such run with a checkpoint; there are "
            f"{', '.join(names) or 'none'}"
        )


def _page(
    args: argparse.Namespace, problems: list[str], subjects: list[Subject], pictures: Pictures
) -> Page:
    colored = colors(subjects)
    chosen, why = _chosen(subjects, args)
    sections = Sections(subjects, colored, pictures, lambda what: _say(f"drawing {what}"))
    drawn = sections.build(
        dissect_all(
            chosen, read_device(args), lambda subject: _say(f"taking {subject.name} apart")
        ),
        why,
    )
    columns, lines = comparison(subjects, colored)
    return Page(
        created=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        summary=summary_of(subjects),
        problems=[*problems, *problems_of(subjects), *sections.problems],
        columns=columns,
        lines=lines,
        sections=drawn,
        details=all_details(subjects),
        environment=[(found.topic, found.lines) for found in (check() for check in _ENVIRONMENT)],
    )


def _chosen(subjects: Sequence[Subject], args: argparse.Namespace) -> tuple[list[Subject], str]:
    """The models to take apart, and why these."""
    if args.no_dissect:
        return [], ""
    if args.dissect:
        return [s for s in subjects if s.name in args.dissect], "The models that --dissect named."
    chosen, why = worth_dissecting(subjects, MOST_DISSECTED)
    return chosen, f"{why} --dissect NAME shows others."


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
