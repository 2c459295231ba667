"""``fairseq-lowbit ngram``: a language model of words, for ``fairseq-lowbit wer --lm``."""

import argparse
from pathlib import Path

from fairseq_lowbit.data.transcripts import read_lines
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.ngram import estimate
from fairseq_lowbit.files import check_writable

HELP = "estimate an n-gram model of words from sentences, as an ARPA file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", type=Path, help="sentences, one a line: train.wrd, or any others")
    parser.add_argument("out", type=Path, help="ARPA file to write")
    parser.add_argument(
        "--order", type=int, default=3, help="words of the longest n-gram (default %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if not args.text.is_file():
        raise LowbitError(f"there is no text {args.text}: it needs one sentence a line")
    if args.out.suffix != ".arpa":
        raise LowbitError(f"{args.out}: name the file .arpa, as fairseq-lowbit wer --lm wants it")
    check_writable(args.out)
    sentences = read_lines(args.text)
    estimate(sentences, args.order, args.out)
    print(f"wrote {args.out}, of {sum(bool(line.strip()) for line in sentences)} sentences")
    return 0
