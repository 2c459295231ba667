"""Entry point of ``fairseq-lowbit``.

A subcommand is a module of this folder with ``HELP``, ``add_arguments(parser)`` and
``run(args) -> int``, and a line in ``COMMANDS``. One with ``PASSES_ON = True`` gets what its parser
does not know as ``args.others``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from fairseq_lowbit import __version__
from fairseq_lowbit.errors import LowbitError

# Name and line of the listing. The line stands here and not in the module, because the listing
# must not wait for torch and fairseq to load.
COMMANDS = (
    ("doctor", "check the installation and say how to fix problems"),
    ("plan", "show which module gets which precision, and what that costs"),
    ("profile", "count storage, operations and memory of models"),
    ("synthesize", "make a small speech corpus without a download"),
    ("librispeech", "check and unpack LibriSpeech and write its manifests"),
    ("prepare", "write fairseq's manifests for a folder of audio"),
    ("labels", "make the k-means labels that HuBERT is trained on"),
    ("import-teacher", "read a model of fairseq or Hugging Face"),
    ("ptq", "quantize a checkpoint by calibration, without training"),
    ("evaluate", "measure a checkpoint"),
    ("probe", "probe what frozen models know, by small heads"),
    ("transcribe", "print what is said in recordings"),
    ("wer", "compare recognizers by word errors"),
    ("ngram", "estimate a language model of words"),
    ("export", "write a model for use elsewhere"),
    ("s3prl", "run s3prl's downstream tasks on a model"),
    ("superb", "run a task of SUPERB on a model"),
    ("superb-table", "results of SUPERB as a table, with published ones"),
    ("sweep-table", "collect runs into one table"),
    ("schedule-figure", "draw training in stages against one step"),
    ("report", "one page from runs, checkpoints and tables"),
)


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, complete for the ``chosen`` subcommand; only its module is imported."""
    parser = argparse.ArgumentParser(
        prog="fairseq-lowbit",
        description="Speech models with 1, 2, 4 and 8-bit weights and activations.",
        epilog="Training itself is fairseq's: fairseq-hydra-train --config-name bitla_w1a1",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="<subcommand>", required=True)
    for name, line in COMMANDS:
        subparser = subparsers.add_parser(name, help=line)
        if name == chosen:
            module = import_module(f"fairseq_lowbit.cli.{name.replace('-', '_')}")
            subparser.description = module.HELP
            module.add_arguments(subparser)
            passes_on = getattr(module, "PASSES_ON", False)
            subparser.set_defaults(run=module.run, passes_on=passes_on)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status (2 for a user's mistake)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    parser = build_parser(chosen)
    args, args.others = parser.parse_known_args(arguments)
    if args.others and not args.passes_on:
        parser.error(f"unrecognized arguments: {' '.join(args.others)}")
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except LowbitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who reads, such as head, has seen enough. Python's last flush would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as rich does


if __name__ == "__main__":
    sys.exit(main())
