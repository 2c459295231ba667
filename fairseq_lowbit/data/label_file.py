"""Frame labels in fairseq's format: ``<split>.<ext>`` lines of symbols and ``dict.<ext>.txt``."""

import hashlib
from pathlib import Path

import numpy as np

from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.errors import LowbitError

# fairseq's Dictionary puts <s>, <pad>, </s> and <unk> first; its checkpoints count them as classes.
SPECIAL_SYMBOLS = 4
# Seconds by which the labels of a recording may be shorter or longer than its audio.
_TOLERANCE = 0.1


class LabelFile:
    """Random access to the labels of each manifest line, read from disk when asked for.

    Args:
        path: one line of space-separated symbols per manifest line.
        dictionary: lines of ``symbol count``.

    Attributes:
        classes: number of classes, fairseq's four special symbols included.
        counts: labels of each line, int [lines].

    Raises:
        LowbitError: a missing or empty file.
    """

    def __init__(self, path: str | Path, dictionary: str | Path) -> None:
        self.path = Path(path)
        self._index = read_dictionary(dictionary)
        if not self.path.is_file():
            raise LowbitError(f"label file {self.path} does not exist; {_HOW}")
        with open(self.path, "rb") as file:
            lines = [(len(line), _count_labels(line)) for line in file]
        if not lines:
            raise LowbitError(f"label file {self.path} is empty; {_HOW}")
        lengths, counts = zip(*lines, strict=True)
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.counts = np.array(counts)

    @property
    def classes(self) -> int:
        return count_classes(self._index)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def digest(self) -> str:
        """Equal for the same labels with the same dictionary."""
        with open(self.path, "rb") as file:
            labels = hashlib.file_digest(file, "sha256")
        labels.update(repr(self._index).encode())
        return labels.hexdigest()

    def __getitem__(self, line: int) -> np.ndarray:
        """Class numbers of one line, int64 [labels]."""
        start, end = self._offsets[line], self._offsets[line + 1]
        with open(self.path, "rb") as file:
            file.seek(start)
            symbols = file.read(end - start).decode().split()
        try:
            return np.array([self._index[symbol] for symbol in symbols], dtype=np.int64)
        except KeyError as error:
            raise LowbitError(
                f"{self.path} line {line + 1}: label {error} is not in the dictionary"
            ) from error


def _count_labels(line: bytes) -> int:
    # Counting spaces is many times as fast as splitting, which counts for hundreds of hours.
    line = line.strip()
    return line.count(b" ") + 1 if line else 0


def check_labels(
    labels: LabelFile, manifest: Manifest, label_rate: float, sample_rate: int
) -> None:
    """Refuses labels of other files or of another rate, which would train without a word.

    An empty line stands for a file that could not be labelled.

    Args:
        label_rate: labels per second.
        sample_rate: samples per second.

    Raises:
        LowbitError: not as many lines as files, or a line that is not as long as its audio, with
            the first such line.
    """
    if len(labels) != len(manifest):
        raise LowbitError(
            f"{labels.path} has {len(labels)} lines and {manifest.path} has "
            f"{len(manifest)} files; make the labels again"
        )
    seconds = manifest.sizes / sample_rate
    wrong = _wrong_lines(labels.counts, seconds, label_rate)
    if not wrong.any():
        return
    line = int(wrong.argmax())
    # A rate shows best in the longest recording: labels are missing at its ends only.
    longest = int(np.where(labels.counts > 0, seconds, 0).argmax())
    rate = max(1, round(labels.counts[longest] / seconds[longest]))
    is_other_rate = not _wrong_lines(labels.counts, seconds, rate).any()
    remedy = f"set task.label_rate to {rate}, or " if is_other_rate else ""
    raise LowbitError(
        f"{labels.path} line {line + 1} has {labels.counts[line]} labels for {seconds[line]:.2f} s "
        f"of audio ({manifest.names[line]}), not {label_rate:g} a second: {remedy}make the labels "
        f"of {manifest.path} again"
    )


def _wrong_lines(counts: np.ndarray, seconds: np.ndarray, rate: float) -> np.ndarray:
    return (counts > 0) & (abs(counts / rate - seconds) > _TOLERANCE)


def count_classes(dictionary: dict[str, int]) -> int:
    """Classes of a masked-prediction head, fairseq's special symbols included."""
    return SPECIAL_SYMBOLS + len(dictionary)


def read_dictionary(path: str | Path) -> dict[str, int]:
    """Symbol -> class number, as fairseq numbers them.

    Raises:
        LowbitError: a missing or empty dictionary (HuBERT pre-training would fail silently).
    """
    path = Path(path)
    if not path.is_file():
        raise LowbitError(f"label dictionary {path} does not exist; {_HOW}")
    symbols = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not symbols:
        raise LowbitError(f"label dictionary {path} is empty; {_HOW}")
    return {symbol: SPECIAL_SYMBOLS + index for index, symbol in enumerate(symbols)}


_HOW = "`fairseq-lowbit labels` makes MFCC k-means labels"
