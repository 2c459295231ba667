"""`fairseq-lowbit synthesize`: the offline demo corpus."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.table import Table

from fairseq_lowbit.data.synthetic.librispeech import archive_subsets, synthesize_librispeech
from fairseq_lowbit.data.synthetic.speech import synthesize_corpus
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.terminal import print_table

HELP = "make an offline corpus of synthetic speech for trying things out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to write audio, manifests, transcripts to")
    parser.add_argument("--minutes", type=float, default=24, help="training speech (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another corpus")
    parser.add_argument(
        "--layout",
        choices=("demo", "librispeech"),
        default="demo",
        help="with manifests and single words (default), or as LibriSpeech comes, without them",
    )
    parser.add_argument(
        "--archives", action="store_true", help="LibriSpeech's layout in archives, as published"
    )


def run(args: argparse.Namespace) -> int:
    if args.layout == "librispeech":
        return _run_librispeech(args)
    if args.archives:
        raise LowbitError("--archives belongs to --layout librispeech: give it too")
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


def _run_librispeech(args: argparse.Namespace) -> int:
    minutes = synthesize_librispeech(args.out, minutes=args.minutes, seed=args.seed)
    table = Table(title=str(args.out))
    table.add_column("subset")
    table.add_column("minutes", justify="right")
    for subset, length in minutes.items():
        table.add_row(subset, f"{length:.1f}")
    print_table(table)
    if args.archives:
        archives = archive_subsets(args.out)
        print(f"wrote {len(archives)} archives; unpack them: fairseq-lowbit librispeech")
    return 0
