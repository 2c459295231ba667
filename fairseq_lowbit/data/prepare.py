"""From a folder of recordings of any kind to a corpus that fairseq can train on."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path, PurePath

import numpy as np
import soundfile
from tqdm import tqdm

from fairseq_lowbit.data.audio import SAMPLE_RATE, UnusableAudio, audio_info, convert_audio
from fairseq_lowbit.data.manifest import write_manifest
from fairseq_lowbit.data.progress import tqdm_options
from fairseq_lowbit.data.transcripts import read_lines, set_aside, write_transcripts
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write

MIN_SECONDS, MAX_SECONDS = 0.5, 30.0
# With this many folders they are taken for speakers (or books, or sessions) and kept whole.
_LEAST_FOLDERS = 10
_SPLITS = ("test", "valid", "train")
# Names of formats serve as extensions; raw files have no header to read them by.
_EXTENSIONS = {name.lower() for name in soundfile.available_formats()} - {"raw"}
_EXTENSIONS |= {"aif", "oga", "opus", "sph"}


@dataclass
class PrepareSummary:
    """What `prepare_directory` did; `minutes` and `files` are keyed by split."""

    out: Path
    minutes: dict[str, float] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    converted: int = 0  # source files
    reused: int = 0  # source files that an earlier run had finished
    skipped: list[tuple[str, str]] = field(default_factory=list)  # source file, reason
    grouped_by_folder: bool = False  # whether whole folders were held out, or single files


@dataclass(frozen=True)
class _Result:
    """One source file (relative) and the (name under out, samples) of what was made of it."""

    source: PurePath
    pieces: list[tuple[str, int]]
    reused: bool = False
    problem: str = ""

    @property
    def samples(self) -> int:
        return sum(samples for _, samples in self.pieces)


def prepare_directory(
    source: str | Path,
    out: str | Path,
    *,
    valid_fraction: float = 0.05,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> PrepareSummary:
    """Converts the audio under `source` to 16 kHz mono FLAC in `out/audio` and splits it.

    Files longer than 30 s are cut into equal pieces; shorter than half a second or unusable ones
    are listed in `out/skipped.txt`. Train, valid and test share no source file and,
    where there are ten folders or more, no folder. A second run converts only what is missing.
    Where a text file with what is said lies beside recordings, `talk.txt` beside `talk.wav`, the
    words are written as `<split>.wrd`; pieces of a file that was cut have none.

    Raises LowbitError when nothing usable is found, or too little for three splits.
    """
    source, out = Path(source), Path(out)
    _check_options(source, valid_fraction, test_fraction)
    found = _sources(source, out)
    out.mkdir(parents=True, exist_ok=True)
    results = _convert_all(found, lambda path: _convert(source, path, out))
    skipped = [(str(r.source), r.problem) for r in results if r.problem]
    with atomic_write(out / "skipped.txt") as file:
        file.writelines(f"{name}\t{reason}\n" for name, reason in skipped)
    usable = [result for result in results if result.pieces]
    if not usable:
        raise LowbitError(f"no usable audio in {source}; the first: {': '.join(skipped[0])}")

    reused = sum(result.reused for result in usable)
    summary = PrepareSummary(out, converted=len(usable) - reused, reused=reused, skipped=skipped)
    groups, summary.grouped_by_folder = _group(usable)
    fractions = {"test": test_fraction, "valid": valid_fraction, "train": 1.0}
    for split, members in _split_groups(groups, fractions, seed).items():
        pieces = sorted(piece for member in members for piece in member.pieces)
        write_manifest(out / f"{split}.tsv", out, pieces)
        texts = _texts(source, members)
        if texts:
            write_transcripts(out / f"{split}.tsv", [name for name, _ in pieces], texts)
        else:
            set_aside(out / f"{split}.tsv")
        summary.files[split] = len(pieces)
        summary.minutes[split] = sum(samples for _, samples in pieces) / SAMPLE_RATE / 60
    return summary


def _check_options(source: Path, valid_fraction: float, test_fraction: float) -> None:
    if not source.is_dir():
        raise LowbitError(f"{source} is not a folder")
    if min(valid_fraction, test_fraction) <= 0 or valid_fraction + test_fraction >= 1:
        raise LowbitError(
            "the fractions for valid and test must be positive and leave something to train on, "
            f"not {valid_fraction} and {test_fraction}"
        )


def _sources(source: Path, out: Path) -> list[PurePath]:
    """Audio files relative to `source`, without those that we wrote."""
    ours = out.resolve()
    found = [path for path in find_audio(source) if not path.resolve().is_relative_to(ours)]
    if not found:
        raise LowbitError(f"no audio in {source} but what was made in {out}")
    return [path.relative_to(source) for path in found]


def find_audio(source: Path) -> list[Path]:
    """The audio files under a folder, sorted, without hidden ones.

    Raises:
        LowbitError: there is none, or no such folder.
    """
    if not source.is_dir():
        raise LowbitError(f"{source} is not a folder")
    found = sorted(
        path
        for path in source.rglob("*")
        if path.suffix[1:].lower() in _EXTENSIONS
        and not path.name.startswith(".")
        and path.is_file()
    )
    if not found:
        raise LowbitError(f"no audio in {source}: looked for {', '.join(sorted(_EXTENSIONS))}")
    return found


def _convert_all(paths: list[PurePath], convert: Callable[[PurePath], _Result]) -> list[_Result]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(convert, paths), "files", len(paths), **tqdm_options()))


def _convert(source: Path, path: PurePath, out: Path) -> _Result:
    # The extension stays in the name: a folder may hold both talk.wav and talk.mp3.
    target = PurePath("audio", path.parent, f"{path.stem}_{path.suffix[1:]}")
    if finished := _finished(out, target):
        return _Result(path, finished, reused=True)
    try:
        if set("\t\n\r") & set(str(path)):
            raise UnusableAudio(path, "its name would break the lines of a manifest")
        samples = convert_audio(source / path)
        if len(samples) < MIN_SECONDS * SAMPLE_RATE:
            seconds = len(samples) / SAMPLE_RATE
            raise UnusableAudio(path, f"{seconds:.2f} s are less than {MIN_SECONDS} s")
        return _Result(path, _write_pieces(out, target, samples))
    except UnusableAudio as error:
        return _Result(path, [], problem=error.reason)


def _finished(out: Path, target: PurePath) -> list[tuple[str, int]]:
    """Pieces of an earlier run: the first piece is written last, so it vouches for the rest."""
    whole, first = (out / f"{target}{end}.flac" for end in ("", "-000"))
    if whole.exists():
        paths = [whole]
    elif first.exists():
        paths = sorted(path for path in first.parent.iterdir() if _is_piece(path, target))
    else:
        return []
    return [(path.relative_to(out).as_posix(), audio_info(path).frames) for path in paths]


def _is_piece(path: Path, target: PurePath) -> bool:
    stem, _, number = path.stem.rpartition("-")
    return path.suffix == ".flac" and stem == target.name and number.isdecimal()


def _write_pieces(out: Path, target: PurePath, samples: np.ndarray) -> list[tuple[str, int]]:
    """Writes equal pieces, from the last to the first."""
    count = ceil(len(samples) / (MAX_SECONDS * SAMPLE_RATE))
    pcm = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
    pieces = []
    for i, piece in reversed(list(enumerate(np.array_split(pcm, count)))):
        if piece.min() == piece.max():
            continue
        name = PurePath(f"{target}-{i:03d}.flac" if count > 1 else f"{target}.flac")
        (out / name.parent).mkdir(parents=True, exist_ok=True)
        with atomic_write(out / name, "wb") as file:
            soundfile.write(file, piece, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        pieces.append((name.as_posix(), len(piece)))
    if not pieces:
        raise UnusableAudio(target, "silent at a resolution of 16 bits")
    return pieces[::-1]


def _group(results: list[_Result]) -> tuple[dict[str, list[_Result]], bool]:
    """What must stay together, and whether that is folders rather than single files.

    Takes the outermost level with enough folders: in `speaker/chapter/file` that is the speaker.
    """
    deepest = max(len(result.source.parts) for result in results) - 1
    for depth in range(1, deepest + 1):
        folders = _collect(results, lambda r, depth=depth: "/".join(r.source.parts[:-1][:depth]))
        if len(folders) >= _LEAST_FOLDERS:
            return folders, True
    return _collect(results, lambda result: result.source.as_posix()), False


def _collect(results: list[_Result], key: Callable[[_Result], str]) -> dict[str, list[_Result]]:
    groups = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return groups


def _split_groups(
    groups: dict[str, list[_Result]], fractions: dict[str, float], seed: int
) -> dict[str, list[_Result]]:
    """Fills test, valid and train in turn with groups, each up to its share of the samples."""
    if len(groups) < len(_SPLITS):
        raise LowbitError(
            f"train, valid and test need three usable files or more, found {len(groups)}"
        )
    total = sum(map(_samples, groups.values()))
    waiting = [groups[name] for name in sorted(groups, key=lambda name: _draw(name, seed))]
    split_members = {}
    for left, split in zip((2, 1, 0), _SPLITS, strict=True):
        members = list(waiting.pop(0))
        # Each split gets a group, however small its share; the later ones must find one too.
        while len(waiting) > left and _samples(members) < fractions[split] * total:
            members += waiting.pop(0)
        split_members[split] = members
    return split_members


def _texts(source: Path, results: list[_Result]) -> dict[str, str]:
    """What is said in the files that were written, by their names, as far as it is known."""
    texts = {}
    for result in results:
        path = (source / result.source).with_suffix(".txt")
        if len(result.pieces) == 1 and path.is_file():
            texts[result.pieces[0][0]] = " ".join(" ".join(read_lines(path)).split())
    return texts


def _samples(results: list[_Result]) -> int:
    return sum(result.samples for result in results)


def _draw(name: str, seed: int) -> bytes:
    """A random order that stays as it is when files are added, unlike that of a shuffle."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
