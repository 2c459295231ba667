"""`fairseq-lowbit synthesize`: the offline demo corpus."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.table import Table

from fairseq_lowbit.data.synthetic.speech import synthesize_corpus
from fairseq_lowbit.terminal import print_table

HELP = "make an offline corpus of synthetic speech for trying things out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to write audio, manifests, transcripts to")
    parser.add_argument("--minutes", type=float, default=24, help="training speech (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another corpus")


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    summary = synthesize_corpus(args.out, minutes=args.minutes, seed=args.seed)
    seconds = time.perf_counter() - start
    table = Table(title=f"{summary.root} ({seconds:.1f} s)")
    for column in ("split", "minutes", "files", "isolated words", "voices"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, minutes in summary.minutes.items():
        words = str(summary.word_files.get(split, "-"))
        counts = str(summary.files[split]), words, str(summary.voices[split])
        table.add_row(split, f"{minutes:.1f}", *counts)
    print_table(table)
    return 0
