"""`fairseq-lowbit synthesize`: the offline demo corpus."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.table import Table

from fairseq_lowbit.data.synthetic.librispeech import archive_subsets, synthesize_librispeech
from fairseq_lowbit.data.synthetic.speech import (
    TEST_SENTENCES,
    CorpusSummary,
    read_aloud,
    synthesize_corpus,
)
from fairseq_lowbit.data.synthetic.texts import king_james, read_sentences
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.terminal import print_table

HELP = "make an offline corpus of synthetic speech for trying things out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to write audio, manifests, transcripts to")
    parser.add_argument("--minutes", type=float, default=24, help="training speech (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another corpus")
    parser.add_argument(
        "--text",
        default="demo",
        metavar="demo|kjv|FILE",
        help="what is said: words and sentences of the demo (default), sentences of the King James "
        "Bible, or those of a text file, one a line",
    )
    parser.add_argument(
        "--test-sentences",
        type=int,
        metavar="COUNT",
        help=f"with --text kjv or FILE: sentences of the test split (default {TEST_SENTENCES})",
    )
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
    if args.test_sentences is not None and args.text == "demo":
        raise LowbitError("--test-sentences belongs to --text kjv or --text FILE: give it too")
    if args.layout == "librispeech":
        if args.text != "demo":
            raise LowbitError(f"--text {args.text}: --layout librispeech has the text of the demo")
        return _run_librispeech(args)
    if args.archives:
        raise LowbitError("--archives belongs to --layout librispeech: give it too")
    start = time.perf_counter()
    summary = _synthesize(args)
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


def _synthesize(args: argparse.Namespace) -> CorpusSummary:
    if args.text == "demo":
        return synthesize_corpus(args.out, minutes=args.minutes, seed=args.seed)
    passages = king_james() if args.text == "kjv" else read_sentences(args.text)
    count = TEST_SENTENCES if args.test_sentences is None else args.test_sentences
    return read_aloud(
        args.out, passages, minutes=args.minutes, test_sentences=count, seed=args.seed
    )


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
