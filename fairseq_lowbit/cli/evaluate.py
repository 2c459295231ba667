"""``fairseq-lowbit evaluate``: compare a teacher, PTQ and trained students on held-out audio."""

import argparse
import logging
from pathlib import Path

import torch
from omegaconf import DictConfig

from fairseq_lowbit.cli import calibration_options
from fairseq_lowbit.cli.device_option import add_device_argument, read_device
from fairseq_lowbit.cli.names import read_named
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.errors import require_number
from fairseq_lowbit.evaluation.compare import COMPARISON_FILE, compare
from fairseq_lowbit.evaluation.quality import SECONDS, Candidate, read_held_out
from fairseq_lowbit.interop import SOURCES, open_model
from fairseq_lowbit.models import LoadedModel
from fairseq_lowbit.report.overview.comparison_figure import draw_comparison
from fairseq_lowbit.runs.tables import comparison_table
from fairseq_lowbit.terminal import print_table

HELP = "compare models with their teacher on held-out audio: table, figure, JSON"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", type=Path, help=f"the float teacher: {SOURCES}")
    parser.add_argument("--data", type=Path, required=True, help="folder with test.tsv")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="audio to measure on (default %(default)g)"
    )
    parser.add_argument(
        "--ptq",
        action="append",
        default=[],
        metavar="PRECISION",
        help="a row of calibration without training, calibrated on the training files",
    )
    parser.add_argument(
        "--student",
        action="append",
        default=[],
        metavar="NAME=CHECKPOINT",
        help="a row of a checkpoint, trained or written by fairseq-lowbit ptq",
    )
    calibration_options.add_arguments(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = read_device(args)
    require_number("--seconds", args.seconds, 0, excluded=True)
    students = [read_named(text, "CHECKPOINT") for text in args.student]
    calibration_options.check_needed(args, args.ptq)
    configs = [calibration_options.read_config(name, args) for name in args.ptq]
    precisions = [calibration_options.read_precision(config) for config in configs]
    teacher = open_model(args.teacher, device)
    for precision in precisions:
        calibration_options.check_criterion(args, teacher, precision)
    held_out = read_held_out(args.data, teacher, args.seconds)
    candidates = [_calibrated(teacher, config, args.data) for config in configs]
    candidates += [Candidate.of(open_model(path, device), name) for name, path in students]
    with torch.inference_mode():
        comparison = compare(teacher, candidates, held_out, _announce)
    comparison.write(args.out)
    figure = args.out / "comparison.png"
    draw_comparison(comparison, figure)
    print_table(comparison_table(comparison))
    for finding in comparison.findings():
        print(finding)
    print(f"figure {figure}, numbers {args.out / COMPARISON_FILE}")
    return 0


def _announce(name: str) -> None:
    print(f"measuring {name} ...", flush=True)


def _calibrated(teacher: LoadedModel, config: DictConfig, data: Path) -> Candidate:
    manifest = read_manifest(data / "train.tsv")
    model = calibration_options.quantize(teacher, config, manifest).model
    return Candidate(f"PTQ {model.plan.precision.name}", model, is_calibrated_only=True)
