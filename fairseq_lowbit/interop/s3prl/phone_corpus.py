"""LibriSpeech with phones, for s3prl's task ``ctc``: a part of s3prl that its package lacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import Dataset

from fairseq_lowbit.data.superb import pronounce, read_lexicon, transcripts
from fairseq_lowbit.errors import LowbitError

Item = tuple[Path, list[int]]


class Tokenizer(Protocol):
    """s3prl's: phones with spaces between -> their numbers and that of an end."""

    def encode(self, text: str) -> list[int]: ...


class PhoneCorpus(Dataset):
    """Audio files and the numbers of their phones, those with most phones first.

    Args:
        split: subsets of LibriSpeech.
        bucket_size: if above 1, an item is a batch of as many neighbours.
        path: the folder of the subsets.
        lexicon: files, see :func:`read_lexicon`.
        others: what the task's configuration says besides.

    Raises:
        LowbitError: a word that the lexicon lacks, or no recording at all.
    """

    def __init__(
        self,
        split: Sequence[str],
        tokenizer: Tokenizer,
        bucket_size: int,
        path: str,
        lexicon: Sequence[str],
        **others: Any,
    ) -> None:
        self.bucket_size = bucket_size
        phones = read_lexicon(lexicon)
        items = [
            (recording, tokenizer.encode(" ".join(pronounce(words, phones, recording))))
            for subset in split
            for recording, words in transcripts(Path(path, subset))
        ]
        if not items:
            raise LowbitError(f"{path}: there is no transcript in {', '.join(split)}")
        self.items = sorted(items, key=lambda item: -len(item[1]))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item | list[Item]:
        if self.bucket_size == 1:
            return self.items[index]
        start = max(0, min(index, len(self.items) - self.bucket_size))
        return self.items[start : start + self.bucket_size]
