"""LibriSpeech with phones, for s3prl's task ``ctc``: a part of s3prl that its package lacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import Dataset

from fairseq_lowbit.errors import LowbitError


class Tokenizer(Protocol):
    """s3prl's: phones with spaces between -> their numbers, with an end."""

    def encode(self, text: str) -> list[int]: ...


Item = tuple[Path, list[int]]


class PhoneCorpus(Dataset):
    """Audio files and the numbers of their phones, in the order of falling numbers of phones.

    Args:
        split: subsets of LibriSpeech.
        bucket_size: if above 1, an item is a batch of as many neighbours.
        path: the folder of the subsets.
        lexicon: files of a word and its phones to a line; of several entries the first counts.
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
        phones = _read_lexicon(lexicon)
        items = [
            (folder / f"{name}.flac", tokenizer.encode(_spoken(words, phones, name)))
            for subset in split
            for folder, name, words in _utterances(Path(path, subset))
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


def _read_lexicon(paths: Sequence[str]) -> dict[str, list[str]]:
    phones: dict[str, list[str]] = {}
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if line.strip():
                word, *spoken = line.split()
                phones.setdefault(word, spoken)
    return phones


def _utterances(subset: Path) -> list[tuple[Path, str, list[str]]]:
    """Folder, name and words of each."""
    found = []
    for path in sorted(subset.glob("*/*/*.trans.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, *words = line.upper().split()
            found.append((path.parent, name, words))
    return found


def _spoken(words: Sequence[str], phones: dict[str, list[str]], name: str) -> str:
    missing = [word for word in words if word not in phones]
    if missing:
        raise LowbitError(f"the lexicon lacks the word {missing[0]} of {name}")
    return " ".join(phone for word in words for phone in phones[word])
