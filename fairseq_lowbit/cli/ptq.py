"""``fairseq-lowbit ptq``: post-training quantization, that is calibration without training."""

import argparse
import time
from pathlib import Path

from fairseq_lowbit.cli import calibration_options
from fairseq_lowbit.cli.device_option import add_device_argument, read_device
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import SOURCES, open_model, write_model
from fairseq_lowbit.nn import describe_squashing
from fairseq_lowbit.precision.plan_table import plan_table
from fairseq_lowbit.terminal import print_table

HELP = "quantize a checkpoint by calibrating on audio: a model of any precision without training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", type=Path, help=f"what to quantize: {SOURCES}")
    parser.add_argument("--precision", required=True, help="for example bitl_w8a8, absmax_w4a8")
    parser.add_argument("--data", type=Path, required=True, help="folder with the manifest")
    parser.add_argument("--out", type=Path, help="checkpoint to write (default ptq_<precision>.pt)")
    calibration_options.add_arguments(parser)
    add_device_argument(parser)
    parser.add_argument("--split", default="train", help="manifest to calibrate on (train)")


def run(args: argparse.Namespace) -> int:
    out = args.out or Path(f"ptq_{args.precision}.pt")
    _check_out(out, args.teacher)
    device = read_device(args)
    config = calibration_options.read_config(args.precision, args)
    teacher = open_model(args.teacher, device)
    calibration_options.check_criterion(args, teacher, calibration_options.read_precision(config))
    manifest = read_manifest(args.data / f"{args.split}.tsv")
    started = time.monotonic()
    calibrated = calibration_options.quantize(teacher, config, manifest)
    seconds = time.monotonic() - started
    write_model(out, calibrated.model, teacher, args.data)
    print_table(plan_table(calibrated.model.plan))
    if calibrated.clipped:
        print(describe_squashing(calibrated.clipped))
    print(f"calibrated in {seconds:.1f} s on files of {manifest.path}; wrote {out}")
    print("measure it: fairseq-lowbit evaluate TEACHER --data DIR --out DIR --student NAME=FILE")
    return 0


def _check_out(out: Path, teacher: Path) -> None:
    if not out.parent.is_dir():
        raise LowbitError(f"--out: there is no folder {out.parent}")
    if out.is_dir():
        raise LowbitError(f"--out: {out} is a folder; name a file in it")
    if out.exists() and teacher.exists() and out.samefile(teacher):
        raise LowbitError(f"--out: {out} is the teacher itself, which would be lost; name another")
