"""``fairseq-lowbit profile``: what models cost, counted and not measured."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.paper import SOURCE, TABLE, PaperRow
from fairseq_lowbit.evaluation.tables import print_table
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.models import Hubert, load_without_weights
from fairseq_lowbit.plugin.configs import meta_model, model_config
from fairseq_lowbit.profiling import Profile, profile
from fairseq_lowbit.profiling.cost import CONVERSION_RATE
from fairseq_lowbit.profiling.tables import (
    module_table,
    paper_table,
    profile_row,
    profile_table,
    write_csv,
)

HELP = "count storage, FLOPs, QuantOps and memory of configurations and checkpoints"
REFERENCE = "hubert_fastconv"
_PAPER_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status: 0; 1 if a target could not be read, the others are still shown."
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help="a configuration (bitla_w1a1), any precision (bitla_w3a5), or a checkpoint",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="audio to count for (10)")
    parser.add_argument(
        "--conversion-rate",
        type=float,
        default=CONVERSION_RATE,
        metavar="K",
        help="bits of quantized work that take as long as one floating-point operation "
        "(%(default)s, the paper's)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OVERRIDE",
        help="Hydra override for every target that is a name, for example model=fastconv_tiny",
    )
    parser.add_argument("--per-module", action="store_true", help="every operator of each target")
    parser.add_argument("--paper", action="store_true", help="the paper's Table 1 beside ours")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV too")


def run(args: argparse.Namespace) -> int:
    _check(args)
    reference = profile(meta_model(model_config(REFERENCE, [])), REFERENCE, args.seconds)
    if args.paper:
        return _paper(reference, args.conversion_rate)
    profiles, problems = _profiles(args.targets, args.set, args.seconds)
    rows = [profile_row(p, reference, args.conversion_rate) for p in profiles]
    if rows:
        _show(rows, profiles, args)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def read_target(target: str, overrides: list[str]) -> Hubert:
    """The model of a configuration, a precision or a checkpoint, on the meta device.

    Raises:
        LowbitError: there is no such thing, or it cannot be read.
    """
    path = Path(target)
    if path.suffix != ".pt" and not path.exists():
        return meta_model(model_config(target, overrides))
    return load_without_weights(path)


def _check(args: argparse.Namespace) -> None:
    if args.paper and (args.targets or args.set or args.seconds != _PAPER_SECONDS):
        raise LowbitError("--paper has its own models and 10 s: leave targets, --set and --seconds")
    if not args.paper and not args.targets:
        raise LowbitError("name a configuration, a precision or a checkpoint, or give --paper")
    if not args.seconds > 0:
        raise LowbitError(f"--seconds {args.seconds:g}: want more than 0")
    if not args.conversion_rate > 0:
        raise LowbitError(f"--conversion-rate {args.conversion_rate:g}: want more than 0")


def _profiles(
    targets: list[str], overrides: list[str], seconds: float
) -> tuple[list[Profile], list[str]]:
    profiles, problems = [], []
    for target in targets:
        try:
            profiles.append(profile(read_target(target, overrides), target, seconds))
        except LowbitError as error:
            problems.append(f"{target}: {error}")
    return profiles, problems


def _show(rows: list[dict[str, Any]], profiles: list[Profile], args: argparse.Namespace) -> None:
    if args.csv:
        with atomic_write(args.csv) as file:
            write_csv(rows, file)
    if args.json:
        if args.per_module:
            rows = [
                {**row, "modules": [cost.to_mapping() for cost in p.costs]}
                for row, p in zip(rows, profiles, strict=True)
            ]
        print(json.dumps(rows, indent=1))
        return
    if args.per_module:
        for entry in profiles:
            print_table(module_table(entry))
    print_table(profile_table(rows))
    print(
        f"runtime: (FLOPs + QuantOps/K) / FLOPs of {REFERENCE}, K = {args.conversion_rate:g}, an "
        "estimate.\nactivations: most that one operator reads and writes, fp32."
    )


def _paper(reference: Profile, conversion_rate: float) -> int:
    rows = []
    for published in TABLE:
        counted = profile(_paper_model(published), published.name, _PAPER_SECONDS)
        if published.without_final_projection:
            costs = tuple(c for c in counted.costs if c.module != "final_proj")
            counted = replace(counted, costs=costs)
        rows.append((published, profile_row(counted, reference, conversion_rate)))
    print_table(paper_table(rows))
    print(f"{SOURCE}. K = {conversion_rate:g}.")
    for published in TABLE:
        if published.note:
            print(f"{published.name}: {published.note}")
    return 0


def _paper_model(published: PaperRow) -> Hubert:
    return meta_model(model_config(published.precision, [f"model={published.model}"]))
