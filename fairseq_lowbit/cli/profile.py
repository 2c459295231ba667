"""``fairseq-lowbit profile``: what models cost, counted; with ``--measure`` also when they run."""

import argparse
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fairseq_lowbit.cli import profile_timing
from fairseq_lowbit.cli.profile_targets import Target
from fairseq_lowbit.configurations import meta_model, model_config
from fairseq_lowbit.errors import LowbitError, describe, require_number
from fairseq_lowbit.interop import SOURCES
from fairseq_lowbit.precision.rules import with_form
from fairseq_lowbit.profiling import Profile, profile
from fairseq_lowbit.profiling.cost import CONVERSION_RATE
from fairseq_lowbit.profiling.paper import REASONS, SOURCE, TABLE
from fairseq_lowbit.profiling.tables import (
    ProfileRow,
    measured_table,
    module_rows,
    module_table,
    paper_rows,
    paper_table,
    profile_row,
    profile_table,
)
from fairseq_lowbit.terminal import print_table

logger = logging.getLogger(__name__)

HELP = (
    "count storage, FLOPs, QuantOps and memory of configurations and checkpoints; with --measure "
    "also run them"
)
# What estimated and measured runtimes are relative to.
REFERENCE = "hubert_fastconv"
_PAPER_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit status: 0; 1 if a target could not be read or run, the others are still shown; 130 "
        "if --measure was interrupted, what it measured until then is shown."
    )
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help="a configuration (bitla_w1a1), any precision (bitla_w3a5), a float model of a shape "
        f"(hubert_base, distilhubert), or {SOURCES}; a file called like one of them is ./NAME",
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
    profile_timing.add_arguments(parser)


@dataclass(frozen=True)
class _Counted:
    """A target with its counts by seconds of audio."""

    name: str
    target: Target
    profiles: dict[float, Profile]


def run(args: argparse.Namespace) -> int:
    _check(args)
    lengths = {args.seconds, *profile_timing.lengths(args)}
    reference = _count(Target(REFERENCE), lengths)
    if args.paper:
        return _paper(reference.profiles[_PAPER_SECONDS], args)
    counted, problems = _count_all(args, lengths)
    rows, is_interrupted = [], False
    if args.measure and counted:
        counted = _with_reference(counted, reference)
        rows, outcome = _measured_rows(counted, reference, args)
        problems += outcome.problems
        is_interrupted = outcome.is_interrupted
    else:
        rows = [_row(entry, reference, args.seconds, args) for entry in counted]
    if rows:
        _show(rows, [entry.profiles[args.seconds] for entry in counted], reference, args)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if is_interrupted:
        print("interrupted: shown is what had been measured until then", file=sys.stderr)
        return 130
    return int(bool(problems))


def _check(args: argparse.Namespace) -> None:
    if args.paper and args.measure:
        raise LowbitError(
            f"--paper counts only: name what to measure, profile {REFERENCE} bitla_w1a1 --measure"
        )
    if args.paper and (
        args.targets or args.set or args.per_module or args.seconds != _PAPER_SECONDS
    ):
        raise LowbitError(
            "--paper has its own models and 10 s: leave targets, --set, --seconds and --per-module"
        )
    if not args.paper and not args.targets:
        raise LowbitError("name a configuration, a precision or a checkpoint, or give --paper")
    require_number("--seconds", args.seconds, 0, excluded=True)
    require_number("--conversion-rate", args.conversion_rate, 0, excluded=True)
    for seconds in profile_timing.lengths(args):
        require_number("--measure-seconds", seconds, 0, excluded=True)


def _count_all(
    args: argparse.Namespace, lengths: Iterable[float]
) -> tuple[list[_Counted], list[str]]:
    """The targets that could be counted, and what is wrong with the others."""
    # Measuring a model twice would show nothing new.
    sources = dict.fromkeys(args.targets) if args.measure else args.targets
    counted, problems = [], []
    for source in sources:
        target = Target(source, tuple(args.set))
        try:
            counted.append(_count(target, lengths))
        except Exception as error:  # one broken checkpoint must not hide the others
            logger.debug("cannot count %s", source, exc_info=True)
            problems.append(f"{source}: {describe(error)}")
    return counted, problems


