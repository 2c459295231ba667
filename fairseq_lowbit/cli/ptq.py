"""``fairseq-lowbit ptq``: post-training quantization, that is calibration without training."""

import argparse
import time
from pathlib import Path

from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.ptq import post_training_quantized
from fairseq_lowbit.evaluation.tables import plan_table, print_table
from fairseq_lowbit.models import load_model, write_model
from fairseq_lowbit.nn import describe_squashing
from fairseq_lowbit.plugin.configs import model_config
from fairseq_lowbit.quantization import Criterion
from fairseq_lowbit.quantization.calibration import CRITERIA

HELP = "quantize a checkpoint by calibrating on audio: a model of any precision without training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", type=Path, help="checkpoint to quantize")
    parser.add_argument("--precision", required=True, help="for example bitl_w8a8, absmax_w4a8")
    parser.add_argument("--data", type=Path, required=True, help="folder with the manifest")
    parser.add_argument("--out", type=Path, help="checkpoint to write (default ptq_<precision>.pt)")
    parser.add_argument("--split", default="train", help="manifest to calibrate on (train)")
    parser.add_argument(
        "--calibration", choices=CRITERIA, default="mse", help="what a scale fits (mse)"
    )
    parser.add_argument(
        "--percentile",
        type=float,
        default=99.9,
        help="of the magnitudes, that --calibration percentile does not clip (99.9)",
    )
    parser.add_argument(
        "--rules", default="[]", metavar="LIST", help="as in model.precision.rules: [{match: ...}]"
    )


def run(args: argparse.Namespace) -> int:
    precision = model_config(args.precision, [f"model.precision.rules={args.rules}"]).precision
    criterion = Criterion(args.calibration, args.percentile)
    out = args.out or Path(f"ptq_{args.precision}.pt")
    if not out.parent.is_dir():
        raise LowbitError(f"--out: there is no folder {out.parent}")
    teacher = load_model(args.teacher)
    manifest = read_manifest(args.data / f"{args.split}.tsv")
    started = time.monotonic()
    calibrated = post_training_quantized(teacher, precision, manifest, criterion)
    seconds = time.monotonic() - started
    write_model(out, calibrated.model, teacher)
    print_table(plan_table(calibrated.model.plan))
    if calibrated.clipped:
        print(describe_squashing(calibrated.clipped))
    print(f"calibrated in {seconds:.1f} s on files of {manifest.path}; wrote {out}")
    print("measure it: fairseq-lowbit evaluate TEACHER --data DIR --out DIR --student NAME=FILE")
    return 0
