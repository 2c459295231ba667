"""Decoding with an n-gram model of words: its estimation by NLTK, the search by ctc-beam-decoder.

The model travels as an ARPA file, which any other tool may have written.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write

_BEGIN, _END = "<s>", "</s>"
# What stands for a probability of 0, of a word that does not occur and of the begin.
_NEVER = -99.0
# Weights of the model and of each word: the decoder's defaults, not tuned.
_ALPHA, _BETA = 0.5, 1.5


def estimate(texts: Sequence[str], order: int, path: Path) -> None:
    """Writes an n-gram model of words with interpolated Witten-Bell smoothing, as ARPA.

    I. H. Witten and T. C. Bell, "The zero-frequency problem", IEEE Transactions on Information
    Theory, 1991. NLTK estimates Kneser-Ney smoothing too, but counts anew for every probability.

    Args:
        texts: sentences, words with spaces between.
        order: words of the longest n-gram, from 2.

    Raises:
        LowbitError: NLTK is not installed, there is no word, the order is too low, or the file
            cannot be written.
    """
    if order < 2:
        raise LowbitError(f"--order {order}: give a whole number from 2")
    sentences = [[_BEGIN, *text.split(), _END] for text in texts if text.strip()]
    if not sentences:
        raise LowbitError("there is no word to estimate a language model from")
    model = _fitted(sentences, order)
    ngrams = [[(word,) for word in model.vocab if word != model.vocab.unk_label]]
    ngrams += [_seen(model, length) for length in range(2, order + 1)]
    with atomic_write(path) as file:
        file.write(f"\\data\\\nngram 1={len(ngrams[0]) + 1}\n")
        file.writelines(f"ngram {n}={len(seen)}\n" for n, seen in enumerate(ngrams[1:], start=2))
        for length, seen in enumerate(ngrams, start=1):
            file.write(f"\n\\{length}-grams:\n")
            if length == 1:
                file.write(f"{_NEVER}\t<unk>\n")
            file.writelines(_lines(model, seen, length < order))
        file.write("\n\\end\\\n")


def _fitted(sentences: list[list[str]], order: int) -> Any:
    """The model of NLTK; ``<s>`` stands once before a sentence, as in ARPA."""
    lm = _import("nltk.lm")
    model = lm.WittenBellInterpolated(order)
    everygrams = _import("nltk.util").everygrams
    ngrams = (everygrams(sentence, max_len=order) for sentence in sentences)
    model.fit(ngrams, [word for sentence in sentences for word in sentence])
    return model


def _seen(model: Any, length: int) -> list[tuple[str, ...]]:
    counts = model.counts[length]
    return sorted((*context, word) for context, words in counts.items() for word in words)


def _lines(model: Any, ngrams: list[tuple[str, ...]], may_go_on: bool) -> Iterator[str]:
    """Logarithm of the probability, words, and of what may go on the weight of backing off."""
    for ngram in ngrams:
        *context, word = ngram
        probability = model.unmasked_score(word, tuple(context))
        logarithm = _NEVER if ngram == (_BEGIN,) else math.log10(probability)
        line = f"{logarithm:.6f}\t{' '.join(ngram)}"
        if may_go_on and word != _END:
            _, weight = model.estimator.alpha_gamma(word, ngram)
            line += f"\t{math.log10(weight):.6f}"
        yield f"{line}\n"


class NgramDecoder:
    """Beam search for the text that a recognizer and a language model agree on.

    Args:
        path: of an ARPA file.
        units: of the recognizer, letters.

    Raises:
        LowbitError: ctc-beam-decoder is not installed, the file is no ARPA file, or units that are
            not letters.
    """

    def __init__(self, path: Path, units: Sequence[str]) -> None:
        if any(len(unit) > 1 for unit in units):
            raise LowbitError("--lm decodes models whose units are letters, not pieces of words")
        if path.suffix != ".arpa" or not path.is_file():
            raise LowbitError(f"--lm {path}: give an .arpa file, as fairseq-lowbit ngram writes it")
        decoder = _import("ctc_beam_decoder")
        labels = [" " if unit == "|" else unit for unit in units]
        try:
            self._decoder = decoder.build_ctcdecoder(labels, path, alpha=_ALPHA, beta=_BETA)
        except ValueError as error:
            raise LowbitError(f"--lm {path} is not a whole ARPA file: {error}") from error

    def __call__(self, log_probs: Tensor, _units: Sequence[str]) -> str:
        """The best text of one utterance; [frames, units]."""
        return self._decoder.decode(log_probs.to("cpu", torch.float32).numpy())


def _import(name: str) -> ModuleType:
    try:
        return __import__(name, fromlist=["*"])
    except ImportError as error:
        raise LowbitError(
            "language models need NLTK and ctc-beam-decoder: pip install fairseq-lowbit[lm]"
        ) from error
