"""The labels of a part of a split: written once, whole, with a stamp that tells what of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairseq_lowbit.data.audio import UnusableAudio
from fairseq_lowbit.data.clusters import Clusters
from fairseq_lowbit.files import atomic_write


@dataclass(frozen=True)
class Shard:
    """One of ``count`` equal runs of lines of a split; ``number`` counts from 1."""

    split: str
    number: int
    count: int

    def lines(self, total: int) -> range:
        """Its lines of the ``total`` of the split."""
        first, end = (total * edge // self.count for edge in (self.number - 1, self.number))
        return range(first, end)

    def labels(self, folder: Path) -> Path:
        """Its label file in the folder of the shards; the stamp is beside it."""
        return folder / f"{self.split}.{self.number}-of-{self.count}.labels"

    def stamp(self, folder: Path) -> Path:
        return self.labels(folder).with_suffix(".json")


@dataclass(frozen=True)
class ShardResult:
    """How often each label occurs, and a message for each file whose line was left empty."""

    counts: list[int]
    unusable: list[str]


def shard_settings(shard: Shard, *digests: str) -> str:
    """Digest of all that the labels of a shard follow from.

    Args:
        digests: of the manifest, the k-means model and the features.
    """
    return hashlib.sha256(repr((shard, digests)).encode()).hexdigest()


def write_shard(
    path: Path, found: Iterable[np.ndarray | UnusableAudio], clusters: Clusters, step: int
) -> ShardResult:
    """Writes a line of labels for each file.

    Args:
        found: features of each file, or why there are none.
        step: frames per label.

    Raises:
        LowbitError: a full disk.
    """
    counts = np.zeros(len(clusters.centers), dtype=np.int64)
    unusable = []
    with atomic_write(path) as file:
        for features in found:
            if isinstance(features, UnusableAudio):
                unusable.append(str(features))
                file.write("\n")
                continue
            labels = clusters.assign(features[::step])
            counts += np.bincount(labels, minlength=len(counts))
            file.write(" ".join(map(str, labels)) + "\n")
    return ShardResult(counts.tolist(), unusable)


def finish_shard(shard: Shard, folder: Path, settings: str, result: ShardResult) -> None:
    """Stamps a written shard, which it counts as finished from then on."""
    size = shard.labels(folder).stat().st_size
    with atomic_write(shard.stamp(folder)) as file:
        json.dump({"settings": settings, "bytes": size, **vars(result)}, file)


def read_shard(shard: Shard, folder: Path, settings: str) -> tuple[ShardResult | None, str]:
    """The result of a finished shard; or None and why what is there does not do, an empty text
    where nothing is there."""
    labels, stamp = shard.labels(folder), shard.stamp(folder)
    if not labels.is_file():
        return None, ""
    try:
        made = json.loads(stamp.read_text(encoding="utf-8"))
        result = ShardResult(made["counts"], made["unusable"])
        is_whole = made["bytes"] == labels.stat().st_size
        is_same = made["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        is_whole = is_same = False
    if not is_whole:
        return None, "half-written"
    return (result, "") if is_same else (None, "made with other settings or of other files")
