"""`fairseq-lowbit labels`: first-iteration HuBERT labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from fairseq_lowbit.data.labels import make_labels
from fairseq_lowbit.terminal import print_table

HELP = "cluster MFCC into the labels of HuBERT's first iteration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="folder with train.tsv, valid.tsv, test.tsv")
    parser.add_argument("--clusters", type=int, default=100, help="number of labels (default 100)")
    parser.add_argument(
        "--splits",
        nargs="+",
        default=["train", "valid", "test"],
        help="manifests to label; k-means is fitted on the first (default: train valid test)",
    )
    parser.add_argument("--label-rate", type=int, default=50, help="labels a second (default 50)")
    parser.add_argument(
        "--fit-seconds",
        type=float,
        default=5 * 3600,
        help="audio to fit k-means on, bounds its memory (default 5 hours)",
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    summary = make_labels(
        args.data,
        args.clusters,
        splits=args.splits,
        label_rate=args.label_rate,
        fit_seconds=args.fit_seconds,
        seed=args.seed,
    )
    table = Table(title=f"{args.data}: k-means on {summary.fitted_frames} MFCC frames")
    for column in ("split", "labels", "clusters in use", "most frequent"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, frames in summary.frames.items():
        used = f"{summary.used_clusters[split]} of {summary.clusters}"
        table.add_row(split, str(frames), used, f"{summary.top_share[split]:.1%}")
    print_table(table)
    if summary.unusable:
        print(f"{len(summary.unusable)} unusable files, without labels: {summary.unusable[0]} ...")
    return 0
