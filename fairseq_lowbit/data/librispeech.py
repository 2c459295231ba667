"""LibriSpeech: from the published archives, or folders unpacked before, to fairseq's manifests.

A *subset* is what LibriSpeech publishes in one archive, such as ``train-clean-100``; a *split* is
what training reads, ``train``, ``valid`` or ``test``, and joins subsets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fairseq_lowbit.data.archives import check_md5, check_space, unpacked
from fairseq_lowbit.data.audio import SAMPLE_RATE, UnusableAudio, audio_info
from fairseq_lowbit.data.manifest import write_manifest
from fairseq_lowbit.data.progress import tqdm_options
from fairseq_lowbit.data.transcripts import write_transcripts
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import writing

TOP = "LibriSpeech"
SPLITS = {
    "train": ("train-clean-100", "train-clean-360", "train-other-500"),
    "valid": ("dev-clean", "dev-other"),
    "test": ("test-clean", "test-other"),
}
# Utterances of the published subsets, to tell a part of one from the whole.
PUBLISHED = {
    "train-clean-100": 28_539,
    "train-clean-360": 104_014,
    "train-other-500": 148_688,
    "dev-clean": 2_703,
    "dev-other": 2_864,
    "test-clean": 2_620,
    "test-other": 2_939,
}
_HEADER_THREADS = 16


@dataclass(frozen=True)
class Subset:
    """An unpacked subset: its folder, the recordings in it, in order, and what is said in them, by
    the stem of the recording."""

    name: str
    folder: Path
    recordings: tuple[Path, ...]
    words: Mapping[str, str]


def unpack_subsets(source: Path, out: Path, names: Sequence[str]) -> list[Subset]:
    """Checks and unpacks what is needed of ``source`` into ``out/LibriSpeech``.

    A subset that is unpacked already, in ``out`` or in ``source``, is taken as it is. Archives are
    compared with an ``md5sum.txt`` beside them. An interrupted call is taken up where it was: a
    subset is there whole or not at all.

    Args:
        source: holds ``<subset>.tar.gz``, ``LibriSpeech/<subset>/`` or ``<subset>/``.

    Raises:
        LowbitError: a missing subset, a damaged archive, too little room on the disk, a subset
            without recordings or without one that its transcripts name.
    """
    found = {name: _find(source, out, name) for name in names}
    archives = {name: path for name, path in found.items() if path.is_file()}
    if archives:
        with writing(out):
            (out / TOP).mkdir(parents=True, exist_ok=True)
        check_space(archives.values(), out)
        for archive in archives.values():
            check_md5(archive)
    for name, archive in archives.items():
        found[name] = _unpack(archive, out / TOP / name)
    return [Subset(name, folder, *_recordings(folder)) for name, folder in found.items()]


def _find(source: Path, out: Path, name: str) -> Path:
    """The folder of a subset, else its archive."""
    places = [out / TOP / name, source / TOP / name, source / name]
    archive = source / f"{name}.tar.gz"
    for folder in places:
        if folder.is_dir():
            return folder
    if archive.is_file():
        return archive
    if not source.is_dir():
        raise LowbitError(f"there is no folder {source}: name the one with LibriSpeech's archives")
    there = ", ".join(sorted(path.name for path in source.iterdir())[:10]) or "nothing"
    raise LowbitError(
        f"no {name}: looked for {archive}, {' and '.join(map(str, places[1:]))}; {source} holds "
        f"{there}. Put it there, or leave it out (--train, --valid, --test)"
    )


def _unpack(archive: Path, folder: Path) -> Path:
    with unpacked(archive, folder.with_name(f".{folder.name}.unpacking")) as top:
        content = top / TOP
        if not (content / folder.name).is_dir():
            raise LowbitError(f"archive {archive} holds no folder {TOP}/{folder.name}")
        with writing(folder):
            for notes in content.glob("*.TXT"):  # SPEAKERS.TXT and the like, in every archive
                os.replace(notes, folder.with_name(notes.name))
            os.rename(content / folder.name, folder)
    return folder


def _recordings(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The recordings, and what is said in them by their stems."""
    recordings = sorted(folder.glob("*/*/*.flac"))
    if not recordings:
        raise LowbitError(f"{folder} holds no recordings <speaker>/<chapter>/*.flac: unpack again")
    present, words = {path.stem for path in recordings}, {}
    for transcript in sorted(folder.glob("*/*/*.trans.txt")):
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, words[name] = line.partition(" ")
            if name not in present:
                raise LowbitError(
                    f"{transcript} has the words of {name}, but there is no {name}.flac beside it: "
                    f"{folder} is not whole, so remove it and unpack again"
                )
    return tuple(recordings), words


def check_splits(splits: Mapping[str, Sequence[str]]) -> None:
    """Raises LowbitError for a subset that is named twice and for no training data."""
    names = [name for members in splits.values() for name in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LowbitError(f"{twice[0]} is named twice: train, valid and test share no subset")
    if not splits["train"]:
        raise LowbitError("--train names no subset: give one or more, for example train-clean-100")


def write_manifests(
    subsets: Sequence[Subset], splits: Mapping[str, Sequence[str]], out: Path
) -> dict[str, int]:
    """Writes ``out/<split>.tsv`` for every split that has subsets, and the words of its files,
    ``out/<split>.wrd``; audio stays where it is.

    Returns:
        samples of each subset.

    Raises:
        LowbitError: recordings that cannot be read or are not 16 kHz mono; a full disk.
    """
    by_name = {subset.name: subset for subset in subsets}
    root = Path(os.path.commonpath([subset.folder.resolve().parent for subset in subsets]))
    samples = {}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for split, members in splits.items():
        items: list[tuple[str, int]] = []
        words: dict[str, str] = {}
        for name in members:
            subset = by_name[name]
            sizes = _sizes(subset)
            samples[name] = sum(sizes)
            names = _names_below(root, subset)
            items += zip(names, sizes, strict=True)
            stems = ((name, path.stem) for name, path in zip(names, subset.recordings, strict=True))
            words |= {name: subset.words[stem] for name, stem in stems if stem in subset.words}
        if items:
            manifest = out / f"{split}.tsv"
            write_manifest(manifest, root, items)
            write_transcripts(manifest, [name for name, _ in items], words)
    return samples


def _names_below(root: Path, subset: Subset) -> list[str]:
    folder = subset.folder.resolve().relative_to(root)
    return [(folder / path.relative_to(subset.folder)).as_posix() for path in subset.recordings]


def _sizes(subset: Subset) -> list[int]:
    """Samples of each recording, from its header."""
    total = len(subset.recordings)
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        # Threads wait for the disk, which may be on the network, and not for each other.
        found = pool.map(_samples_or_problem, subset.recordings)
        sizes = list(tqdm(found, subset.name, total, **tqdm_options()))
    problems = [entry for entry in sizes if isinstance(entry, UnusableAudio)]
    if problems:
        raise LowbitError(
            f"{len(problems)} of {total} recordings of {subset.name} are unusable, first "
            f"{problems[0]}; unpack it again"
        )
    return sizes


def _samples_or_problem(path: Path) -> int | UnusableAudio:
    try:
        info = audio_info(path)
    except UnusableAudio as error:
        return error
    if info.samplerate != SAMPLE_RATE or info.channels != 1:
        return UnusableAudio(
            path, f"{info.samplerate} Hz, {info.channels} channels: not 16 kHz mono"
        )
    return info.frames or UnusableAudio(path, "empty")
