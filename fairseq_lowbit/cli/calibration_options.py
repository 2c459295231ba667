"""The options of calibration without training, of ``ptq`` and ``evaluate --ptq``."""

import argparse
from collections.abc import Sequence

from fairseq_lowbit.configurations import model_config, rules_overrides
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import LoadedModel, WithoutWeights
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.precision.grammar import LEARNED_SCALE
from fairseq_lowbit.quantization import Criterion
from fairseq_lowbit.quantization.calibration import CRITERIA

_DEFAULT = Criterion()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        choices=CRITERIA,
        help="what a learned scale fits: mse (default), the least squared error, which suits every "
        "width; absmax, nothing clipped, or percentile, little clipped, for many levels (8 bits): "
        "at w2a2 percentile 99.9 is the worst of the three",
    )
    parser.add_argument(
        "--percentile",
        type=float,
        metavar="P",
        help="percentage of the magnitudes that --calibration percentile does not clip "
        f"({_DEFAULT.percentile:g})",
    )
    parser.add_argument(
        "--rules",
        metavar="NAME|LIST",
        help="a file of config/rules, as per_channel, or a list as in model.precision.rules: "
        "[{match: ...}]",
    )


def check_needed(args: argparse.Namespace, rows: Sequence[str]) -> None:
    """Raises LowbitError for options of calibration where nothing is calibrated."""
    for name in ("calibration", "percentile", "rules"):
        if not rows and getattr(args, name) is not None:
            raise LowbitError(f"--{name} belongs to --ptq: give a precision to calibrate too")


def read_precision(name: str, args: argparse.Namespace) -> Precision:
    """The precision of a name and of ``--rules``.

    Raises:
        LowbitError: an unknown name, rule or file of rules.
    """
    return model_config(name, rules_overrides(args.rules or "none")).precision


def read_criterion(
    args: argparse.Namespace, teacher: LoadedModel, precision: Precision
) -> Criterion:
    """What ``--calibration`` and ``--percentile`` ask for.

    Raises:
        LowbitError: an option without effect in this combination; a precision that does not fit
            ``teacher``.
    """
    if args.percentile is not None and args.calibration != "percentile":
        raise LowbitError("--percentile belongs to --calibration percentile: give it too")
    if args.calibration is not None:
        with WithoutWeights():
            plan = teacher.model.untrained(precision).plan
        if not any(entry.method in LEARNED_SCALE for entry in plan.entries):
            raise LowbitError(
                f"--calibration {args.calibration}: no scale of {precision.name} is learned, so "
                "none is fitted: drop it"
            )
    percentile = _DEFAULT.percentile if args.percentile is None else args.percentile
    return Criterion(args.calibration or _DEFAULT.name, percentile)
