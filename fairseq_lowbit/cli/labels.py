"""`fairseq-lowbit labels`: the labels that HuBERT is trained on."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from fairseq_lowbit.cli.device_option import add_device_argument, read_device
from fairseq_lowbit.data.features import FrameFeatures, Mfcc
from fairseq_lowbit.data.labels import LabelJob, LabelSummary, fit, join, label_shards
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.terminal import print_table

HELP = "cluster MFCC, or a layer of a model, into the labels that HuBERT is trained on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="folder with train.tsv, valid.tsv, test.tsv")
    parser.add_argument("--clusters", type=int, default=100, help="number of labels (default 100)")
    parser.add_argument("--model", help="cluster a layer of this model instead of MFCC")
    parser.add_argument("--layer", type=int, help="of --model: 1 is the output of its first layer")
    add_device_argument(parser)
    parser.add_argument(
        "--name", default="km", help="end of the label files' names: task.labels (default km)"
    )
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
        help="audio to fit k-means on, drawn from the first split (default 5 hours)",
    )
    parser.add_argument("--seed", type=int, default=0)
    _add_shard_arguments(parser)


def _add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "large corpora", "Finished shards are kept: after an interruption run the same command."
    )
    group.add_argument("--shards", type=int, default=1, help="parts of every split (default 1)")
    group.add_argument(
        "--workers", type=int, default=1, help="processes, for one shard each at a time (default 1)"
    )
    one = group.add_mutually_exclusive_group()
    one.add_argument("--fit-only", action="store_true", help="only k-means: before the jobs")
    one.add_argument(
        "--shard",
        type=int,
        metavar="I",
        help="only part I of 1 to --shards: a job of a cluster; without it, the same command joins",
    )


def run(args: argparse.Namespace) -> int:
    job = _job(args)
    if args.shard is not None:
        return _run_shard(job, args.shard)
    clusters = fit(job)
    if args.fit_only:
        print(f"k-means on {clusters.frames} frames: wrote {job.kmeans}")
        return 0
    labelled = label_shards(job, job.all_shards(), args.workers)
    print_table(_table(job, join(job), _describe(args)))
    total = len(job.all_shards())
    if labelled < total:
        print(f"{total - labelled} of {total} shards were finished before ({job.folder})")
    return 0


def _job(args: argparse.Namespace) -> LabelJob:
    if args.shard is not None and not 1 <= args.shard <= args.shards:
        raise LowbitError(f"--shard {args.shard}: give a number from 1 to --shards {args.shards}")
    return LabelJob(
        args.data,
        _features(args),
        args.clusters,
        label_rate=args.label_rate,
        fit_seconds=args.fit_seconds,
        seed=args.seed,
        splits=tuple(args.splits),
        name=args.name,
        shards=args.shards,
    )


def _features(args: argparse.Namespace) -> FrameFeatures:
    if (args.model is None) != (args.layer is None):
        raise LowbitError("--model and --layer belong together: give both, or none for MFCC")
    if args.model is None:
        return Mfcc()
    # They load torch, which MFCC do without.
    from fairseq_lowbit.evaluation.layer_features import LayerFeatures
    from fairseq_lowbit.interop import open_model

    return LayerFeatures(args.model, args.layer, open_model, read_device(args))


def _describe(args: argparse.Namespace) -> str:
    return "MFCC" if args.model is None else f"layer {args.layer} of {args.model}"


def _run_shard(job: LabelJob, number: int) -> int:
    shards = [shard for shard in job.all_shards() if shard.number == number]
    labelled = label_shards(job, shards)
    print(f"shard {number} of {job.shards}: {labelled} of {len(shards)} splits were left to label")
    print("when all shards are finished, join them: the same command without --shard")
    return 0


def _table(job: LabelJob, summary: LabelSummary, features: str) -> Table:
    title = f"{job.data_dir}: k-means on {summary.fitted_frames} frames of {features}"
    table = Table(title=title)
    for column in ("split", "labels", "clusters in use", "most frequent"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, frames in summary.frames.items():
        used = f"{summary.used_clusters[split]} of {summary.clusters}"
        table.add_row(split, str(frames), used, f"{summary.top_share[split]:.1%}")
    if summary.unusable:
        table.caption = (
            f"{len(summary.unusable)} unusable files, without labels: {summary.unusable[0]} ..."
        )
    return table
