"""A corpus of synthetic English in the layout of LibriSpeech, to run its recipe in minutes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fairseq_lowbit.data.archives import MD5_FILE
from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.data.librispeech import SPLITS, TOP
from fairseq_lowbit.data.synthetic.speech import (
    HELD_OUT_SHARE,
    VOICES,
    Part,
    record_part,
    sentence,
    sentence_numbers,
    write_speech,
)
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write

_CHAPTERS = 2  # of every speaker


def synthesize_librispeech(
    out: str | Path, *, minutes: float = 24, seed: int = 0
) -> dict[str, float]:
    """Writes all seven subsets under ``out/LibriSpeech``, with at least ``minutes`` of training
    speech: ``<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac``, a transcript for
    each chapter, and ``SPEAKERS.TXT``. Equal arguments give equal files.

    Returns:
        minutes of each subset.

    Raises:
        LowbitError: without eSpeak NG, or minutes that are not positive.
    """
    if minutes <= 0:
        raise LowbitError(f"minutes must be positive, not {minutes}")
    top = Path(out, TOP)
    parts = _plan(minutes, seed)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        spoken = list(pool.map(lambda entry: _speak(top, *entry), parts))
    _write_speakers(top / "SPEAKERS.TXT", parts, spoken)
    written: dict[str, float] = {}
    for (subset, _, _), seconds in zip(parts, spoken, strict=True):
        written[subset] = written.get(subset, 0) + seconds / 60
    return written


def archive_subsets(out: str | Path) -> list[Path]:
    """Replaces the subsets under ``out/LibriSpeech`` by archives in ``out`` as they are published,
    each with ``SPEAKERS.TXT``, and writes their ``md5sum.txt``."""
    top = Path(out, TOP)
    archives = []
    for folder in sorted(path for path in top.iterdir() if path.is_dir()):
        archive = Path(out, f"{folder.name}.tar.gz")
        with tarfile.open(archive, "w:gz") as tar:
            for path in (top / "SPEAKERS.TXT", folder):
                tar.add(path, f"{TOP}/{path.name}")
        archives.append(archive)
    with atomic_write(Path(out, MD5_FILE)) as file:
        for archive in archives:
            digest = hashlib.md5(archive.read_bytes(), usedforsecurity=False)
            file.write(f"{digest.hexdigest()}  {archive.name}\n")
    shutil.rmtree(top)
    return archives


def _plan(minutes: float, seed: int) -> list[tuple[str, int, Part]]:
    """Subset, number and sentences of each speaker."""
    numbers = sentence_numbers(minutes, seed)
    speakers = sum(map(len, VOICES.values()))
    plan = []
    for split, voices in VOICES.items():
        subsets = SPLITS[split]
        seconds = 60 * minutes * (1 if split == "train" else HELD_OUT_SHARE) / len(voices)
        for i, voice in enumerate(voices):
            position = len(plan)
            sentences = [sentence(int(number)) for number in numbers[position::speakers]]
            part = Part(voice, (seed, position), [], sentences, seconds)
            plan.append((subsets[i % len(subsets)], 100 + position, part))
    return plan


def _speak(top: Path, subset: str, speaker: int, part: Part) -> float:
    """Writes what one speaker says, the sentences in turn into each chapter; returns seconds."""
    transcripts: list[list[str]] = [[] for _ in range(_CHAPTERS)]
    chapters = [top / subset / str(speaker) / str(1000 * speaker + c) for c in range(_CHAPTERS)]
    samples = 0
    for chapter in chapters:
        chapter.mkdir(parents=True, exist_ok=True)
    for i, (_, text, speech) in enumerate(record_part(part)):
        lines, chapter = transcripts[i % _CHAPTERS], chapters[i % _CHAPTERS]
        name = f"{speaker}-{chapter.name}-{len(lines):04d}"
        write_speech(chapter / f"{name}.flac", speech)
        lines.append(f"{name} {text.upper()}\n")
        samples += len(speech)
    for chapter, lines in zip(chapters, transcripts, strict=True):
        with atomic_write(chapter / f"{speaker}-{chapter.name}.trans.txt") as file:
            file.writelines(lines)
    return samples / SAMPLE_RATE


def _write_speakers(path: Path, parts: list[tuple[str, int, Part]], seconds: list[float]) -> None:
    """eSpeak's variants do not all tell their sex, so the column has M for every speaker."""
    with atomic_write(path) as file:
        file.write(";ID  |SEX| SUBSET           |MINUTES| NAME\n")
        for (subset, speaker, part), spoken in zip(parts, seconds, strict=True):
            file.write(f"{speaker:<5}| M | {subset:<17}| {spoken / 60:.2f}  | {part.voice.name}\n")
