"""``fairseq-lowbit profile --measure``: runs the models and adds time and memory to each row."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from fairseq_lowbit.cli.profile_targets import Target
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.machine import this_machine, usable_cores
from fairseq_lowbit.profiling.tables import ProfileRow
from fairseq_lowbit.profiling.timing import (
    FAKE_QUANTIZATION,
    TimedModel,
    TimingRecord,
    conditions,
    runnable,
    time_models,
    timings,
)

_SECONDS = (2.0, 5.0, 15.0, 30.0)
_REPEATS = 5
# Counted for each length that is measured, under the names of a row.
_ESTIMATES = ("flops", "quantops", "runtime", "peak_activation_bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also run the models, on this machine's processor, with one thread and with one per "
        "core: time, real-time factor, peak memory",
    )
    parser.add_argument(
        "--measure-seconds",
        nargs="+",
        type=float,
        metavar="S",
        help=f"audio to run ({' '.join(f'{seconds:g}' for seconds in _SECONDS)})",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help=f"timed runs of each ({_REPEATS})")


def lengths(args: argparse.Namespace) -> tuple[float, ...]:
    """Seconds of audio to measure, none without ``--measure``.

    Raises:
        LowbitError: lengths or repeats that make no sense.
    """
    if not args.measure:
        if args.measure_seconds is not None or args.repeats is not None:
            raise LowbitError("--measure-seconds and --repeats belong to --measure: give it too")
        return ()
    if args.repeats is not None and args.repeats < 1:
        raise LowbitError(f"--repeats {args.repeats}: want 1 or more")
    return tuple(args.measure_seconds or _SECONDS)


@dataclass(frozen=True)
class Outcome:
    """What was measured of the targets, and whether it was interrupted."""

    record: TimingRecord
    problems: tuple[str, ...]
    is_interrupted: bool


def run_targets(targets: Mapping[str, Target], args: argparse.Namespace) -> Outcome:
    """Measures every target under its name, with progress on stderr."""
    models = [
        TimedModel(name, lambda target=target: runnable(target.load()))
        for name, target in targets.items()
    ]
    grid = conditions(lengths(args), (1, usable_cores()))
    record, is_interrupted = TimingRecord(), False
    try:
        time_models(models, grid, args.repeats or _REPEATS, record, _announce)
    except KeyboardInterrupt:
        is_interrupted = True
    problems = tuple(f"{name}: {reason}" for name, reason in record.failures.items())
    return Outcome(record, problems, is_interrupted)


def _announce(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def add_measurements(
    row: ProfileRow,
    target: Target,
    estimates: Mapping[float, ProfileRow],
    record: TimingRecord,
    reference: str,
) -> None:
    """Adds what was measured to a row of the profile.

    Args:
        estimates: rows of the same model by seconds of audio.
        reference: name of what measured runtimes are relative to.
    """
    row["weights"] = "checkpoint" if target.has_weights else "random"
    row["arithmetic"] = record.arithmetic.get(row["name"])
    row["libraries_resident_bytes"] = record.libraries
    row["machine"] = {**asdict(this_machine()), "torch": torch.__version__}
    row["measured"] = [
        {
            **found.to_mapping(),
            **{key: estimates[found.condition.seconds][key] for key in _ESTIMATES},
        }
        for found in timings(record, row["name"], reference)
    ]


def notes(rows: Sequence[ProfileRow], reference: str) -> list[str]:
    """Explanations below the measured table."""
    first = rows[0]
    machine = this_machine()
    lines = [
        f"machine: {machine}; torch {first['machine']['torch']}, batch 1.",
        "time: median (smallest, largest) of the runs; the models took turns. real-time factor: "
        "time / length of the audio.",
        f"measured runtime: time / time of {reference} in the same turn, median; that model runs "
        "even when it is not named. estimated: as above, for this audio.",
        f"peak memory: {_memory_note(first['libraries_resident_bytes'])}",
    ]
    fake = [row["name"] for row in rows if row["arithmetic"] == FAKE_QUANTIZATION]
    if fake:
        lines.append(
            f"{', '.join(fake)}: run as {FAKE_QUANTIZATION}, which is all the work of a float "
            "model of that shape and the quantizers' besides, so slower. The estimate is for "
            "arithmetic on packed integers, which is not built yet."
        )
    drawn = [row["name"] for row in rows if row["weights"] == "random"]
    if drawn:
        lines.append(
            f"{', '.join(drawn)}: no checkpoints, so with random weights and scales, on whose "
            "values the time does not depend."
        )
    return lines


def _memory_note(libraries: int | None) -> str:
    if libraries is None:
        return "not known on this system."
    return (
        "most resident memory of the process while it runs this model and holds no other; "
        f"{libraries / 1e6:.0f} MB are the interpreter and its libraries."
    )