def _count(target: Target, lengths: Iterable[float]) -> _Counted:
    model, name = target.read(), target.name
    if target.has_weights:  # of a configuration the name has it, if it was asked for
        name = with_form(name, model.plan.form)
    return _Counted(name, target, {seconds: profile(model, name, seconds) for seconds in lengths})


def _row(
    entry: _Counted, reference: _Counted, seconds: float, args: argparse.Namespace
) -> ProfileRow:
    return profile_row(entry.profiles[seconds], reference.profiles[seconds], args.conversion_rate)


def _with_reference(counted: list[_Counted], reference: _Counted) -> list[_Counted]:
    """Measured runtimes are relative to the reference, so it runs even when it was not named."""
    if any(entry.target == reference.target for entry in counted):
        return counted
    name = f"{REFERENCE} (reference)"
    profiles = {s: replace(counts, name=name) for s, counts in reference.profiles.items()}
    return [_Counted(name, reference.target, profiles), *counted]


def _measured_rows(
    counted: list[_Counted], reference: _Counted, args: argparse.Namespace
) -> tuple[list[ProfileRow], profile_timing.Outcome]:
    # Estimates come first, so that an error in them is reported before time is spent.
    rows = [_row(entry, reference, args.seconds, args) for entry in counted]
    estimates = [
        {s: _row(entry, reference, s, args) for s in profile_timing.lengths(args)}
        for entry in counted
    ]
    outcome = profile_timing.run_targets({entry.name: entry.target for entry in counted}, args)
    (reference_name,) = (e.name for e in counted if e.target == reference.target)
    for entry, row, own in zip(counted, rows, estimates, strict=True):
        profile_timing.add_measurements(row, entry.target, own, outcome.record, reference_name)
    return rows, outcome


def _show(
    rows: list[ProfileRow],
    profiles: list[Profile],
    reference: _Counted,
    args: argparse.Namespace,
) -> None:
    modules: list[list[ProfileRow]] = []
    if args.per_module:
        measure = reference.profiles[args.seconds], args.conversion_rate
        modules = [module_rows(entry, *measure) for entry in profiles]
    if args.json and modules:
        pairs = zip(rows, modules, strict=True)
        print(json.dumps([{**row, "modules": own} for row, own in pairs], indent=1))
    elif args.json:
        print(json.dumps(rows, indent=1))
    else:
        for row, own in zip(rows, modules, strict=False):
            print_table(module_table(row, own))
        _print_tables(rows, args)


def _print_tables(rows: list[ProfileRow], args: argparse.Namespace) -> None:
    print_table(profile_table(rows))
    print(
        f"runtime: (FLOPs + QuantOps/K) / FLOPs of {REFERENCE}, K = {args.conversion_rate:g}, an "
        "estimate.\nactivations: most that one operator (softmax, norms and GELU too) reads and "
        "writes, fp32."
    )
    if args.measure and any(row["measured"] for row in rows):
        print_table(measured_table(rows))
        print("\n".join(profile_timing.notes(rows, REFERENCE)))


def _paper(reference: Profile, args: argparse.Namespace) -> int:
    cells: list[ProfileRow] = []
    for published in TABLE:
        model = meta_model(
            model_config(published.precision, [f"model={published.model}", "form=paper"])
        )
        counted = profile(model, published.name, _PAPER_SECONDS)
        if published.without_final_projection:
            costs = tuple(c for c in counted.costs if c.module != "final_proj")
            counted = replace(counted, costs=costs)
        cells += paper_rows(published, profile_row(counted, reference, args.conversion_rate))
    if args.json:
        print(json.dumps(cells, indent=1))
        return 0
    print_table(paper_table(cells))
    print(f"{SOURCE}. K = {args.conversion_rate:g}.")
    print("WER is measured, not counted: this code has not been run at that scale.")
    print("\n".join(REASONS))
    return 0
