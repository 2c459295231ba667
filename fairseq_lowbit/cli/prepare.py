"""`fairseq-lowbit prepare`: a folder of recordings becomes a corpus."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fairseq_lowbit.data.prepare import prepare_directory

HELP = "convert a folder of audio to 16 kHz mono FLAC and split it into train, valid and test"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder that is searched for audio files")
    parser.add_argument("out", type=Path, help="folder to write audio and manifests to")
    parser.add_argument("--valid-fraction", type=float, default=0.05, help="default 0.05")
    parser.add_argument("--test-fraction", type=float, default=0.1, help="default 0.1")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another split")


def run(args: argparse.Namespace) -> int:
    summary = prepare_directory(
        args.source,
        args.out,
        valid_fraction=args.valid_fraction,
        test_fraction=args.test_fraction,
        seed=args.seed,
    )
    table = Table()
    for column in ("split", "minutes", "files"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in ("train", "valid", "test"):
        table.add_row(split, f"{summary.minutes[split]:.1f}", str(summary.files[split]))
    console = Console(markup=False)
    console.print(table)
    kept_whole = "folders" if summary.grouped_by_folder else "files"
    counts = f"{summary.converted} converted, {summary.reused} finished before"
    console.print(f"{counts}; the splits share no {kept_whole}")
    if summary.skipped:
        name, reason = summary.skipped[0]
        rest = f"{len(summary.skipped)} skipped (all in {summary.out / 'skipped.txt'})"
        console.print(f"{rest}: {name}: {reason}", soft_wrap=True)
    return 0
