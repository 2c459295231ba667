"""fairseq manifests: a first line with the root folder, then `relative path<TAB>samples`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_lowbit.data.audio import UnusableAudio, audio_info
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write

_PROBED_FILES = 64


@dataclass
class Manifest:
    """One split: `names[i]` lies under `root` and holds `sizes[i]` samples (int64)."""

    path: Path
    root: Path
    names: list[str]
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def files(self) -> Iterator[Path]:
        """Absolute paths, in the order of the lines."""
        return (self.root / name for name in self.names)

    def digest(self) -> str:
        """Equal for the same files in the same order, wherever their root is."""
        lines = (f"{name}\t{size}\n" for name, size in zip(self.names, self.sizes, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """Reads a manifest; raises LowbitError (with the line) when it is missing or malformed."""
    path = Path(path)
    if not path.is_file():
        raise LowbitError(
            f"no manifest {path}; make one with `fairseq-lowbit prepare SOURCE OUT` from a folder "
            "of audio, or `fairseq-lowbit synthesize OUT` for the demo corpus"
        )
    # Not splitlines: a file name may hold one of the rarer separators of Unicode.
    first, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    root = Path(first.strip())
    if not first.strip() or not lines:
        raise LowbitError(f"{path} is empty: it needs a root folder and at least one file")
    if not root.is_dir():
        raise LowbitError(
            f"{path}:1: the root folder {root} does not exist; if the corpus was moved, "
            "edit this first line"
        )
    entries = [_parse_line(path, number, line) for number, line in enumerate(lines, start=2)]
    names, sizes = zip(*entries, strict=True)
    return Manifest(path, root, list(names), np.array(sizes, dtype=np.int64))


def _parse_line(path: Path, number: int, line: str) -> tuple[str, int]:
    name, tab, size = line.rpartition("\t")
    if not (tab and name and size.strip().isdecimal() and int(size) > 0):
        raise LowbitError(
            f"{path}:{number}: expected `relative path<TAB>number of samples`, found {line!r}"
        )
    return name, int(size)


def write_manifest(path: str | Path, root: str | Path, items: Iterable[tuple[str, int]]) -> None:
    """Writes (relative path, samples) pairs; the file appears complete or not at all."""
    with atomic_write(path) as file:
        file.write(f"{Path(root).resolve()}\n")
        file.writelines(f"{name}\t{size}\n" for name, size in items)


def check_format(manifest: Manifest, sample_rate: int) -> None:
    """Opens the headers of a few evenly spaced files before a run spends hours on them; those that
    cannot be read are left to training, which skips them.

    Raises LowbitError when a file has another rate or several channels.
    """
    count = min(_PROBED_FILES, len(manifest))
    for index in np.linspace(0, len(manifest) - 1, count).round().astype(int):
        name = manifest.names[index]
        try:
            info = audio_info(manifest.root / name)
        except UnusableAudio:
            continue
        if info.samplerate != sample_rate or info.channels != 1:
            raise LowbitError(
                f"{manifest.path}: {name} has {info.samplerate} Hz and {info.channels} channel(s), "
                f"but training needs {sample_rate} Hz mono; `fairseq-lowbit prepare` converts"
            )
