"""`fairseq-lowbit librispeech`: the published archives become a corpus to train on."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.data.librispeech import (
    PUBLISHED,
    SPLITS,
    Subset,
    check_splits,
    unpack_subsets,
    write_manifests,
)
from fairseq_lowbit.terminal import print_table

HELP = "check and unpack LibriSpeech and write its manifests"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="folder with train-clean-100.tar.gz ..., or with unpacked folders"
    )
    parser.add_argument("out", type=Path, help="folder for LibriSpeech/ and the manifests")
    for split, subsets in SPLITS.items():
        parser.add_argument(
            f"--{split}",
            nargs="*",
            default=list(subsets),
            metavar="SUBSET",
            help=f"subsets of {split}.tsv (default: {' '.join(subsets)})",
        )
    parser.add_argument(
        "--unpack-only", action="store_true", help="check and unpack, without writing manifests"
    )


def run(args: argparse.Namespace) -> int:
    splits = {split: getattr(args, split) for split in SPLITS}
    check_splits(splits)
    names = [name for members in splits.values() for name in members]
    subsets = unpack_subsets(args.source, args.out, names)
    samples = {} if args.unpack_only else write_manifests(subsets, splits, args.out)
    print_table(_table(subsets, splits, samples))
    if not args.unpack_only:
        written = ", ".join(f"{split}.tsv" for split, members in splits.items() if members)
        print(f"wrote {written} in {args.out}")
    return 0


def _table(subsets: list[Subset], splits: dict[str, list[str]], samples: dict[str, int]) -> Table:
    table = Table()
    for column in ("subset", "split", "utterances", "published", "hours"):
        table.add_column(column, justify="left" if column in ("subset", "split") else "right")
    split_of = {name: split for split, members in splits.items() for name in members}
    for subset in subsets:
        published = PUBLISHED.get(subset.name)
        table.add_row(
            subset.name,
            split_of[subset.name],
            f"{len(subset.recordings):,}",
            "-" if published is None else f"{published:,}",
            f"{samples[subset.name] / SAMPLE_RATE / 3600:,.2f}" if samples else "-",
        )
    return table
