"""``fairseq-lowbit export``: a model in a format for use elsewhere."""

import argparse
from pathlib import Path

from fairseq_lowbit.interop import SOURCES, open_model
from fairseq_lowbit.interop.exporting import FORMATS

HELP = "write a model for use elsewhere, whole or not at all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = "; ".join(f"{name}: {form.what}" for name, form in FORMATS.items())
    parser.add_argument("checkpoint", help=SOURCES)
    parser.add_argument("--to", choices=FORMATS, required=True, help=formats)
    parser.add_argument("out", type=Path, help="file to write, of hf a folder")


def run(args: argparse.Namespace) -> int:
    FORMATS[args.to].export(open_model(args.checkpoint), args.out)
    print(f"wrote {args.out}")
    return 0
