"""The units that a recognizer of speech writes: letters, or the pieces of a sentencepiece model.

Unit 0 is the blank of CTC and stands for the empty string.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Protocol

import sentencepiece

from fairseq_lowbit.errors import LowbitError

LETTERS = "letters"
BLANK = 0
# What stands for the space between words: among letters as in fairseq, and in sentencepiece.
_LETTER_SPACE, _PIECE_SPACE = "|", "▁"


class UnknownCharacter(LowbitError):
    """A character that no unit can write.

    Attributes:
        character: the first one.
    """

    def __init__(self, character: str) -> None:
        super().__init__(f"the character {character!r} is not in the vocabulary")
        self.character = character


class Units(Protocol):
    """Text as units.

    Attributes:
        vocabulary: what every unit writes, the blank first as an empty string.
    """

    vocabulary: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """The units of a text with single spaces between words; raises UnknownCharacter."""


@dataclass(frozen=True)
class Letters:
    """One unit for each character, and ``|`` for the space between words."""

    vocabulary: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Letters":
        """All characters of ``texts``, in the order of their code points.

        Raises:
            LowbitError: the separator itself is among them.
        """
        characters = set().union(*texts)
        if _LETTER_SPACE in characters:
            raise LowbitError(
                f"the transcripts hold {_LETTER_SPACE!r}, which stands for the space between words "
                "when units are letters: take it out of them"
            )
        return cls(("", _LETTER_SPACE, *sorted(characters - {" "})))

    @cached_property
    def _ids(self) -> dict[str, int]:
        ids = {unit: index for index, unit in enumerate(self.vocabulary)}
        return {**ids, " ": ids[_LETTER_SPACE]}

    def encode(self, text: str) -> list[int]:
        """As in :class:`Units`."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as missing:
            raise UnknownCharacter(missing.args[0]) from None


class Pieces:
    """The pieces of a sentencepiece model, without those that write nothing.

    Args:
        path: of the model, as ``sentencepiece`` trains it.

    Raises:
        LowbitError: ``path`` is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise LowbitError(
                f"task.units: there is no sentencepiece model {path}; want {LETTERS}, or the path "
                "of one"
            )
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise LowbitError(f"task.units: {path} is no sentencepiece model") from error
        model = self._model
        written = [
            number
            for number in range(len(model))
            if not (model.IsControl(number) or model.IsUnknown(number) or model.IsUnused(number))
        ]
        self._ids = {number: unit for unit, number in enumerate(written, start=1)}
        self.vocabulary = ("", *map(model.IdToPiece, written))

    def encode(self, text: str) -> list[int]:
        """As in :class:`Units`."""
        try:
            return [self._ids[number] for number in self._model.EncodeAsIds(text)]
        except KeyError:
            unknown = self._model.unk_id()
            alone = (c for c in text if unknown in self._model.EncodeAsIds(c))
            raise UnknownCharacter(next(alone, text)) from None


def read_units(units: str, texts: Iterable[str]) -> Units:
    """What ``task.units`` names.

    Args:
        units: ``letters``, or the path of a sentencepiece model.
        texts: of training, whose characters are the letters.

    Raises:
        LowbitError: there is no such model, or it is another kind of file.
    """
    return Letters.of(texts) if units == LETTERS else Pieces(units)


def encode_lines(units: Units, texts: Sequence[str], path: Path) -> list[list[int]]:
    """The units of every transcript.

    Args:
        path: of the transcripts, for messages.

    Raises:
        LowbitError: a character outside the vocabulary, with its line.
    """
    encoded = []
    for number, text in enumerate(texts, start=1):
        try:
            encoded.append(units.encode(text))
        except UnknownCharacter as error:
            raise LowbitError(
                f"{path}:{number}: the character {error.character!r} is not in the vocabulary, "
                "which comes from the training transcripts or from task.units: write these alike, "
                "for example in upper case without punctuation"
            ) from error
    return encoded


def fewest_frames(ids: Sequence[int]) -> int:
    """Frames that CTC needs for a sequence: one for each unit, and a blank between equal ones."""
    return len(ids) + sum(first == second for first, second in pairwise(ids))


def collapsed(best: Iterable[int]) -> list[int]:
    """The units that frames stand for in CTC: repetitions are one unit, and blanks none."""
    return [unit for unit, _ in groupby(best) if unit != BLANK]


def decode(ids: Iterable[int], vocabulary: Sequence[str]) -> str:
    """The text of units, with single spaces between words."""
    is_pieces = any(unit.startswith(_PIECE_SPACE) for unit in vocabulary)
    space = _PIECE_SPACE if is_pieces else _LETTER_SPACE
    written = "".join(vocabulary[unit] for unit in ids)
    return " ".join(written.replace(space, " ").split())
