"""What SUPERB's tasks read beside a corpus: vocabularies and lengths, made from the corpus."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from string import ascii_uppercase

import soundfile
from tqdm import tqdm

from fairseq_lowbit.data.synthetic.espeak import Engine
from fairseq_lowbit.data.synthetic.speech import VOICES
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write

SUBSETS = ("train-clean-100", "dev-clean", "test-clean")
WORD_END = "|"
Lexicon = dict[str, list[str]]


def write_letters(librispeech: Path, path: Path) -> None:
    """A dictionary of fairseq's form, a letter and its count to a line: of the training part.

    Args:
        librispeech: folder of :data:`SUBSETS`.

    Raises:
        LowbitError: another part has a letter that the training part lacks.
    """
    train, *others = SUBSETS
    counts: Counter[str] = Counter()
    for _, words in transcripts(librispeech / train):
        counts.update(WORD_END.join([*words, ""]))
    for subset in others:
        for recording, words in transcripts(librispeech / subset):
            strange = set("".join(words)) - set(counts)
            if strange:
                raise LowbitError(
                    f"{recording}: its transcript has the character {min(strange)!r}, which is "
                    f"nowhere in {train}"
                )
    with atomic_write(path) as file:
        file.writelines(f"{letter} {count}\n" for letter, count in counts.most_common())


def write_slot_letters(path: Path) -> None:
    """The characters of slot filling, one to a line: space, capital letters, apostrophe."""
    with atomic_write(path) as file:
        file.writelines(f"{letter}\n" for letter in (" ", *ascii_uppercase, "'"))


def write_lengths(librispeech: Path, folder: Path) -> None:
    """``<subset>.csv`` of every file's name from ``librispeech`` and its samples, longest first."""
    folder.mkdir(parents=True, exist_ok=True)
    for subset in SUBSETS:
        files = sorted((librispeech / subset).glob("*/*/*.flac"))
        lengths = {
            path.relative_to(librispeech).as_posix(): soundfile.info(str(path)).frames
            for path in tqdm(files, f"lengths of {subset}", leave=False)
        }
        with atomic_write(folder / f"{subset}.csv") as file:
            writer = csv.writer(file)
            writer.writerow(("file_path", "length"))
            writer.writerows(sorted(lengths.items(), key=lambda entry: -entry[1]))


def read_lexicon(paths: Sequence[str | Path]) -> Lexicon:
    """Word -> phones, a word and its phones to a line; of several entries the first counts.

    Raises:
        LowbitError: a file that cannot be read, or a word without phones.
    """
    lexicon: Lexicon = {}
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LowbitError(f"lexicon {path} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            word, *phones = line.split() or [""]
            if word and not phones:
                raise LowbitError(f"lexicon {path}, line {number}: {word} has no phones")
            lexicon.setdefault(word, phones)
    return lexicon


def write_spoken_lexicon(librispeech: Path, path: Path) -> None:
    """The words of a corpus and the phones by which eSpeak NG says each, for corpora that it spoke.

    Raises:
        LowbitError: without eSpeak NG.
    """
    words = {
        word for subset in SUBSETS for _, said in transcripts(librispeech / subset) for word in said
    }
    with closing(Engine(VOICES["train"][0])) as reader, atomic_write(path) as file:
        for word in sorted(words):
            file.write(f"{word} {' '.join(reader.phones(word.lower()))}\n")


def write_phones(lexicon: Lexicon, librispeech: Path, path: Path) -> None:
    """The phones of a lexicon, one to a line.

    Raises:
        LowbitError: it lacks a word of the corpus.
    """
    for subset in SUBSETS:
        for recording, words in transcripts(librispeech / subset):
            pronounce(words, lexicon, recording)
    phones = sorted({phone for word in lexicon.values() for phone in word})
    with atomic_write(path) as file:
        file.writelines(f"{phone}\n" for phone in phones)


def pronounce(words: Sequence[str], lexicon: Lexicon, recording: Path) -> list[str]:
    """The phones of words.

    Raises:
        LowbitError: the lexicon lacks one; ``recording`` says where.
    """
    unknown = [word for word in words if word not in lexicon]
    if unknown:
        raise LowbitError(f"the lexicon lacks the word {unknown[0]} of {recording}")
    return [phone for word in words for phone in lexicon[word]]


def transcripts(subset: Path) -> Iterator[tuple[Path, list[str]]]:
    """The recordings of one part of LibriSpeech and their words, in capitals.

    Raises:
        LowbitError: a recording without a transcript, a transcript without a recording or words.
    """
    for path in sorted(subset.glob("*/*/*.trans.txt")):
        said: dict[Path, list[str]] = {}
        for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
            name, *words = line.upper().split()
            if not words:
                raise LowbitError(f"{path}: {name} has no words")
            said[path.parent / f"{name}.flac"] = words
        differing = sorted(set(path.parent.glob("*.flac")).symmetric_difference(said))
        if differing:
            missing = "recording" if differing[0] in said else "line"
            raise LowbitError(f"{path}: there is no {missing} for {differing[0].stem}")
        yield from said.items()
